"""The benchmark's programs start anywhere: their peers and programs are looked for only when a race begins."""

from __future__ import annotations

import json
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


@pytest.fixture
def endless_model(shared_models: Path, tmp_path: Path) -> Path:
    """The smallest model, so changed that it generates as many tokens as it is asked for."""
    pytest.importorskip("tea_llm._llama", reason="tea_llm was built without llama.cpp")
    source, target = shared_models / "stories260K-f32.gguf", tmp_path / "endless.gguf"
    code = "import sys, pathlib, make_model; make_model.endless_copy(*map(pathlib.Path, sys.argv[1:]), 4096)"
    subprocess.run([sys.executable, "-c", code, source, target], cwd=BENCH, check=True)
    return target


@pytest.mark.parametrize(
    ("program", "sizes"),
    [
        ("concurrency.py", "--parallel 2 3 --prompt-tokens 9 --tokens 4"),
        ("prefix.py", "--parallel 2 --system-tokens 20 --own-tokens 5 --prefix-tokens 40 --tokens 4"),
    ],
)
def test_a_race_of_many_callers_measures_each_of_its_figures(endless_model: Path, program: str, sizes: str) -> None:
    """On the smallest model, without peers: one line of JSON, with a number for each figure. The bars may be missed."""
    options = f"{sizes} --threads 1 --rounds 1 --any-length --only tea_llm".split()
    command = [sys.executable, str(BENCH / program), "--model", str(endless_model), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout)
    assert report["left_out"] == {}
    assert [f["name"] for f in report["figures"] if not f["subjects"]["tea_llm"]["median"] > 0] == []


def test_calls_of_a_wave_are_made_at_the_same_time() -> None:
    """A call that waits for all the others of its wave returns; one by one it would wait for ever."""
    code = """
import threading
from adapter import Call, Counts, make_wave

class Peer:
    at_once = True
    all_here = threading.Barrier(3)

    def generate(self, call, chunks):
        self.all_here.wait(10)
        chunks.arrived()
        return Counts(1, call.n_tokens)

wave = make_wave(Peer(), tuple(Call(str(i), "", 1, stream=True) for i in range(3)))
assert [call["name"] for call in wave["calls"]] == ["0", "1", "2"]
assert wave["wall_s"] >= max(call["first_s"] for call in wave["calls"])
"""
    subprocess.run([sys.executable, "-c", code], cwd=BENCH / "peers", check=True, timeout=60)
