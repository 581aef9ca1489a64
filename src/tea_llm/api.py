"""`ApiLlmBackend`: answers from an OpenAI-compatible HTTP API (OpenAI, Azure, Ollama, llama-server, vLLM …).

params ─chat_body→ Request ─Io.send→ response ─Answer.feed→ chunks ─Answer.result→ LlmCallResult
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import tenacity

from .api_format import (
    ADVICE,
    DEFAULT_MODELS,
    EMBEDDING_BATCH,
    RETRIED_STATUSES,
    Answer,
    Patience,
    Request,
    amended,
    as_float32,
    chat_body,
    cut,
    extra_body,
    headers_of,
    is_own,
    key_variable,
    normalized,
    patience_of,
    retry_after_s,
    server_words,
    shown,
    status_line,
    url_of,
    usage_of,
    vectors_of,
)
from .api_io import HTTPX_ERRORS, Clients, Io, break_off, error_class
from .backend import RequestBackend, checked_texts, sentence
from .blocking import run_blocking
from .constraint import with_parsed
from .errors import (
    ApiConnectionError,
    ApiError,
    ApiResponseError,
    ApiStatusError,
    ApiTimeout,
    BadRequest,
    Cancelled,
    EngineClosed,
    FallbackError,
    LlmError,
    SettingsError,
)
from .params import Delta, LlmCallParams, LlmCallResult, LlmEmbedResult, Usage
from .settings import ApiEndpoint, LlmSettings, missing_credentials, resolve_api
from .stream import Pieces, TextStream

__all__ = ["ApiLlmBackend"]

logger = logging.getLogger("tea_llm")

_ASIDE_S = 5.0  # for a question that the answer can do without

_R = TypeVar("_R", LlmCallResult, LlmEmbedResult)
_T = TypeVar("_T")


@dataclass
class _Effort:
    """What it takes to get one answer: requests sent, seconds waited between them."""

    attempts: int = 0
    total_delay_s: float = 0.0
    retry_after_s: float | None = None


class _Asking:
    """The way to one endpoint and back for one call: sends, retries, reads, and says what went wrong."""

    def __init__(self, io: Io, endpoint: ApiEndpoint, patience: Patience, effort: _Effort) -> None:
        self.endpoint = endpoint
        self._io = io
        self._patience = patience
        self._effort = effort

    def apart(self) -> _Asking:
        """The same way for something else: one short attempt, whose effort isn't this call's."""
        timeout_s = min(self._patience.timeout_s or _ASIDE_S, _ASIDE_S)
        return _Asking(self._io, self.endpoint, Patience(timeout_s, max_retries=0), _Effort())

    def request(self, method: str, url: str, body: Mapping[str, Any] | None = None) -> Request:
        """A request with the endpoint's key. Raises SettingsError for a key that no header can hold."""
        return Request(method, url, headers_of(self.endpoint), body)

    async def ask(self, request: Request, read: Callable[[httpx.Response], Awaitable[_T]]) -> _T:
        """What `read` makes of the response, after as many attempts as patience allows."""
        patience, effort = self._patience, self._effort
        exponential = tenacity.wait_exponential(multiplier=patience.base_delay, max=patience.max_delay)

        def delay_s(state: tenacity.RetryCallState) -> float:
            asked = effort.retry_after_s
            return exponential(state) if asked is None else min(asked, patience.max_delay)

        def announce(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            status = getattr(error, "status_code", None)
            logger.warning(
                "%s: %s; attempt %d of %d, the next in %.1f s",
                request, f"status {status}" if status else type(error).__name__,
                state.attempt_number, patience.max_retries + 1, state.upcoming_sleep,
            )  # fmt: skip

        async def pause(seconds: float) -> None:
            effort.total_delay_s += seconds
            await self._io.sleep(seconds)

        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(patience.max_retries + 1),
            wait=delay_s,
            retry=tenacity.retry_if_exception(self._is_worth_another),
            before_sleep=announce,
            sleep=pause,
            reraise=True,
        )
        return await retrying(self._attempt, request, read)

    async def reply(self, request: Request, response: httpx.Response) -> Mapping[str, Any]:
        """The reply as an object. Raises ApiResponseError when it isn't one, or is an error."""
        with self._translated(request):
            await self._io.read(response)
        return self._object(request, response.text)

    async def whole_answer(
        self, request: Request, response: httpx.Response, model: str
    ) -> tuple[str | Delta | None, LlmCallResult]:
        """The answer that came in one piece, and its result."""
        answer = Answer(model)
        reply = await self.reply(request, response)
        with self.understanding(request, reply):
            if not reply["choices"]:
                raise ValueError("no choices")
            piece = answer.feed(reply)
        return piece, answer.result()

    async def answer(self, request: Request, model: str, stream: TextStream) -> Pieces:
        """The answer for `stream`. What fails after the first piece isn't tried again: it would be seen twice."""

        async def begun(response: httpx.Response) -> tuple[str | Delta | LlmCallResult, Pieces]:
            pieces = self._pieces(request, response, model, stream)
            return await anext(pieces), pieces

        first, rest = await self.ask(request, begun)
        async with aclosing(rest):
            yield first
            async for piece in rest:
                yield piece

    async def _pieces(self, request: Request, response: httpx.Response, model: str, stream: TextStream) -> Pieces:
        """The answer that comes as events; a server that doesn't stream gives a single chunk."""
        if "text/event-stream" not in response.headers.get("content-type", ""):
            piece, result = await self.whole_answer(request, response, model)
            if piece:
                yield piece
            yield result
            return
        answer = Answer(model)
        stream.cancel_by(lambda: break_off(response))
        try:
            async with aclosing(self._chunks(request, response, answer)) as chunks:
                async for chunk in chunks:
                    yield chunk
                    if stream.cancelled:
                        break
        except ApiError:
            if not stream.cancelled:
                raise
        finally:
            stream.cancel_by(None)  # the next request may have the connection then
            await self._io.close(response)
        yield answer.result()

    @contextmanager
    def understanding(self, request: Request, reply: Any) -> Iterator[None]:
        """Where reading `reply` fails, ApiResponseError says so."""
        try:
            yield
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as exc:
            raise ApiResponseError(
                f"{request} was answered with something else than the API's format "
                f"({type(exc).__name__}: {self._masked(str(exc))}); check llm.api_base. "
                f"The server says: {self._words(reply)}"
            ) from exc

    async def _attempt(self, request: Request, read: Callable[[httpx.Response], Awaitable[_T]]) -> _T:
        while True:
            self._effort.attempts += 1
            self._effort.retry_after_s = None
            logger.debug("%s: attempt %d", request, self._effort.attempts)
            with self._translated(request):
                response = await self._io.send(request, self._patience.timeout_s)
            if response.is_success:
                return await read(response)
            words = await self._refusal_words(response)
            body = amended(request.body, response.status_code, words)
            if body is None:
                self._effort.retry_after_s = retry_after_s(response.headers)
                raise self._refusal(request, response, words)
            request = dataclasses.replace(request, body=body)

    async def _chunks(
        self, request: Request, response: httpx.Response, answer: Answer
    ) -> AsyncGenerator[str | Delta, None]:
        """What each event adds. An error holds the text before it as `partial`."""
        try:
            async with aclosing(self._io.events(response)) as events:
                async for event in events:
                    if event.data.strip() == "[DONE]":
                        return
                    if not event.data:
                        continue
                    reply = self._object(request, event.data, is_error=event.event == "error")
                    with self.understanding(request, reply):
                        chunk = answer.feed(reply)
                    if chunk:
                        yield chunk
            if answer.finish_reason is None:
                raise ApiResponseError(
                    f"{request}: the stream ended with neither a finish_reason nor [DONE]: text is missing; ask again"
                )
        except HTTPX_ERRORS as exc:
            if answer.finish_reason is None:
                error = self._broken(request, exc, half=bool(answer.content))
                if isinstance(error, ApiError):
                    error.partial = answer.content
                raise error from exc
        except ApiError as error:
            error.partial = answer.content
            raise

    def _is_worth_another(self, error: BaseException) -> bool:
        if isinstance(error, ApiStatusError):
            status = error.status_code or 0
            return status in RETRIED_STATUSES or status >= 500
        return isinstance(error, (ApiTimeout, ApiConnectionError))

    @contextmanager
    def _translated(self, request: Request) -> Iterator[None]:
        try:
            yield
        except HTTPX_ERRORS as exc:
            raise self._broken(request, exc) from exc

    def _broken(self, request: Request, exc: Exception, *, half: bool = False) -> LlmError:
        """Our error for one of httpx's; `half`: after some text, so that the connection held and the answer broke."""
        kind = error_class(type(exc))
        if half and kind is ApiConnectionError:
            kind = ApiResponseError
        if kind is ApiTimeout:
            found = f"gave no complete answer within {self._patience.timeout_s} s; raise llm.timeout, or ask for less"
        elif kind is ApiConnectionError:
            found = "got no answer; check that the server runs, and llm.api_base"
        elif kind is SettingsError:
            found = "can't be sent; check llm.api_base"
        else:
            found = "gave an answer that broke; ask again"
        return kind(f"{request} {found}. {self._masked(str(exc)) or type(exc).__name__}")

    async def _refusal_words(self, response: httpx.Response) -> str:
        try:
            await self._io.read(response)
        except HTTPX_ERRORS:
            return ""  # the status is the news; what the server adds is lost
        try:
            return self._words(json.loads(response.text))
        except ValueError:
            return self._words(response.text)

    def _refusal(self, request: Request, response: httpx.Response, words: str) -> ApiError:
        """The error for a status that isn't a success."""
        status = response.status_code
        said = f" The server says: {words}" if words else ""
        if status < 400:
            to = self._masked(shown(response.headers.get("location", "an unnamed address")))
            return ApiResponseError(
                f"{request} was answered {status_line(status)} to {to}, and a key must not follow; "
                f"set llm.api_base to the address itself.{said}",
                status_code=status,
            )
        advice = ADVICE.get(status) or ("try again later, or raise max_retries" if status >= 500 else "ask otherwise")
        advice = advice.format(key=key_variable(self.endpoint))
        return ApiStatusError(f"{request} was answered {status_line(status)}; {advice}.{said}", status_code=status)

    def _object(self, request: Request, text: str, *, is_error: bool = False) -> Mapping[str, Any]:
        """`text` as a JSON object. Raises ApiResponseError when it is none, or holds an error."""
        try:
            reply = json.loads(text)
        except ValueError:
            reply = text
        error = reply.get("error") if isinstance(reply, Mapping) else None
        if isinstance(reply, Mapping) and not error and not is_error:
            return reply
        code = error.get("code") if isinstance(error, Mapping) else None
        found = "an error" if error or is_error else "something else than a JSON object"
        raise ApiResponseError(
            f"{request} was answered with {found}; check the request and llm.api_base. "
            f"The server says: {self._words(reply)}",
            status_code=code if isinstance(code, int) else None,
        )

    def _words(self, reply: Any) -> str:
        return self._masked(server_words(reply))

    def _masked(self, text: str) -> str:
        key = self.endpoint.api_key
        return text.replace(key, "***") if key else text


class ApiLlmBackend(RequestBackend):
    """Answers from an OpenAI-compatible HTTP API. Threads and event loops may share it.

    `settings` is `{"llm": {…}}` or an `LlmSettings`; `fallback_from` is why a local model couldn't answer, and is then
    named in each result and, with the API's own fault, in each error. Further API parameters go into `params.extra`;
    `max_retries`, `base_delay` and `max_delay` (seconds) there say how to retry.
    `params.timeout_s` bounds each attempt.

    Raises SettingsError for settings that name no usable endpoint, BadRequest for a field that the API doesn't have,
    ApiError when there is no answer, FallbackError for any of these after `fallback_from`, EngineClosed after close().
    """

    def __init__(self, settings: Mapping[str, Any] | LlmSettings, *, fallback_from: LlmError | None = None) -> None:
        self._settings = LlmSettings.of(settings)
        self._fallback_from = fallback_from
        self._clients = Clients()
        self._served_model: str | None = None  # the first that the server lists, once asked

    def __repr__(self) -> str:
        s = self._settings
        return f"ApiLlmBackend(provider={s.provider!r}, model={s.model!r}{', closed' if self._clients.closed else ''})"

    async def written(self, params: LlmCallParams, stream: TextStream) -> Pieces:
        """See `RequestBackend.written`."""
        io = self._clients.blocking() if stream.loop is None else await self._clients.asynchronous()
        if params.session is not None:
            logger.debug("session %s: an API keeps none", params.session)
        effort = _Effort()
        with self._explained(effort):
            endpoint = self._endpoint()
            asking = _Asking(io, endpoint, patience_of(self._settings, params.extra, params.timeout_s), effort)
            deployment = endpoint.deployment if endpoint.provider == "azure" else None
            model = await self._model(asking, "chat", deployment, params.model, self._settings.model)
            body = chat_body(params, model, stream=stream.in_chunks, own=is_own(endpoint))
            path = "chat/completions" if params.suffix is None else "completions"
            request = asking.request("POST", url_of(endpoint, path, model), body)
            async with aclosing(asking.answer(request, model, stream)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, LlmCallResult):
                        if len(piece.completions or (piece,)) != params.n:
                            logger.warning("%s: n is %d, and the server didn't keep to it", request, params.n)
                        piece = with_parsed(params, self._signed(piece, endpoint, effort))
                    yield piece

    def embeddings(self, texts: Sequence[str], **options: Any) -> LlmEmbedResult:
        """One vector per text. `attempts` counts the requests of all batches.

        `dimensions` cuts each vector (Matryoshka) before it is normalised. Further options go into the request's body.
        """
        io = self._clients.blocking()
        return run_blocking(self._embedded(io, texts, **options))

    async def aembeddings(self, texts: Sequence[str], **options: Any) -> LlmEmbedResult:
        """`embeddings` for asyncio, same options."""
        io = await self._clients.asynchronous()
        return await self._embedded(io, texts, **options)

    def is_available(self) -> bool:
        """Whether the settings name an endpoint and its key is there; nothing is sent."""
        if self._clients.closed:
            return False
        try:
            self._endpoint()
        except SettingsError:
            return False
        return True

    def close(self) -> None:
        """Close the connections. Closing twice is fine; a call after that raises EngineClosed."""
        self._clients.close()

    def _endpoint(self) -> ApiEndpoint:
        """Where to ask, as settings and environment say now. Raises SettingsError when something is missing."""
        endpoint = resolve_api(self._settings)
        if missing := missing_credentials(endpoint):
            raise SettingsError(missing)
        return endpoint

    @contextmanager
    def _explained(self, effort: _Effort) -> Iterator[None]:
        """An error in there says what it took and, after a fallback, what it fell back from."""
        local = self._fallback_from
        try:
            yield
        except (BadRequest, Cancelled, EngineClosed):  # the caller's doing, whoever is asked
            raise
        except LlmError as error:
            if isinstance(error, ApiError):
                error.attempts, error.total_delay_s = effort.attempts, effort.total_delay_s
            if local is None:
                raise
            raise FallbackError(
                f"{sentence(local)} The API could not answer in its place: {error}", (("local", local), ("api", error))
            ) from error

    def _signed(self, result: _R, endpoint: ApiEndpoint, effort: _Effort) -> _R:
        """`result` with who gave it, what it took and, after a fallback, what it fell back from."""
        return dataclasses.replace(
            result,
            backend="api",
            provider=endpoint.provider,
            attempts=effort.attempts,
            total_delay_s=effort.total_delay_s,
            fallback_reason=None if self._fallback_from is None else str(self._fallback_from),
        )

    async def _embedded(self, io: Io, texts: Sequence[str], **options: Any) -> LlmEmbedResult:
        effort = _Effort()
        with self._explained(effort):
            return await self._embed(io, effort, texts, **options)

    async def _embed(
        self,
        io: Io,
        effort: _Effort,
        texts: Sequence[str],
        *,
        model: str | None = None,
        normalize: bool = True,
        dimensions: int | None = None,
        as_numpy: bool = False,
        timeout_s: float | None = None,
        **extra: Any,
    ) -> LlmEmbedResult:
        if isinstance(texts, str):
            raise BadRequest("embeddings takes a list of texts; for a single one use embed(text)")
        texts = checked_texts(texts)
        if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
            raise BadRequest(f"dimensions is {dimensions!r}; give a whole number of at least 1")
        endpoint = self._endpoint()
        own = is_own(endpoint)
        asking = _Asking(io, endpoint, patience_of(self._settings, extra, timeout_s), effort)
        named = (model, self._settings.embedding_model, None if own else self._settings.model)
        model = await self._model(asking, "embeddings", *named) if texts else model or ""
        request = asking.request("POST", url_of(endpoint, "embeddings", model))
        vectors: list[list[float]] = []
        n_prompt: int | None = 0
        answered_by = model
        for start in range(0, len(texts), EMBEDDING_BATCH):
            batch = list(texts[start : start + EMBEDDING_BATCH])
            body = extra_body(extra) | {"model": model, "input": batch, "encoding_format": "float"}
            if dimensions is not None and own:
                body["dimensions"] = dimensions
            reply = await asking.ask(dataclasses.replace(request, body=body), lambda r: asking.reply(request, r))
            with asking.understanding(request, reply):
                vectors += vectors_of(reply, len(batch))
                answered_by = reply.get("model") or model
                counted = reply.get("usage")
                n_prompt = usage_of(counted).prompt_tokens + n_prompt if counted and n_prompt is not None else None
        vectors = [cut(vector, dimensions) for vector in vectors]
        if normalize:
            vectors = [normalized(vector) for vector in vectors]
        rows = as_float32(vectors) if as_numpy else vectors
        usage = None if n_prompt is None else Usage(n_prompt)
        return self._signed(LlmEmbedResult(rows, answered_by, usage=usage), endpoint, effort)

    async def _model(self, asking: _Asking, kind: str, *named: str | None) -> str:
        """The model to ask for: the first that is named, else the endpoint's own choice.

        After a fallback a `.gguf` path names the local model that failed, and no API's.
        """
        for name in named:
            if name and not (self._fallback_from is not None and name.endswith(".gguf")):
                return name
        endpoint = asking.endpoint
        if endpoint.provider == "azure":
            if endpoint.deployment:
                return endpoint.deployment
            raise SettingsError("provider azure needs a deployment; set llm.deployment or AZURE_OPENAI_DEPLOYMENT")
        if is_own(endpoint):
            return DEFAULT_MODELS[kind]
        if self._served_model is None:
            self._served_model = await self._first_served(asking)
        return self._served_model or DEFAULT_MODELS[kind]

    async def _first_served(self, asking: _Asking) -> str | None:
        """The first model that the server lists; None where it has no such list, or doesn't say.

        Raises SettingsError when the list is empty.
        """
        asking = asking.apart()
        request = asking.request("GET", url_of(asking.endpoint, "models"))
        try:
            reply = await asking.ask(request, lambda response: asking.reply(request, response))
        except ApiError as error:  # the call itself meets the same fault, or does without the list
            logger.info("No model is named, and the server lists none (%s)", error)
            return None
        served = reply.get("data")
        if not isinstance(served, list) or not all(isinstance(model, Mapping) and "id" in model for model in served):
            return None
        if not served:
            raise SettingsError(f"no model is named, and {request} lists none; set llm.model or give model=…")
        return str(served[0]["id"])
