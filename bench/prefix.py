"""What a subject saves when prompts begin alike: tea_llm against llama-server and the Python peers, in the same run.

    python bench/prefix.py --model qwen-0.5b.gguf

Nothing is known when a process starts but a call that only warms up and shares nothing. Greedy, streamed.

  shared   Sixteen calls at the same moment: a system prompt of 512 tokens that is the same in all, 32 tokens of their
           own, 32 generated. Then the same sixteen calls again; then sixteen with other 32 tokens after the same 512.
             shared_cold            seconds from that moment until the last call returned, first wave
             shared_cold_slot_each  the same, only with settings by which a server takes all sixteen at once
             shared_first_token     seconds to the first chunk, first wave, median over the calls
             shared_again           that of the second wave, over that of the first
             shared_new_endings     that of the third wave, over that of the first
  endings  A text of 1,500 tokens with ten different endings of 10 tokens, one after the other, 8 tokens generated.
           `between` has a call with 200 other tokens between each two; it runs in a process of its own.
             …_first                seconds to the first chunk, first ending
             …_rest                 the same of the second to the tenth ending: the median of the nine
             …_ratio                rest over first
             …_slowest_ratio        the slowest of the nine over first

A server is tried with a slot for each call and with fewer, which then find in a slot what the call before has left
there; with one KV cache for all slots; with its cache in host memory. llama-cpp-python is tried with and without its
own such cache. llama-cpp-python and cyllama serve one caller at a time, and get the calls one after the other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import race
from adapter import Call, Request, Wave, one_by_one

N_ENDINGS, N_ENDING, N_BETWEEN, N_ANSWER = 10, 10, 200, 8
ENDINGS_CONTEXT = 4096
ENDINGS = "endings"
BETWEEN = "endings_between"

_RAM = race.Variant(features=("ram-cache",))

SHARED_FIGURES = (
    race.Figure("shared_cold", "s", race.LLAMA_SERVER, 0.35, higher_is_better=False),
    race.Figure("shared_cold_slot_each", "s", race.LLAMA_SERVER, 0.35, higher_is_better=False),
    race.Figure("shared_first_token", "s", race.LLAMA_SERVER, None, higher_is_better=False),
    race.Figure("shared_again", "of the first wave", race.ITSELF, 0.2, higher_is_better=False),
    race.Figure("shared_new_endings", "of the first wave", race.ITSELF, None, higher_is_better=False),
)
ENDINGS_VARIANTS = {
    race.LLAMA_SERVER: (race.Variant(), _RAM, race.Variant(4), race.Variant(4, ("ram-cache",))),
    race.XLLAMACPP: (race.Variant(), _RAM),
    race.LLAMA_CPP_PYTHON: (race.Variant(), _RAM),
}


def shared_variants(n: int) -> dict[str, Sequence[race.Variant]]:
    """The settings that may help a peer with `n` calls that share a prefix: fewer slots let a call find another's."""
    fewer = tuple(race.Variant(slots) for slots in sorted({max(n // 4, 1), 1}))
    unified = race.Variant(features=("kv-unified",))
    all_on = race.Variant(features=("kv-unified", "ram-cache", "cache-reuse"))
    return {
        race.LLAMA_SERVER: (race.Variant(), unified, _RAM, all_on, *fewer),
        race.XLLAMACPP: (race.Variant(), unified, *fewer),
        race.LLAMA_CPP_PYTHON: (race.Variant(), _RAM),
    }


def endings_figures(race_name: str) -> tuple[race.Figure, ...]:
    """The figures of `endings` or `endings_between`."""
    return (
        race.Figure(f"{race_name}_first", "s", race.LLAMA_SERVER, None, higher_is_better=False),
        race.Figure(f"{race_name}_rest", "s", race.LLAMA_SERVER, None, higher_is_better=False),
        race.Figure(f"{race_name}_ratio", "of the first", race.ITSELF, 0.03, higher_is_better=False),
        race.Figure(f"{race_name}_slowest_ratio", "of the first", race.ITSELF, None, higher_is_better=False),
    )


def shared_wave(n: int, first_salt: int, args: argparse.Namespace) -> Wave:
    """`n` calls with the same beginning; no two go on with the same word."""
    system = race.text_of(args.system_tokens, 0)
    endings = (race.text_of(args.own_tokens, first_salt + i) for i in range(n))
    return tuple(Call("shared", system + ending, args.tokens, stream=True) for ending in endings)


def race_shared(contest: race.Race, args: argparse.Namespace) -> None:
    """All callers at once, three waves of them in each process."""
    n = args.parallel
    first, others = shared_wave(n, 0, args), shared_wave(n, n, args)
    n_prompt = args.system_tokens + args.own_tokens
    waves = (*race.WARM_UP, first, first, others)
    n_ctx = race.context_for(n_prompt + args.tokens)
    request = Request(str(args.model), n_ctx, waves=waves, n_parallel=n, prompt_cache=True)

    def measure(subject: race.Subject) -> dict[str, list[float]]:
        reply, _ = contest.ask(subject, request)
        _, cold, again, new = reply["waves"]
        if not args.any_length:
            race.check_lengths([*cold["calls"], *again["calls"], *new["calls"]], n_prompt)
        cold_first_s = race.median_first_s(cold)
        found = {
            "shared_cold": [cold["wall_s"]],
            "shared_first_token": [cold_first_s],
            "shared_again": [race.median_first_s(again) / cold_first_s],
            "shared_new_endings": [race.median_first_s(new) / cold_first_s],
        }
        if subject.variant.n_slots is None:
            found["shared_cold_slot_each"] = found["shared_cold"]
        return found

    entrants = contest.entrants([args.threads], args.threads, variants=shared_variants(n))
    contest.run(args.rounds, entrants, measure, settle=SHARED_FIGURES[:2])


def endings_calls(race_name: str, args: argparse.Namespace) -> list[Call]:
    """The calls of `endings` or `endings_between`, each named `ending` or `other`."""
    prefix = race.text_of(args.prefix_tokens, 0)
    calls: list[Call] = []
    for i in range(N_ENDINGS):
        if calls and race_name == BETWEEN:
            calls.append(Call("other", race.text_of(N_BETWEEN, 20 + i), N_ANSWER, stream=True))
        calls.append(Call("ending", prefix + race.text_of(N_ENDING, i), N_ANSWER, stream=True))
    return calls


def race_endings(contest: race.Race, args: argparse.Namespace) -> None:
    """One caller, with and without other calls between: two processes for each subject."""

    def measure_one(subject: race.Subject, race_name: str) -> dict[str, list[float]]:
        waves = (*race.WARM_UP, *one_by_one(endings_calls(race_name, args)))
        request = Request(str(args.model), ENDINGS_CONTEXT, waves=waves, prompt_cache=True)
        reply, _ = contest.ask(subject, request)
        endings = [call for call in race.calls_of(reply) if call["name"] == "ending"]
        if not args.any_length:
            race.check_lengths(endings, args.prefix_tokens + N_ENDING)
        first, *rest = (call["first_s"] for call in endings)
        return {
            f"{race_name}_first": [first],
            f"{race_name}_rest": [median(rest)],
            f"{race_name}_ratio": [median(rest) / first],
            f"{race_name}_slowest_ratio": [max(rest) / first],
        }

    def measure(subject: race.Subject) -> dict[str, list[float]]:
        return measure_one(subject, ENDINGS) | measure_one(subject, BETWEEN)

    entrants = contest.entrants([args.threads], args.threads, variants=ENDINGS_VARIANTS)
    settle = [endings_figures(race_name)[1] for race_name in (ENDINGS, BETWEEN)]
    contest.run(args.rounds, entrants, measure, settle)


def main() -> int:
    """Race, report; the exit status is 1 when a bar was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a 0.5B model by bench/make_model.py")
    parser.add_argument("--races", nargs="+", choices=["shared", ENDINGS], default=["shared", ENDINGS])
    parser.add_argument("--parallel", type=int, default=16, help="calls at once, shared (default: %(default)s)")
    parser.add_argument("--system-tokens", type=int, default=512, help="that all share (default: %(default)s)")
    parser.add_argument("--own-tokens", type=int, default=32, help="of each, after them (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="generated for each, shared (default: %(default)s)")
    parser.add_argument("--prefix-tokens", type=int, default=1500, help="before the endings (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of every subject (default: %(default)s)")
    race.add_length_option(parser)
    race.add_options(parser, rounds=3)
    args = parser.parse_args()
    if 2 * args.parallel > race.N_SALTS:
        parser.error(f"--parallel takes at most {race.N_SALTS // 2}: no two texts may go on with the same word")
    contest = race.race_of(args)
    race.read_into_page_cache(args.model)
    figures: tuple[race.Figure, ...] = ()
    if "shared" in args.races:
        race_shared(contest, args)
        figures += SHARED_FIGURES
    if ENDINGS in args.races:
        race_endings(contest, args)
        figures += (*endings_figures(ENDINGS), *endings_figures(BETWEEN))
    return contest.report("prefix", figures, model=args.model.name, rounds=args.rounds)


if __name__ == "__main__":
    sys.exit(main())
