"""Every example runs: over the scripted API here, and on the shared models where llama.cpp is built in."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tea_llm.workflow import run_workflow

from .api_server import ApiServer, Reply, chat, delta, json_reply, sse, stream
from .reciting_models import write_reciting

EXAMPLES = Path(__file__).parents[1] / "examples"

needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("tea_llm._llama") is None, reason="tea_llm is built without llama.cpp"
)


@pytest.fixture
def server(bare_environment: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """A server that the environment names as the API, and no model in sight."""
    with ApiServer() as server:
        monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", server.address)
        monkeypatch.setenv("AZURE_OPENAI_API_KEY", "k")
        monkeypatch.setenv("AZURE_OPENAI_DEPLOYMENT", "served-1")  # so that nobody asks for a list of models
        yield server


def _run(name: str, **how: Any) -> dict[str, Any]:
    return run_workflow(EXAMPLES / f"{name}.yaml", how.pop("input", None), **how)


def _vectors(*vectors: list[float]) -> Reply:
    rows = [{"index": i, "embedding": vector} for i, vector in enumerate(vectors)]
    return json_reply({"model": "emb-1", "data": rows, "usage": {"prompt_tokens": 1}})


def test_story_answers_from_the_api_when_its_model_is_missing(
    server: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    state = _run("story", input={"question": "Why?"})
    assert (state["content"], state["backend"], state["question"]) == ("Hi.", "api", "Why?")
    assert "Falling back to API backend" in caplog.text


def test_fallback_says_why_the_api_answered(server: ApiServer, caplog: pytest.LogCaptureFixture) -> None:
    state = _run("fallback")
    assert (state["answer"], state["answered_by"]) == ("Hi.", "served-1 (api)")
    assert "model" in state["reason"]
    assert state["reason"] != "the local model answered"
    assert "Falling back to API backend" in caplog.text


def test_branches_run_and_one_is_chosen(server: ApiServer) -> None:
    server.replies = [chat("Short."), chat("Longer than that.")]
    state = _run("branches", backend="api")
    assert state["drafts"][state["winner"]] == "Short."
    prompts = sorted(seen.body["messages"][0]["content"] for seen in server.seen)
    assert prompts == ["One sentence about the sea.", "Two lines of verse about the sea."]


def test_branches_that_tie_end_there(server: ApiServer) -> None:
    assert "winner" not in _run("branches", backend="api")


def test_stream_prints_to_stderr(server: ApiServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.replies = [stream(sse(delta("There"), delta(" was", "stop")))]
    state = _run("stream", backend="api")
    assert (state["story"], state["chunks"]) == ("There was", 2)
    assert capsys.readouterr() == ("", "There was\n")


def test_embed_finds_the_nearest_document(server: ApiServer) -> None:
    server.replies = [_vectors([0.0, 1.0], [1.0, 0.0], [0.7, 0.7]), _vectors([0.1, 1.0])]
    state = _run("embed", backend="api")
    assert state["nearest"].startswith("Boil the noodles")
    assert state["scores"][0] == max(state["scores"])


def test_a_function_helps_with_the_answer(server: ApiServer) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "multiply", "arguments": '{"a": 17, "b": 23}'}}
    server.replies = [chat(None, tool_calls=[call], finish_reason="tool_calls"), chat("It is 391.")]
    state = _run("tools", backend="api")
    assert state["answer"] == "It is 391."
    assert server.seen[1].body["messages"][-1]["content"] == "391"


@needs_llama
def test_a_local_model_has_a_function_help(tmp_path: Path) -> None:
    call = ("<tool_call>", '\n{"name": "multiply", ', '"arguments": {"a": 17', ', "b": 23}}\n', "</tool_call>")
    model = write_reciting(tmp_path / "reciting.gguf", {"\n": call, "<|again|>": ("It is 391.",)})
    state = _run("tools", gguf=model, backend="local")
    assert (state["answer"], state["calls"][0]["arguments"]) == ("It is 391.", {"a": 17, "b": 23})


@needs_llama
@pytest.mark.parametrize("name", ["story", "stream", "branches"])
def test_a_local_model_runs_the_examples(name: str, shared_models: Path) -> None:
    workflow = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"))
    workflow.get("settings", {}).get("llm", {}).pop("n_threads", None)  # more than a busy machine has are slow
    assert run_workflow(workflow, gguf=shared_models / "stories260K-f32.gguf", backend="local")


@needs_llama
def test_a_local_embedder_finds_the_nearest_document(shared_models: Path) -> None:
    embedder = next(iter(sorted(shared_models.glob("all-MiniLM-L6-v2*.gguf"))), None)
    if embedder is None:
        pytest.skip("no all-MiniLM-L6-v2 among the shared models")
    assert _run("embed", gguf=embedder, backend="local")["nearest"].startswith("Boil the noodles")


@needs_llama
def test_what_is_extracted_follows_the_schema(bare_environment: None) -> None:
    person = _run("extract")["person"]
    assert person["name"]
    assert 0 <= person["age"] <= 120
