"""The local backend: a GGUF file answers, through llama.cpp, in this process."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import struct
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from .answer import AnswerReader, chat_request
from .backend import RequestBackend, checked_texts
from .blocking import run_blocking
from .chat import chat_parts, checked_message
from .constraint import constraint_of, wants_json, with_parsed
from .errors import BadRequest, Cancelled, EngineClosed, ExtensionMissing, ModelNotFound, SessionError, SettingsError
from .models import get_model_info
from .params import (
    Completion,
    Delta,
    LlmCallParams,
    LlmCallResult,
    LlmEmbedResult,
    Message,
    TokenLogprob,
    TopLogprob,
    Usage,
    check_timeout_s,
    sampler_order,
)
from .session import Session, SessionFile
from .settings import LlmSettings, expand_path
from .stream import Pieces, TextStream
from .ticket import Cancellable

if TYPE_CHECKING:
    import asyncio

    from ._llama import ChatPrompt, Model
    from .engine import Embedded, EmbedRequest, Engine, Generated, TextRequest
    from .ticket import Ticket

__all__ = ["LocalLlmBackend"]

logger = logging.getLogger("tea_llm")

_R = TypeVar("_R")

_N_SEEDS = 2**32 - 1  # the last one means a random seed to llama.cpp
_LONG_TEXT = 20_000  # characters; to tokenize more would hold up an event loop for milliseconds

_OFF: Mapping[str, Any] = {
    "dynatemp_range": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "min_keep": 0,
    "typical_p": 1.0,
    "top_n_sigma": -1.0,
    "xtc_probability": 0.0,
    "dry_multiplier": 0.0,
    "dry_penalty_last_n": 0,
    "repeat_penalty": 1.0,
    "repeat_last_n": 0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "adaptive_target": -1.0,
    "mirostat": 0,
    "ignore_eos": False,
}
"""The value that switches a sampler off, for those where None says so; for the others None is the default."""

_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "functions": (None, []),
}
"""API parameters that change what the answer is, so that leaving them out in silence would be wrong; and the values
that change nothing."""

_STOPS: Mapping[str | None, tuple[str, ...]] = {
    "chatml": ("<|im_end|>",),
    "gemma": ("<end_of_turn>",),
    None: ("\nuser:",),
}
"""What ends an answer in a prompt that `format_chat_prompt` wrote, for models that have no token for it."""


class LocalLlmBackend(RequestBackend):
    """A GGUF model loaded into this process. Backends of the same file and options share one loaded model.

    Safe to call from any thread and event loop: `n_parallel` requests are computed together, others wait for their
    turn, for `queue_timeout` seconds at most. A prompt that begins like an earlier one is computed from where they
    differ. The model is freed when the last of its backends is closed or collected, or `keep_alive` seconds later.

    `n_ctx` None is what the model was trained for, as far as memory allows; `n_threads` None is what pays for the
    model's size; `n_gpu_layers` None or -1 is all; `n_parallel` None is up to 16, as far as memory allows.
    `cache_ram_mib` is host memory for prompts that had to leave the KV cache; None: as much as that has. `speculative`
    ("draft" with a `draft_model_path`, "mtp", "ngram") has `n_draft` tokens guessed and checked at once. `chat_format`
    overrides the file's chat template ("chatml", "gemma"), as `chat_template` (Jinja) or `chat_template_file` does;
    `chat_template_name` takes another of the file's own, and `template_kwargs` is what each gets besides messages. In a
    raw prompt the model's control tokens may be written out; in messages they are text. `progress` is called with the
    loaded fraction, 0 to 1; returning False cancels the load.

    Raises ModelNotFound, ModelLoadError, ExtensionMissing (built without llama.cpp), MemoryError, Cancelled.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        n_ctx: int | None = None,
        n_threads: int | None = None,
        n_gpu_layers: int | None = None,
        chat_format: str | None = None,
        *,
        n_batch: int | None = None,
        n_parallel: int | None = None,
        cache_ram_mib: int | None = None,
        pooling: str | None = None,
        embedding_model_path: str | os.PathLike[str] | None = None,
        keep_alive: float = 0,
        queue_timeout: float | None = None,
        speculative: str | None = None,
        draft_model_path: str | os.PathLike[str] | None = None,
        n_draft: int | None = None,
        chat_template: str | None = None,
        chat_template_file: str | os.PathLike[str] | None = None,
        chat_template_name: str | None = None,
        template_kwargs: Mapping[str, Any] | str | None = None,
        progress: Callable[[float], object] | None = None,
    ) -> None:
        self.model_path = _checked_path("model_path", model_path)
        self._embedding_model_path = (
            None if embedding_model_path is None else _checked_path("embedding_model_path", embedding_model_path)
        )
        self._options: dict[str, Any] = {
            "n_ctx": n_ctx,
            "n_batch": n_batch,
            "n_threads": n_threads,
            "n_gpu_layers": n_gpu_layers,
            "n_parallel": n_parallel,
            "cache_ram_mib": cache_ram_mib,
            "pooling": pooling,
            "keep_alive": keep_alive,
            "queue_timeout": queue_timeout,
            "speculative": speculative,
            "draft_model_path": draft_model_path,
            "n_draft": n_draft,
            "chat_format": chat_format,
            "chat_template": chat_template,
            "chat_template_file": chat_template_file,
            "chat_template_name": chat_template_name,
            "template_kwargs": template_kwargs,
        }
        self._settings = LlmSettings.from_mapping(self._options, where=type(self).__name__)
        self.chat_format = self._settings.chat_format
        self._chat_template = self._settings.chat_template or _template_text(self._settings.chat_template_file)
        self._template_kwargs = json.loads(self._settings.template_kwargs or "{}")
        self._progress = progress
        rooms = _engine_rooms()
        options = rooms.engine.EngineOptions(
            **{f.name: getattr(self._settings, f.name) for f in dataclasses.fields(rooms.engine.EngineOptions)}
        )
        self._engine: Engine | None = rooms.registry.open_engine(self.model_path, options, progress)
        self._release = weakref.finalize(
            self, rooms.registry.release_engine, self._engine, self._settings.keep_alive
        )
        self._release.atexit = False  # the registry frees all engines then; no thread can be begun to keep one alive
        self._embedding: LocalLlmBackend | None = None  # opened by the first embedding that needs it

    @property
    def model(self) -> str:
        """The name results carry: the file's stem."""
        return Path(self.model_path).stem

    @property
    def n_ctx(self) -> int:
        """The context length in use, in tokens."""
        return self._open_engine().n_ctx

    def is_available(self) -> bool:
        """Whether the backend is open."""
        return self._engine is not None

    def close(self) -> None:
        """Give the model back. After its last user a text in flight ends `cancelled`, a waiting one is refused."""
        if self._embedding is not None:
            self._embedding.close()
        self._engine = None
        if held := self._release.detach():  # None for all but the first who closes
            _engine_rooms().registry.release_engine(*held[2], wait=True)

    # --- text ---------------------------------------------------------------------------------------------------------
    async def written(self, params: LlmCallParams, stream: TextStream) -> Pieces:
        """See `RequestBackend.written`."""
        has_session = params.session is not None
        file, known = await _beside(stream.loop, lambda: self._session(params), long=has_session)
        is_long = params.messages is not None or _size(params) > _LONG_TEXT  # a template takes milliseconds, or longer
        texts = await _beside(stream.loop, lambda: self._begun(params, stream, known), long=is_long)
        first, *others = texts
        with ExitStack() as held:
            for text in texts:
                held.enter_context(text.ticket)
            try:
                async for piece in first.pieces():
                    yield piece
                for text in others:
                    async for _ in text.pieces():
                        pass
            except Cancelled:  # before its turn
                if not stream.cancelled:
                    raise
                yield LlmCallResult("", self.model, backend="local")
                return
        if rest := first.end(cancelled=stream.cancelled):
            yield rest
        for text in others:
            text.end(cancelled=stream.cancelled)
        outcome = first.outcome
        usage = Usage(outcome.usage.prompt_tokens, sum(text.outcome.usage.completion_tokens for text in texts))
        completions = tuple(self._completion(text, stream, params) for text in texts)
        answer = completions[0]
        result = LlmCallResult(
            answer.content,
            self.model,
            tokens_used=usage.total_tokens,
            finish_reason=answer.finish_reason,
            usage=usage,
            backend="local",
            timings=outcome.timings,
            tool_calls=answer.tool_calls,
            logprobs=answer.logprobs,
            completions=completions if params.n > 1 else (),
        )
        saved = await _beside(stream.loop, lambda: _saved(file, outcome, result), long=has_session)
        yield with_parsed(params, saved, cut_by_stop=outcome.cut_by_stop)

    def _session(self, params: LlmCallParams) -> tuple[SessionFile | None, Session | None]:
        """Where the session of a call is kept, and what is there."""
        if params.session is None:
            return None, None
        file = SessionFile(expand_path(params.session), self._open_engine().origin)
        return file, file.read()

    def _begun(self, params: LlmCallParams, stream: TextStream, known: Session | None) -> list[_Text]:
        """Hand the request to the engine, once for each text that is wanted."""
        request, new_reader = self._text_request(params, known, in_chunks=stream.in_chunks)
        texts: list[_Text] = []

        def cancel() -> None:
            for text in texts:
                text.ticket.cancel()

        stream.cancel_by(cancel)
        try:
            for i in range(params.n):
                ticket = self._open_engine().generate(
                    _with_seed(request, i),
                    timeout_s=params.timeout_s,
                    queue_timeout_s=self._settings.queue_timeout,
                    priority=params.priority,
                    loop=stream.loop,
                )
                texts.append(_Text(ticket, new_reader and new_reader(), request))
        except BaseException:
            cancel()
            raise
        stream.cancel_by(cancel)  # again, for those that were begun meanwhile
        return texts

    def _completion(self, text: _Text, stream: TextStream, params: LlmCallParams) -> Completion:
        outcome = text.outcome
        calls = text.reader.calls() if text.reader is not None else ()
        finish_reason = "cancelled" if stream.cancelled else outcome.finish_reason
        logprobs = None
        if params.logprobs:
            model, n_top = self._open_engine().model, params.top_logprobs or 0
            logprobs = tuple(_token_logprobs(model, outcome.logprobs, n_top, text.request.markup))
        return Completion(
            "".join(text.said),
            "tool_calls" if calls and finish_reason == "stop" else finish_reason,
            reasoning="".join(text.thought) or None,
            tool_calls=calls,
            logprobs=logprobs,
            seed=outcome.timings.seed,
        )

    def _text_request(
        self, params: LlmCallParams, known: Session | None, *, in_chunks: bool
    ) -> tuple[TextRequest, Callable[[], AnswerReader] | None]:
        for name, plain in _UNSUPPORTED.items():
            if params.extra.get(name) not in plain:
                raise BadRequest(f"{name} is not supported by the local backend yet; leave it out or use backend: api")
        if params.extra:
            logger.debug("API parameters without a meaning for a local model: %s", ", ".join(params.extra))
        engine = _engine_rooms().engine
        request: TextRequest = engine.TextRequest(
            prompt=params.prompt,
            max_tokens=params.max_tokens,
            stop=params.stops,
            sampling=_sampling(params),
            constraint=constraint_of(params),
            stream=in_chunks,
            truncate=params.truncate,
            known=known,
            save=params.session is not None,
            infill=None if params.suffix is None else engine.Infill(params.suffix, params.input_extra),
            logprobs=(params.top_logprobs or 0) if params.logprobs else None,
        )
        if params.messages is None:
            if params.tools:
                raise BadRequest("tools are given, and a prompt that is continued knows none; give messages")
            return request, None
        if (chat := self._rendered(params, params.messages)) is not None:
            return chat_request(request, chat, params, self.model_path)
        if params.tools:
            raise BadRequest(
                f"tools are given, and {self.model_path} has no chat template that knows them; use a model that has "
                "one, or leave out chat_format"
            )
        chat_format = self.chat_format or self._format_by_name
        prompt = self._open_engine().model.tokenize_parts(chat_parts(params.messages, chat_format))
        return dataclasses.replace(request, prompt=prompt, stop=params.stops + _STOPS[chat_format]), None

    def _rendered(self, params: LlmCallParams, messages: Sequence[Message]) -> ChatPrompt | None:
        """The prompt by a Jinja template: the call's, the backend's or the file's. None where a format writes it."""
        model = self._open_engine().model
        template, name = params.chat_template, params.chat_template_name
        if template is None and name is None:
            template, name = self._chat_template, self._settings.chat_template_name
            if template is None and name is None and (self.chat_format is not None or model.chat_template is None):
                return None
        choice = params.tool_choice or "auto"
        return model.apply_chat_template(
            [checked_message(message) for message in messages],
            tools=cast("Sequence[Mapping[str, Any]] | None", params.tools),
            tool_choice=choice if isinstance(choice, str) else choice["function"]["name"],
            parallel_tool_calls=params.parallel_tool_calls,
            enable_thinking=params.reasoning,
            template=template,
            variant=name if template is None else None,
            template_kwargs={**self._template_kwargs, **(params.template_kwargs or {})},
        )

    @cached_property
    def _format_by_name(self) -> str | None:
        """The chat format of a file without a template; found once, as the header is read for it."""
        chat_format: str | None = get_model_info(self.model_path)["chat_format"]
        return chat_format

    # --- embeddings ---------------------------------------------------------------------------------------------------
    def embeddings(
        self, texts: Sequence[str], *, model: str | None = None, normalize: bool = True, dimensions: int | None = None,
        as_numpy: bool = False, truncate: bool = False, on_progress: Callable[[int], object] | None = None,
        timeout_s: float | None = None, **options: Any,
    ) -> LlmEmbedResult:  # fmt: skip
        """One vector per text, computed in batches; `on_progress` is called with the number of texts done.

        Raises ContextOverflow for a text that is longer than the model takes, unless `truncate`.
        """
        request = _embed_request(texts, normalize, dimensions, truncate, on_progress, timeout_s)
        backend = self._embedding_backend()
        return run_blocking(backend._embedded(None, request, timeout_s, normalize, dimensions, as_numpy))

    async def aembeddings(
        self, texts: Sequence[str], *, model: str | None = None, normalize: bool = True, dimensions: int | None = None,
        as_numpy: bool = False, truncate: bool = False, on_progress: Callable[[int], object] | None = None,
        timeout_s: float | None = None, **options: Any,
    ) -> LlmEmbedResult:  # fmt: skip
        """`embeddings` for asyncio."""
        import asyncio

        request = _embed_request(texts, normalize, dimensions, truncate, on_progress, timeout_s)
        backend = await asyncio.to_thread(self._embedding_backend)
        loop = asyncio.get_running_loop()
        return await backend._embedded(loop, request, timeout_s, normalize, dimensions, as_numpy)

    async def _embedded(
        self,
        loop: asyncio.AbstractEventLoop | None,
        request: EmbedRequest,
        timeout_s: float | None,
        normalize: bool,
        dimensions: int | None,
        as_numpy: bool,
    ) -> LlmEmbedResult:
        caller = Cancellable()

        def ask() -> Ticket[Embedded]:
            ticket = self._open_engine().embed(request, timeout_s=timeout_s, loop=loop)
            caller.cancel_by(ticket.cancel)
            return ticket

        try:
            with await _beside(loop, ask, long=sum(map(len, request.texts)) > _LONG_TEXT) as ticket:
                async for _ in ticket:
                    pass
        except BaseException:
            caller.cancel()  # a thread beside the loop may hand the request to the engine only after that
            raise
        return _embed_result(ticket.outcome, self.model, normalize, dimensions, as_numpy)

    def _embedding_backend(self) -> LocalLlmBackend:
        if self._embedding_model_path is None:
            return self
        self._open_engine()
        if self._embedding is None:
            settings = self._settings
            self._embedding = LocalLlmBackend(
                self._embedding_model_path,
                n_threads=settings.n_threads,
                n_gpu_layers=settings.n_gpu_layers,
                pooling=settings.pooling,
                keep_alive=settings.keep_alive,
                progress=self._progress,
            )
        return self._embedding

    def _open_engine(self) -> Engine:
        if self._engine is None:
            raise EngineClosed(f"the backend of {self.model_path} is closed; make a new one")
        return self._engine

    def __reduce__(self) -> tuple[Any, ...]:
        # The configuration, not the weights: who unpickles it opens the model, which is shared within a process.
        opened = partial(
            type(self), self.model_path, embedding_model_path=self._embedding_model_path, **self._options
        )
        return opened, ()

    def __repr__(self) -> str:
        return f"LocalLlmBackend({self.model_path!r})"


@dataclass
class _Text:
    """One text that the engine writes, with what reads its answer, where that is more than plain text."""

    ticket: Ticket[Generated]
    reader: AnswerReader | None
    request: TextRequest
    said: list[str] = field(default_factory=list)
    thought: list[str] = field(default_factory=list)

    @property
    def outcome(self) -> Generated:
        """How it ended."""
        outcome: Generated = self.ticket.outcome
        return outcome

    async def pieces(self) -> AsyncIterator[str | Delta]:
        """What is new, until the engine has no more of it."""
        async for chunk in self.ticket:
            if piece := self._noted(chunk if self.reader is None else self.reader.read(chunk)):
                yield piece

    def end(self, *, cancelled: bool) -> str | Delta | None:
        """What is left of it, once the engine has no more."""
        if self.reader is None:
            return None
        whole = not cancelled and self.outcome.finish_reason == "stop"
        return self._noted(self.reader.read("", end="whole" if whole else "cut"))

    def _noted(self, piece: str | Delta | None) -> str | Delta | None:
        if isinstance(piece, Delta):
            self.said.append(piece.content)
            self.thought.append(piece.reasoning)
        elif piece:
            self.said.append(piece)
        return piece


def _saved(file: SessionFile | None, outcome: Generated, result: LlmCallResult) -> LlmCallResult:
    """The result, its session saved if it has one and ended by itself; the answer is not lost where that fails."""
    if file is None or result.finish_reason == "cancelled" or (outcome.session is None and not result.content):
        return result
    try:
        if outcome.session is None:
            raise SessionError(f"the session could not be saved to {file.path}: there is no memory for a copy of it")
        file.write(outcome.session)
    except SessionError as exc:
        logger.warning("%s", exc)
        return dataclasses.replace(result, session_error=str(exc))
    return result


class _Rooms(NamedTuple):
    engine: Any
    registry: Any


def _engine_rooms() -> _Rooms:
    """The modules that load the extension: with the first local model, and not by `import tea_llm`."""
    try:
        from . import engine, registry
    except ImportError as exc:
        raise ExtensionMissing(
            "this tea_llm can't run local models: it was built without llama.cpp (-C wheel.cmake=false), or its "
            f"extension does not load here ({exc}); install it again with llama.cpp, or use backend: api"
        ) from exc
    return _Rooms(engine, registry)


async def _beside(loop: asyncio.AbstractEventLoop | None, work: Callable[[], _R], *, long: bool) -> _R:
    """What `work` gives; done in a thread where it takes long and would hold up a loop."""
    if loop is None or not long:
        return work()
    import asyncio

    return await asyncio.to_thread(work)


def _size(params: LlmCallParams) -> int:
    """About how many characters have to be tokenized; the first reading of a form takes as long as many."""
    if wants_json(params) or (params.grammar, params.regex, params.choices) != (None, None, None):
        return _LONG_TEXT + 1
    files = (file["text"] for file in params.input_extra)
    said = (str(message.get("content")) for message in params.messages or ())
    texts = [params.prompt, params.suffix or "", *files, *said]
    return sum(map(len, texts))


def _checked_path(name: str, path: Any) -> str:
    """`path` as text. Raises SettingsError for what is no path, ModelNotFound for one that no system has."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(text := os.fspath(path), str):
        raise SettingsError(f"LocalLlmBackend.{name} is {path!r:.80}; give the path of a GGUF file")
    if "\0" in text:
        raise ModelNotFound(f"no model file at {text!r}: a path holds no NUL; check the path")
    return text


def _template_text(path: str | None) -> str | None:
    """What is in a template's file. Raises SettingsError for one that can't be read."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as exc:
        raise SettingsError(f"chat_template_file is {path!r}, which can't be read: {exc}; check the path") from exc


def _sampling(params: LlmCallParams) -> dict[str, Any]:
    """Keyword arguments of `_llama.Sampler`."""
    sampling: dict[str, Any] = {"temperature": params.temperature}
    for name, value in params.given().items():
        if value is not None:
            sampling[name] = value
        elif name in _OFF:
            sampling[name] = _OFF[name]
    if (order := sampler_order(params.samplers)) is not None:
        sampling["samplers"] = order
    if "logit_bias" in sampling:
        sampling["logit_bias"] = {_token_id(k): float(v) for k, v in sampling["logit_bias"].items()}
    return sampling


def _with_seed(request: TextRequest, i: int) -> TextRequest:
    """The request for the text number `i` of several."""
    seed = request.sampling.get("seed")
    if seed is None or i == 0:
        return request
    return dataclasses.replace(request, sampling={**request.sampling, "seed": (seed + i) % _N_SEEDS})


def _token_logprobs(model: Model, rows: bytes, n_top: int, markup: Sequence[str]) -> Iterable[TokenLogprob]:
    """What `_llama.Generation.take_logprobs` told, with the tokens' texts.

    Control tokens are written out; those that the text doesn't show, for they aren't in `markup`, have no bytes.
    """
    pairs = list(struct.iter_unpack("=if", rows))
    for first in range(0, len(pairs), 1 + n_top):
        (token, logprob), *others = pairs[first : first + 1 + n_top]
        piece = model.piece(token, special=True)
        name = piece.decode("utf-8", "replace")
        is_hidden = name not in markup and model.is_control(token)
        top = [
            TopLogprob(other.decode("utf-8", "replace"), other, value)
            for other, value in ((model.piece(token, special=True), value) for token, value in others if token >= 0)
        ]
        yield TokenLogprob(name, b"" if is_hidden else piece, logprob, tuple(top))


def _token_id(key: int | str) -> int:
    try:
        return int(key)
    except ValueError as exc:
        raise BadRequest(f"logit_bias has the key {key!r}; give token ids of the local model") from exc


def _embed_request(
    texts: Sequence[str], normalize: bool, dimensions: int | None, truncate: bool,
    on_progress: Callable[[int], object] | None, timeout_s: float | None,
) -> EmbedRequest:  # fmt: skip
    check_timeout_s(timeout_s)
    if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
        raise BadRequest(f"dimensions is {dimensions!r}; give a whole number of at least 1, or None for all")
    # A vector that is to be cut is normalised after the cut.
    request: EmbedRequest = _engine_rooms().engine.EmbedRequest(
        tuple(checked_texts(texts)),
        normalize=normalize and dimensions is None,
        truncate=truncate,
        on_progress=on_progress,
    )
    return request


def _embed_result(
    outcome: Embedded, model: str, normalize: bool, dimensions: int | None, as_numpy: bool
) -> LlmEmbedResult:
    n_embd = outcome.n_embd
    if dimensions is not None and dimensions > n_embd:
        raise BadRequest(f"dimensions is {dimensions}, but the vectors of {model} have {n_embd}; give at most that")
    if not outcome.vectors:
        rows: Any = memoryview(b"").cast("f")
        vectors: Any = []
    else:
        rows = memoryview(outcome.vectors).cast("f", (len(outcome.vectors) // (4 * n_embd), n_embd))
        vectors = rows
    if as_numpy:
        import numpy as np

        vectors = np.array(rows, np.float32).reshape(-1, n_embd)
        if dimensions is not None:
            vectors = vectors[:, :dimensions]
            if normalize:
                vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    elif outcome.vectors:
        vectors = rows.tolist()
        if dimensions is not None:
            vectors = [_cut(vector, dimensions, normalize) for vector in vectors]
    return LlmEmbedResult(vectors, model, usage=outcome.usage, backend="local")


def _cut(vector: list[float], dimensions: int, normalize: bool) -> list[float]:
    cut = vector[:dimensions]
    norm = sum(x * x for x in cut) ** 0.5
    return [x / norm for x in cut] if normalize and norm else cut
