"""What several test modules need: the shared models, and a real llama-server on loopback."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .api_server import ApiServer

if TYPE_CHECKING:
    from tea_llm._llama import Model


@pytest.fixture(scope="session", autouse=True)
def _hears_ctrl_c() -> None:
    """What a shell starts in the background ignores SIGINT, and so does every process that it starts in turn."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable that names a model, a provider or a proxy, and an empty home."""
    for name in list(os.environ):
        if name.startswith(("OPENAI_", "AZURE_", "OLLAMA_", "TEA_MODEL", "APPDIR")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def server() -> Iterator[ApiServer]:
    """A scripted API on loopback."""
    with ApiServer() as server:
        yield server


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The directory of small real models; skips where it is missing."""
    shared = Path(os.environ.get("TEA_LLM_SHARED") or Path(__file__).parents[2] / "shared")
    models = shared / "models"
    if not models.is_dir():
        pytest.skip(f"no shared models at {models}; set TEA_LLM_SHARED to the directory that holds models/")
    return models


@pytest.fixture(scope="session")
def llama_server(shared_models: Path) -> Iterator[str]:
    """The base address (…/v1) of llama.cpp's own server, on the small chat model, in a process of its own."""
    with serving(shared_models / "stories260K-chat-q8_0.gguf") as address:
        yield f"{address}/v1"


@contextmanager
def serving(model: Path, n_ctx: int = 512, n_batch: int = 2048, n_parallel: int = 1) -> Iterator[str]:
    """The address of a llama-server on `model`."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed; it starts the llama-server that these tests talk to")
    program = Path(__file__).with_name("llama_server.py")
    command = [sys.executable, program, model, str(n_ctx), str(n_batch), str(n_parallel)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        address = process.stdout.readline().decode().strip()
        assert address.startswith("http"), f"llama-server did not start on {model}"
        yield address
        process.stdin.close()  # its end


@pytest.fixture(scope="session")
def stories(shared_models: Path) -> Model:
    """A model of 260K parameters that tells stories, in F32."""
    return _model(shared_models / "stories260K-f32.gguf")


@pytest.fixture(scope="session")
def quantised(shared_models: Path) -> Model:
    """The same in Q8_0: it rounds what its weights are multiplied with to 8 bits, so that the last bit of a sum changes
    the text soon.
    """
    return _model(shared_models / "stories260K-q8_0.gguf")


@pytest.fixture(scope="session")
def scripted(shared_models: Path) -> Model:
    """Says " quick brown fox …" after "The", and " one two three …" for ever after "count"."""
    return _model(shared_models / "scripted-f16.gguf")


def _model(path: Path) -> Model:
    from tea_llm._llama import Model  # not where tea_llm was built without llama.cpp

    return Model(path)
