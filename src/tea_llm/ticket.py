"""The two ends of a request: the caller waits for chunks and an outcome, the engine hands them out."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar, cast

from .blocking import next_blocking
from .errors import DeadlineExceeded, EngineBusy

if TYPE_CHECKING:
    import asyncio

__all__ = ["Cancellable", "Ticket", "fall_silent", "hand_out"]

_Outcome = TypeVar("_Outcome")
_Event: TypeAlias = "tuple[str | None, Any]"  # a chunk, or None and the outcome or error that ends the request


class Cancellable:
    """Something that any thread may cancel, whoever works on it at that time. In a child of fork() nobody does."""

    def __init__(self) -> None:
        self.cancelled = False
        self._cancel: Callable[[], object] | None = None
        self._lock = threading.RLock()  # a collection of garbage may cancel in the midst of what is below
        self._pid = os.getpid()

    def cancel(self) -> None:
        """End it as soon as may be."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self.cancelled = True
            if self._cancel is not None:
                self._cancel()

    def cancel_by(self, cancel: Callable[[], object] | None) -> None:
        """Say how it is cancelled from now on; it is at once where somebody has asked for it already."""
        with self._lock:
            self._cancel = cancel
            if self.cancelled and cancel is not None:
                cancel()


class Ticket(Cancellable, Generic[_Outcome]):
    """The caller's end of a request: iterate its chunks (`for` or `async for`), then take `outcome`.

    A context manager: leaving it before the outcome is there, by any exception, cancels the request. Without `loop` it
    waits by blocking, in `async for` too.

    Raises what the request failed with, DeadlineExceeded after `timeout_s`, and EngineBusy when it was not begun within
    `queue_timeout_s`.
    """

    def __init__(
        self,
        timeout_s: float | None = None,
        queue_timeout_s: float | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__()
        now = time.monotonic()
        self.outcome: Any = None  # once the iteration has ended
        self.loop = loop
        self._timeout_s, self._queue_timeout_s = timeout_s, queue_timeout_s
        self._deadline = None if timeout_s is None else now + timeout_s
        self._turn_by = None if queue_timeout_s is None else now + queue_timeout_s
        self._events: Any = _async_queue() if loop else SimpleQueue()
        self.begun = False  # whether the request has had its turn
        self._ended = False  # whether what ends it has been handed out, and at most waits to be read

    # --- the caller's side --------------------------------------------------------------------------------------------
    def __iter__(self) -> Ticket[_Outcome]:
        return self

    def __next__(self) -> str:
        return next_blocking(self)

    def __aiter__(self) -> Ticket[_Outcome]:
        return self

    async def __anext__(self) -> str:
        while True:
            try:
                chunk, end = await self._next_event()
            except (Empty, TimeoutError):
                self._check_patience()
                continue
            if chunk is not None:
                if not self._ended:
                    self._check_patience()
                return chunk
            if isinstance(end, BaseException):
                raise end
            self.outcome = end
            raise StopAsyncIteration

    async def _next_event(self) -> _Event:
        """The next event. Raises Empty or TimeoutError when it is time to look at the clock."""
        patience_s = self._patience_s()
        if self.loop is None:
            return cast(_Event, self._events.get(timeout=patience_s))
        import asyncio

        async with asyncio.timeout(patience_s):
            return cast(_Event, await self._events.get())

    def __enter__(self) -> Ticket[_Outcome]:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.outcome is None:
            self.cancel()

    def _patience_s(self) -> float | None:
        """Seconds until there is something to say about the time that has passed."""
        limits = [limit for limit in (self._deadline, None if self.begun else self._turn_by) if limit is not None]
        return max(min(limits) - time.monotonic(), 0) if limits else None

    def _check_patience(self) -> None:
        now = time.monotonic()
        if self._deadline is not None and now >= self._deadline:
            raise DeadlineExceeded(
                f"no complete answer within {self._timeout_s:g} s; raise timeout or lower max_tokens"
            )
        if self._turn_by is not None and now >= self._turn_by and not self.begun:
            raise EngineBusy(
                f"the model was busy with other requests for {self._queue_timeout_s:g} s; raise queue_timeout or "
                "n_parallel"
            )

    # --- the engine's side --------------------------------------------------------------------------------------------
    def cancel_by(self, cancel: Callable[[], object] | None, *, begun: bool = False) -> None:
        """Say how the request is cancelled from now on, and with `begun` that it has its turn."""
        self.begun = begun
        super().cancel_by(cancel)

    def put(self, chunk: str | None, end: Any = None) -> None:
        """Hand out a chunk, or None and what ends the request. With a loop: only on the loop's own thread."""
        self._ended = chunk is None
        self._events.put_nowait((chunk, end))


_program_ends = False


def fall_silent() -> None:
    """Hand out nothing from now on: the program ends, and only daemon threads, which end with it, wait for anything."""
    global _program_ends
    _program_ends = True


def hand_out(news: Iterable[tuple[Ticket[Any], str | None, Any]]) -> None:
    """Put events into their tickets wherever their callers wait; a loop is woken once for all of its own."""
    if _program_ends:
        return
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket[Any], str | None, Any]]] = {}
    for event in news:
        ticket, chunk, end = event
        if ticket.loop is None:
            ticket.put(chunk, end)
        else:
            by_loop.setdefault(ticket.loop, []).append(event)
    for loop, events in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put_all, events)
        except RuntimeError:  # the loop was closed: nobody waits any more
            for ticket, _, _ in events:
                ticket.cancel()


def _put_all(events: Iterable[tuple[Ticket[Any], str | None, Any]]) -> None:
    for ticket, chunk, end in events:
        ticket.put(chunk, end)


def _async_queue() -> Any:
    import asyncio  # only where a loop runs, and so has imported it

    return asyncio.Queue()
