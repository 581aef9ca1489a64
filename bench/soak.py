"""Many threads and tasks on one model for minutes, that come, leave and fail as they like: what goes wrong, what stays.

    python bench/soak.py --model stories260K-f32.gguf --seconds 300

64 threads and 200 asyncio tasks ask one backend, over its public interface: whole texts and streams, callbacks that
return False or raise, streams that are dropped, tasks that are cancelled, timeouts, sessions, chats, vectors. Each text
is compared with what a fresh model says to the same request alone; one that was left early must be its beginning.

  wrong             texts that are not the right one, and errors that nobody asked for
  longest_silence   the longest time in which one caller heard nothing of its request, its wait for a turn included;
                    more than `--patience` is a request that hangs, and ends the run
  resident_mb       resident memory by time
  at_rest           what the process holds while nobody asks: before the model, after a warm-up, after the run, closed
  left              what is there after the run and was not after the warm-up: resident memory, memory in use by malloc
                    (glibc only), blocks and objects of Python; and after `close` threads, files, memory

A text is right or wrong on any machine; a time is worth only what the machine's quiet is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import dataclasses
import faulthandler
import gc
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import race

from tea_llm import (
    Cancelled,
    DeadlineExceeded,
    EngineBusy,
    GrammarError,
    LlmBackend,
    LlmCallParams,
    LlmCallResult,
    create_llm_backend,
    get_model_info,
)

N_LOOPS = 2  # that share the tasks
N_SESSIONS = 8  # files, which callers share too
N_TOLD = 20  # faults that are told in full
CACHE_RAM_MIB = 2  # full before the warm-up ends, so that what grows later is no cache
REST_S = 0.5  # until what is on its way out is gone

BEGINNINGS = ("Once upon a time", "Lily and Ben", "One day, a little girl", "Tom", "The red dog was", "Mom said", "A")
QUESTIONS = ("What is the capital of France?", "Hello!", "Tell me a story about a cat.", "Who are you?")
VECTOR_ERROR = 1e-4  # of a normalised vector's numbers, computed in another batch


class _OnPurposeError(Exception):
    """What a callback raises."""


# --- what is asked ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Ask:
    """A request, and what a fresh model answers to it alone."""

    params: LlmCallParams
    content: str = ""
    finish_reason: str | None = None
    vector: Sequence[float] = ()  # of the prompt

    def fault_of(self, said: Said) -> str | None:
        """What is wrong with an answer; None if nothing."""
        if not said.whole:
            return None if self.content.startswith(said.text) else "does not begin like the right text"
        if said.text != self.content:
            return "is not the right text"
        if said.finish_reason not in (None, self.finish_reason):
            return f"ended by {said.finish_reason} and not by {self.finish_reason}"
        return None


@dataclass(frozen=True)
class Said:
    """What a caller heard: the whole text, or its beginning where it left early; `end` says how."""

    text: str
    whole: bool = True
    finish_reason: str | None = None
    end: str = "whole"


def asks(n: int, seed: int, *, n_tokens: int, chats: bool) -> list[Ask]:
    """Requests that often begin alike; some are long, some chat, some are drawn with a seed, some end at a string."""
    draw = random.Random(seed)
    found: list[Ask] = []
    for i in range(n):
        long = i % 8 == 0
        prompt = " ".join(draw.choice(BEGINNINGS) for _ in range(draw.randint(12, 20) if long else draw.randint(1, 4)))
        sampling: dict[str, Any] = {"temperature": 0}
        if i % 8 == 3:
            sampling = {"temperature": 0.8, "seed": i}
        if i % 8 == 5:
            sampling["stop"] = ["the", "."]
        messages = [{"role": "user", "content": draw.choice(QUESTIONS)}] if chats and i % 4 == 2 else None
        max_tokens = draw.randint(1, n_tokens)
        found.append(Ask(LlmCallParams(prompt, max_tokens=max_tokens, messages=messages, **sampling)))
    return found


def answered_alone(ask: Ask, settings: Mapping[str, Any]) -> Ask:
    """The request with its answers, each by a model that has never heard anything."""
    with create_llm_backend(settings) as backend:
        result = backend.call(ask.params)
    with create_llm_backend(settings) as backend:
        vector = backend.embed(ask.params.prompt)
    return dataclasses.replace(ask, content=result.content, finish_reason=result.finish_reason, vector=vector)


# --- those who ask ----------------------------------------------------------------------------------------------------
@dataclass
class Caller:
    """A thread or task: how it draws, what it is doing, and since when it has heard nothing."""

    name: str
    crowd: Crowd
    draw: random.Random
    doing: str = ""
    heard_at: float | None = None  # None: it waits for nothing

    def hears(self, _: object = None) -> None:
        """It is being answered."""
        self.heard_at = time.monotonic()


@dataclass
class Crowd:
    """Everybody who asks, and what became of it."""

    backend: LlmBackend
    impatient: LlmBackend  # the same model; waits for a turn only shortly
    asks: Sequence[Ask]
    sessions_dir: Path
    ends: Counter[str] = field(default_factory=Counter)
    n_faults: int = 0
    faults: list[dict[str, Any]] = field(default_factory=list)  # the first of them
    callers: list[Caller] = field(default_factory=list)
    longest_silence_s: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def caller(self, name: str, seed: int) -> Caller:
        """A new one."""
        caller = Caller(name, self, random.Random(seed))
        with self.lock:
            self.callers.append(caller)
        return caller

    def next_ask(self, caller: Caller) -> Ask:
        """What the caller asks now."""
        ask = caller.draw.choice(self.asks)
        return dataclasses.replace(
            ask, params=dataclasses.replace(ask.params, priority=caller.draw.choice([0, 0, 0, 1]))
        )

    def take(self, caller: Caller, ask: Ask, said: Said | BaseException) -> None:
        """Count an answer, and note what is wrong with it."""
        fault = ask.fault_of(said) if isinstance(said, Said) else f"{type(said).__name__}: {said}"
        if fault is not None:
            text = said.text if isinstance(said, Said) else None
            asked = {"prompt": ask.params.prompt, "max_tokens": ask.params.max_tokens, "right": ask.content}
            self.find_fault(fault, way=caller.doing, said=text, **asked)
        with self.lock:
            self.ends[said.end if isinstance(said, Said) and fault is None else "wrong"] += 1

    def find_fault(self, fault: str, **where: Any) -> None:
        """Note what should not have been."""
        with self.lock:
            self.n_faults += 1
            if len(self.faults) < N_TOLD:
                self.faults.append({"fault": fault, **where})

    def longest_wait(self) -> tuple[float, Caller | None]:
        """Who has heard nothing for the longest time, and for how many seconds."""
        now = time.monotonic()
        waits = [(now - at, caller) for caller in self.callers if (at := caller.heard_at) is not None]
        return max(waits, key=lambda wait: wait[0], default=(0.0, None))


Way: TypeAlias = Callable[[Caller, Ask], Said]
AsyncWay: TypeAlias = Callable[[Caller, Ask], Awaitable[Said]]


def _whole(result: LlmCallResult, heard: Sequence[str] | None = None) -> Said:
    if heard is not None and "".join(heard) != result.content:
        raise AssertionError(f"the chunks {''.join(heard)!r} are not the result {result.content!r}")
    cancelled = result.finish_reason == "cancelled"
    return Said(result.content, not cancelled, result.finish_reason, "left" if cancelled else "whole")


def _part(heard: Sequence[str], end: str) -> Said:
    return Said("".join(heard), whole=False, end=end)


def _chat_options(params: LlmCallParams) -> dict[str, Any]:
    """What a chat is given beside its messages."""
    return {"max_tokens": params.max_tokens, "temperature": params.temperature, "priority": params.priority}


# --- ways to ask, for threads -----------------------------------------------------------------------------------------
def call(caller: Caller, ask: Ask) -> Said:
    """Wait for the whole text."""
    if ask.params.messages is not None:
        return _whole(caller.crowd.backend.chat(ask.params.messages, **_chat_options(ask.params)))
    return _whole(caller.crowd.backend.call(ask.params))


def read(caller: Caller, ask: Ask) -> Said:
    """Iterate a stream to its end, now and then slowly."""
    heard, stream = [], caller.crowd.backend.stream(ask.params)
    pause_s = caller.draw.choice([0, 0, 0.005])
    for chunk in stream:
        caller.hears()
        heard.append(chunk)
        time.sleep(pause_s)
    return _whole(stream.result, heard)


def read_in_part(caller: Caller, ask: Ask) -> Said:
    """Break out of a stream, or drop what iterates it."""
    heard: list[str] = []
    n = caller.draw.randint(0, 8)
    for chunk in caller.crowd.backend.stream(ask.params):
        heard.append(chunk)
        if len(heard) > n:
            break
    return _part(heard, "left")


def cancel_from_another_thread(caller: Caller, ask: Ask) -> Said:
    """Read on while another thread cancels."""
    stream = caller.crowd.backend.stream(ask.params)
    timer = threading.Timer(caller.draw.uniform(0, 0.3), stream.cancel)
    heard: list[str] = []
    timer.start()
    try:
        for chunk in stream:
            heard.append(chunk)
        return _whole(stream.result, heard)
    except Cancelled:  # before it was read
        return _part(heard, "left")
    finally:
        timer.cancel()
        timer.join()


def _ear(caller: Caller, heard: list[str]) -> Callable[[str], bool]:
    """A callback that keeps what it hears, and may end the text by False or by an error."""
    n, error = caller.draw.choice([None, None, 0, 1, 5]), caller.draw.random() < 0.5

    def hear(chunk: str) -> bool:
        caller.hears()
        heard.append(chunk)
        if n is None or len(heard) <= n:
            return True
        if error:
            raise _OnPurposeError
        return False

    return hear


def be_called(caller: Caller, ask: Ask) -> Said:
    """A callback for each chunk."""
    heard: list[str] = []
    try:
        return _whole(caller.crowd.backend.stream(ask.params, _ear(caller, heard)), heard)
    except _OnPurposeError:
        return _part(heard, "callback failed")


def be_short_of_time(caller: Caller, ask: Ask) -> Said:
    """A timeout that often is too short."""
    heard: list[str] = []
    params = dataclasses.replace(ask.params, timeout_s=caller.draw.choice([0, 0.001, 0.02, 0.2, 1]))
    try:
        return _whole(caller.crowd.backend.stream(params, heard.append), heard)
    except DeadlineExceeded:
        return _part(heard, "timeout")


def be_impatient(caller: Caller, ask: Ask) -> Said:
    """Wait for a turn only shortly."""
    try:
        return _whole(caller.crowd.impatient.call(ask.params))
    except EngineBusy:
        return _part([], "busy")


def go_on(caller: Caller, ask: Ask) -> Said:
    """A session file, which others write too."""
    path = caller.crowd.sessions_dir / f"{caller.draw.randrange(N_SESSIONS)}.session"
    result = caller.crowd.backend.call(dataclasses.replace(ask.params, session=path))
    if result.session_error is not None:
        raise AssertionError(result.session_error)
    return _whole(result)


def embed(caller: Caller, ask: Ask) -> Said:
    """The prompt's vector, among others."""
    others = [caller.draw.choice(caller.crowd.asks).params.prompt for _ in range(caller.draw.randrange(3))]
    return _check_vector(ask, caller.crowd.backend.embed([*others, ask.params.prompt]))


def _check_vector(ask: Ask, vectors: Sequence[Sequence[float]]) -> Said:
    error = max(abs(a - b) for a, b in zip(ask.vector, vectors[-1], strict=True))
    if error > VECTOR_ERROR:
        raise AssertionError(f"a vector that is off by {error}")
    return Said(ask.content, end="vector")


def be_refused(caller: Caller, ask: Ask) -> Said:
    """A grammar that is none."""
    try:
        return _whole(caller.crowd.backend.call(dataclasses.replace(ask.params, grammar="root ::= (")))
    except GrammarError:
        return _part([], "refused")


WAYS: tuple[Way, ...] = (
    call, call, read, read, read_in_part, cancel_from_another_thread, be_called, be_called, be_short_of_time,
    be_impatient, be_refused, go_on, embed,
)  # fmt: skip


# --- ways to ask, for tasks -------------------------------------------------------------------------------------------
async def acall(caller: Caller, ask: Ask) -> Said:
    """Wait for the whole text."""
    if ask.params.messages is not None:
        return _whole(await caller.crowd.backend.achat(ask.params.messages, **_chat_options(ask.params)))
    return _whole(await caller.crowd.backend.acall(ask.params))


async def aread(caller: Caller, ask: Ask) -> Said:
    """Iterate a stream to its end."""
    heard, stream = [], caller.crowd.backend.stream(ask.params)
    async for chunk in stream:
        caller.hears()
        heard.append(chunk)
    return _whole(stream.result, heard)


async def aread_in_part(caller: Caller, ask: Ask) -> Said:
    """Break out of a stream, in half of all cases without closing it."""
    heard: list[str] = []
    n, stream = caller.draw.randint(0, 8), caller.crowd.backend.stream(ask.params)
    async with stream if caller.draw.random() < 0.5 else contextlib.nullcontext():
        async for chunk in stream:
            heard.append(chunk)
            if len(heard) > n:
                break
    return _part(heard, "left")


async def abe_called(caller: Caller, ask: Ask) -> Said:
    """A coroutine for each chunk, which waits a turn of the loop."""
    heard: list[str] = []
    hear = _ear(caller, heard)

    async def hear_later(chunk: str) -> bool:
        await asyncio.sleep(0)
        return hear(chunk)

    try:
        return _whole(await caller.crowd.backend.astream(ask.params, hear_later), heard)
    except _OnPurposeError:
        return _part(heard, "callback failed")


async def be_cancelled(caller: Caller, ask: Ask) -> Said:
    """A task that another one cancels, at any moment."""
    heard: list[str] = []
    task = asyncio.create_task(caller.crowd.backend.astream(ask.params, heard.append))
    await asyncio.sleep(caller.draw.choice([0, 0, 0.001, 0.05, 0.5, 2]))
    task.cancel()
    try:
        return _whole(await task, heard)
    except asyncio.CancelledError:
        return _part(heard, "cancelled")


async def abe_short_of_time(caller: Caller, ask: Ask) -> Said:
    """A timeout of ours or of asyncio's that often is too short."""
    heard: list[str] = []
    patience_s, own = caller.draw.choice([0, 0.001, 0.02, 0.2, 1]), caller.draw.random() < 0.5
    params = dataclasses.replace(ask.params, timeout_s=patience_s if own else None)
    try:
        return _whole(
            await asyncio.wait_for(caller.crowd.backend.astream(params, heard.append), None if own else patience_s),
            heard,
        )
    except DeadlineExceeded:
        return _part(heard, "timeout")
    except TimeoutError:  # asyncio's
        return _part(heard, "cancelled")


async def abe_impatient(caller: Caller, ask: Ask) -> Said:
    """Wait for a turn only shortly."""
    try:
        return _whole(await caller.crowd.impatient.acall(ask.params))
    except EngineBusy:
        return _part([], "busy")


async def aembed(caller: Caller, ask: Ask) -> Said:
    """The prompt's vector."""
    return _check_vector(ask, await caller.crowd.backend.aembed([ask.params.prompt]))


ASYNC_WAYS: tuple[AsyncWay, ...] = (
    acall, acall, aread, aread, aread_in_part, abe_called, abe_called, be_cancelled, be_cancelled, abe_short_of_time,
    abe_impatient, aembed,
)  # fmt: skip


# --- all together -----------------------------------------------------------------------------------------------------
def run_thread(caller: Caller, end_at: float) -> None:
    """Ask in one way after the other until it is time."""
    while time.monotonic() < end_at:
        ask, way = caller.crowd.next_ask(caller), caller.draw.choice(WAYS)
        caller.doing = way.__name__
        caller.hears()
        try:
            said: Said | BaseException = way(caller, ask)
        except Exception as exc:  # noqa: BLE001 - whatever it is was not asked for
            said = exc
        caller.heard_at = None
        caller.crowd.take(caller, ask, said)


async def run_task(caller: Caller, end_at: float) -> None:
    """`run_thread` for a task."""
    while time.monotonic() < end_at:
        ask, way = caller.crowd.next_ask(caller), caller.draw.choice(ASYNC_WAYS)
        caller.doing = way.__name__
        caller.hears()
        try:
            said: Said | BaseException = await way(caller, ask)
        except Exception as exc:  # noqa: BLE001 - whatever it is was not asked for
            said = exc
        caller.heard_at = None
        caller.crowd.take(caller, ask, said)


def run_loop(crowd: Crowd, callers: Sequence[Caller], end_at: float) -> None:
    """An event loop with a task for each caller."""

    async def all_of_them() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: crowd.find_fault(f"in a loop: {what}"))
        await asyncio.gather(*(run_task(caller, end_at) for caller in callers))

    asyncio.run(all_of_them())


def run(crowd: Crowd, seconds: float, args: argparse.Namespace, *, seed: int) -> list[tuple[float, float]]:
    """Everybody asks for so many seconds. Gives resident memory by time: seconds, MB.

    Ends the process if somebody hears nothing for longer than `--patience`.
    """
    begun = time.monotonic()
    end_at = begun + seconds
    crowd.callers.clear()
    tasks = [crowd.caller(f"task {i}", seed + 1000 + i) for i in range(args.tasks)]
    threads = [crowd.caller(f"thread {i}", seed + i) for i in range(args.threads)]
    resident: list[tuple[float, float]] = []
    with ThreadPoolExecutor(args.threads + N_LOOPS) as pool:
        work = [pool.submit(run_loop, crowd, tasks[i::N_LOOPS], end_at) for i in range(N_LOOPS)]
        work += [pool.submit(run_thread, caller, end_at) for caller in threads]
        while not all(one.done() for one in work):
            time.sleep(0.05)
            wait_s, caller = crowd.longest_wait()
            crowd.longest_silence_s = max(crowd.longest_silence_s, wait_s)
            if caller is not None and wait_s > args.patience:
                hang(crowd, caller, wait_s)
            now = time.monotonic() - begun
            if not resident or now - resident[-1][0] > seconds / 20:
                resident.append((round(now, 1), round(resident_mb(), 1)))
    for one in work:
        one.result()
    return resident


def hang(crowd: Crowd, caller: Caller, wait_s: float) -> None:
    """Say who waits, and where every thread is; and end the process, which else would wait for them."""
    faulthandler.dump_traceback(sys.stderr)
    hung = f"{caller.name} has heard nothing for {wait_s:.1f} s, in {caller.doing}"
    print(hung, file=sys.stderr)
    report = {
        "bench": "soak",
        "hung": hung,
        "ends": crowd.ends,
        "faults": crowd.faults,
        "missed": ["hung"],
        "met": False,
    }
    print(json.dumps(report), flush=True)
    os._exit(1)


# --- what is left -----------------------------------------------------------------------------------------------------
def resident_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class _MallInfo(ctypes.Structure):  # malloc.h, mallinfo2
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def malloc_mb() -> float | None:
    """Memory that was asked of malloc and not given back; None without glibc."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return None
    mallinfo2.restype = _MallInfo
    info = mallinfo2()
    return float(info.uordblks + info.hblkhd) / 1e6


@dataclass(frozen=True)
class Footprint:
    """What a process holds while nobody asks."""

    resident_mb: float
    malloc_mb: float | None
    python_blocks: int
    python_objects: int
    threads: int
    files: int

    @classmethod
    def at_rest(cls) -> Footprint:
        """Of this process, after what is only still on its way out."""
        time.sleep(REST_S)
        gc.collect()
        return cls(
            resident_mb(),
            malloc_mb(),
            sys.getallocatedblocks(),
            len(gc.get_objects()),
            threading.active_count(),
            len(os.listdir("/proc/self/fd")),  # noqa: PTH208 - the descriptors are no paths to look at
        )


ALLOWED: Mapping[str, float] = {
    "resident_mb": 16,
    "malloc_mb": 0.5,
    "python_blocks": 600,
    "python_objects": 150,
    "threads": 0,
    "files": 0,
    "closed_mb": 4,
}
"""How much may be left, however many were answered: an answer that leaves one block each time shows in seconds."""


def growth(before: Footprint, after: Footprint) -> dict[str, float]:
    """What `after` has more than `before`; what the platform can't say is left out."""
    pairs = {f.name: (getattr(before, f.name), getattr(after, f.name)) for f in dataclasses.fields(Footprint)}
    return {name: round(b - a, 3) for name, (a, b) in pairs.items() if a is not None}


def main() -> int:
    """Soak, report; the exit status is 1 if a text was wrong, something was left, or somebody waited for too long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="any generative model; a small one answers more")
    parser.add_argument("--seconds", type=float, default=300, help="of the run (default: %(default)s)")
    parser.add_argument("--warm-up", type=float, default=30, help="seconds before it (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=64, help="that ask (default: %(default)s)")
    parser.add_argument("--tasks", type=int, default=200, help="that ask (default: %(default)s)")
    parser.add_argument("--asks", type=int, default=96, help="different requests (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=60, help="generated for each, at most (default: %(default)s)")
    parser.add_argument("--patience", type=float, default=60, help="seconds to hear nothing (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    args = parser.parse_args()

    llm = {"backend": "local", "fallback": "error", "model_path": str(args.model), "cache_ram_mib": CACHE_RAM_MIB}
    chats = get_model_info(args.model)["chat_format"] is not None
    known = [answered_alone(ask, {"llm": llm}) for ask in asks(args.asks, args.seed, n_tokens=args.tokens, chats=chats)]
    at_first = Footprint.at_rest()
    with (
        tempfile.TemporaryDirectory() as sessions_dir,
        create_llm_backend({"llm": llm}) as backend,
        create_llm_backend({"llm": {**llm, "queue_timeout": 0.05}}) as impatient,
    ):
        crowd = Crowd(backend, impatient, known, Path(sessions_dir))
        sys.unraisablehook = lambda what: crowd.find_fault(f"in {what.object!r}: {what.exc_value!r}")
        run(crowd, args.warm_up, args, seed=args.seed + 1)
        warm = Footprint.at_rest()
        crowd.ends.clear()
        resident = run(crowd, args.seconds, args, seed=args.seed + 2)
        soaked = Footprint.at_rest()
    closed = Footprint.at_rest()

    left = {**growth(warm, soaked), "threads": closed.threads - 1, "files": closed.files - at_first.files}
    if closed.malloc_mb is not None and at_first.malloc_mb is not None:
        left["closed_mb"] = round(closed.malloc_mb - at_first.malloc_mb, 3)
    missed = [name for name, most in ALLOWED.items() if left.get(name, 0) > most]
    missed += ["wrong"] * (crowd.n_faults > 0)
    report = {
        "ends": dict(crowd.ends),
        "distinct": len({ask.content for ask in known}),
        "wrong": crowd.n_faults,
        "faults": crowd.faults,
        "longest_silence_s": round(crowd.longest_silence_s, 2),
        "resident_mb": resident,
        "at_rest": {
            name: dataclasses.asdict(found)
            for name, found in (("first", at_first), ("warm", warm), ("soaked", soaked), ("closed", closed))
        },
        "left": left,
        "missed": missed,
    }
    facts = {"machine": race.machine(), "model": args.model.name, "seconds": args.seconds, "warm_up_s": args.warm_up}
    for name, n in sorted(crowd.ends.items()):
        print(f"{name:16} {n:8}", file=sys.stderr)
    print(f"left: {left}\nmissed: {', '.join(missed) or 'nothing'}", file=sys.stderr)
    print(json.dumps({"bench": "soak", **facts, **report, "met": not missed}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
