"""What a backend is, which there are, and who answers when one can't."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar, overload

from .errors import BadRequest, EngineClosed, EngineError, LlmError, ModelError, ModelNotFound, OutOfMemory
from .models import packaged_model, resolve_model_path
from .params import ChunkCallback, LlmCallParams, LlmCallResult, LlmEmbedResult, Message
from .settings import LlmSettings
from .stream import Pieces, TextStream, bridged

__all__ = ["BackendPool", "LlmBackend", "RequestBackend", "create_llm_backend"]

logger = logging.getLogger("tea_llm")

_R = TypeVar("_R")
_Self = TypeVar("_Self", bound="LlmBackend")


async def _to_thread(function: Callable[..., _R], *args: Any, **kwargs: Any) -> _R:
    import asyncio  # 50 ms to import, which a program without an event loop need not wait for

    return await asyncio.to_thread(function, *args, **kwargs)


def _check_request(params: LlmCallParams, on_chunk: ChunkCallback | None) -> None:
    """Raise BadRequest for a request or a callback that is none."""
    if not isinstance(params, LlmCallParams):
        raise BadRequest(f"the request is {params!r:.60}; give LlmCallParams(prompt, …)")
    if on_chunk is not None and not callable(on_chunk):
        raise BadRequest(f"the callback is {on_chunk!r:.60}; give a callable that takes one chunk of text")


def _wants_callback(own: Callable[..., Any]) -> bool:
    *_, last = inspect.signature(own).parameters.values()
    return last.default is inspect.Parameter.empty


def _also_without_callback(own: Callable[..., LlmCallResult]) -> Callable[..., Any]:
    """A backend's own `stream`, which without a callback gives a TextStream."""

    @functools.wraps(own)
    def stream(self: LlmBackend, params: LlmCallParams, callback: ChunkCallback | None = None, **more: Any) -> Any:
        if callback is None:
            return bridged(lambda on_chunk: own(self, params, on_chunk, **more))
        return own(self, params, callback, **more)

    return stream


class LlmBackend(ABC):
    """A language model that can be asked. A context manager: leaving it closes it.

    A backend of your own implements the abstract methods, `stream` only with its callback; its async twins and streams
    then run them in a thread. Errors are `LlmError`s; `BadRequest` means that no backend could answer.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = vars(cls).get("stream")
        if inspect.isfunction(own) and _wants_callback(own):
            cls.stream = _also_without_callback(own)  # type: ignore[method-assign]

    @abstractmethod
    def call(self, params: LlmCallParams) -> LlmCallResult:
        """Continue `params.prompt`, or answer `params.messages`."""

    @abstractmethod
    def chat(self, messages: Sequence[Message], **options: Any) -> LlmCallResult:
        """Answer `messages`; `options` are fields of `LlmCallParams`."""

    @abstractmethod
    def embed(self, text: str | Sequence[str], **options: Any) -> Any:
        """The vector of a text, or a list of vectors of a list of texts."""

    @abstractmethod
    def stream(self, params: LlmCallParams, callback: ChunkCallback) -> LlmCallResult:
        """As `call`, handing each chunk of text to `callback` as soon as it is there; without one, a TextStream.

        The signature is what a backend of your own has to write; those of the package have the other one too.
        """

    @abstractmethod
    def is_available(self) -> bool:
        """Whether a call could be answered now, as far as can be told without making one."""

    @overload
    def stream_chat(self, messages: Sequence[Message], callback: ChunkCallback, **options: Any) -> LlmCallResult: ...

    @overload
    def stream_chat(self, messages: Sequence[Message], callback: None = None, **options: Any) -> TextStream: ...

    def stream_chat(
        self, messages: Sequence[Message], callback: ChunkCallback | None = None, **options: Any
    ) -> LlmCallResult | TextStream:
        """As `chat`, handing each chunk of text to `callback` as soon as it is there; without one, a TextStream."""
        stream: Any = self.stream  # see __init_subclass__
        answer: LlmCallResult | TextStream = stream(LlmCallParams("", messages=messages, **options), callback)
        return answer

    def close(self) -> None:  # noqa: B027  a backend that holds nothing has nothing to write here
        """Give back what the backend holds. Closing twice is fine; a call after that raises EngineClosed."""

    async def acall(self, params: LlmCallParams) -> LlmCallResult:
        """`call` for asyncio."""
        return await _to_thread(self.call, params)

    async def achat(self, messages: Sequence[Message], **options: Any) -> LlmCallResult:
        """`chat` for asyncio."""
        return await _to_thread(self.chat, messages, **options)

    async def aembed(self, text: str | Sequence[str], **options: Any) -> Any:
        """`embed` for asyncio."""
        return await _to_thread(self.embed, text, **options)

    async def astream(self, params: LlmCallParams, callback: ChunkCallback) -> LlmCallResult:
        """`stream` for asyncio; `callback` may be a coroutine function."""
        return await bridged(lambda on_chunk: self.stream(params, on_chunk)).aread(callback)

    async def astream_chat(self, messages: Sequence[Message], callback: ChunkCallback, **options: Any) -> LlmCallResult:
        """`stream_chat` for asyncio; `callback` may be a coroutine function."""
        return await self.astream(LlmCallParams("", messages=messages, **options), callback)

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class RequestBackend(LlmBackend):
    """A backend with one way in for text and one for vectors, each sync and async; all else follows from them."""

    @abstractmethod
    def written(self, params: LlmCallParams, stream: TextStream) -> Pieces:
        """The answer to `params` for `stream`, which says how to wait and whether to go on."""

    @abstractmethod
    def embeddings(
        self,
        texts: Sequence[str],
        *,
        model: str | None = None,
        normalize: bool = True,
        dimensions: int | None = None,
        as_numpy: bool = False,
        **options: Any,
    ) -> LlmEmbedResult:
        """One vector per text. `dimensions` cuts each vector (Matryoshka) before it is normalised."""

    @abstractmethod
    async def aembeddings(self, texts: Sequence[str], **options: Any) -> LlmEmbedResult:
        """`embeddings` for asyncio, same options."""

    def generate(self, params: LlmCallParams, on_chunk: ChunkCallback | None = None) -> LlmCallResult:
        """Answer `params`; with `on_chunk`, hand out each chunk of text as soon as it is there."""
        if inspect.iscoroutinefunction(on_chunk):
            raise BadRequest(
                "the callback is a coroutine function, which nobody would await here; use agenerate or astream"
            )
        return self._stream(params, on_chunk, in_chunks=on_chunk is not None).read(on_chunk)

    async def agenerate(self, params: LlmCallParams, on_chunk: ChunkCallback | None = None) -> LlmCallResult:
        """`generate` for asyncio; `on_chunk` may be a coroutine function."""
        return await self._stream(params, on_chunk, in_chunks=on_chunk is not None).aread(on_chunk)

    def _stream(self, params: LlmCallParams, on_chunk: ChunkCallback | None = None, *, in_chunks: bool) -> TextStream:
        _check_request(params, on_chunk)
        if in_chunks and params.n > 1:
            raise BadRequest(f"n is {params.n}, and a stream is one text; use call, or a stream for each")
        return TextStream(lambda stream: self.written(params, stream), in_chunks=in_chunks)

    def call(self, params: LlmCallParams) -> LlmCallResult:
        """See `LlmBackend.call`."""
        return self.generate(params)

    def chat(self, messages: Sequence[Message], **options: Any) -> LlmCallResult:
        """See `LlmBackend.chat`."""
        return self.generate(LlmCallParams("", messages=messages, **options))

    @overload
    def stream(self, params: LlmCallParams, callback: ChunkCallback) -> LlmCallResult: ...

    @overload
    def stream(self, params: LlmCallParams, callback: None = None) -> TextStream: ...

    def stream(self, params: LlmCallParams, callback: ChunkCallback | None = None) -> LlmCallResult | TextStream:
        """See `LlmBackend.stream`."""
        return self._stream(params, in_chunks=True) if callback is None else self.generate(params, callback)

    def embed(self, text: str | Sequence[str], **options: Any) -> Any:
        """See `LlmBackend.embed`; `options` are those of `embeddings`."""
        vectors = self.embeddings(checked_texts(text), **options).embeddings
        return vectors[0] if isinstance(text, str) else vectors

    async def acall(self, params: LlmCallParams) -> LlmCallResult:
        """`call` for asyncio."""
        return await self.agenerate(params)

    async def achat(self, messages: Sequence[Message], **options: Any) -> LlmCallResult:
        """`chat` for asyncio."""
        return await self.agenerate(LlmCallParams("", messages=messages, **options))

    async def astream(self, params: LlmCallParams, callback: ChunkCallback) -> LlmCallResult:
        """`stream` for asyncio; `callback` may be a coroutine function."""
        return await self.agenerate(params, callback)

    async def aembed(self, text: str | Sequence[str], **options: Any) -> Any:
        """`embed` for asyncio."""
        vectors = (await self.aembeddings(checked_texts(text), **options)).embeddings
        return vectors[0] if isinstance(text, str) else vectors


def checked_texts(text: str | Sequence[str]) -> list[str]:
    """A text or some texts as a list. Raises BadRequest for anything else."""
    if isinstance(text, (bytes, Mapping)) or not isinstance(text, Iterable):
        raise BadRequest(f"text is {text!r:.60}; embed takes a str or a list of str")
    texts = [text] if isinstance(text, str) else list(text)
    for i, t in enumerate(texts):
        if not isinstance(t, str):
            raise BadRequest(f"text[{i}] is {type(t).__name__}; embed takes a str or a list of str")
    return texts


# --- which backend answers --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Choice:
    """Who is to answer: the model file at `path`, or with None the API."""

    settings: LlmSettings
    path: str | None
    missing: LlmError | None = None  # why there is no path although a local model was asked for

    @property
    def falls_back(self) -> bool:
        """Whether the API answers where the local model can't."""
        return "api" in self.settings.fallback


def create_llm_backend(settings: Mapping[str, Any] | LlmSettings, engine: Any = None) -> RequestBackend:
    """The backend that `settings`, `{"llm": {…}}`, ask for: a LocalLlmBackend or an ApiLlmBackend.

    `engine.cli_overrides` (`model_path`, `backend`) come first. A local model that is not found or does not load is a
    WARNING, and the API answers in its place; with `fallback: error` it is an error. The choice is logged at INFO.

    Raises SettingsError, and with `fallback: error` ModelError or MemoryError.
    """
    if isinstance(settings, Mapping) and isinstance(settings.get("llm"), Mapping):
        settings = {**settings, "llm": rendered_llm(settings["llm"], engine, settings=settings)}
    return _open(_choose(LlmSettings.of(settings), getattr(engine, "cli_overrides", None) or {}))


def rendered_llm(
    llm: Mapping[str, Any],
    engine: Any,
    *,
    settings: Mapping[str, Any],
    state: Mapping[str, Any] | None = None,
) -> Mapping[str, Any]:
    """`settings.llm` with its templates filled in, from the engine's `variables` and `secrets` among others."""
    if not any("{" in str(value) for value in llm.values()):
        return llm
    from .template import render  # here, so that settings without templates do without Jinja2

    scope = {
        "state": state or {},
        "variables": getattr(engine, "variables", None) or {},
        "secrets": getattr(engine, "secrets", None) or {},
        "settings": settings,
        "env": os.environ,
    }
    rendered: Mapping[str, Any] = render(llm, scope)
    return rendered


def _choose(settings: LlmSettings, cli: Mapping[str, Any]) -> _Choice:
    cli_path = cli.get("model_path")
    named = settings.replaced(backend=cli["backend"]).backend if cli.get("backend") else None
    backend = named or ("local" if cli_path else settings.backend)
    if backend not in ("local", "auto"):
        return _Choice(settings, None)
    if settings.model == "tiny" and not settings.model_path and not cli_path:
        return _Choice(settings, packaged_model())
    path = resolve_model_path(settings, cli_path) or settings.embedding_model_path
    if path is None and backend == "local":
        return _Choice(settings, None, _nothing_found(cli_path, os.environ.get("TEA_MODEL_PATH"), settings.model_path))
    return _Choice(settings, path)


def _nothing_found(*paths: str | None) -> ModelNotFound:
    tried = ", ".join(str(path) for path in paths if path)
    where = f" No file is at {tried}." if tried else ""
    return ModelNotFound(f"No local model found. Set TEA_MODEL_PATH or configure llm.model_path.{where}")


def _open(
    choice: _Choice, progress: Callable[[float], object] | None = None, *, each_call: bool = False
) -> RequestBackend:
    """The backend of a choice, or its fallback; with `each_call` a local one falls back in single calls too."""
    if choice.path is None and choice.missing is None:
        logger.info("LLM backend: API")
        return _api(choice.settings)
    try:
        if choice.missing is not None:
            raise choice.missing
        backend = _local(choice, progress)
    except (ModelError, EngineError, MemoryError) as exc:
        if not choice.falls_back:
            raise
        what = "" if isinstance(exc, ModelNotFound) else "Failed to load local LLM: "
        logger.warning("%s%s Falling back to API backend", what, sentence(exc))
        logger.info("LLM backend: API")
        return _api(choice.settings, exc)
    logger.info("LLM backend: local, %s", choice.path)
    return _LocalThenApi(backend, choice.settings) if each_call and choice.falls_back else backend


def _local(choice: _Choice, progress: Callable[[float], object] | None) -> RequestBackend:
    from .local import LocalLlmBackend

    s = choice.settings
    assert choice.path is not None
    return LocalLlmBackend(
        choice.path,
        n_ctx=s.n_ctx,
        n_threads=s.n_threads,
        n_gpu_layers=s.n_gpu_layers,
        chat_format=s.chat_format,
        chat_template=s.chat_template,
        chat_template_file=s.chat_template_file,
        chat_template_name=s.chat_template_name,
        template_kwargs=s.template_kwargs,
        n_batch=s.n_batch,
        n_parallel=s.n_parallel,
        cache_ram_mib=s.cache_ram_mib,
        pooling=s.pooling,
        embedding_model_path=s.embedding_model_path if s.embedding_model_path != choice.path else None,
        keep_alive=s.keep_alive,
        queue_timeout=s.queue_timeout,
        speculative=s.speculative,
        draft_model_path=s.draft_model_path,
        n_draft=s.n_draft,
        progress=progress,
    )


def _api(settings: LlmSettings, fault: BaseException | None = None) -> RequestBackend:
    from .api import ApiLlmBackend

    if fault is not None and not isinstance(fault, LlmError):
        fault = OutOfMemory(f"not enough memory for the local model: {fault}")
    return ApiLlmBackend(settings, fallback_from=fault)


def sentence(exc: BaseException) -> str:
    """What an error says, ended by a full stop so that another sentence can follow."""
    text = str(exc)
    return text if text.endswith((".", "!", "?")) else f"{text}."


class _LocalThenApi(RequestBackend):
    """A local model, and the API for each call in which it fails before the first chunk was handed out."""

    _FAULTS = (ModelError, EngineError, MemoryError)  # of the model, never of the request

    def __init__(self, local: RequestBackend, settings: LlmSettings) -> None:
        self._first = local
        self._settings = settings

    async def written(self, params: LlmCallParams, stream: TextStream) -> Pieces:
        """The local model's answer, or the API's with the reason why."""
        n_pieces = 0
        try:
            async with aclosing(self._first.written(params, stream)) as pieces:
                async for piece in pieces:
                    n_pieces += 1
                    yield piece
        except self._FAULTS as exc:
            if n_pieces:
                raise
            with self._next(exc) as api:
                async with aclosing(api.written(params, stream)) as pieces:
                    async for piece in pieces:
                        yield piece

    def embeddings(self, texts: Sequence[str], **options: Any) -> LlmEmbedResult:
        """Embed on the local model, or on the API with the reason why."""
        try:
            return self._first.embeddings(texts, **options)
        except self._FAULTS as exc:
            with self._next(exc) as api:
                return api.embeddings(texts, **options)

    async def aembeddings(self, texts: Sequence[str], **options: Any) -> LlmEmbedResult:
        """`embeddings` for asyncio."""
        try:
            return await self._first.aembeddings(texts, **options)
        except self._FAULTS as exc:
            with self._next(exc) as api:
                return await api.aembeddings(texts, **options)

    def _next(self, exc: BaseException) -> RequestBackend:
        """Who answers after `exc`; raises it where nobody may."""
        if isinstance(exc, EngineClosed):
            raise exc
        logger.warning("The local model could not answer: %s Falling back to API backend", sentence(exc))
        return _api(self._settings, exc)

    def is_available(self) -> bool:
        """Whether the local model is open."""
        return self._first.is_available()

    def close(self) -> None:
        """Give the local model back."""
        self._first.close()


class BackendPool:
    """Backends kept for as long as the pool is open: equal settings get the same one, so a model is loaded once.

    Safe from any thread. A model file that appears or changes its place is noticed by the next `get`. `progress` hears
    of each model that loads, from 0 to 1.
    """

    def __init__(self, progress: Callable[[float], object] | None = None) -> None:
        self._progress = progress
        self._backends: dict[tuple[LlmSettings, str | None, bool], RequestBackend] = {}
        self._lock = threading.Lock()
        self._closed = False

    def get(self, settings: LlmSettings, *, cli: Mapping[str, Any] | None = None) -> RequestBackend:
        """The backend for `settings`, with its fallback during calls; `cli` holds `model_path` and `backend`.

        Raises what `create_llm_backend` raises.
        """
        choice = _choose(settings, cli or {})
        key = (settings, choice.path, choice.missing is None)
        known = self._known(key)
        if known is None:
            # Without the lock: others are served while a model loads, and two who load the same one share it.
            opened = _open(choice, self._progress, each_call=True)
            try:
                known = self._known(key, opened)
            finally:
                if known is not opened:
                    opened.close()
        assert known is not None
        return known

    def _known(
        self, key: tuple[LlmSettings, str | None, bool], opened: RequestBackend | None = None
    ) -> RequestBackend | None:
        """The backend of `key`, which is `opened` if there was none yet."""
        with self._lock:
            if self._closed:
                raise EngineClosed("this BackendPool is closed; make a new one")
            if opened is not None:
                self._backends.setdefault(key, opened)
            return self._backends.get(key)

    def close(self) -> None:
        """Close every backend. Closing twice is fine."""
        with self._lock:
            self._closed = True
            backends = list(self._backends.values())
            self._backends.clear()
        for backend in backends:
            backend.close()
