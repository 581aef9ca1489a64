"""The `tea-llm` command as a script meets it: another process, its exit code, its stdout and its stderr."""

from __future__ import annotations

import importlib.util
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .api_server import ApiServer, Reply, delta, failure, json_reply, sse, stream

SAID = stream(sse(delta("Hel"), delta("lo.", "stop")))
ECHO = "nodes:\n  - name: a\n    run: |\n      return {'n': state.get('n', 0) + 1}\n"


class Command:
    """Runs `python -m tea_llm` in an environment of its own."""

    def __init__(self, home: Path, server: ApiServer) -> None:
        kept = ("PATH", "LANG", "PYTHONPATH", "LD_LIBRARY_PATH")
        self.home = home
        self.env = {name: os.environ[name] for name in kept if name in os.environ}
        self.env |= {"HOME": str(home), "SKBUILD_EDITABLE_VERBOSE": "0", "AZURE_OPENAI_ENDPOINT": server.address}
        self.env |= {"AZURE_OPENAI_API_KEY": "secret-0123", "AZURE_OPENAI_DEPLOYMENT": "d"}

    def __call__(self, *args: str, given: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.line(*args), input=given, env=self.env, cwd=self.home, capture_output=True, text=True, timeout=60
        )

    def line(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "tea_llm", *args]

    def file(self, name: str, text: str) -> str:
        (self.home / name).write_text(text, encoding="utf-8")
        return name

    def state(self, *args: str, given: str = "") -> Any:
        """The JSON on stdout of a run that went well."""
        done = self(*args, given=given)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as server:
        server.replies = [SAID]
        yield server


@pytest.fixture
def tea(tmp_path: Path, server: ApiServer) -> Command:
    return Command(tmp_path, server)


# --- run -------------------------------------------------------------------------------------------------------------


def test_run_prints_the_final_state_and_nothing_else(tea: Command) -> None:
    done = tea("run", tea.file("w.yaml", ECHO + "      \n"), "--input", '{"n": 4, "é": "ü"}')
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"n": 5, "é": "ü"}


def test_input_may_come_from_a_file_or_from_stdin(tea: Command) -> None:
    workflow = tea.file("w.yaml", ECHO)
    tea.file("in.json", '{"n": 1}')
    assert tea.state("run", workflow, "--input", "@in.json") == {"n": 2}
    assert tea.state("run", workflow, "--input", "@-", given='{"n": 2}') == {"n": 3}


def test_streamed_text_goes_to_stderr(tea: Command) -> None:
    node = "nodes:\n  - {name: a, uses: llm.stream, with: {prompt: x, print: true}, output: {t: content}}\n"
    done = tea("run", tea.file("w.yaml", node))
    assert json.loads(done.stdout) == {"t": "Hello."}
    assert done.stderr == "Hello.\n"


def test_what_a_node_prints_goes_to_stderr(tea: Command) -> None:
    done = tea("run", tea.file("w.yaml", "nodes:\n  - name: a\n    run: |\n      print('hi')\n      return {'x': 1}\n"))
    assert json.loads(done.stdout) == {"x": 1}
    assert done.stderr == "hi\n"


def test_the_command_line_chooses_the_backend_over_the_file(tea: Command) -> None:
    settings = "settings: {llm: {backend: local, fallback: error}}\n"
    node = settings + "nodes:\n  - {name: a, uses: llm.stream, with: {prompt: x}}\n"
    workflow = tea.file("w.yaml", node)
    assert tea.state("run", workflow, "--backend", "api")["content"] == "Hello."
    done = tea("run", workflow)
    assert (done.returncode, done.stdout) == (1, "")
    assert "No local model found" in done.stderr


def test_a_fallback_is_in_the_log_and_in_the_result(tea: Command) -> None:
    node = "settings: {llm: {backend: local}}\nnodes:\n  - {name: a, uses: llm.stream, with: {prompt: x}}\n"
    done = tea("run", tea.file("w.yaml", node))
    assert "Falling back to API backend" in done.stderr
    assert "No local model found" in json.loads(done.stdout)["fallback_reason"]


@pytest.mark.parametrize(
    ("workflow", "given", "code", "words"),
    [
        ("nodes:\n  - {name: a, run: '1 / 0'}\n", "{}", 1, "Node 'a' (w.yaml:"),
        ("nodes:\n  - {name: a, run: 'return {\"x\": float(\"nan\")}'}\n", "{}", 1, "JSON"),
        ("nodes:\n  - {name: a, usess: llm.call}\n", "{}", 2, "w.yaml:2: unknown key 'usess'"),
        ("settings: {llm: {modle: x}}\nnodes:\n  - {name: a}\n", "{}", 2, "'model'"),
        ("nodes: [\n", "{}", 2, "w.yaml:"),
        (ECHO, "{no json", 2, "--input is no JSON"),
        (ECHO, "[1]", 2, "give a JSON object"),
        (ECHO, "@missing.json", 2, "missing.json"),
        (None, "{}", 2, "Can't read the workflow w.yaml"),
    ],
)
def test_the_exit_code_tells_a_failed_node_from_a_bad_file(
    tea: Command, workflow: str | None, given: str, code: int, words: str
) -> None:
    if workflow is not None:
        tea.file("w.yaml", workflow)
    done = tea("run", "w.yaml", "--input", given)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


# --- call and chat ---------------------------------------------------------------------------------------------------


def test_call_prints_the_text(tea: Command, server: ApiServer) -> None:
    done = tea("call", "--backend", "api", "--temperature", "0", "--max-tokens", "5", "--stop", "x", "Say hello")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hello.\n", "")
    body = server.seen[0].body
    assert (body["temperature"], body["max_tokens"], body["stop"]) == (0, 5, ["x"])


def test_call_prints_the_whole_result_as_json_where_asked(tea: Command) -> None:
    result = tea.state("call", "--backend", "api", "--json", "-", given="Say hello")
    assert (result["content"], result["backend"], result["model"]) == ("Hello.", "api", "served-1")


def test_a_failed_call_is_code_1_and_says_why_once(tea: Command, server: ApiServer) -> None:
    server.replies = [failure(401, "bad key")]
    done = tea("call", "--backend", "api", "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("bad key") == 1


def test_chat_answers_one_message(tea: Command, server: ApiServer) -> None:
    done = tea("chat", "--backend", "api", "--system", "Be brief.", "Hi")
    assert done.stdout == "Hello.\n"
    assert [m["role"] for m in server.seen[0].body["messages"]] == ["system", "user"]


def test_chat_without_a_message_talks_until_end_of_input_and_remembers(tea: Command, server: ApiServer) -> None:
    done = tea("chat", "--backend", "api", given="One\n\nTwo\n")
    assert (done.returncode, done.stdout) == (0, "Hello.\nHello.\n")
    contents = [m["content"] for m in server.seen[1].body["messages"]]
    assert contents == ["One", "Hello.", "Two"]


# --- embed -----------------------------------------------------------------------------------------------------------


def _vectors(n: int, model: str = "e") -> Reply:
    rows = [{"index": i, "embedding": [1.0, float(i)]} for i in range(n)]
    return json_reply({"model": model, "data": rows, "usage": {"prompt_tokens": n}})


def test_embed_prints_the_vector_of_a_text(tea: Command, server: ApiServer) -> None:
    server.replies = [_vectors(1)]
    result = tea.state("embed", "--backend", "api", "--no-normalize", "a text")
    assert result["embedding"] == [1.0, 0.0]
    assert "embeddings" not in result


def test_embed_takes_a_file_in_batches_and_gives_one_answer(tea: Command, server: ApiServer) -> None:
    server.replies = [_vectors(32), _vectors(3)]
    lines = "".join(f"line {i}\n" for i in range(35))
    result = tea.state("embed", "--backend", "api", "--file", tea.file("t.txt", lines))
    assert len(result["embeddings"]) == 35
    assert result["tokens_used"] == 35
    assert server.seen[1].body["input"] == ["line 32", "line 33", "line 34"]


def test_vectors_of_two_models_are_never_put_together(tea: Command, server: ApiServer) -> None:
    server.replies = [_vectors(32), _vectors(3, "other")]
    done = tea("embed", "--backend", "api", "--file", "-", given="x\n" * 35)
    assert (done.returncode, done.stdout) == (1, "")
    assert "'other'" in done.stderr


def test_nothing_to_embed_is_wrong_usage(tea: Command) -> None:
    assert tea("embed").returncode == 2
    assert tea("embed", "--file", "missing.txt").returncode == 2


# --- info and usage --------------------------------------------------------------------------------------------------


def test_info_says_what_would_be_used(tea: Command, server: ApiServer) -> None:
    info = tea.state("info")
    built = importlib.util.find_spec("tea_llm._llama") is not None
    assert (info["extension"]["built"], info["model"], info["backend"]) == (built, None, "api")
    assert info["api"] == {"provider": "azure", "address": server.address, "missing": None}


def test_info_says_which_model_and_why(tea: Command, shared_models: Path) -> None:
    path = str(shared_models / "stories260K-f32.gguf")
    tea.env["TEA_MODEL_PATH"] = path
    model = tea.state("info")["model"]
    assert (model["path"], model["found_by"], model["n_ctx"]) == (path, "TEA_MODEL_PATH", 512)
    assert tea.state("info", "--gguf", path)["model"]["found_by"] == "--gguf"


@pytest.mark.parametrize("args", [[], ["walk"], ["run"], ["call"], ["run", "x", "--backend", "cloud"], ["info", "--x"]])
def test_wrong_usage_is_code_2(tea: Command, args: list[str]) -> None:
    done = tea(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage:" in done.stderr


@pytest.mark.parametrize("command", [[], ["run"], ["call"], ["chat"], ["embed"], ["info"]])
def test_help_explains_the_exit_codes(tea: Command, command: list[str]) -> None:
    done = tea(*command, "--help")
    assert done.returncode == 0
    assert "exit codes:" in done.stdout
    assert all(code in done.stdout for code in ("0 ", "1 ", "2 ", "130", "141"))


def test_version_is_printed(tea: Command) -> None:
    assert tea("--version").stdout.startswith("tea-llm ")


def test_verbose_logs_to_stderr(tea: Command) -> None:
    done = tea("call", "--backend", "api", "-v", "x")
    assert done.stdout == "Hello.\n"
    assert "INFO: LLM backend: API" in done.stderr


# --- signals, pipes and terminals ------------------------------------------------------------------------------------


def test_ctrl_c_is_code_130(tea: Command, server: ApiServer) -> None:
    server.replies = [Reply(wait_s=30)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(tea.line("call", "--backend", "api", "x"), env=tea.env, **pipes) as process:
        deadline = time.monotonic() + 20
        while not server.seen and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert err == "interrupted\n"


def test_a_reader_that_leaves_is_code_141(tea: Command) -> None:
    workflow = tea.file("w.yaml", "nodes:\n  - name: a\n    run: \"return {'x': 'y' * 1000000}\"\n")
    with subprocess.Popen(
        tea.line("run", workflow), env=tea.env, cwd=tea.home, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=20) == 141


def _on_a_terminal(tea: Command, *args: str, stderr: bool = False) -> tuple[str, str]:
    """What a command writes to a terminal, and what to the other stream, which is a pipe."""
    mine, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    streams: dict[str, Any] = {"stdout": theirs, "stderr": subprocess.PIPE}
    if stderr:
        streams = {"stdout": subprocess.PIPE, "stderr": theirs}
    with subprocess.Popen(tea.line(*args), env=tea.env, cwd=tea.home, stdin=subprocess.DEVNULL, **streams) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(mine, 4096)
            except OSError:  # Linux says EIO when the other side is gone
                break
            if not piece:
                break
            shown += piece
        pipe = process.stdout if stderr else process.stderr
        assert pipe is not None
        other = pipe.read()
        assert process.wait(timeout=20) == 0
    os.close(mine)
    return shown.decode().replace("\r\n", "\n"), other.decode()


def test_text_is_streamed_to_a_terminal(tea: Command, server: ApiServer) -> None:
    server.replies = [stream(sse(delta("Hel"), done=False), sse(delta("lo.", "stop")), pause_s=0.1)]
    assert _on_a_terminal(tea, "call", "--backend", "api", "x") == ("Hello.\n", "")


def test_a_batch_shows_its_progress_on_a_terminal_only(tea: Command, server: ApiServer) -> None:
    server.replies = [_vectors(32)]
    texts = tea.file("t.txt", "x\n" * 64)
    shown, out = _on_a_terminal(tea, "embed", "--backend", "api", "--file", texts, stderr=True)
    assert "batch" in shown
    assert len(json.loads(out)["embeddings"]) == 64
    assert tea("embed", "--backend", "api", "--file", texts).stderr == ""


# --- on a model ------------------------------------------------------------------------------------------------------


def test_call_continues_the_reference_story(tea: Command, shared_models: Path) -> None:
    if importlib.util.find_spec("tea_llm._llama") is None:
        pytest.skip("tea_llm is built without llama.cpp")
    model = str(shared_models / "stories260K-f32.gguf")
    done = tea("call", "Once upon a time", "--gguf", model, "--temperature", "0", "--max-tokens", "40")
    reference = (shared_models / "stories260K.reference.txt").read_text(encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert reference.startswith("Once upon a time" + done.stdout.removesuffix("\n"))
