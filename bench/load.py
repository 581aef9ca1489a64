"""From process start to the first token, and peak resident memory, of tea_llm and the peers in the same run.

    python bench/load.py --model qwen-0.5b.gguf

The file is in the page cache. Every subject has the same context, two threads and memory-mapped weights, and none warms
up. The clock starts before the process does and stops when a call for one token after a short prompt returns; for
llama-server it starts with the server, not with the client. Memory is VmHWM, in which pages of the mapped file count.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import race
from adapter import Call, Request, one_by_one

FIGURES = (
    race.Figure("first_token", "ms", race.BEST_PEER, 0.9, higher_is_better=False),
    race.Figure("peak_rss", "MB", race.LLAMA_SERVER, 1.0, higher_is_better=False),
)


def main() -> int:
    """Race, report; the exit status is 1 when a bar was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a 0.5B model by bench/make_model.py")
    parser.add_argument("--n-ctx", type=int, default=2048, help="of every subject (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of every subject (default: %(default)s)")
    race.add_options(parser, rounds=7)
    args = parser.parse_args()
    contest = race.race_of(args)
    race.read_into_page_cache(args.model)
    request = Request(str(args.model), args.n_ctx, waves=one_by_one([Call("first", race.text_of(8, 1), 1)]))

    def measure(subject: race.Subject) -> dict[str, list[float]]:
        reply, started = contest.ask(subject, request)
        return {
            "first_token": [(race.calls_of(reply)[0]["ended"] - started) * 1000],
            "peak_rss": [reply["rss_bytes"] / 1e6],
        }

    contest.run(args.rounds, contest.entrants([args.threads], args.threads), measure)
    return contest.report("load", FIGURES, rounds=args.rounds, model=args.model.name, n_ctx=args.n_ctx)


if __name__ == "__main__":
    sys.exit(main())
