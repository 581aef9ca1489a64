"""The engine: one loaded model, and the one thread that computes with it.

Callers on any thread or event loop submit work and get a `Ticket`; the engine's thread answers one request at a time.
Python runs on that thread only to hand out text somebody waits for: each `run` computes without the GIL.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, TypeAlias

from . import _llama
from .errors import Cancelled, ContextOverflow, DeadlineExceeded, EngineClosed
from .params import Timings, Usage

if TYPE_CHECKING:
    import asyncio

__all__ = ["EmbedRequest", "Embedded", "Engine", "EngineOptions", "Generated", "TextRequest", "Ticket", "open_engine",
           "release_engine"]

logger = logging.getLogger("tea_llm")

_EMBED_BATCH = 512  # tokens computed at once; a longer text gets a larger context
_EMBED_TEXTS = 64  # sequences in one batch
_SMALL_MODEL_BYTES = 8 << 20  # below it the threads of a layer wait for each other longer than they compute
_FLASH_HEAD_SIZE = 64  # below it llama.cpp's flash attention slows generation down, to a third at size 8
_F16_HEAD_SIZE = 32  # below it llama.cpp multiplies F16 keys one by one; F32 is a third faster at size 8


@dataclass(frozen=True)
class EngineOptions:
    """How a model is loaded; engines with equal options and path are one engine."""

    n_ctx: int | None = None
    n_batch: int | None = None
    n_threads: int | None = None
    n_gpu_layers: int | None = None
    pooling: str | None = None


@dataclass(frozen=True)
class TextRequest:
    """A prompt to continue. `sampling` holds keyword arguments of `_llama.Sampler`; `stream`: a chunk per token."""

    prompt: str
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    stream: bool = False
    truncate: bool = False


@dataclass(frozen=True)
class Generated:
    """How a `TextRequest` ended; its text was handed out as chunks."""

    finish_reason: str
    usage: Usage
    timings: Timings


@dataclass(frozen=True)
class EmbedRequest:
    """Texts to embed."""

    texts: Sequence[str]
    normalize: bool = True
    truncate: bool = False
    on_progress: Callable[[int], object] | None = None  # called on the engine's thread with the texts done so far


@dataclass(frozen=True)
class Embedded:
    """The vectors: float32 bytes, row after row, `n_embd` to a row."""

    vectors: bytes
    n_embd: int
    usage: Usage


Outcome: TypeAlias = Generated | Embedded
_Event: TypeAlias = "str | Outcome | BaseException"


class Ticket:
    """The caller's end of a request: iterate its chunks (`for` or `async for`), then take `outcome`.

    A context manager: leaving it before the outcome is there, by any exception, cancels the request.
    """

    def __init__(self, timeout_s: float | None, loop: asyncio.AbstractEventLoop | None) -> None:
        self.outcome: Any = None  # Generated or Embedded, once the iteration has ended
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._loop = loop
        self._events: Any = _async_queue() if loop else SimpleQueue()
        self._cancel: Callable[[], object] | None = None
        self._lock = threading.Lock()
        self.cancelled = False

    # --- the caller's side --------------------------------------------------------------------------------------------
    def cancel(self) -> None:
        """End the request as soon as may be; what it has so far is still handed out."""
        with self._lock:
            self.cancelled = True
            cancel = self._cancel
        if cancel:
            cancel()

    def __iter__(self) -> Iterator[str]:
        while True:
            try:
                event = self._events.get(timeout=self._remaining_s())
            except Empty:
                raise self._too_late() from None
            if not isinstance(event, str):
                return self._finish(event)
            yield event

    async def __aiter__(self) -> AsyncIterator[str]:
        import asyncio

        while True:
            try:
                async with asyncio.timeout(self._remaining_s()):
                    event = await self._events.get()
            except TimeoutError:
                raise self._too_late() from None
            if not isinstance(event, str):
                self._finish(event)
                return
            yield event

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.outcome is None:
            self.cancel()

    def _remaining_s(self) -> float | None:
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0)

    def _too_late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"no complete answer within {self._timeout_s:g} s; raise timeout or lower max_tokens")

    def _finish(self, event: Outcome | BaseException) -> None:
        if isinstance(event, BaseException):
            raise event
        self.outcome = event

    # --- the engine's side --------------------------------------------------------------------------------------------
    def started(self, cancel: Callable[[], object]) -> None:
        """Say how the work is cancelled from now on."""
        with self._lock:
            self._cancel = cancel
            cancelled = self.cancelled
        if cancelled:
            cancel()

    def put(self, event: _Event) -> None:
        """Hand an event to the caller, wherever it waits."""
        if self._loop is None:
            self._events.put(event)
            return
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop was closed: nobody waits any more
            self.cancel()


def _async_queue() -> Any:
    import asyncio  # only where a loop runs, and so has imported it

    return asyncio.Queue()


class Engine:
    """A loaded model that any thread may ask. Made by `open_engine`; `close` frees it with the last user.

    Raises what `_llama.Model` raises; in a child process after fork() each request raises EngineClosed.
    """

    def __init__(
        self, path: str, options: EngineOptions, on_progress: Callable[[float], object] | None = None
    ) -> None:
        self.path = path
        self.options = options
        self._pid = os.getpid()
        self._work: deque[tuple[TextRequest | EmbedRequest, Ticket, float]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self.n_users = 0  # counted by open_engine and release_engine
        self._running: Ticket | None = None
        self._text: _llama.Context | None = None
        self._vectors: _llama.Context | None = None
        self._model: _llama.Model | None = _load(path, options, on_progress)
        self.n_ctx = fit_n_ctx(self.model, options.n_ctx)
        self.n_threads = fit_threads(options.n_threads, self.model.size_bytes)
        self._thread = threading.Thread(target=self._main, name=f"tea_llm {Path(path).stem}", daemon=True)
        self._thread.start()

    @property
    def model(self) -> _llama.Model:
        """The model, for reading. Raises EngineClosed after close()."""
        model = self._model
        if model is None:
            raise EngineClosed(f"the engine of {self.path} is closed; make a new backend")
        return model

    def submit(
        self,
        request: TextRequest | EmbedRequest,
        *,
        timeout_s: float | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> Ticket:
        """Queue `request`. With `loop` the ticket is iterated by `async for` on that loop, else by `for`.

        Raises EngineClosed after close() or in a child process.
        """
        if os.getpid() != self._pid:
            raise EngineClosed(
                f"{self.path} was loaded before fork(), and its threads are not in this process; make the backend in "
                "this process, or start processes with the 'spawn' method"
            )
        ticket = Ticket(timeout_s, loop)
        with self._wake:
            if self._closed:
                raise EngineClosed(f"the engine of {self.path} is closed; make a new backend")
            self._work.append((request, ticket, time.monotonic()))
            self._wake.notify()
        return ticket

    def close(self) -> None:
        """Cancel what runs, refuse what waits, free the model. Closing twice is fine."""
        if os.getpid() != self._pid:
            return
        with self._wake:
            self._closed = True
            running = self._running
            self._wake.notify()
        if running:
            running.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # --- the engine's thread ------------------------------------------------------------------------------------------
    def _main(self) -> None:
        while (work := self._next()) is not None:
            self._answer(*work)
            del work
        for _, ticket, _ in self._work:
            ticket.put(EngineClosed(f"the engine of {self.path} was closed before this request's turn"))
        self._work.clear()
        for context in (self._text, self._vectors):
            if context is not None:
                context.close()
        self._text = self._vectors = self._model = None

    def _next(self) -> tuple[TextRequest | EmbedRequest, Ticket, float] | None:
        with self._wake:
            self._running = None
            self._wake.wait_for(lambda: self._work or self._closed)
            if self._closed:
                return None
            work = self._work.popleft()
            self._running = work[1]
            return work

    def _answer(self, request: TextRequest | EmbedRequest, ticket: Ticket, queued_at: float) -> None:
        try:
            if ticket.cancelled:
                raise Cancelled("the request was cancelled before its turn")
            if isinstance(request, TextRequest):
                ticket.put(self._generate(request, ticket, time.monotonic() - queued_at))
            else:
                ticket.put(self._embed(request, ticket))
        except BaseException as exc:  # noqa: BLE001 - whatever it is belongs to the caller that waits
            ticket.put(exc)

    def _generate(self, request: TextRequest, ticket: Ticket, queue_s: float) -> Generated:
        model = self.model
        context = self._text_context()
        tokens = model.tokenize(request.prompt, parse_special=True)
        if request.truncate and len(tokens) >= context.n_ctx:
            tokens = _cut(tokens, context.n_ctx, request.max_tokens, keep_first=model.add_bos)
        sampler = _llama.Sampler(model, **request.sampling)
        generation = _llama.Generation(context, sampler, tokens, max_tokens=request.max_tokens, stop=request.stop)
        ticket.started(generation.cancel)
        while (text := generation.run(stream=request.stream)) is not None:
            ticket.put(text)
        usage = Usage(len(tokens), generation.n_generated)
        first_s = queue_s + generation.prompt_s if generation.n_generated else None
        timings = Timings(queue_s, generation.prompt_s, generation.generation_s, first_s, seed=sampler.seed)
        return Generated(generation.finish_reason or "stop", usage, timings)

    def _text_context(self) -> _llama.Context:
        if self._text is None or self._text.poisoned:
            n_batch = min(self.options.n_batch or 512, self.n_ctx)
            head_size = _head_size(self.model)
            self._text = _llama.Context(
                self.model,
                n_ctx=self.n_ctx,
                n_batch=n_batch,
                n_threads=self.n_threads,
                flash_attn=False if 0 < head_size < _FLASH_HEAD_SIZE else None,
                kv_f32=0 < head_size < _F16_HEAD_SIZE,
            )
        return self._text

    def _embed(self, request: EmbedRequest, ticket: Ticket) -> Embedded:
        model = self.model
        texts = [self._embed_tokens(i, text, request.truncate) for i, text in enumerate(request.texts)]
        context = self._embed_context(max(map(len, texts), default=1))
        ticket.started(context.cancel)
        vectors = bytearray()
        n_done = 0
        while n_done < len(texts):
            if ticket.cancelled:
                raise Cancelled("embedding was cancelled")
            n = _n_that_fit(texts, n_done, context.n_batch)
            vectors += context.embed(texts[n_done : n_done + n], normalize=request.normalize).cast("B")
            n_done += n
            if request.on_progress:
                request.on_progress(n_done)
        return Embedded(bytes(vectors), model.n_embd, Usage(sum(map(len, texts))))

    def _embed_tokens(self, i: int, text: str, truncate: bool) -> list[int]:
        tokens = self.model.tokenize(text)
        n_max = self.n_ctx
        if len(tokens) > n_max and truncate:
            tokens = [*tokens[: n_max - 1], tokens[-1]]  # keep the closing token that encoders want
        if len(tokens) > n_max:
            raise ContextOverflow(
                f"text {i} has {len(tokens)} tokens, but {self.path} takes {n_max}; shorten it or set truncate: true",
                n_prompt=len(tokens),
                n_ctx=n_max,
            )
        # A model that adds no token of its own has nothing to compute for "": a text of one space stands for it.
        return tokens or self.model.tokenize(" ")

    def _embed_context(self, n_longest: int) -> _llama.Context:
        context = self._vectors
        if context is None or context.poisoned or context.n_batch < n_longest:
            n_batch = min(max(_EMBED_BATCH, 1 << (n_longest - 1).bit_length()), self.n_ctx)
            self._vectors = None  # frees the smaller one before the larger one is made
            context = self._vectors = _llama.Context(
                self.model,
                n_ctx=n_batch,
                n_batch=n_batch,
                n_seq_max=_EMBED_TEXTS,
                n_threads=self.n_threads,
                embeddings=True,
                pooling=self.options.pooling or _pooling_of(self.model),
            )
        return context


def _load(path: str, options: EngineOptions, on_progress: Callable[[float], object] | None) -> _llama.Model:
    """The loaded model. On the caller's thread: memory of another would come from an arena that grows page by page."""
    n_gpu_layers = -1 if options.n_gpu_layers is None else options.n_gpu_layers
    loading = _llama.Loading()
    if on_progress is None:
        return _llama.Model(path, n_gpu_layers=n_gpu_layers, loading=loading)
    done = threading.Event()

    def report() -> None:
        while not done.wait(0.05):
            if on_progress(loading.fraction) is False:
                loading.cancel()

    reporter = threading.Thread(target=report, name="tea_llm loading", daemon=True)
    reporter.start()
    try:
        model = _llama.Model(path, n_gpu_layers=n_gpu_layers, loading=loading)
    finally:
        done.set()
        reporter.join()
    on_progress(1.0)
    return model


def _cut(tokens: list[int], n_ctx: int, max_tokens: int | None, *, keep_first: bool) -> list[int]:
    """The end of a prompt that is too long, with room for `max_tokens` but for half the context at most."""
    n_keep = max(n_ctx - (max_tokens or 1), n_ctx // 2, 1)
    if keep_first and n_keep > 1:
        return [tokens[0], *tokens[len(tokens) - n_keep + 1 :]]
    return tokens[len(tokens) - n_keep :]


def _n_that_fit(texts: Sequence[Sequence[int]], first: int, n_batch: int) -> int:
    n = n_tokens = 0
    for text in texts[first : first + _EMBED_TEXTS]:
        n_tokens += len(text)
        if n and n_tokens > n_batch:
            break
        n += 1
    return n


def _pooling_of(model: _llama.Model) -> str | None:
    """None where the file says how it pools; a model made to generate is pooled by the mean."""
    metadata = model.metadata
    return None if f"{metadata.get('general.architecture')}.pooling_type" in metadata else "mean"


def fit_n_ctx(model: _llama.Model, asked: int | None) -> int:
    """The smallest of what was asked, what the model was trained for, and what half the free memory holds.

    Says so when it cuts: a WARNING for what was asked, INFO for a default.
    """
    trained = model.n_ctx_train or 4096
    n_ctx, why = min(asked or trained, trained), f"the model was trained for {trained}"
    n_bytes = _kv_bytes_per_token(model)
    free = _free_memory_bytes()
    if n_bytes and free and n_ctx * n_bytes > free // 2:
        n_ctx, why = max(free // 2 // n_bytes // 256 * 256, 256), f"free memory is {free >> 20} MiB"
    if asked and n_ctx < asked:
        logger.warning("n_ctx cut from %d to %d: %s", asked, n_ctx, why)
    elif n_ctx < trained and not asked:
        logger.info("n_ctx is %d of the %d trained for: %s", n_ctx, trained, why)
    return n_ctx


def _kv_bytes_per_token(model: _llama.Model) -> int:
    """Size of one token's keys and values, or 0 where the file does not tell the shape."""
    head_size = _head_size(model)
    n_bytes = 4 if head_size < _F16_HEAD_SIZE else 2
    return 2 * n_bytes * model.n_layer * model.n_head_kv * head_size


def _head_size(model: _llama.Model) -> int:
    """Length of one attention head's keys, or 0 where the file does not tell."""
    metadata = model.metadata
    arch = metadata.get("general.architecture", "")
    length = metadata.get(f"{arch}.attention.key_length", "")
    if length.isdecimal():
        return int(length)
    n_head = metadata.get(f"{arch}.attention.head_count", "")
    return model.n_embd // int(n_head) if n_head.isdecimal() and n_head != "0" else 0


def _free_memory_bytes() -> int | None:
    """Memory that can be taken without swapping, or None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def fit_threads(asked: int | None, model_bytes: int) -> int:
    """Threads that pay for a model of this size: one for a tiny one, else one per physical core this process may use.

    More than there are CPUs is cut, with a WARNING: ggml's threads spin while they wait for each other, so that one
    without a CPU of its own holds up all others (measured: 2 CPUs, 4 threads, a hundredth of the speed).
    """
    cpus = _usable_cpus()
    if asked and asked > len(cpus):
        logger.warning("n_threads cut from %d to %d: this process may use no more CPUs", asked, len(cpus))
    if asked:
        return min(asked, len(cpus))
    if model_bytes < _SMALL_MODEL_BYTES:
        return 1
    return len({_core_of(cpu) for cpu in cpus})


def _usable_cpus() -> set[int]:
    try:
        return os.sched_getaffinity(0)
    except AttributeError:  # not on macOS and Windows
        return set(range(os.cpu_count() or 1))


def _core_of(cpu: int) -> str:
    """What names the physical core of a CPU: its siblings, or itself where the system does not tell."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings").read_text()
    except OSError:
        return str(cpu)


# --- the engines of this process --------------------------------------------------------------------------------------
_engines: dict[tuple[Any, ...], Engine] = {}
_engines_lock = threading.RLock()  # reentrant: a backend can be collected, and so released, in the middle of anything
_load_lock = threading.Lock()  # one load at a time, during which other engines are shared and released


def open_engine(
    path: str, options: EngineOptions, on_progress: Callable[[float], object] | None = None
) -> Engine:
    """The engine of a model file: the one that is loaded already if path and options are the same, else a new one.

    A file that was replaced on disk is another file. Give it back with `release_engine`. Raises what `Engine` raises.
    """
    key = (os.getpid(), *_identity(path), options)
    if engine := _shared(key):
        return engine
    with _load_lock:
        if engine := _shared(key):  # loaded while this thread waited
            return engine
        engine = Engine(path, options, on_progress)
        with _engines_lock:
            engine.n_users = 1
            _engines[key] = engine
        return engine


def _shared(key: tuple[Any, ...]) -> Engine | None:
    """The engine that is loaded already, with one more user."""
    with _engines_lock:
        engine = _engines.get(key)
        if engine is not None:
            engine.n_users += 1
        return engine if key in _engines else None  # its last backend may have been collected in between


def release_engine(engine: Engine) -> None:
    """Give an engine back; the last user's release frees the model."""
    with _engines_lock:
        engine.n_users -= 1
        if engine.n_users > 0:
            return
        for key in [key for key, value in _engines.items() if value is engine]:
            del _engines[key]
    engine.close()


def _identity(path: str) -> tuple[Any, ...]:
    real = os.path.realpath(path)
    try:
        found = Path(real).stat()
    except (OSError, ValueError):
        return (real,)  # Model says what is wrong with it
    return (real, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _forget_all() -> None:
    """In a child process after fork(): the engines' threads stayed with the parent, and so may have the locks."""
    global _engines_lock, _load_lock
    _engines_lock, _load_lock = threading.RLock(), threading.Lock()
    _engines.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


@atexit.register
def _close_all() -> None:
    # The engines' threads must be gone before the interpreter is: one that comes back from C then would be killed.
    for engine in list(_engines.values()):
        engine.close()
