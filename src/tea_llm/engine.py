"""The engine: one loaded model, and the one thread that computes with it for everybody at once.

Callers on any thread or event loop submit requests and get a `Ticket` each. The engine's thread decides who is in the
next batch; `_llama.Context.run` then computes without the GIL until there is something to hand out.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import _llama
from .constraint import Constraint
from .errors import (
    BadRequest,
    Cancelled,
    ContextOverflow,
    EngineBusy,
    EngineClosed,
    ModelError,
    ModelLoadError,
    SessionError,
    SettingsError,
)
from .models import model_digest
from .params import Timings, Usage
from .session import Origin, Session
from .sizing import fit_cells, fit_n_ctx, fit_n_kept, fit_n_parallel, fit_threads, fours_pay, kv_bytes_per_token
from .ticket import Ticket, hand_out

if TYPE_CHECKING:
    import asyncio

__all__ = ["EmbedRequest", "Embedded", "Engine", "EngineOptions", "Generated", "Infill", "TextRequest"]

logger = logging.getLogger("tea_llm")

_CPU_BATCH, _GPU_BATCH = 128, 512  # tokens computed at once; more makes a CPU no faster, and others wait for longer
_EMBED_BATCH = 512  # tokens computed at once; a longer text gets a larger context
_EMBED_TEXTS = 64  # sequences in one batch
_KEPT_CELLS = 4096  # for ended texts; more would slow small models down, by their share of the mask
_PROMPT_TOKEN_S = 0.002  # a prompt's tokens, counted as a later arrival: short ones first, but none waits for ever
_MAX_QUEUE = 10_000
_MAX_GRAMMARS = 64
_LOCK_PATIENCE_S = 0.2
_N_DRAFT = 3  # with the token before them they fill the four rows that a CPU multiplies at once
_GPU_DRAFT_ROWS = 64  # of a batch, for next tokens and guesses; a GPU computes them about as fast as one


@dataclass(frozen=True)
class EngineOptions:
    """How a model is loaded; engines with equal options and path are one engine.

    `cache_ram_mib` is host memory for prompts that had to leave the KV cache; None: as much as the KV cache has.
    `speculative` is what guesses the next `n_draft` tokens: "draft" (the model at `draft_model_path`), "mtp", "ngram",
    or "off"; None: "draft" where there is a path.
    """

    n_ctx: int | None = None
    n_batch: int | None = None
    n_threads: int | None = None
    n_gpu_layers: int | None = None
    pooling: str | None = None
    n_parallel: int | None = None
    cache_ram_mib: int | None = None
    speculative: Literal["off", "draft", "mtp", "ngram"] | None = None
    draft_model_path: str | None = None
    n_draft: int | None = None

    @property
    def guess_by(self) -> Literal["off", "draft", "mtp", "ngram"]:
        """What guesses tokens. Raises SettingsError for "draft" without a model."""
        guess_by = self.speculative or ("draft" if self.draft_model_path else "off")
        if guess_by == "draft" and not self.draft_model_path:
            raise SettingsError("speculative is 'draft', and no model guesses; name one in draft_model_path")
        return guess_by


@dataclass(frozen=True)
class Infill:
    """What a text leads to, and other files to know: mappings with a `text` and a `filename`."""

    suffix: str
    files: Sequence[Mapping[str, str]] = ()


@dataclass(frozen=True)
class TextRequest:
    """A prompt to continue, as text or in tokens. `sampling` holds keyword arguments of `_llama.Sampler`.

    `stream`: a chunk per token. What the prompt has in common with the `known` session is not computed again; `save`:
    it becomes a session itself. Control tokens of the texts in `markup` are part of the answer; of others nothing is
    seen.
    With `infill` the prompt is what comes before the text. `logprobs`: so many alternatives to each token are wanted.
    """

    prompt: str | Sequence[int]
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    constraint: Constraint | None = None
    stream: bool = False
    truncate: bool = False
    known: Session | None = None
    save: bool = False
    markup: Sequence[str] = ()
    infill: Infill | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class Generated:
    """How a `TextRequest` ended; its text was handed out as chunks.

    `logprobs` are as `_llama.Generation.take_logprobs` gives them.

    `session` is None unless it was to be saved and the text ended by itself; and where memory didn't hold it.
    """

    finish_reason: str
    usage: Usage
    timings: Timings
    session: Session | None = None
    logprobs: bytes = b""
    cut_by_stop: bool = False  # by a stop string, and not by the model


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


@dataclass
class _TextJob:
    """A text that waits for its turn."""

    request: TextRequest
    tokens: list[int]
    sampler: _llama.Sampler
    ticket: Ticket[Generated]
    queued_at: float


@dataclass
class _Live:
    """A text in the batch."""

    job: _TextJob
    precedence: tuple[float, ...]
    queue_s: float  # before the generation was made


@dataclass
class _EmbedJob:
    """Texts of which `n_done` are embedded."""

    tokens: Sequence[Sequence[int]]
    request: EmbedRequest
    ticket: Ticket[Embedded]
    vectors: bytearray = field(default_factory=bytearray)
    n_done: int = 0


class Engine:
    """A loaded model that any thread may ask. Made by `open_engine`; `close` frees it with the last user.

    `n_parallel` texts are computed at once; others wait for a place, by priority and then about in the order they came.

    Raises what `_llama.Model` raises; in a child process after fork() each request raises EngineClosed.
    """

    def __init__(
        self, path: str, options: EngineOptions, on_progress: Callable[[float], object] | None = None
    ) -> None:
        self.path = path
        self.options = options
        self.n_users = 0  # counted by the registry
        self._pid = os.getpid()
        self._model: _llama.Model | None = _load(path, options, on_progress)
        self._file = _stamp(path)
        self._draft = _load_draft(options)
        models = [self._model, *([self._draft] if isinstance(self._draft, _llama.Model) else [])]
        self.n_ctx = fit_n_ctx(models, options.n_ctx)
        self.n_cells = fit_cells(models, self.n_ctx, options.n_parallel)
        self.n_parallel = fit_n_parallel(self.n_cells, options.n_parallel)
        if self._draft and self._model.is_recurrent and self.n_parallel > 1:
            logger.info("n_parallel is 1: with a recurrent state, tokens are guessed of one text at a time")
            self.n_parallel = 1
        self.n_threads = fit_threads(options.n_threads, self._model.size_bytes)

        self._wake = threading.Condition()  # guards what follows, which other threads touch
        self._waiting: list[tuple[tuple[float, ...], int, _TextJob]] = []  # a heap
        self._embedding: deque[_EmbedJob] = deque()
        self._text: _llama.Context | None = None
        self._closed = False
        self._numbers = itertools.count()

        self._grammars: dict[Constraint, _llama.Grammar] = {}  # by their last use
        self._live: dict[_llama.Generation, _Live] = {}  # in the order in which their prompts are read
        self._vectors: _llama.Context | None = None
        if self._draft:
            self._check_draft()
        self._thread = threading.Thread(target=self._main, name=f"tea_llm {Path(path).stem}", daemon=True)
        self._thread.start()

    def _check_draft(self) -> None:
        """Make the context that guesses now, and not for the first request, so that who opens the model hears of it."""
        try:
            self._text_context()
        except BadRequest as exc:
            raise ModelLoadError(f"{self.path} can't be loaded with guesses: {exc}") from exc
        except ModelError as exc:  # an encoder, which embeds: who asks it for a text hears of it then
            logger.debug("no guesses: %s", exc)

    @property
    def model(self) -> _llama.Model:
        """The model, for reading. Raises EngineClosed after close()."""
        model = self._model
        if model is None:
            raise self._is_closed()
        return model

    @cached_property
    def origin(self) -> Origin:
        """What sessions of this engine come from. Read from the model file, by the first who asks.

        Raises SessionError where the file is no longer the one that was loaded.
        """
        try:
            origin = Origin(
                model_digest(self.path), Path(self.path).stem, _llama.llama_version(), _llama.state_layout()
            )
        except ModelError as exc:
            raise SessionError(f"no session can be kept: {exc} Leave session out.") from exc
        if _stamp(self.path) != self._file:
            raise SessionError(
                f"no session can be kept: {self.path} was changed after it was loaded; make a new backend"
            )
        return origin

    def _is_closed(self) -> EngineClosed:
        return EngineClosed(f"the engine of {self.path} is closed; make a new backend")

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise EngineClosed(
                f"{self.path} was loaded before fork(), and its threads are not in this process; make the backend in "
                "this process, or start processes with the 'spawn' method"
            )

    def generate(
        self,
        request: TextRequest,
        *,
        timeout_s: float | None = None,
        queue_timeout_s: float | None = None,
        priority: int = 0,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> Ticket[Generated]:
        """Queue a text. With `loop` the ticket is iterated by `async for` on that loop, else by `for`.

        Of waiting texts, and of prompts being read, those of a higher `priority` come first.

        Raises BadRequest or GrammarError for a request that can't be computed, EngineBusy when 10,000 others wait, and
        EngineClosed after close() or in a child process.
        """
        self._check_process()
        ticket: Ticket[Generated] = Ticket(timeout_s, queue_timeout_s, loop)
        queued_at = time.monotonic()
        model = self.model
        tokens = self._prompt_tokens(request)
        sampler = _llama.Sampler(model, **request.sampling, grammar=self._grammar(model, request.constraint))
        job = _TextJob(request, tokens, sampler, ticket, queued_at)
        precedence = (-priority, queued_at + len(tokens) * _PROMPT_TOKEN_S)
        with self._wake:
            if self._closed:
                raise self._is_closed()
            if len(self._waiting) >= _MAX_QUEUE:
                raise EngineBusy(f"{_MAX_QUEUE} requests wait for {self.path}; send fewer at once")
            has_place = len(self._live) + len(self._waiting) < self.n_parallel
            heapq.heappush(self._waiting, (precedence, next(self._numbers), job))
            ticket.cancel_by(self._drop_cancelled, begun=has_place)
            self._interrupt()
        return ticket

    def _prompt_tokens(self, request: TextRequest) -> list[int]:
        model = self.model
        if request.infill is not None:
            n_max = max(self.n_ctx - (request.max_tokens or 1), self.n_ctx // 2, 1) if request.truncate else None
            return _infill_tokens(model, str(request.prompt), request.infill, n_max)
        prompt = request.prompt
        tokens = model.tokenize(prompt, parse_special=True) if isinstance(prompt, str) else list(prompt)
        if request.truncate and len(tokens) >= self.n_ctx:
            tokens = _cut(tokens, self.n_ctx, request.max_tokens, keep_first=model.add_bos)
        return tokens

    def _grammar(self, model: _llama.Model, constraint: Constraint | None) -> _llama.Grammar | None:
        """What holds a text to `constraint`. The last ones are kept: to read one may take as long as a short answer."""
        if constraint is None:
            return None
        grammar = self._grammars.pop(constraint, None) or _read(model, constraint)
        self._grammars[constraint] = grammar  # the last to go
        if len(self._grammars) > _MAX_GRAMMARS:
            with suppress(StopIteration, KeyError, RuntimeError):  # another thread does so too
                del self._grammars[next(iter(self._grammars))]
        return grammar

    def embed(
        self,
        request: EmbedRequest,
        *,
        timeout_s: float | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> Ticket[Embedded]:
        """Queue texts to embed; they are computed batch by batch, in turns with texts being generated.

        Raises ContextOverflow for a text longer than the model takes, and EngineClosed.
        """
        self._check_process()
        ticket: Ticket[Embedded] = Ticket(timeout_s, loop=loop)
        tokens = [self._embed_tokens(i, text, request.truncate) for i, text in enumerate(request.texts)]
        with self._wake:
            if self._closed:
                raise self._is_closed()
            self._embedding.append(_EmbedJob(tokens, request, ticket))
            self._interrupt()
        return ticket

    def _drop_cancelled(self) -> None:
        """Answer the cancelled among the texts that wait."""
        # Who holds the lock may be collecting garbage, and wait for the ticket that is being cancelled here.
        if not self._wake.acquire(timeout=_LOCK_PATIENCE_S):
            return  # it is answered when its turn comes
        try:
            dropped = [waiting for waiting in self._waiting if waiting[2].ticket.cancelled]
            self._waiting = [waiting for waiting in self._waiting if not waiting[2].ticket.cancelled]
            heapq.heapify(self._waiting)
        finally:
            self._wake.release()
        hand_out([(job.ticket, None, Cancelled("the request was cancelled before its turn")) for _, _, job in dropped])

    def _interrupt(self) -> None:
        """Have the engine's thread look at what is new. With the lock."""
        if self._text is not None:
            self._text.wake()
        self._wake.notify()

    def close(self, *, wait: bool = True) -> None:
        """Cancel what runs, refuse what waits, free the model. Closing twice is fine."""
        if os.getpid() != self._pid:
            return
        with self._wake:
            self._closed = True
            self._interrupt()
        for live in self._live.copy().values():  # a copy, as the engine's thread goes on with both
            live.job.ticket.cancel()
        for job in self._embedding.copy():
            job.ticket.cancel()
        if wait and threading.current_thread() is not self._thread:
            self._thread.join()

    # --- the engine's thread ------------------------------------------------------------------------------------------
    def _main(self) -> None:
        while self._has_work():
            self._admit()
            if self._embedding:
                self._embed_next()
            if self._live:
                self._compute()
        self._shut_down()

    def _has_work(self) -> bool:
        """Wait for something to do; False once the engine is closed."""
        with self._wake:
            self._wake.wait_for(lambda: self._waiting or self._live or self._embedding or self._closed)
            return not self._closed

    def _admit(self) -> None:
        """Give waiting texts the places that are free."""
        while len(self._live) < self.n_parallel and (waiting := self._next_waiting()):
            precedence, _, job = waiting
            try:
                generation = self._begin(job)
            except Exception as exc:  # noqa: BLE001 - whatever it is belongs to the caller that waits
                hand_out([(job.ticket, None, _named(exc, job.request))])
                continue
            self._live[generation] = _Live(job, precedence, time.monotonic() - job.queued_at)
            job.ticket.cancel_by(generation.cancel, begun=True)
        self._live = dict(sorted(self._live.items(), key=lambda item: item[1].precedence))

    def _next_waiting(self) -> tuple[tuple[float, ...], int, _TextJob] | None:
        with self._wake:
            return heapq.heappop(self._waiting) if self._waiting else None

    def _begin(self, job: _TextJob) -> _llama.Generation:
        request = job.request
        return _llama.Generation(
            self._text_context(),
            job.sampler,
            job.tokens,
            max_tokens=request.max_tokens,
            stop=request.stop,
            stream=request.stream,
            n_ctx=self.n_ctx,
            known=(request.known.tokens, request.known.state) if request.known else None,
            save=request.save,
            markup=_tokens(self.model, request.markup),
            logprobs=request.logprobs,
        )

    def _compute(self) -> None:
        """Compute for all texts in the batch until one has news, and hand it out."""
        context = self._text_context()
        if self._embedding or self._closed:
            context.wake()  # one step, and then a turn for the others
        try:
            news = context.run(self._live)
        except Exception as exc:  # noqa: BLE001 - llama.cpp failed: it belongs to all that it computed for
            hand_out([(live.job.ticket, None, copy.copy(exc)) for live in self._live.values()])
            self._live.clear()
            return
        events: list[tuple[Ticket[Any], str | None, Any]] = []
        for generation, text in news:
            job = self._live[generation].job
            ticket = job.ticket
            if text and (job.request.stream or generation.error is None):  # half a text is for who reads along
                events.append((ticket, text, None))
            if generation.ended:
                live = self._live.pop(generation)
                error = generation.error and _named(generation.error, live.job.request)
                events.append((ticket, None, error or _generated(generation, live.queue_s)))
        hand_out(events)

    def _text_context(self) -> _llama.Context:
        if self._text is not None and self._text.poisoned:
            with self._wake:
                self._text = None
        if self._text is None:
            model, options = self.model, self.options
            on_gpu = options.n_gpu_layers != 0 and _llama.supports_gpu_offload()
            n_batch = min(options.n_batch or (_GPU_BATCH if on_gpu else _CPU_BATCH), self.n_cells)
            ram_mib = options.cache_ram_mib
            context = _llama.Context(
                model,
                n_ctx=self.n_cells,
                n_batch=n_batch,
                n_seq_max=min(self.n_parallel + fit_n_kept(model, self.n_cells), 255),
                n_threads=self.n_threads,
                fill_fours=not on_gpu and fours_pay(model),
                n_kept_max=_KEPT_CELLS,
                n_host_max=self.n_cells * kv_bytes_per_token(model) if ram_mib is None else ram_mib << 20,
                draft=self._draft,
                n_draft=min(options.n_draft or _N_DRAFT, n_batch),
                n_draft_rows=min(_GPU_DRAFT_ROWS, n_batch) if on_gpu else 0,
            )
            with self._wake:
                self._text = context
        return self._text

    def _shut_down(self) -> None:
        error = EngineClosed(f"the engine of {self.path} was closed before this request's turn")
        hand_out([(job.ticket, None, error) for _, _, job in self._waiting])
        hand_out([(job.ticket, None, Cancelled("embedding was cancelled")) for job in self._embedding])
        if self._live:
            for live in self._live.values():
                live.job.ticket.cancel()
            self._compute()
        with self._wake:
            context, self._text = self._text, None
            self._waiting.clear()
            self._embedding.clear()
        for used in (context, self._vectors):
            if used is not None:
                used.close()
        self._grammars.clear()
        self._vectors = self._model = self._draft = None

    # --- vectors ------------------------------------------------------------------------------------------------------
    def _embed_next(self) -> None:
        """Compute the next batch of the first embedding, and let another have the next turn."""
        job = self._embedding[0]
        try:
            self._embed_batch(job)
        except BaseException as exc:  # noqa: BLE001 - whatever it is belongs to the caller that waits
            end: Any = exc
        else:
            if job.n_done < len(job.tokens):
                self._embedding.rotate(-1)
                return
            usage = Usage(sum(map(len, job.tokens)))
            end = Embedded(bytes(job.vectors), self.model.n_embd, usage)
        self._embedding.remove(job)
        hand_out([(job.ticket, None, end)])

    def _embed_batch(self, job: _EmbedJob) -> None:
        if job.ticket.cancelled:
            raise Cancelled("embedding was cancelled")
        context = self._embed_context(max(map(len, job.tokens), default=1))
        job.ticket.cancel_by(context.cancel, begun=True)
        n = _n_that_fit(job.tokens, job.n_done, context.n_batch)
        batch = job.tokens[job.n_done : job.n_done + n]
        try:
            job.vectors += context.embed(batch, normalize=job.request.normalize).cast("B")
        finally:
            job.ticket.cancel_by(None, begun=True)  # the next batch may be another's
        job.n_done += n
        if n and job.request.on_progress:
            job.request.on_progress(job.n_done)

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


def _generated(generation: _llama.Generation, queue_s: float) -> Generated:
    queue_s += generation.queue_s
    n_generated = generation.n_generated
    timings = Timings(
        queue_s,
        generation.prompt_s,
        generation.generation_s,
        queue_s + generation.prompt_s if n_generated else None,
        generation.n_cached,
        draft_tokens=generation.n_drafted,
        accepted_tokens=generation.n_accepted,
        seed=generation.sampler.seed,
    )
    usage, state = Usage(generation.n_prompt, n_generated), generation.take_state()
    session = state and Session(*state)
    logprobs, cut = generation.take_logprobs(), generation.cut_by_stop
    return Generated(generation.finish_reason or "stop", usage, timings, session, logprobs, cut)


def _named(error: Exception, request: TextRequest) -> Exception:
    """The error; one of the session says which file it is about."""
    known = request.known
    return known.refused(str(error)) if known and isinstance(error, SessionError) else error


def _stamp(path: str) -> tuple[int, ...] | None:
    """What changes when a file is replaced or written to; None where there is none."""
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _load(path: str, options: EngineOptions, on_progress: Callable[[float], object] | None) -> _llama.Model:
    """The loaded model. On the caller's thread: memory of another would come from an arena that grows page by page."""
    loading = _llama.Loading()
    load = partial(
        _llama.Model,
        path,
        n_gpu_layers=_gpu_layers(options),
        loading=loading,
        load_mtp=options.guess_by == "mtp",
        split_load=False if options.guess_by in ("draft", "mtp") else None,
    )
    if on_progress is None:
        return load()
    done = threading.Event()

    def report() -> None:
        while not done.wait(0.05):
            if on_progress(loading.fraction) is False:
                loading.cancel()

    reporter = threading.Thread(target=report, name="tea_llm loading", daemon=True)
    reporter.start()
    try:
        model = load()
    finally:
        done.set()
        reporter.join()
    if on_progress(1.0) is False:
        raise Cancelled(f"loading {path} was cancelled")
    return model


def _load_draft(options: EngineOptions) -> _llama.Model | Literal["mtp", "ngram"] | None:
    """What guesses tokens, as `_llama.Context` takes it."""
    match options.guess_by:
        case "draft":
            assert options.draft_model_path is not None
            return _llama.Model(options.draft_model_path, n_gpu_layers=_gpu_layers(options), split_load=False)
        case "mtp" | "ngram" as layers_or_text:
            return layers_or_text
    return None


def _gpu_layers(options: EngineOptions) -> int:
    return -1 if options.n_gpu_layers is None else options.n_gpu_layers


def _cut(tokens: list[int], n_ctx: int, max_tokens: int | None, *, keep_first: bool) -> list[int]:
    """The end of a prompt that is too long, with room for `max_tokens` but for half the context at most."""
    n_keep = max(n_ctx - (max_tokens or 1), n_ctx // 2, 1)
    if keep_first and n_keep > 1:
        return [tokens[0], *tokens[len(tokens) - n_keep + 1 :]]
    return tokens[len(tokens) - n_keep :]


def _read(model: _llama.Model, of: Constraint) -> _llama.Grammar:
    triggers = [_trigger(model, kind, value) for kind, value in of.triggers]
    markup = _tokens(model, of.markup)
    return _llama.Grammar(model, of.kind, of.source, triggers=triggers, prefix=of.prefix, markup=markup)


def _trigger(model: _llama.Model, kind: str, value: str | int) -> tuple[str, str | int]:
    """A trigger in the terms of `_llama.Grammar`. A word that is one token is found by that, as llama-server does."""
    if kind == "word" and (tokens := _single(model, str(value))):
        return "token", tokens[0]
    return ("pattern", f"^(?:{value})$") if kind == "pattern_full" else (kind, value)


def _tokens(model: _llama.Model, texts: Sequence[str]) -> list[int]:
    """The tokens of those texts that are one token each."""
    return [token for text in texts for token in _single(model, text)]


def _single(model: _llama.Model, text: str) -> list[int]:
    """The one token that `text` is, [] for a text of several."""
    tokens = model.tokenize(text, add_special=False, parse_special=True)
    return tokens if len(tokens) == 1 else []


def _infill_tokens(model: _llama.Model, prefix: str, infill: Infill, n_max: int | None) -> list[int]:
    """The prompt of an infill, laid out as llama-server does (format_prompt_infill): files, prefix, suffix, middle.

    With `n_max` it is cut to that: the suffix to a quarter, then the prefix, then the files, from their begin.
    Raises BadRequest where the model has no tokens for it.
    """
    pre, suf, mid, rep, sep = (model.fim_token(part) for part in ("pre", "suf", "mid", "rep", "sep"))
    if pre is None or suf is None or mid is None:
        raise BadRequest(
            f"suffix is set, and {model.path} has no tokens for infill; leave suffix out, or take a model that was "
            "trained for it"
        )

    def tokens(text: str) -> list[int]:
        return model.tokenize(text, add_special=False)

    files = [] if rep is None else [rep, *tokens("myproject\n")]
    for file in infill.files:
        name = file.get("filename", "tmp")
        files += tokens("\n\n--- snippet ---\n\n") if sep is None else [sep, *tokens(f"{name}\n")]
        files += tokens(file["text"])
    if sep is not None:
        files += [sep, *tokens("filename\n")]
    begin = [model.bos] if model.add_bos else []
    before, after = tokens(prefix), tokens(infill.suffix)
    if n_max is not None:
        n_free = max(n_max - len(begin) - 3, 0)
        after = after[: n_free // 4]
        before = _last(before, n_free - len(after))
        files = _last(files, n_free - len(after) - len(before))
    return [*files, *begin, pre, *before, suf, *after, mid]


def _last(tokens: list[int], n: int) -> list[int]:
    return tokens[max(len(tokens) - n, 0) :]


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
