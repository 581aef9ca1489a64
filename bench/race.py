"""Runs the subjects one after the other, round by round, and says how tea_llm stands against each bar.

A machine drifts: its clock, its neighbours, its page cache. So every round runs every subject once, each in a process
of its own, and a ratio is taken inside each round; what is reported is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEERS_DIR = Path(__file__).resolve().parent / "peers"
sys.path.insert(0, str(PEERS_DIR))

from adapter import Call, Request, one_by_one  # noqa: E402  # the adapters' protocol; they run where this package's parents don't exist

OURS = "tea_llm"
LLAMA_BENCH = "llama-bench"
LLAMA_BATCHED_BENCH = "llama-batched-bench"
LLAMA_SERVER = "llama-server"
LLAMA_CPP_PYTHON = "llama-cpp-python"
XLLAMACPP = "xllamacpp"
BEST_PEER = "best peer"
ITSELF = "itself"
"""What a figure is compared with that is a ratio already, of two of the subject's own numbers."""

ADAPTERS = {
    OURS: "tea.py",
    LLAMA_CPP_PYTHON: "llama_cpp_python.py",
    XLLAMACPP: "xllamacpp_server.py",
    "cyllama": "cyllama_llm.py",
    LLAMA_SERVER: "llama_server.py",
}
"""Every subject with an adapter."""

PROGRAMS = (LLAMA_BENCH, LLAMA_BATCHED_BENCH)
"""llama.cpp's own measures, which have no adapter: they generate nothing."""

WITH_ATTENTION = (LLAMA_CPP_PYTHON, XLLAMACPP, LLAMA_SERVER, LLAMA_BATCHED_BENCH)
"""The subjects that let their user choose flash attention or not, which on a CPU may cost more than it brings."""

# Word for word one token in Qwen's vocabulary, with the space before it.
_WORDS = """
    time water house light river small garden morning family letter music paper window summer winter street market
    doctor school mother father sister brother teacher simple green bright heavy quiet early often never always under
    before after again open close carry build write learn bring start begin little strong young happy black white
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Variant:
    """Settings of a peer besides threads and attention: its slots (None: as many as the request has calls at a time),
    and the features of its adapter that are on."""

    n_slots: int | None = None
    features: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """One entrant of a round: a program, with its threads and its kind of attention (None: as it comes)."""

    name: str
    n_threads: int | None
    flash_attn: bool | None = None
    variant: Variant = Variant()

    @property
    def settings(self) -> str:
        """Its settings in a few letters: `t=2 fa`."""
        attention = {None: (), True: ("fa",), False: ("no-fa",)}[self.flash_attn]
        slots = () if self.variant.n_slots is None else (f"slots={self.variant.n_slots}",)
        return " ".join((f"t={self.n_threads or 'auto'}", *attention, *slots, *self.variant.features))

    @property
    def is_peer(self) -> bool:
        """Whether "best peer" may mean it."""
        return self.name not in (OURS, *PROGRAMS)


@dataclass(frozen=True)
class Figure:
    """One measured number, what it is compared with, and the ratio that must be reached (or not be passed).

    Several figures may have the same name: one number, compared with several subjects. Without a bar it is only shown.
    """

    name: str
    unit: str
    against: str
    bar: float | None
    higher_is_better: bool = True

    def pick(self, *values: Any, **options: Any) -> Any:
        """The best of some numbers: max or min."""
        return (max if self.higher_is_better else min)(*values, **options)

    def met(self, ratio: float) -> bool | None:
        """Whether a ratio of ours to theirs satisfies the bar; None if there is none."""
        if self.bar is None:
            return None
        return ratio >= self.bar if self.higher_is_better else ratio <= self.bar


@dataclass
class Race:
    """The samples of a run, one for each figure, subject and round; and who was left out, and why."""

    python: str
    peers_python: str | None
    reference_dir: Path | None
    only: frozenset[str]
    versions: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    samples: dict[str, dict[Subject, list[float]]] = field(default_factory=dict)

    def entrants(
        self,
        threads: Sequence[int],
        ours: int | None,
        programs: Sequence[str] = (),
        variants: Mapping[str, Sequence[Variant]] | None = None,
    ) -> list[Subject]:
        """The subjects that can run here, a peer once for each of its settings; the others go to `left_out`."""
        able = [name for name in (*programs, *ADAPTERS) if self._can_run(name)]
        return [
            Subject(name, n, flash_attn, variant)
            for name in able
            for n in ([ours] if name == OURS else threads)
            for flash_attn in ((True, False) if name in WITH_ATTENTION else (None,))
            for variant in (variants or {}).get(name, (Variant(),))
        ]

    def _can_run(self, name: str) -> bool:
        if name not in self.only:
            return False
        missing = None
        if name in (*PROGRAMS, LLAMA_SERVER):
            if self.reference_dir is None:
                missing = "no --reference-dir; build one with bench/reference.py"
            elif not self.reference_program(name).exists():
                missing = f"{self.reference_program(name).name} is not in the --reference-dir; build it again"
        elif name != OURS and self.peers_python is None:
            missing = "no --peers-python; bench/README.md says how to make one"
        if missing:
            self._leave_out(name, missing)
        return missing is None

    def reference_program(self, name: str) -> Path:
        """Where a program of llama.cpp's own lies."""
        if self.reference_dir is None:
            raise ValueError("no --reference-dir")
        return self.reference_dir / "bin" / name

    def ask(self, subject: Subject, request: Request) -> tuple[dict[str, Any], float]:
        """An adapter's reply, and the monotonic time when its process started."""
        request = replace(
            request,
            n_threads=subject.n_threads,
            flash_attn=subject.flash_attn,
            n_parallel=subject.variant.n_slots or request.n_parallel,
            features=subject.variant.features,
        )
        if subject.name == LLAMA_SERVER:
            request = replace(request, server=str(self.reference_program(LLAMA_SERVER)))
        python = self.python if subject.name in (OURS, LLAMA_SERVER) else self.peers_python
        started = time.monotonic()
        reply = json.loads(run([str(python), str(PEERS_DIR / ADAPTERS[subject.name])], request.to_json()))
        self.versions[subject.name] = reply["version"]
        return reply, reply["started"] or started

    def run(
        self,
        rounds: int,
        entrants: Sequence[Subject],
        measure: Callable[[Subject], Mapping[str, Iterable[float]]],
        settle: Sequence[Figure] = (),
    ) -> None:
        """Measure every entrant once a round. One that fails is left out of the whole run.

        With `settle`, a subject goes on after the second round only with the settings that may be its best in one of
        these figures.
        """
        for number in range(rounds):
            if number == 2 and settle:
                entrants = self._promising(entrants, settle)
            shift = number % max(1, len(entrants))  # nobody always runs after the same neighbour
            for subject in [*entrants[shift:], *entrants[:shift]]:
                if subject.name in self.left_out:
                    continue
                print(f"round {number + 1}/{rounds}: {subject.name} {subject.settings}", file=sys.stderr)
                try:
                    measured = measure(subject)
                except (subprocess.CalledProcessError, RuntimeError) as exc:
                    self._leave_out(subject.name, _last_words(exc))
                    continue
                for figure, values in measured.items():
                    self.samples.setdefault(figure, {}).setdefault(subject, []).append(median(values))

    def _promising(self, entrants: Sequence[Subject], figures: Sequence[Figure]) -> list[Subject]:
        """The entrants that were once, in one of the figures, at most a tenth worse than the best of their name."""
        promising: set[Subject] = set()
        for figure in figures:
            so_far = {subject: figure.pick(values) for subject, values in self.samples.get(figure.name, {}).items()}
            for subject, value in so_far.items():
                best = figure.pick(other for named, other in so_far.items() if named.name == subject.name)
                if (best / value if figure.higher_is_better else value / best) <= 1.1:
                    promising.add(subject)
        return [subject for subject in entrants if subject in promising]

    def _leave_out(self, name: str, why: str) -> None:
        self.left_out[name] = why
        print(f"{name} is left out: {why}", file=sys.stderr)
        for of_figure in self.samples.values():
            for subject in [s for s in of_figure if s.name == name]:
                del of_figure[subject]

    def verdict(self, figure: Figure) -> dict[str, Any]:
        """The medians of one figure, each subject with its best settings, and our ratio to the bar."""
        samples = self.samples.get(figure.name, {})
        n_rounds = max(map(len, samples.values()), default=0)
        best: dict[str, tuple[Subject, list[float]]] = {}
        for subject, values in samples.items():
            if len(values) < n_rounds:
                continue  # settings that were given up
            if subject.name not in best or figure.pick(median(values), median(best[subject.name][1])) == median(values):
                best[subject.name] = (subject, values)
        against = figure.against
        if against == BEST_PEER:
            peers = {name: median(values) for name, (subject, values) in best.items() if subject.is_peer}
            against = figure.pick(peers, key=lambda name: peers[name]) if peers else BEST_PEER
        ratio = None
        if OURS in best and against == ITSELF:
            ratio = median(best[OURS][1])
        elif OURS in best and against in best:
            ratio = median(ours / theirs for ours, theirs in zip(best[OURS][1], best[against][1], strict=True))
        return {
            **asdict(figure),
            "against": against,
            "ratio": ratio,
            "met": None if ratio is None else figure.met(ratio),
            "subjects": {
                name: {
                    "median": median(values),
                    "settings": subject.settings,
                    "rounds": values,
                    "tried": {s.settings: median(v) for s, v in samples.items() if s.name == name},
                }
                for name, (subject, values) in best.items()
            },
        }

    def report(self, bench: str, figures: Sequence[Figure], **facts: Any) -> int:
        """One JSON line on stdout, a table on stderr. Returns the exit status: 1 when a bar was missed."""
        verdicts = [self.verdict(figure) for figure in figures]
        print_table(verdicts)
        for name, why in self.left_out.items():
            print(f"left out: {name}: {why}", file=sys.stderr)
        facts |= {"machine": machine(), "versions": self.versions, "left_out": self.left_out}
        print(json.dumps({"bench": bench, **facts, "figures": verdicts}))
        return 1 if any(v["met"] is False for v in verdicts) else 0


_VERDICTS = {True: "met", False: "MISSED", None: "not measured"}


def print_table(verdicts: Sequence[Mapping[str, Any]]) -> None:
    """A row for each figure, a column for each subject, on stderr."""
    names = [n for n in (*PROGRAMS, *ADAPTERS) if any(n in v["subjects"] for v in verdicts)]
    rows = [["figure", "unit", *names, "ratio", "bar", ""]]
    for v in verdicts:
        cells = [_cell(v["subjects"].get(name)) for name in names]
        ratio = "-" if v["ratio"] is None else f"{v['ratio']:.3f} of {v['against']}"
        bar, verdict = "-", ""
        if v["bar"] is not None:
            bar, verdict = f"{'≥' if v['higher_is_better'] else '≤'} {v['bar']:g}", _VERDICTS[v["met"]]
        rows.append([v["name"], v["unit"], *cells, ratio, bar, verdict])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), file=sys.stderr)


def _cell(of_subject: Mapping[str, Any] | None) -> str:
    if of_subject is None:
        return "-"
    return f"{of_subject['median']:.4g} ({of_subject['settings']})"


def run(command: Sequence[str], stdin: str = "") -> str:
    """What a program wrote on stdout. Raises CalledProcessError, with its stderr, when it fails."""
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=True).stdout


def _last_words(exc: Exception) -> str:
    if isinstance(exc, subprocess.CalledProcessError):
        lines = (exc.stderr or "").strip().splitlines() or ["it said nothing"]
        return f"exit status {exc.returncode}: {lines[-1]}"
    return str(exc)


WARM_UP = one_by_one([Call("warm-up", "a few words before", 8)])
"""What goes before the waves that are measured: no other prompt begins like it."""

N_SALTS = len(_WORDS)
"""So many prompts begin each with another word."""


def text_of(n_words: int, salt: int) -> str:
    """A prompt of `n_words` tokens in Qwen's vocabulary; another `salt` begins with another word, so no cache helps.

    It begins with a space, as some words are two tokens without; so texts can be put together as they are.
    """
    first = salt % len(_WORDS)
    return "".join(" " + _WORDS[(first + i * (1 + salt % 7)) % len(_WORDS)] for i in range(n_words))


def calls_of(reply: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All calls of an adapter's reply, wave after wave."""
    return [call for wave in reply["waves"] for call in wave["calls"]]


def median_first_s(wave: Mapping[str, Any]) -> float:
    """The median time to the first chunk over the calls of a wave, which were streamed."""
    return float(median(call["first_s"] for call in wave["calls"]))


def check_lengths(calls: Iterable[Mapping[str, Any]], n_tokens: int) -> None:
    """Raises RuntimeError if a prompt is not `n_tokens` long."""
    lengths = {call["prompt_tokens"] for call in calls}
    if lengths != {n_tokens}:
        raise RuntimeError(f"the prompt has {lengths} tokens instead of {n_tokens}; use a model of bench/make_model.py")


def context_for(n_tokens: int) -> int:
    """The context for calls of so many tokens: a whole number of 256, which is what llama.cpp makes of it anyway."""
    return -(-n_tokens // 256) * 256


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.platform(), "load_1min": os.getloadavg()[0]}


def read_into_page_cache(path: Path) -> None:
    """Read a file once, so that no subject pays for the disk."""
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def add_options(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """The options that every race has."""
    env = os.environ.get
    parser.add_argument("--rounds", type=int, default=rounds, help="how often each subject runs (default: %(default)s)")
    parser.add_argument("--python", default=sys.executable, help="the Python that has tea_llm (default: this one)")
    parser.add_argument(
        "--peers-python",
        default=env("TEA_BENCH_PEERS_PYTHON"),
        help="the Python that has the peers (TEA_BENCH_PEERS_PYTHON)",
    )
    parser.add_argument(
        "--reference-dir",
        type=Path,
        default=env("TEA_BENCH_REFERENCE_DIR"),
        help="what bench/reference.py built (TEA_BENCH_REFERENCE_DIR)",
    )
    names = [*PROGRAMS, *ADAPTERS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="race only these (default: all)")


def add_length_option(parser: argparse.ArgumentParser) -> None:
    """The option of the races whose prompts must have a certain length."""
    parser.add_argument(
        "--any-length", action="store_true", help="take a model for which the prompts have another length than is asked"
    )


def race_of(args: argparse.Namespace) -> Race:
    """The race that the options ask for; warns on a machine that is busy with something else."""
    load = os.getloadavg()[0]
    if load > 0.3:
        print(f"the machine is not quiet (load {load:.1f}); the figures will be worth little", file=sys.stderr)
    return Race(args.python, args.peers_python, args.reference_dir, frozenset(args.only))
