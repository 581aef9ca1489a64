"""What a JSON schema costs: tokens per second with one, over those without, in the same process.

    python bench/structured.py --model build/qwen-0.5b.gguf

A schema with ten fields, long enough that no text is complete after --tokens; greedy, with the default sampler chain,
and with that at temperature 1.5. The model has random weights, so the schema forbids what it would say at most of its
tokens. cyllama is left out: it has no schemas.

How each figure is taken: --tokens over the seconds from the first token to the last, with the schema, over the same of
the call without it just before.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import race
from adapter import Call, Request, one_by_one

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"sampled": True},
    "hot": {"sampled": True, "temperature": 1.5},
}
FIGURES = (
    race.Figure("greedy", "of without", race.ITSELF, 0.98),
    race.Figure("sampled", "of without", race.ITSELF, 0.97),
    race.Figure("hot", "of without", race.ITSELF, None),
    race.Figure("greedy_rate", "tokens/s", race.BEST_PEER, None),
    race.Figure("sampled_rate", "tokens/s", race.BEST_PEER, None),
    race.Figure("hot_rate", "tokens/s", race.BEST_PEER, None),
)
_FIELDS: dict[str, dict[str, Any]] = {
    "title": {"type": "string", "minLength": 50, "maxLength": 100},
    "id": {"type": "integer", "minimum": 1, "maximum": 99999},
    "kind": {"enum": ["person", "place", "thing"]},
    "text": {"type": "string", "minLength": 200},
    "score": {"type": "number"},
    "active": {"type": "boolean"},
    "tags": {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 5},
    "born": {"type": "string", "format": "date"},
    "parent": {"type": ["integer", "null"]},
    "note": {"type": "string", "maxLength": 200},
}
SCHEMA = {"type": "object", "properties": _FIELDS, "required": list(_FIELDS), "additionalProperties": False}


def calls(repetitions: int, n_tokens: int) -> tuple[Call, ...]:
    """For each kind a call without the schema and one with it, after one of each that only warms up."""
    found = [Call("warm-up", race.text_of(8, 998), 8), Call("warm-up", race.text_of(8, 999), 8, schema=SCHEMA)]
    for i in range(repetitions):
        for j, (kind, options) in enumerate(KINDS.items()):
            prompt = race.text_of(8, 10 * i + j)
            found.append(Call(f"{kind} without", prompt, n_tokens, stream=True, **options))
            found.append(Call(f"{kind} with", prompt, n_tokens, stream=True, schema=SCHEMA, **options))
    return tuple(found)


def rate(call: dict[str, Any]) -> float:
    """Tokens per second, from the first to the last."""
    return float((call["tokens"] - 1) / (call["last_s"] - call["first_s"]))


def main() -> int:
    """Race, report; the exit status is 1 when a bar was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the 0.5B model by bench/make_model.py")
    parser.add_argument("--threads", type=int, default=2, help="of every subject (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of each text (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, help="of each call in a process (default: %(default)s)")
    race.add_options(parser, rounds=3)
    args = parser.parse_args()
    contest = race.race_of(args)
    request = Request(str(args.model), 1024, waves=one_by_one(calls(args.repetitions, args.tokens)))

    def measure(subject: race.Subject) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        by_name: dict[str, list[float]] = {}
        for call in race.calls_of(contest.ask(subject, request)[0]):
            if call["name"] != "warm-up":
                by_name.setdefault(call["name"], []).append(rate(call))
        for kind in KINDS:
            with_, without = by_name[f"{kind} with"], by_name[f"{kind} without"]
            found[kind] = [a / b for a, b in zip(with_, without, strict=True)]
            found[f"{kind}_rate"] = with_
        return found

    entrants = [s for s in contest.entrants([args.threads], args.threads) if s.name != "cyllama"]
    contest.run(args.rounds, entrants, measure)
    return contest.report("structured", FIGURES, rounds=args.rounds, model=args.model.name)


if __name__ == "__main__":
    sys.exit(main())
