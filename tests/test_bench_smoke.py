"""The benchmark's programs start anywhere: their peers and programs are looked for only when a race begins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
NOT_PROGRAMS = {"race.py", "adapter.py", "llama_service.py"}
PROGRAMS = sorted(p for p in (*BENCH.glob("*.py"), *BENCH.glob("peers/*.py")) if p.name not in NOT_PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_a_bench_program_explains_itself_without_the_peers(program: Path) -> None:
    """`--help` says how to use it, in an environment that has neither the peers nor the extension."""
    done = subprocess.run([sys.executable, str(program), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: " + program.name)


def test_every_adapter_of_the_race_is_a_program() -> None:
    """A subject whose adapter is missing would only be noticed in the middle of a race."""
    code = "import race; print(*race.ADAPTERS.values())"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCH, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {p.name for p in PROGRAMS if p.parent.name == "peers"}
