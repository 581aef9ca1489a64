"""The model that comes with the package: its file, and how it was examined."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

import tea_llm
from tea_llm.models import get_model_info, read_metadata

MODEL = Path(tea_llm.__file__).parent / "data" / "tea-tiny.gguf"
TOOLS = Path(__file__).parents[1] / "tools" / "tiny_model"


def test_the_packaged_model_is_at_most_one_megabyte():
    """A package that every installation carries stays small."""
    assert MODEL.stat().st_size <= 1_000_000


def test_the_packaged_model_says_what_it_is():
    """Name, licence and author travel in the file, and its own metadata decides how it is used."""
    metadata = read_metadata(MODEL)
    assert metadata is not None
    assert metadata["general.name"] == "tea-tiny"
    assert metadata["general.license"] == "cc0-1.0"
    assert metadata["general.author"]
    assert metadata["tokenizer.ggml.eos_token_id"] == metadata["tokenizer.ggml.eot_token_id"]
    info = get_model_info(MODEL)
    assert info["n_ctx"] == 512
    assert info["chat_format"] == "chatml"


@pytest.fixture
def phrases(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The word lists of the generator; skips where the source tree is not there."""
    if not TOOLS.is_dir():
        pytest.skip(f"no {TOOLS}: the generator is in the source tree only")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return runpy.run_path(str(TOOLS / "phrases.py"))


@pytest.mark.parametrize(
    "kind", ["SYSTEM", "CAPITAL", "COUNTRY", "OPENERS", "CLOSERS", "ASKS", "THINGS", "TELL_ABOUT", "CONTINUE"]
)
def test_training_and_examination_share_no_line(phrases, kind):
    """What is measured was not shown in training."""
    assert not set(phrases[f"{kind}_TRAIN"]) & set(phrases[f"{kind}_HELD_OUT"])
