"""A text stream: one thing for `for`, `async for` and callbacks, and nobody writes for a reader who has left."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tea_llm import (
    BackendPool,
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    EngineClosed,
    LlmBackend,
    LlmCallParams,
    LlmCallResult,
    LlmError,
    LocalLlmBackend,
    StreamError,
    TextStream,
)
from tea_llm.settings import LlmSettings

from .api_server import ApiServer, chat, delta, sse, stream

pytest.importorskip("tea_llm._llama", reason="tea_llm was built without llama.cpp")
pytest.importorskip("httpx", reason="tea_llm is installed without its API")
from tea_llm.api import ApiLlmBackend

from .random_models import with_trained_context

pytestmark = pytest.mark.usefixtures("bare_environment")

ENDLESS = LlmCallParams("count", temperature=0, max_tokens=None)
SOON_S = 8.0  # the endless texts take more than twice as long


class Endless(LlmBackend):
    """A user's own backend, with the five methods that it must have, whose text never ends by itself."""

    def __init__(self) -> None:
        self.n_writing = 0

    def call(self, params: LlmCallParams) -> LlmCallResult:
        return self.stream(params, lambda chunk: False)

    def chat(self, messages: Any, **options: Any) -> LlmCallResult:
        return self.call(LlmCallParams("", messages=messages, **options))

    def embed(self, text: Any, **options: Any) -> Any:
        return [1.0]

    def stream(self, params: LlmCallParams, callback: Callable[[str], object]) -> LlmCallResult:
        self.n_writing += 1
        try:
            while callback(" one") is not False:
                time.sleep(0.01)
        finally:
            self.n_writing -= 1
        return LlmCallResult("", "own", finish_reason="cancelled")

    def is_available(self) -> bool:
        return True


@dataclass(frozen=True)
class Writer:
    """A backend that writes without an end, and whether nobody writes any more."""

    backend: Any
    is_idle: Callable[[], bool]


@pytest.fixture(scope="module")
def endless_path(shared_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripted model with room for a text of minutes."""
    scripted = shared_models / "scripted-f16.gguf"
    return with_trained_context(scripted, 65536, tmp_path_factory.mktemp("endless") / "endless.gguf")


def _local(path: Path, server: ApiServer) -> Writer:
    backend = LocalLlmBackend(path, n_parallel=1)
    return Writer(backend, lambda: bool(backend.call(LlmCallParams("The", temperature=0, max_tokens=1)).content))


def _pool(path: Path, server: ApiServer) -> Writer:
    llm = {"backend": "local", "model_path": str(path), "n_parallel": 1, "api_base": server.base}
    backend = BackendPool().get(LlmSettings.from_mapping(llm))
    return Writer(backend, lambda: bool(backend.call(LlmCallParams("The", temperature=0, max_tokens=1)).content))


def _api(path: Path, server: ApiServer) -> Writer:
    words = [sse(delta(" one"), done=False)] * 2000
    server.replies = [stream(*words, pause_s=0.01)]
    return Writer(ApiLlmBackend({"llm": {"api_base": server.base, "model": "m"}}), server.all_closed)


def _own(path: Path, server: ApiServer) -> Writer:
    backend = Endless()

    def is_idle() -> bool:
        ends_at = time.monotonic() + 2
        while backend.n_writing and time.monotonic() < ends_at:
            time.sleep(0.01)
        return not backend.n_writing

    return Writer(backend, is_idle)


@pytest.fixture(params=[_local, _pool, _api, _own])
def writer(request: pytest.FixtureRequest, endless_path: Path, server: ApiServer) -> Iterator[Writer]:
    writer = request.param(endless_path, server)
    with writer.backend:
        yield writer


@pytest.fixture(params=[_local, _api])
def two_writers(request: pytest.FixtureRequest, endless_path: Path, server: ApiServer) -> Iterator[Writer]:
    """Those whose waiting can be interrupted."""
    writer = request.param(endless_path, server)
    with writer.backend:
        yield writer


@contextlib.contextmanager
def soon() -> Iterator[None]:
    """What runs in here waits for no text to end by itself."""
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < SOON_S


# --- leaving ----------------------------------------------------------------------------------------------------------
def by_break(stream: TextStream) -> None:
    for _ in stream:
        break


def by_an_exception(stream: TextStream) -> None:
    with contextlib.suppress(KeyError):
        for _ in stream:
            raise KeyError


def by_the_end_of_with(stream: TextStream) -> None:
    with stream as chunks:
        assert next(kept := iter(chunks))
    assert list(kept) == []


def by_close(stream: TextStream) -> None:
    for n, _ in enumerate(stream):
        assert n == 0
        stream.close()
        stream.close()


def by_dropping_the_iterator(stream: TextStream) -> None:
    chunks = iter(stream)
    next(chunks)
    del chunks


def by_a_collected_cycle(stream: TextStream) -> None:
    cycle: list[Any] = [iter(stream)]
    next(cycle[0])
    cycle.append(cycle)
    del cycle
    gc.collect()


LEAVES = [
    by_break, by_an_exception, by_the_end_of_with, by_close, by_dropping_the_iterator, by_a_collected_cycle
]  # fmt: skip


@pytest.mark.parametrize("leave", LEAVES)
def test_leaving_a_stream_ends_its_text(writer, leave):
    stream = writer.backend.stream(ENDLESS)
    with soon():
        leave(stream)
        assert writer.is_idle()
    with pytest.raises(StreamError, match="left early"):
        stream.result  # noqa: B018


async def by_async_break(stream: TextStream) -> None:
    async for _ in stream:
        break
    await asyncio.sleep(0.05)  # a connection is closed by the loop


async def by_async_exception(stream: TextStream) -> None:
    with contextlib.suppress(KeyError):
        async for _ in stream:
            raise KeyError
    await asyncio.sleep(0.05)


async def by_the_end_of_async_with(stream: TextStream) -> None:
    async with stream as chunks:
        async for _ in chunks:
            break


async def by_aclose(stream: TextStream) -> None:
    async for _ in stream:
        await stream.aclose()
        await stream.aclose()


async def by_a_cancelled_task(stream: TextStream) -> None:
    begun = asyncio.Event()

    async def read() -> None:
        async for _ in stream:
            begun.set()

    task = asyncio.create_task(read())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_a_task_cancelled_between_chunks(stream: TextStream) -> None:
    begun = asyncio.Event()

    async def read() -> None:
        async for _ in stream:
            begun.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(read())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.05)


async def by_a_timeout(stream: TextStream) -> None:
    async def read() -> None:
        async for _ in stream:
            pass

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(read(), 0.2)


async def by_the_end_of_the_loop(stream: TextStream) -> None:
    async def read() -> None:
        async for _ in stream:
            begun.set()

    begun = asyncio.Event()
    task = asyncio.create_task(read())
    await begun.wait()
    assert not task.done()


ASYNC_LEAVES: list[Callable[[TextStream], Awaitable[None]]] = [
    by_async_break, by_async_exception, by_the_end_of_async_with, by_aclose, by_a_cancelled_task,
    by_a_task_cancelled_between_chunks, by_a_timeout, by_the_end_of_the_loop,
]  # fmt: skip


@pytest.mark.parametrize("leave", ASYNC_LEAVES)
def test_leaving_an_async_stream_ends_its_text(writer, leave):
    stream = writer.backend.stream(ENDLESS)
    with soon():
        asyncio.run(leave(stream))
        assert writer.is_idle()
    with pytest.raises(StreamError, match="left early"):
        stream.result  # noqa: B018


def test_a_loop_that_is_closed_in_the_middle_ends_its_text(endless_path):
    async def begin() -> Any:
        chunks = aiter(backend.stream(ENDLESS))
        await anext(chunks)
        return chunks

    with LocalLlmBackend(endless_path, n_parallel=1) as backend, soon():
        loop = asyncio.new_event_loop()
        chunks = loop.run_until_complete(begin())
        loop.close()  # and nobody has told the stream
        assert backend.call(LlmCallParams("The", max_tokens=1)).content
        del chunks


def test_a_deadline_ends_a_stream(endless_path):
    with LocalLlmBackend(endless_path, n_parallel=1) as backend:
        with soon(), pytest.raises(DeadlineExceeded):
            list(backend.stream(LlmCallParams("count", max_tokens=None, timeout_s=0.3)))
        assert backend.call(LlmCallParams("The", max_tokens=1)).content


@pytest.mark.parametrize("way", ["for", "async for"])
def test_a_deadline_ends_a_text_of_which_more_is_there_than_was_read(endless_path, way):
    def read_slowly(stream: TextStream) -> None:
        for _, _ in zip(range(100), stream, strict=False):
            time.sleep(0.02)

    async def aread_slowly(stream: TextStream) -> None:
        chunks = aiter(stream)
        for _ in range(100):
            await anext(chunks)
            await asyncio.sleep(0.02)

    with LocalLlmBackend(endless_path, n_parallel=1) as backend:
        stream = backend.stream(LlmCallParams("count", max_tokens=None, timeout_s=0.3))
        with pytest.raises(DeadlineExceeded):
            read_slowly(stream) if way == "for" else asyncio.run(aread_slowly(stream))


def test_a_text_that_was_complete_in_time_may_be_read_later(endless_path):
    with LocalLlmBackend(endless_path, n_parallel=1) as backend:
        chunks = iter(backend.stream(LlmCallParams("count", temperature=0, max_tokens=20, timeout_s=2)))
        first = next(chunks)
        time.sleep(2.1)
        assert "".join([first, *chunks]) == " one two three four five" * 4


# --- cancel -----------------------------------------------------------------------------------------------------------
def test_who_cancels_and_reads_on_has_the_text_so_far(writer):
    stream = writer.backend.stream(ENDLESS)
    chunks = []
    with soon():
        for chunk in stream:
            chunks.append(chunk)
            if len(chunks) == 3:
                stream.cancel()
    assert len(chunks) == 3
    assert stream.result.content == "".join(chunks)
    assert stream.result.finish_reason == "cancelled"
    assert writer.is_idle()


def test_another_thread_may_cancel(writer):
    stream = writer.backend.stream(ENDLESS)
    threading.Timer(0.3, stream.cancel).start()
    with soon():
        text = "".join(stream)
    assert text
    assert (stream.result.content, stream.result.finish_reason) == (text, "cancelled")
    assert writer.is_idle()


@pytest.mark.parametrize("way", ["for", "async for"])
def test_a_cancelled_stream_waits_for_no_further_chunk(server, way):
    server.replies = [stream(sse(delta("a"), done=False), sse(delta("b")), pause_s=1.5)]
    with ApiLlmBackend({"llm": {"api_base": server.base, "model": "m"}}) as backend:
        chunks = backend.stream(ENDLESS)

        async def read() -> list[str]:
            return [chunk async for chunk in chunks]

        threading.Timer(1.8, chunks.cancel).start()
        begun = time.monotonic()
        assert (list(chunks) if way == "for" else asyncio.run(read())) == ["a"]
        assert time.monotonic() - begun < 2.5
        assert chunks.result.finish_reason == "cancelled"
        assert server.all_closed()


def test_a_cancel_after_the_end_harms_nobody(server):
    server.replies = [stream(sse(delta("a", "stop"), done=False)), chat("next")]
    with ApiLlmBackend({"llm": {"api_base": server.base, "model": "m"}}) as backend:
        first = backend.stream(ENDLESS)
        assert list(first) == ["a"]
        first.cancel()
        first.close()
        assert first.result.finish_reason == "stop"
        assert backend.call(ENDLESS).content == "next"
        assert server.n_connections == 1  # whose second user is not cut off


def test_a_stream_cancelled_in_the_queue_ends_at_once(endless_path):
    with LocalLlmBackend(endless_path, n_parallel=1) as backend, backend.stream(ENDLESS) as first:
        next(busy := iter(first))
        queued = backend.stream(ENDLESS)
        threading.Timer(0.2, queued.cancel).start()
        with soon():
            assert list(queued) == []
        assert (queued.result.content, queued.result.finish_reason) == ("", "cancelled")
        assert next(busy)


def test_a_stream_closed_before_it_is_read_asks_nobody(server):
    with ApiLlmBackend({"llm": {"api_base": server.base, "model": "m"}}) as backend:
        unread = backend.stream(ENDLESS)
        with backend.stream(ENDLESS) as closed:
            pass
        with pytest.raises(Cancelled, match="before it was read"):
            iter(closed)
        del unread
    assert server.seen == []


def test_a_stream_begun_in_a_loop_without_await_outlives_the_loop(writer):
    async def begin() -> Iterator[str]:
        hooks = sys.get_asyncgen_hooks()
        chunks = iter(writer.backend.stream(ENDLESS))
        next(chunks)
        assert sys.get_asyncgen_hooks() == hooks  # the loop's
        return chunks

    chunks = asyncio.run(begin())
    assert next(chunks)
    del chunks
    assert writer.is_idle()


# --- misuse -----------------------------------------------------------------------------------------------------------
def test_a_stream_has_no_result_before_its_end(writer):
    stream = writer.backend.stream(ENDLESS)
    with pytest.raises(StreamError, match="no result yet; read it to its end"):
        stream.result  # noqa: B018
    for _ in stream:
        with pytest.raises(StreamError, match="no result yet"):
            stream.result  # noqa: B018
        break


def test_a_stream_is_read_once(writer):
    stream = writer.backend.stream(ENDLESS)
    for _ in stream:
        for again in (iter, aiter, TextStream.read):
            with pytest.raises((StreamError, RuntimeError)):
                again(stream)
        break
    with pytest.raises(StreamError, match="read already; ask again"):
        list(stream)


def test_two_threads_can_not_read_one_stream(server):
    server.replies = [stream(sse(delta("a"), done=False), sse(delta("b", "stop")), pause_s=0.5)]
    with ApiLlmBackend({"llm": {"api_base": server.base, "model": "m"}}) as backend:
        chunks = iter(backend.stream(ENDLESS))
        first: list[str] = []
        thread = threading.Thread(target=lambda: first.extend(chunks))
        thread.start()
        time.sleep(0.2)
        with pytest.raises(StreamError, match="another thread"):
            next(chunks)
        thread.join()
        assert first == ["a", "b"]  # who was first is not disturbed


def test_two_tasks_can_not_read_one_stream(server):
    server.replies = [stream(sse(delta("a"), done=False), sse(delta("b", "stop")), pause_s=0.2)]

    async def read() -> list[Any]:
        chunks = aiter(backend.stream(ENDLESS))
        return await asyncio.gather(anext(chunks), anext(chunks), return_exceptions=True)

    with ApiLlmBackend({"llm": {"api_base": server.base, "model": "m"}}) as backend:
        first, second = asyncio.run(read())
        assert first == "a"
        assert isinstance(second, StreamError)


@pytest.mark.parametrize("params", [None, "Once"])
def test_what_is_no_request_is_refused_before_it_is_read(two_writers, params):
    with pytest.raises(BadRequest, match="give LlmCallParams"):
        two_writers.backend.stream(params)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("begun", [True, False])
def test_a_stream_does_not_go_on_in_a_child_process(endless_path, begun):
    with LocalLlmBackend(endless_path, n_parallel=1) as backend:
        stream = backend.stream(ENDLESS)
        chunks = iter(stream)
        if begun:
            next(chunks)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                try:
                    next(chunks)
                except EngineClosed as exc:
                    status = 0 if "in this" in str(exc) else 2
                stream.close()
                del chunks, stream
            finally:
                os._exit(status)
        with soon():
            assert os.waitpid(child, 0)[1] == 0
        assert next(chunks) == (" two" if begun else " one")  # the parent's goes on


# --- many -------------------------------------------------------------------------------------------------------------
def test_a_slow_reader_slows_nobody_down(endless_path):
    with LocalLlmBackend(endless_path, n_parallel=2) as backend:
        with contextlib.closing(backend.stream(ENDLESS)) as slow:
            next(unread := iter(slow))
            with soon():
                for _ in range(20):
                    assert len(list(backend.stream(LlmCallParams("count", temperature=0, max_tokens=20)))) > 1
        assert list(unread) == []


def test_streams_are_read_in_turns(endless_path):
    with LocalLlmBackend(endless_path) as backend:
        params = LlmCallParams("count", temperature=0, max_tokens=10)
        streams = [backend.stream(params) for _ in range(8)]
        assert [set(chunks) for chunks in zip(*streams, strict=True)] == [
            {f" {word}"} for word in ["one", "two", "three", "four", "five"] * 2
        ]
        assert {stream.result.content for stream in streams} == {backend.call(params).content}


# --- a backend of one's own -------------------------------------------------------------------------------------------
class Faulty(Endless):
    """Fails after a chunk."""

    def stream(self, params: LlmCallParams, callback: Callable[[str], object]) -> LlmCallResult:
        callback("a")
        raise LlmError("mine")


class Modern(Endless):
    """Has a stream without a callback itself."""

    def stream(self, params: LlmCallParams, callback: Callable[[str], object] | None = None) -> Any:
        return "its own" if callback is None else super().stream(params, callback)


def test_what_an_own_backend_raises_comes_out_of_its_stream():
    chunks: list[str] = []
    with pytest.raises(LlmError, match="mine"):
        chunks.extend(Faulty().stream(ENDLESS))
    chunks = []
    with pytest.raises(LlmError, match="mine"):
        asyncio.run(Faulty().astream(ENDLESS, chunks.append))
    assert chunks == ["a"]


def test_an_own_backend_may_have_streams_itself():
    assert Modern().stream(ENDLESS) == "its own"
    assert asyncio.run(Modern().astream(ENDLESS, lambda chunk: False)).content == " one"


def test_the_callback_of_an_own_backend_is_called_in_the_loop():
    threads: set[threading.Thread] = set()

    def take(chunk: str) -> bool:
        threads.add(threading.current_thread())
        return False

    assert asyncio.run(Endless().astream(ENDLESS, take)).content == " one"
    assert threads == {threading.main_thread()}


# --- the end of the program -------------------------------------------------------------------------------------------
LEFT = """
import asyncio, sys
from tea_llm import LlmCallParams, LocalLlmBackend

path, way = sys.argv[1:]
params = LlmCallParams("count", temperature=0, max_tokens=None)
backend = LocalLlmBackend(path)
stream = backend.stream(params)

async def begin():
    global chunks
    chunks = aiter(stream)
    await anext(chunks)

if way == "for":
    chunks = iter(stream)
    next(chunks)
else:
    asyncio.run(begin())
print("end of the program")
"""


@pytest.mark.parametrize("way", ["for", "async for"])
def test_a_program_ends_cleanly_with_a_stream_half_read(endless_path, way):
    environment = os.environ | {"SKBUILD_EDITABLE_VERBOSE": "0"}
    with soon():
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", LEFT, endless_path, way],
            capture_output=True, text=True, timeout=60, check=False, env=environment,
        )  # fmt: skip
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "end of the program\n")
