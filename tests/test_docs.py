"""Every example on a page runs, every link leads somewhere, every acceptance criterion has its test.

A block that can't run says why on the line above it: `<!-- not run: … -->`.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tea_llm import register_actions, run_workflow
from tea_llm.models import packaged_model
from tea_llm.settings import LlmSettings
from tea_llm.workflow_file import load_workflow

from .api_server import ApiServer, Reply, chat, delta, json_reply, sse, stream

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")])
ADDRESS = "http://127.0.0.1:8080/v1"  # what the pages write where a server of your own is meant

_BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_EXCUSE = re.compile(r"<!-- not run: (.+) -->\s*\Z")


class Block(NamedTuple):
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    excuse: str | None


def _blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _BLOCK.finditer(text):
            indent, language, body = match.groups()
            lines = [line.removeprefix(indent) for line in body.splitlines()]
            excuse = _EXCUSE.search(text, 0, match.start())
            before = text.count("\n", 0, match.start())
            yield Block(page, before + 1, language, "\n".join(lines) + "\n", excuse and excuse[1])


BLOCKS = list(_blocks())


def _named(language: str) -> list[Any]:
    return [pytest.param(block, id=f"{block.page.name}:{block.line}") for block in BLOCKS if block.language == language]


class AnyApi(ApiServer):
    """Answers each kind of request that the pages make."""

    def next_reply(self) -> Reply:
        """One that fits the last request."""
        path, body = self.seen[-1].path, self.seen[-1].body
        if path.endswith("/models"):
            return json_reply({"data": [{"id": "served-1"}]})
        if path.endswith("/embeddings"):
            rows = [{"index": i, "embedding": [1.0, 0.0]} for i in range(len(body["input"]))]
            return json_reply({"model": "e", "data": rows, "usage": {"prompt_tokens": 1, "total_tokens": 1}})
        return stream(sse(delta("Hi.", "stop"))) if body.get("stream") else chat()


@pytest.fixture
def server(bare_environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """A folder with the files that the pages name, and a server that the environment names as the API."""
    (tmp_path / "model.gguf").symlink_to(packaged_model())
    for block in BLOCKS:
        if block.language == "yaml" and (title := re.match(r"name: (\w+)\n", block.text)):
            (tmp_path / f"{title[1]}.yaml").write_text(block.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_API_KEY", "k")
    with AnyApi() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base)
        monkeypatch.setenv("OPENAI_API_KEY", "k")
        yield server


def _excused(block: Block) -> None:
    if block.excuse:
        pytest.skip(block.excuse)


@pytest.mark.parametrize("block", _named("python"))
def test_a_python_example_runs_and_prints_what_it_says(
    block: Block, server: ApiServer, capfd: pytest.CaptureFixture[str]
) -> None:
    """A comment behind or below a `print` is what is printed."""
    _excused(block)
    if "LocalLlmBackend" in block.text and importlib.util.find_spec("tea_llm._llama") is None:
        pytest.skip("tea_llm is built without llama.cpp")
    engine = types.SimpleNamespace(actions_registry={})  # what a page calls the engine it is plugged into
    code = compile(block.text.replace(ADDRESS, server.base), str(block.page), "exec")
    exec(code, {"__name__": "__main__", "engine": engine})
    printed = capfd.readouterr().out.splitlines()
    for said in re.findall(r"^ *print\(.*\)(?:  |\n *)# (.+)$", block.text, re.MULTILINE):
        assert said in printed


@pytest.mark.parametrize("block", _named("yaml"))
def test_a_yaml_example_is_right(block: Block, server: ApiServer) -> None:
    """A whole workflow runs; a part of one passes the checks that come before a run."""
    _excused(block)
    written = yaml.safe_load(block.text)
    if "nodes" in written:
        assert run_workflow(written)
        return
    registry: dict[str, Any] = {}
    register_actions(registry)
    workflow = _completed(written)
    load_workflow(workflow, registry.keys())
    LlmSettings.from_mapping(workflow.get("settings", {}).get("llm"))


def _completed(part: Any) -> dict[str, Any]:
    """The workflow around a part: the nodes it speaks of are added."""
    if isinstance(part, list):
        return {"nodes": part}
    if "goto" in part:
        targets = [rule["to"] for rule in part["goto"] if rule["to"] != "__end__"]
        return {"nodes": [{"name": "here", **part}, *({"name": target} for target in targets)]}
    ends = [edge[end] for edge in part.get("edges", ()) for end in ("from", "to") if not edge[end].startswith("__")]
    return {"nodes": [{"name": name} for name in dict.fromkeys(ends)] or [{"name": "n"}], **part}


@pytest.mark.parametrize("block", _named("console"))
def test_a_command_runs(block: Block, server: ApiServer) -> None:
    """Each line of a console block that begins with `$`."""
    _excused(block)
    lines = re.findall(r"^\$ (.+)$", block.text, re.MULTILINE)
    assert lines, "a console block shows commands as `$ command`"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for line in lines:
        done = subprocess.run(
            ["bash", "-c", line], env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr


def test_the_readme_sets_up_with_two_commands() -> None:
    """`.ci/run` runs both as they stand there."""
    commands = [
        subprocess.run(
            [sys.executable, REPOSITORY / "ci" / "readme", number], capture_output=True, text=True, check=True
        ).stdout.strip()
        for number in ("1", "2")
    ]
    assert "pip install ." in commands[0]
    assert commands[0].endswith("tea-llm run examples/hello.yaml")
    assert commands[1] == "ci/test"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    prose = re.sub(r"`[^`\n]+`", "", _BLOCK.sub("", page.read_text(encoding="utf-8")))
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", prose)
    assert [link for link in links if not (page.parent / link).exists()] == []


# --- the acceptance criteria ------------------------------------------------------------------------------------------
ACCEPTANCE = (REPOSITORY / "docs" / "acceptance.md").read_text(encoding="utf-8")
EVIDENCE = re.findall(r"`((?:tests|ci|\.ci)/[\w./-]+)(?:::(\w+))?`", ACCEPTANCE)


@pytest.mark.parametrize("number", range(1, 14))
def test_every_acceptance_criterion_has_its_evidence(number: int) -> None:
    rows = [line for line in ACCEPTANCE.splitlines() if line.startswith(f"| AC-{number} ")]
    assert len(rows) == 1
    assert re.search(r"`(tests/\w+\.py::\w+|\.?ci/\w+)`", rows[0])


@pytest.mark.parametrize(("file", "test"), sorted(set(EVIDENCE)))
def test_the_named_evidence_exists(file: str, test: str) -> None:
    path = REPOSITORY / file
    assert path.is_file()
    if test:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert test in {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
