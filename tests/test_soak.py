"""Ten seconds of bench/soak.py: hundreds ask one model at once and leave as they like, and nobody notices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tea_llm._llama", reason="tea_llm was built without llama.cpp")
from tea_llm.models import packaged_model

SOAK = Path(__file__).resolve().parent.parent / "bench" / "soak.py"


def test_whoever_comes_and_goes_each_text_is_right_nothing_hangs_and_nothing_is_left() -> None:
    """64 threads and 200 tasks; a request that hangs is told after 20 seconds."""
    options = ["--warm-up", "3", "--seconds", "7", "--asks", "40", "--patience", "20"]
    command = [sys.executable, "-W", "error", str(SOAK), "--model", packaged_model(), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    report = json.loads((done.stdout.splitlines() or ["null"])[-1])  # an editable install may build first
    assert (done.returncode, report and report["missed"]) == (0, []), done.stderr + done.stdout
    assert report["distinct"] > 20  # else texts could be mixed up and be right
    assert set(report["ends"]) == {
        "whole", "left", "callback failed", "timeout", "cancelled", "busy", "refused", "vector"
    }  # fmt: skip
