"""HTTP over httpx, blocking or in an event loop behind one face, and httpx's errors as ours.

Whoever asks is written once, as a coroutine over an `Io`. With `Clients.asynchronous()` it waits in the event loop;
with `Clients.blocking()` it never suspends, which is what `run_blocking` needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from typing import Any, Final

import httpx
import httpx_sse

from .api_format import Request
from .errors import (
    ApiConnectionError,
    ApiResponseError,
    ApiStatusError,
    ApiTimeout,
    EngineClosed,
    LlmError,
    SettingsError,
)

__all__ = ["ERRORS", "HTTPX_ERRORS", "Clients", "Io", "break_off", "error_class"]

_CLOSED: Final = "this ApiLlmBackend was closed; make a new one"

ERRORS: Final[Mapping[type[Exception], type[LlmError]]] = {
    # https://www.python-httpx.org/exceptions/; a class without a row of its own takes its nearest parent's
    httpx.TimeoutException: ApiTimeout,
    httpx.TransportError: ApiConnectionError,  # NetworkError, ProxyError, RemoteProtocolError …
    httpx.LocalProtocolError: SettingsError,
    httpx.UnsupportedProtocol: SettingsError,
    httpx.InvalidURL: SettingsError,
    httpx.CookieConflict: ApiResponseError,
    httpx.DecodingError: ApiResponseError,
    httpx.TooManyRedirects: ApiResponseError,
    httpx.HTTPStatusError: ApiStatusError,
    httpx.StreamError: ApiResponseError,
    httpx.RequestError: ApiConnectionError,
    httpx.HTTPError: ApiConnectionError,
    httpx_sse.SSEError: ApiResponseError,
}

HTTPX_ERRORS: Final = (httpx.HTTPError, httpx.InvalidURL, httpx.CookieConflict, httpx.StreamError)


def error_class(kind: type[Exception]) -> type[LlmError]:
    """Our class for one of httpx's."""
    return next(ERRORS[parent] for parent in kind.__mro__ if parent in ERRORS)


class _TimedBody(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A response body that raises ReadTimeout at the first bytes after `ends_at`, however lively the server is."""

    def __init__(self, body: Any, ends_at: float) -> None:
        self._body = body
        self._ends_at = ends_at

    def _in_time(self, chunk: bytes) -> bytes:
        if time.monotonic() > self._ends_at:
            raise httpx.ReadTimeout("the answer took too long")
        return chunk

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._body:
            yield self._in_time(chunk)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._body:
            yield self._in_time(chunk)

    def close(self) -> None:
        self._body.close()

    async def aclose(self) -> None:
        await self._body.aclose()


class Io(ABC):
    """The few things that differ between blocking and asyncio."""

    @abstractmethod
    async def send(self, request: Request, timeout_s: float | None) -> httpx.Response:
        """The response, its body unread."""

    @abstractmethod
    async def read(self, response: httpx.Response) -> None:
        """Read the body, which gives the connection back; it is `response.text` then."""

    @abstractmethod
    def events(self, response: httpx.Response) -> AsyncGenerator[httpx_sse.ServerSentEvent, None]:
        """The body's events, as they come."""

    @abstractmethod
    async def close(self, response: httpx.Response) -> None:
        """Give the connection back, or close it when the body wasn't read to its end."""

    @abstractmethod
    async def sleep(self, seconds: float) -> None:
        """Wait."""


class _BlockingIo(Io):
    """Nothing here suspends."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    async def send(self, request: Request, timeout_s: float | None) -> httpx.Response:
        return _timed(self._client.send(_built(self._client, request, timeout_s), stream=True), timeout_s)

    async def read(self, response: httpx.Response) -> None:
        with contextlib.closing(response):
            response.read()

    async def events(self, response: httpx.Response) -> AsyncGenerator[httpx_sse.ServerSentEvent, None]:
        for event in httpx_sse.EventSource(response).iter_sse():
            yield event

    async def close(self, response: httpx.Response) -> None:
        response.close()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class _AsyncioIo(Io):
    """Waits in the running loop; the callback may be a coroutine function."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def send(self, request: Request, timeout_s: float | None) -> httpx.Response:
        return _timed(await self._client.send(_built(self._client, request, timeout_s), stream=True), timeout_s)

    async def read(self, response: httpx.Response) -> None:
        async with contextlib.aclosing(response):
            await response.aread()

    def events(self, response: httpx.Response) -> AsyncGenerator[httpx_sse.ServerSentEvent, None]:
        return httpx_sse.EventSource(response).aiter_sse()

    async def close(self, response: httpx.Response) -> None:
        await response.aclose()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def _built(client: httpx.Client | httpx.AsyncClient, request: Request, timeout_s: float | None) -> httpx.Request:
    if client.is_closed:
        raise EngineClosed(_CLOSED)
    built = client.build_request(
        request.method, request.url, headers=request.headers, content=request.content(), timeout=timeout_s
    )
    built.extensions["sent_at"] = time.monotonic()
    return built


def _timed(response: httpx.Response, timeout_s: float | None) -> httpx.Response:
    if timeout_s is not None:
        response.stream = _TimedBody(response.stream, response.request.extensions["sent_at"] + timeout_s)
    response.encoding = "utf-8-sig"  # what JSON and event streams are, whatever the header says
    return response


def break_off(response: httpx.Response) -> None:
    """End the connection under whoever reads it, from any thread; he finds that the body breaks off."""
    stream = response.extensions["network_stream"]
    with contextlib.suppress(OSError):
        stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


class Clients:
    """One blocking client per process, and one asyncio client per event loop, for its sockets can't leave it."""

    def __init__(self) -> None:
        self.closed = False
        self._lock = threading.Lock()
        self._by_process: dict[int, httpx.Client] = {}  # a child of fork() must not write into its parent's sockets
        self._by_loop: dict[asyncio.AbstractEventLoop, tuple[httpx.AsyncClient, AsyncGenerator[None, None]]] = {}

    def blocking(self) -> Io:
        """For code that isn't a coroutine, in any thread. Raises EngineClosed after close()."""
        with self._lock:
            self._check_open()
            client = self._by_process.get(os.getpid())
            if client is None:
                client = self._by_process[os.getpid()] = httpx.Client(verify=_tls_context())
            return _BlockingIo(client)

    async def asynchronous(self) -> Io:
        """For the running event loop. Raises EngineClosed after close()."""
        loop = asyncio.get_running_loop()
        with self._lock:
            self._check_open()
            if loop in self._by_loop:
                return _AsyncioIo(self._by_loop[loop][0])
            for ended in [other for other in self._by_loop if other.is_closed()]:
                del self._by_loop[ended]
            client = httpx.AsyncClient(verify=_tls_context())
            keeper = _closed_with_its_loop(client)
            self._by_loop[loop] = client, keeper
        await anext(keeper)
        return _AsyncioIo(client)

    def close(self) -> None:
        """Close every client; a loop that is running closes its own at its next turn."""
        with self._lock:
            self.closed = True
            blocking, by_loop = self._by_process.pop(os.getpid(), None), dict(self._by_loop)
            self._by_loop.clear()
        if blocking is not None:
            blocking.close()
        for loop, (_, keeper) in by_loop.items():
            if loop.is_running():
                asyncio.run_coroutine_threadsafe(_end(keeper), loop)
            elif not loop.is_closed() and not _in_a_loop():
                loop.run_until_complete(_end(keeper))

    def _check_open(self) -> None:
        if self.closed:
            raise EngineClosed(_CLOSED)


@functools.cache
def _tls_context() -> ssl.SSLContext:
    """One for the process: reading the certificates takes tens of milliseconds."""
    return httpx.create_ssl_context()


async def _closed_with_its_loop(client: httpx.AsyncClient) -> AsyncGenerator[None, None]:
    """Closes `client` when it is closed itself, which asyncio.run does with each open async generator at its end."""
    try:
        yield
    finally:
        await client.aclose()


async def _end(generator: AsyncGenerator[None, None]) -> None:
    await generator.aclose()


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
