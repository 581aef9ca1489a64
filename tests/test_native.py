"""The C++ by itself: programs that `-C cmake.define.TEA_LLM_NATIVE_TESTS=ON` builds beside the extension."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def build() -> Path:
    """The directory that the programs were built in; skips where none was."""
    builds = sorted(Path(__file__).parents[1].glob("build/*/native_attention"), key=lambda path: path.stat().st_mtime)
    if not builds:
        pytest.skip("the C++ tests are not built; reinstall with -C cmake.define.TEA_LLM_NATIVE_TESTS=ON")
    return builds[-1].parent


def test_attention_is_right_and_the_same_bits_in_any_company(build: Path) -> None:
    run = subprocess.run([build / "native_attention"], capture_output=True, text=True, timeout=300, check=False)
    assert (run.returncode, run.stdout) == (0, "all right\n")
