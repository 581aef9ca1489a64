"""What every adapter does alike: read a request, make its calls wave by wave, say how long each took.

An adapter is a program of its own, so that each subject runs alone in its process and may live in its own environment.
Standard input holds one request, standard output one reply, both JSON; what the subject itself prints goes to stderr.

    request  {"model": path, "n_ctx": int, "n_parallel": int | null, "n_threads": int | null, "flash_attn": bool | null,
              "prompt_cache": bool, "features": [str, …], "server": path | null,
              "waves": [[{"name": str, "prompt": str, "n_tokens": int, "sampled": bool, "stream": bool,
              "schema": {…} | null, "temperature": float | null}, …], …]}
    reply    {"version": str, "started": s | null, "rss_bytes": int, "waves": [{"wall_s", "calls":
              [{"name", "prompt_tokens", "tokens", "wall_s", "first_s" | null, "last_s" | null, "ended"}, …]}, …]}

The calls of a wave start together, from as many threads; a wave begins when the one before has ended. A subject that
serves one caller at a time gets them one after the other, as its users have to do it. All times of a call are from its
wave's begin: `wall_s` until it returned, `first_s` and `last_s` until the first and the last chunk of a streamed call
arrived. `started` and `ended` are readings of the system's monotonic clock, the same in every process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

SAMPLING = {"top_k": 40, "top_p": 0.95, "min_p": 0.05, "temperature": 0.8}
"""llama.cpp's default sampler chain: what every `sampled` call uses."""

SEED = 1


@dataclass(frozen=True)
class Call:
    """One text to generate: `n_tokens` after `prompt`, greedy unless `sampled` (at `temperature`; None: the chain's).

    With a `schema` it is JSON, which has to be longer than `n_tokens` to fulfil it.
    """

    name: str
    prompt: str
    n_tokens: int
    sampled: bool = False
    stream: bool = False
    schema: dict[str, Any] | None = None
    temperature: float | None = None

    @property
    def sampling(self) -> dict[str, float]:
        """The samplers, by llama.cpp's names."""
        if not self.sampled:
            return {"temperature": 0.0}
        return SAMPLING if self.temperature is None else {**SAMPLING, "temperature": self.temperature}


Wave = tuple[Call, ...]
"""Calls that start together."""


def one_by_one(calls: Iterable[Call]) -> tuple[Wave, ...]:
    """Each call in a wave of its own."""
    return tuple((call,) for call in calls)


@dataclass(frozen=True)
class Request:
    """What one adapter has to do. `server` is the path of the program for adapters that start one.

    `n_ctx` is what one call may use, of which there are `n_parallel` at a time. Without `prompt_cache` nothing that was
    computed for an earlier call may be used again, where the subject lets its user say so. `features` are switched on
    besides; each adapter has a table of those that it knows. None for `n_parallel`, `n_threads` and `flash_attn` leaves
    them to the subject; a server then has one slot.
    """

    model: str
    n_ctx: int
    n_threads: int | None = None
    flash_attn: bool | None = None
    waves: tuple[Wave, ...] = ()
    server: str | None = None
    n_parallel: int | None = None
    prompt_cache: bool = False
    features: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The request as an adapter reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        """The request that `to_json` wrote."""
        fields = json.loads(text)
        waves = tuple(tuple(Call(**call) for call in wave) for wave in fields["waves"])
        return cls(**{**fields, "waves": waves, "features": tuple(fields["features"])})


@dataclass
class Chunks:
    """Counts chunks of text as they arrive, and remembers when the first and the last one did."""

    n: int = 0
    first: float | None = None
    last: float | None = None

    def arrived(self) -> None:
        """Take note that a chunk is here."""
        self.last = time.monotonic()
        self.n += 1
        if self.first is None:
            self.first = self.last


@dataclass(frozen=True)
class Counts:
    """Tokens of one call, as the subject counts them."""

    prompt_tokens: int
    tokens: int


class Peer(Protocol):
    """A loaded model that answers calls; `started` and `pid` name another process where the model lives in one.

    `at_once` says whether `generate` may be called from several threads.
    """

    started: float | None
    pid: int
    at_once: bool

    def version(self) -> str:
        """The subject's own version; asked for after the clock has stopped."""

    def generate(self, call: Call, chunks: Chunks) -> Counts:
        """Generate; tell `chunks` of each chunk when `call.stream`."""

    def close(self) -> None:
        """Stop what was started."""


class InProcess:
    """The part of a `Peer` that is the same for all that load the model into the adapter's own process."""

    started: float | None = None
    at_once = True

    def __init__(self) -> None:
        self.pid = os.getpid()

    def close(self) -> None:
        """Nothing to stop: the process ends."""


def peak_rss_bytes(pid: int) -> int:
    """The most memory that a process has had resident (VmHWM; pages of a mapped file count)."""
    with Path(f"/proc/{pid}/status").open(encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/status has no VmHWM line")


def make_call(peer: Peer, call: Call, begin: float) -> dict[str, Any]:
    """One row of the reply. Raises RuntimeError if the subject ended before `n_tokens`: its time would not compare."""
    chunks = Chunks()
    counts = peer.generate(call, chunks)
    ended = time.monotonic()
    if counts.tokens < call.n_tokens:
        raise RuntimeError(f"call {call.name!r} gave {counts.tokens} of {call.n_tokens} tokens; it can't be compared")
    return {
        "name": call.name,
        **asdict(counts),
        "wall_s": ended - begin,
        "first_s": None if chunks.first is None else chunks.first - begin,
        "last_s": None if chunks.last is None else chunks.last - begin,
        "ended": ended,
    }


def make_wave(peer: Peer, calls: Wave) -> dict[str, Any]:
    """The rows of one wave, and how long all of it took."""
    if len(calls) == 1 or not peer.at_once:
        begin = time.monotonic()
        rows = [make_call(peer, call, begin) for call in calls]
    else:
        from concurrent.futures import ThreadPoolExecutor  # not where load.py would measure its import

        with ThreadPoolExecutor(len(calls)) as threads:
            begin = time.monotonic()
            rows = list(threads.map(lambda call: make_call(peer, call, begin), calls))
    return {"wall_s": max(row["ended"] for row in rows) - begin, "calls": rows}


def serve(open_peer: Callable[[Request], Peer], doc: str | None) -> None:
    """Answer the request on standard input; an adapter's whole main program."""
    if len(sys.argv) > 1:  # no argparse: its import would be part of every start that load.py measures
        print(f"usage: {Path(sys.argv[0]).name} < request.json\n\n{doc}\n{__doc__}")
        return
    reply_to = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the subject's own code prints must not end up inside the reply
    request = Request.from_json(sys.stdin.read())
    peer = open_peer(request)
    try:
        waves = [make_wave(peer, wave) for wave in request.waves]
        reply = {
            "version": peer.version(),
            "started": peer.started,
            "rss_bytes": peak_rss_bytes(peer.pid),
            "waves": waves,
        }
    finally:
        peer.close()
    reply_to.write(json.dumps(reply) + "\n")
    reply_to.close()
