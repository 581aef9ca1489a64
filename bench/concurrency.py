"""Many callers of one model at once: tea_llm against llama.cpp's own programs and the peers, in the same run.

    python bench/concurrency.py --model qwen-0.5b.gguf

Eight and sixteen different prompts of 256 tokens, all submitted at the same moment, 64 tokens generated for each,
greedy and streamed, after a call that only warms up.

  total         all generated tokens, over the seconds from that moment until the last call returned
  first_token   the median over the calls, from that moment to the call's first chunk; llama-server with its own batch
                of 2,048 tokens, so that it reads eight prompts side by side
  first_token_N_any_batch   the same, llama-server also with a batch of 512, in which it reads two prompts at a time
  streamed      tea_llm's own total at sixteen, over what it is when nobody takes the text before it is whole; both in
                processes of their own, one right after the other

llama-server and xllamacpp have a slot for each call, with one KV cache for all or one each. llama-cpp-python and
cyllama serve one caller at a time, and get the calls one after the other. llama-batched-bench decodes random tokens and
samples nothing: its total is the tokens over the seconds that it says both of its phases took.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import race
from adapter import Call, Request, Wave

_EACH = (race.Variant(), race.Variant(features=("kv-unified",)))
_SMALL_BATCH = race.Variant(features=("small-batch",))
VARIANTS = {race.LLAMA_SERVER: (*_EACH, _SMALL_BATCH), race.XLLAMACPP: _EACH, race.LLAMA_BATCHED_BENCH: _EACH}


def figures_of(n: int) -> tuple[race.Figure, ...]:
    """What is measured with `n` calls at once."""
    return (
        race.Figure(f"total_{n}", "tokens/s", race.LLAMA_SERVER, 1.0),
        race.Figure(f"total_{n}", "tokens/s", race.LLAMA_BATCHED_BENCH, 0.97),
        race.Figure(f"total_{n}", "tokens/s", race.LLAMA_CPP_PYTHON, 1.35),
        race.Figure(f"first_token_{n}", "s", race.LLAMA_SERVER, 0.65, higher_is_better=False),
        race.Figure(f"first_token_{n}_any_batch", "s", race.LLAMA_SERVER, None, higher_is_better=False),
    )


def streamed_figure(n: int) -> race.Figure:
    """What it costs that `n` callers take their text piece by piece."""
    return race.Figure(f"streamed_{n}", "of not streamed", race.ITSELF, 0.98)


def wave_of(n: int, args: argparse.Namespace, *, stream: bool) -> Wave:
    """`n` calls, of which no two begin with the same word."""
    return tuple(Call(f"{i}", race.text_of(args.prompt_tokens, i), args.tokens, stream=stream) for i in range(n))


def total_rate(wave: Mapping[str, Any]) -> float:
    """Tokens per second of a whole wave of an adapter's reply."""
    n_tokens: int = sum(call["tokens"] for call in wave["calls"])
    return n_tokens / float(wave["wall_s"])


def batched_bench(program: Path, subject: race.Subject, n: int, args: argparse.Namespace) -> float:
    """llama-batched-bench's tokens per second over both of its phases."""
    n_ctx = n * race.context_for(args.prompt_tokens + args.tokens)
    options = f"-c {n_ctx} -b 2048 -ub 512 -t {subject.n_threads} -fa {'on' if subject.flash_attn else 'off'}"
    options += f" -npp {args.prompt_tokens} -ntg {args.tokens} -npl {n} --output-format jsonl"
    if "kv-unified" in subject.variant.features:
        options += " -kvu"
    said = race.run([str(program), "-m", str(args.model), *options.split()])
    (row,) = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return float(n * args.tokens / (row["t_pp"] + row["t_tg"]))


def race_at(contest: race.Race, n: int, args: argparse.Namespace, *, plain_too: bool) -> None:
    """Every subject with `n` calls at once; with `plain_too`, tea_llm without streams as well."""
    n_ctx = race.context_for(args.prompt_tokens + args.tokens)

    def last_wave(subject: race.Subject, *, stream: bool) -> Mapping[str, Any]:
        waves = (*race.WARM_UP, wave_of(n, args, stream=stream))
        reply, _ = contest.ask(subject, Request(str(args.model), n_ctx, waves=waves, n_parallel=n))
        wave: Mapping[str, Any] = reply["waves"][-1]
        if not args.any_length:
            race.check_lengths(wave["calls"], args.prompt_tokens)
        return wave

    def measure(subject: race.Subject) -> dict[str, list[float]]:
        if subject.name == race.LLAMA_BATCHED_BENCH:
            program = contest.reference_program(race.LLAMA_BATCHED_BENCH)
            return {f"total_{n}": [batched_bench(program, subject, n, args)]}
        streamed = last_wave(subject, stream=True)
        first_s = race.median_first_s(streamed)
        found = {f"total_{n}": [total_rate(streamed)], f"first_token_{n}_any_batch": [first_s]}
        if subject.variant != _SMALL_BATCH:
            found[f"first_token_{n}"] = [first_s]
        if plain_too and subject.name == race.OURS:
            found[f"streamed_{n}"] = [total_rate(streamed) / total_rate(last_wave(subject, stream=False))]
        return found

    entrants = contest.entrants([args.threads], args.threads, [race.LLAMA_BATCHED_BENCH], VARIANTS)
    contest.run(args.rounds, entrants, measure, settle=figures_of(n))


def main() -> int:
    """Race, report; the exit status is 1 when a bar was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a 0.5B model by bench/make_model.py")
    parser.add_argument(
        "--parallel", type=int, nargs="+", default=[8, 16], help="calls at once (default: 8 16)", metavar="N"
    )
    parser.add_argument("--prompt-tokens", type=int, default=256, help="of each call (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="generated for each call (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of every subject (default: %(default)s)")
    race.add_length_option(parser)
    race.add_options(parser, rounds=3)
    args = parser.parse_args()
    if max(args.parallel) > race.N_SALTS:
        parser.error(f"--parallel takes at most {race.N_SALTS}: no two prompts may begin with the same word")
    contest = race.race_of(args)
    race.read_into_page_cache(args.model)
    most = max(args.parallel)
    figures: tuple[race.Figure, ...] = ()
    for n in args.parallel:
        race_at(contest, n, args, plain_too=n == most)
        figures += figures_of(n)
    facts = {"rounds": args.rounds, "prompt_tokens": args.prompt_tokens, "tokens": args.tokens}
    return contest.report("concurrency", (*figures, streamed_figure(most)), model=args.model.name, **facts)


if __name__ == "__main__":
    sys.exit(main())
