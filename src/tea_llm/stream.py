"""`TextStream`: an answer while it is being written, the same for `for`, `async for` and callbacks.

Who writes it is one async generator of chunks and at last the result, told by `stream.loop` how to wait: None is to
block, and then each piece takes one step of `run_blocking`.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from .blocking import next_blocking, run_blocking
from .errors import Cancelled, EngineClosed, StreamError
from .params import ChunkCallback, LlmCallResult
from .ticket import Cancellable, Ticket, hand_out

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Coroutine

__all__ = ["Pieces", "TextStream", "bridged"]

Pieces: TypeAlias = "AsyncGenerator[str | LlmCallResult, None]"
"""Chunks of text, none of them empty, and at last the result. Its `content` is left to the stream."""


class TextStream(Cancellable):
    """The text of one answer, chunk by chunk: `for chunk in stream`, or `async for`; after the last, `result`.

    The request is made when the reading begins, and one stream is read once. Leaving early cancels: `break`, an
    exception, a cancelled task, the end of `with` or `async with`, or dropping what iterates. Chunks wait for a slow
    reader without a bound, and slow nobody else down.

    Raises what the backend's `call` raises; StreamError when it is read twice or by two at once, and EngineClosed when
    it is read on in a child process.
    """

    def __init__(self, write: Callable[[TextStream], Pieces], *, in_chunks: bool = True) -> None:
        super().__init__()
        self.in_chunks = in_chunks  # False: nobody wants the text before it is whole
        self.loop: asyncio.AbstractEventLoop | None = None  # in which it is read
        self._write = write
        self._begun = False
        self._pieces: Pieces | None = None  # while there is more to come
        self._said: list[str] = []
        self._result: LlmCallResult | None = None
        self._reading = threading.Lock()

    @property
    def result(self) -> LlmCallResult:
        """The whole answer, once the last chunk was read. Raises StreamError before, and after leaving early."""
        if self._result is None:
            left = self._begun and self._pieces is None
            raise StreamError(
                "the stream has no result, for it was left early or failed; cancel() it and read on to keep a part"
                if left
                else "the stream has no result yet; read it to its end first"
            )
        return self._result

    def cancel(self) -> None:
        """End the text as soon as may be, from any thread; who reads on gets the end, and the text so far as `result`.

        The result's `finish_reason` is `cancelled` then.
        """
        if not self._begun or self._pieces is not None:
            super().cancel()

    def close(self) -> None:
        """Leave the stream: cancel what isn't written yet, and hand out no more. Closing twice is fine."""
        pieces = self._leave()
        if pieces is not None and self.loop is None:
            run_blocking(pieces.aclose())
        # In a loop: dropping the generator has the loop close it at its next turn.

    async def aclose(self) -> None:
        """`close`, and wait until the connection is given back."""
        if (pieces := self._leave()) is not None:
            await pieces.aclose()

    def read(self, on_chunk: ChunkCallback | None = None) -> LlmCallResult:
        """Read to the end, each chunk handed to `on_chunk`; where that returns False the text ends."""
        with self:
            for chunk in self:
                if on_chunk is not None and on_chunk(chunk) is False:
                    self.cancel()
        return self.result

    async def aread(self, on_chunk: ChunkCallback | None = None) -> LlmCallResult:
        """`read` for asyncio; `on_chunk` may be a coroutine function."""
        async with self:
            async for chunk in self:
                said = None if on_chunk is None else on_chunk(chunk)
                if (await said if inspect.isawaitable(said) else said) is False:
                    self.cancel()
        return self.result

    def __iter__(self) -> Iterator[str]:
        return self._begin(None)

    def __aiter__(self) -> AsyncIterator[str]:
        import asyncio  # only where a loop runs, and so has imported it

        return self._begin(asyncio.get_running_loop())

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> TextStream:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    def _begin(self, loop: asyncio.AbstractEventLoop | None) -> _Reader:
        with self._lock:
            if self._begun:
                raise StreamError("the stream was read already; ask again for another")
            if self.cancelled:
                raise Cancelled("the stream was closed before it was read; ask again for another")
            self._begun = True
        self.loop = loop
        self._pid = os.getpid()
        self._pieces = self._write(self)
        return _Reader(self)

    async def _next(self) -> str:
        if os.getpid() != self._pid:
            raise EngineClosed("the stream was begun before fork(), and is read by that process; ask again in this one")
        if not self._reading.acquire(blocking=False):
            raise StreamError("the stream is being read by another thread or task; give each a stream of its own")
        try:
            while self._pieces is not None:
                piece = await anext(self._pieces)
                if not isinstance(piece, str):
                    self._result = self._finished(piece)
                elif not self.cancelled:
                    self._said.append(piece)
                    return piece
            raise StopAsyncIteration
        except StopAsyncIteration:
            self._pieces = None
            raise
        except BaseException:
            self.cancel()
            self._pieces = None
            raise
        finally:
            self._reading.release()

    def _finished(self, result: LlmCallResult) -> LlmCallResult:
        content = "".join(self._said)
        if self.cancelled:
            return dataclasses.replace(result, content=content, finish_reason="cancelled")
        return dataclasses.replace(result, content=content)

    def _leave(self) -> Pieces | None:
        """Cancel, and have the pieces no more. Gives them to who is to close them; None where another reads them."""
        if os.getpid() != self._pid:
            return None
        self.cancel()
        if not self._reading.acquire(blocking=False):
            return None
        pieces, self._pieces = self._pieces, None
        self._reading.release()
        return pieces


class _Reader:
    """Iterates a stream, and closes it when it is dropped: a loop drops it by `break` and by an exception."""

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> str:
        return next_blocking(self)

    def __aiter__(self) -> _Reader:
        return self

    def __anext__(self) -> Coroutine[Any, Any, str]:
        return self._stream._next()

    def __del__(self) -> None:
        self._stream.close()


def bridged(ask: Callable[[ChunkCallback], LlmCallResult]) -> TextStream:
    """The stream of an answer that is only to be had by a callback: `ask` runs in a thread of its own."""
    return TextStream(lambda stream: _pieces_of(ask, stream))


async def _pieces_of(ask: Callable[[ChunkCallback], LlmCallResult], stream: TextStream) -> Pieces:
    ticket: Ticket[LlmCallResult] = Ticket(loop=stream.loop)
    stream.cancel_by(ticket.cancel)

    def on_chunk(chunk: str) -> bool:
        hand_out([(ticket, chunk, None)])
        return not ticket.cancelled

    def run() -> None:
        try:
            end: Any = ask(on_chunk)
        except BaseException as exc:  # noqa: BLE001 - whatever it is belongs to the caller that waits
            end = exc
        hand_out([(ticket, None, end)])

    threading.Thread(target=run, name="tea_llm stream", daemon=True).start()
    with ticket:
        async for chunk in ticket:
            yield chunk
    yield ticket.outcome
