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
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from .blocking import next_blocking, run_blocking
from .errors import Cancelled, EngineClosed, StreamError
from .params import ChunkCallback, Delta, LlmCallResult
from .ticket import Cancellable, Ticket, hand_out

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Coroutine

__all__ = ["Deltas", "Pieces", "TextStream", "bridged"]

Pieces: TypeAlias = "AsyncGenerator[str | Delta | LlmCallResult, None]"
"""Chunks of text, none of them empty, or deltas where there is more to say than that; and at last the result.

Its `content` and `reasoning` are left to the stream.
"""

_Item = TypeVar("_Item")  # str or Delta


class TextStream(Cancellable):
    """The text of one answer, chunk by chunk: `for chunk in stream`, or `async for`; after the last, `result`.

    Thinking and tool calls are in the result, and in `deltas()` while they are written.

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
        self._thought: list[str] = []
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
        return self._begin(None, in_deltas=False)

    def __aiter__(self) -> AsyncIterator[str]:
        return self._begin(_running_loop(), in_deltas=False)

    def deltas(self) -> Deltas:
        """The answer with its thinking and tool calls: `for delta in stream.deltas()`, or `async for`, each a Delta."""
        return Deltas(self)

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> TextStream:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    def _begin(self, loop: asyncio.AbstractEventLoop | None, *, in_deltas: bool) -> _Reader[Any]:
        with self._lock:
            if self._begun:
                raise StreamError("the stream was read already; ask again for another")
            if self.cancelled:
                raise Cancelled("the stream was closed before it was read; ask again for another")
            self._begun = True
        self.loop = loop
        self._pid = os.getpid()
        self._pieces = self._write(self)
        return _Reader(self, in_deltas)

    async def _next(self, in_deltas: bool) -> Any:
        """The next chunk of text or, `in_deltas`, the next Delta."""
        if os.getpid() != self._pid:
            raise EngineClosed("the stream was begun before fork(), and is read by that process; ask again in this one")
        if not self._reading.acquire(blocking=False):
            raise StreamError("the stream is being read by another thread or task; give each a stream of its own")
        try:
            while self._pieces is not None:
                piece = await anext(self._pieces)
                if isinstance(piece, LlmCallResult):
                    self._result = self._finished(piece)
                elif self.cancelled:
                    continue
                elif isinstance(piece, str):
                    self._said.append(piece)
                    return Delta(piece) if in_deltas else piece
                else:
                    self._said.append(piece.content)
                    self._thought.append(piece.reasoning)
                    if in_deltas or piece.content:
                        return piece if in_deltas else piece.content
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
        finish_reason = "cancelled" if self.cancelled else result.finish_reason
        return dataclasses.replace(
            result,
            content="".join(self._said),
            reasoning="".join(self._thought) or None,
            finish_reason=finish_reason,
        )

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


class Deltas:
    """An answer with its thinking and tool calls, while it is written; read once, like the stream that it is of."""

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[Delta]:
        return self._stream._begin(None, in_deltas=True)

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self._stream._begin(_running_loop(), in_deltas=True)


class _Reader(Generic[_Item]):
    """Iterates a stream, and closes it when it is dropped: a loop drops it by `break` and by an exception."""

    def __init__(self, stream: TextStream, in_deltas: bool) -> None:
        self._stream = stream
        self._in_deltas = in_deltas

    def __iter__(self) -> _Reader[_Item]:
        return self

    def __next__(self) -> _Item:
        return next_blocking(self)

    def __aiter__(self) -> _Reader[_Item]:
        return self

    def __anext__(self) -> Coroutine[Any, Any, _Item]:
        return self._stream._next(self._in_deltas)

    def __del__(self) -> None:
        self._stream.close()


def _running_loop() -> asyncio.AbstractEventLoop:
    import asyncio  # only where a loop runs, and so has imported it

    return asyncio.get_running_loop()


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
