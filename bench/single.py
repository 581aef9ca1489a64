"""Single-stream speed: tea_llm against llama.cpp's own llama-bench and against the peers, in the same run.

    python bench/single.py --large qwen-0.5b.gguf --small stories260K-f32.gguf

--large is the model of bench/make_model.py: prompt processing (512 tokens) and generation (128 tokens, greedy and with
the default sampler chain). --small is a model so small that overhead is all there is: 512 tokens streamed or not,
greedy or sampled, and 2,000 tokens streamed; a copy of it is used that neither ends nor stops at the 512 tokens that it
was trained for.

How each figure is taken, the same way for every subject:
  prompt      the prompt's tokens, over the seconds of a whole call that generates one token
  generation  128, over the seconds of a call for 129 tokens less those of a call for one: from the first to the last
  small       the tokens, over the seconds of the whole call
llama-bench decodes random tokens and samples nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import race
from adapter import Call, Request, one_by_one
from make_model import endless_copy

N_PROMPT, N_GEN, N_SMALL, N_LONG = 512, 128, 512, 2000
SMALL_CONTEXT = 4096

LARGE_FIGURES = (
    race.Figure("prompt_512", "tokens/s", race.LLAMA_BENCH, 0.97),
    race.Figure("greedy_128", "tokens/s", race.LLAMA_BENCH, 0.97),
    race.Figure("sampled_128", "tokens/s", race.LLAMA_BENCH, 0.95),
)
SMALL_FIGURES = (
    race.Figure("small_greedy_512", "tokens/s", race.BEST_PEER, 1.05),
    race.Figure("small_greedy_512_streamed", "tokens/s", race.BEST_PEER, 1.05),
    race.Figure("small_sampled_512", "tokens/s", race.BEST_PEER, 1.05),
    race.Figure("small_sampled_512_streamed", "tokens/s", race.BEST_PEER, 1.05),
    race.Figure("small_greedy_2000_streamed", "tokens/s", race.LLAMA_CPP_PYTHON, 2.0),
)


def large_calls(repetitions: int) -> tuple[Call, ...]:
    """The calls on the large model, after one that only warms up. No prompt comes twice."""
    calls = [Call("warm-up", race.text_of(8, 999), 8)]
    for i in range(repetitions):
        salt = 10 * i
        calls.append(Call("prompt", race.text_of(N_PROMPT, salt + 1), 1))
        for kind, sampled in (("greedy", False), ("sampled", True)):
            calls.append(Call(f"{kind} first", race.text_of(8, salt + 2 + 2 * sampled), 1, sampled, stream=True))
            calls.append(Call(f"{kind} all", race.text_of(8, salt + 3 + 2 * sampled), N_GEN + 1, sampled, stream=True))
    return tuple(calls)


def large_rates(calls: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Tokens per second of each figure, from an adapter's reply. Raises RuntimeError for a prompt of another length."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for call in calls:
        by_name.setdefault(call["name"], []).append(call)
    rates = {f"prompt_{N_PROMPT}": [call["prompt_tokens"] / call["wall_s"] for call in by_name["prompt"]]}
    race.check_lengths(by_name["prompt"], N_PROMPT)
    for kind in ("greedy", "sampled"):
        pairs = zip(by_name[f"{kind} first"], by_name[f"{kind} all"], strict=True)
        rates[f"{kind}_{N_GEN}"] = [
            (all_["tokens"] - first["tokens"]) / (all_["wall_s"] - first["wall_s"]) for first, all_ in pairs
        ]
    return rates


def small_calls(repetitions: int) -> tuple[Call, ...]:
    """The calls on the small model, after one that only warms up; each is named after its figure."""
    prompt = "Once upon a time"
    calls = [Call("warm-up", prompt, 64)]
    for _ in range(repetitions):
        for figure in SMALL_FIGURES:
            n_tokens = N_LONG if "2000" in figure.name else N_SMALL
            calls.append(Call(figure.name, prompt, n_tokens, "sampled" in figure.name, "streamed" in figure.name))
    return tuple(calls)


def small_rates(calls: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Tokens per second of each figure, from an adapter's reply."""
    rates: dict[str, list[float]] = {}
    for call in calls:
        if call["name"] != "warm-up":
            rates.setdefault(call["name"], []).append(call["tokens"] / call["wall_s"])
    return rates


def llama_bench(
    program: Path, model: Path, n_threads: int | None, tests: Mapping[str, str], n: int
) -> dict[str, list[float]]:
    """llama-bench's own tokens per second; `tests` gives, for each figure, the test it is measured by (`pp512`)."""
    found: dict[str, list[float]] = {}
    n_prompt = sorted({test[2:] for test in tests.values() if test.startswith("pp")})
    n_gen = sorted({test[2:] for test in tests.values() if test.startswith("tg")})
    command = [str(program), "-m", str(model), "-t", str(n_threads), "-r", str(n), "-o", "json"]
    command += ["-p", ",".join(n_prompt) or "0", "-n", ",".join(n_gen) or "0"]
    for row in json.loads(race.run(command)):
        test = f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}"
        for figure in (name for name, wanted in tests.items() if wanted == test):
            found[figure] = row["samples_ts"]
    return found


def race_large(contest: race.Race, args: argparse.Namespace) -> None:
    """Every subject with the same number of threads; llama-bench as it comes."""
    tests = {f"prompt_{N_PROMPT}": f"pp{N_PROMPT}", f"greedy_{N_GEN}": f"tg{N_GEN}", f"sampled_{N_GEN}": f"tg{N_GEN}"}
    request = Request(str(args.large), n_ctx=1024, waves=one_by_one(large_calls(args.repetitions)))

    def measure(subject: race.Subject) -> dict[str, list[float]]:
        if subject.name == race.LLAMA_BENCH:
            program = contest.reference_program(race.LLAMA_BENCH)
            return llama_bench(program, args.large, subject.n_threads, tests, args.repetitions)
        return large_rates(race.calls_of(contest.ask(subject, request)[0]))

    contest.run(args.rounds, contest.entrants([args.threads], args.threads, [race.LLAMA_BENCH]), measure)


def race_small(contest: race.Race, args: argparse.Namespace, model: Path) -> None:
    """Every peer with each of its settings, of which the best counts; tea_llm with its own choice."""
    tests = {figure.name: f"tg{N_LONG if '2000' in figure.name else N_SMALL}" for figure in SMALL_FIGURES}
    request = Request(str(model), n_ctx=SMALL_CONTEXT, waves=one_by_one(small_calls(args.repetitions)))

    def measure(subject: race.Subject) -> dict[str, list[float]]:
        if subject.name == race.LLAMA_BENCH:
            program = contest.reference_program(race.LLAMA_BENCH)
            return llama_bench(program, model, subject.n_threads, tests, args.repetitions)
        return small_rates(race.calls_of(contest.ask(subject, request)[0]))

    contest.run(args.rounds, contest.entrants(args.small_threads, None, [race.LLAMA_BENCH]), measure)


def main() -> int:
    """Race, report; the exit status is 1 when a bar was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", type=Path, help="a 0.5B model by bench/make_model.py; left out if not given")
    parser.add_argument("--small", type=Path, help="stories260K-f32.gguf or -q8_0.gguf; left out if not given")
    parser.add_argument("--threads", type=int, default=2, help="of every subject on --large (default: %(default)s)")
    parser.add_argument(
        "--small-threads", type=int, nargs="+", default=[1, 2], help="tried by each peer on --small (default: 1 2)"
    )
    parser.add_argument("--repetitions", type=int, default=2, help="of each call in a process (default: %(default)s)")
    race.add_options(parser, rounds=5)
    args = parser.parse_args()
    if args.large is None and args.small is None:
        parser.error("give --large, --small or both")
    contest = race.race_of(args)
    figures: tuple[race.Figure, ...] = ()
    if args.large is not None:
        race.read_into_page_cache(args.large)
        race_large(contest, args)
        figures += LARGE_FIGURES
    if args.small is not None:
        with tempfile.TemporaryDirectory() as folder:
            endless = Path(folder) / args.small.name
            endless_copy(args.small, endless, SMALL_CONTEXT)
            race_small(contest, args, endless)
        figures += SMALL_FIGURES
    return contest.report("single", figures, rounds=args.rounds, large=_name(args.large), small=_name(args.small))


def _name(path: Path | None) -> str | None:
    return None if path is None else path.name


if __name__ == "__main__":
    sys.exit(main())
