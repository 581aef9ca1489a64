"""The C++ by itself: programs that `-C cmake.define.TEA_LLM_NATIVE_TESTS=ON` or ci/test-native builds."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tea_llm.models import packaged_model

BUILD = Path(__file__).parents[1] / "build"


def said_by(program: str, *arguments: str) -> tuple[int, str]:
    """The exit status and the last line of a program; skips where it was not built."""
    built = sorted(
        [*BUILD.glob(f"*/{program}"), *BUILD.glob(f"native/plain/{program}")], key=lambda p: p.stat().st_mtime
    )
    if not built:
        pytest.skip(f"{program} is not built; run ci/test-native")
    done = subprocess.run([built[-1], *arguments], capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, (done.stdout.splitlines() or [done.stderr])[-1]


def test_attention_is_right_and_the_same_bits_in_any_company() -> None:
    assert said_by("native_attention") == (0, "all right")


def test_a_product_with_four_bit_weights_is_the_one_of_ggml_to_the_last_bit() -> None:
    assert said_by("native_matmul") == (0, "all right")


def test_a_batch_that_many_threads_ask_cancel_and_wake_gives_each_its_own_text() -> None:
    """For races, `ci/test-native --races` runs it under ThreadSanitizer."""
    assert said_by("native_many_callers", packaged_model(), "4") == (0, "all right")
