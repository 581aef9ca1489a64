"""What the OpenAI API's requests and answers look like; pure functions, no input or output."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import quote, urlsplit

from .constraint import json_schema_of
from .errors import BadRequest, SettingsError
from .params import (
    Completion,
    Delta,
    LlmCallParams,
    LlmCallResult,
    TokenLogprob,
    TopLogprob,
    Usage,
    check_timeout_s,
    sampler_order,
)
from .settings import ApiEndpoint, LlmSettings
from .tools import GrowingCalls

__all__ = [
    "ADVICE",
    "BODY_FIELDS",
    "DEFAULT_MODELS",
    "EMBEDDING_BATCH",
    "RETRIED_STATUSES",
    "Answer",
    "BodyField",
    "Patience",
    "Request",
    "amended",
    "as_float32",
    "chat_body",
    "cut",
    "extra_body",
    "headers_of",
    "is_own",
    "key_variable",
    "normalized",
    "patience_of",
    "retry_after_s",
    "server_words",
    "shown",
    "status_line",
    "url_of",
    "usage_of",
    "vectors_of",
]

EMBEDDING_BATCH: Final = 2048
"""Texts per embedding request; OpenAI's limit."""


@dataclass(frozen=True)
class BodyField:
    """How a sampling field is sent: its API name, whether OpenAI itself knows it, which value switches it off."""

    name: str
    openai: bool = False
    off: Any = None  # None: leaving it out is off


BODY_FIELDS: Final[Mapping[str, BodyField]] = {
    # https://platform.openai.com/docs/api-reference/chat/create
    "seed": BodyField("seed", openai=True),
    "top_p": BodyField("top_p", openai=True, off=1.0),
    "frequency_penalty": BodyField("frequency_penalty", openai=True, off=0.0),
    "presence_penalty": BodyField("presence_penalty", openai=True, off=0.0),
    "logit_bias": BodyField("logit_bias", openai=True),
    # llama.cpp, tools/server/README.md; vLLM and Ollama know some of them
    "samplers": BodyField("samplers"),
    "dynatemp_range": BodyField("dynatemp_range", off=0.0),
    "dynatemp_exponent": BodyField("dynatemp_exponent"),
    "min_keep": BodyField("min_keep", off=0),
    "adaptive_target": BodyField("adaptive_target", off=-1.0),
    "adaptive_decay": BodyField("adaptive_decay"),
    "ignore_eos": BodyField("ignore_eos", off=False),
    "top_k": BodyField("top_k", off=0),
    "min_p": BodyField("min_p", off=0.0),
    "typical_p": BodyField("typical_p", off=1.0),
    "top_n_sigma": BodyField("top_n_sigma", off=-1.0),
    "xtc_probability": BodyField("xtc_probability", off=0.0),
    "xtc_threshold": BodyField("xtc_threshold"),
    "dry_multiplier": BodyField("dry_multiplier", off=0.0),
    "dry_base": BodyField("dry_base"),
    "dry_allowed_length": BodyField("dry_allowed_length"),
    "dry_penalty_last_n": BodyField("dry_penalty_last_n", off=0),
    "dry_sequence_breakers": BodyField("dry_sequence_breakers"),
    "repeat_penalty": BodyField("repeat_penalty", off=1.0),
    "repeat_last_n": BodyField("repeat_last_n", off=0),
    "mirostat": BodyField("mirostat", off=0),
    "mirostat_tau": BodyField("mirostat_tau"),
    "mirostat_eta": BodyField("mirostat_eta"),
    "grammar": BodyField("grammar"),
}

_RETRY_KEYS: Final = ("max_retries", "base_delay", "max_delay")

_NEVER_SENT: Final = frozenset(
    {f.name for f in dataclasses.fields(LlmSettings)}  # settings of ours, n_ctx or api_key say nothing to a server
    | set(_RETRY_KEYS)
    | {"api_url", "base_url", "truncate", "stream", "prompt", "messages", "callback", "print", "extra_body"}
    | {"state", "config", "node", "graph", "parallel_results", "engine"}  # what workflow engines pass to an action
)

DEFAULT_MODELS: Final = {"chat": "gpt-4o-mini", "embeddings": "text-embedding-3-small"}  # at OpenAI itself

_KEY_VARIABLES: Final = {"openai": "OPENAI_API_KEY", "azure": "AZURE_OPENAI_API_KEY"}

RETRIED_STATUSES: Final = frozenset({408, 409, 429})  # and 500 and above

ADVICE: Final[Mapping[int, str]] = {
    400: "change the request",
    401: "check {key}",
    403: "check {key}, and what it may use",
    404: "check llm.api_base and the model's name",
    405: "check llm.api_base",
    413: "send less text",
    422: "change the request",
    429: "wait, or raise max_retries",
}


@dataclass(frozen=True)
class Request:
    """One HTTP request; `method url` is how errors and logs call it."""

    method: str
    url: str
    headers: Mapping[str, str] = field(repr=False)
    body: Mapping[str, Any] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.method} {shown(self.url)}"

    def content(self) -> bytes | None:
        """The body as JSON."""
        if self.body is None:
            return None
        try:
            return json.dumps(self.body, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError) as exc:
            raise BadRequest(f"the request can't be written as JSON: {exc}; check messages and extra") from exc


@dataclass(frozen=True)
class Patience:
    """How long one attempt may take, how many follow it, and how far apart."""

    timeout_s: float | None
    max_retries: int
    base_delay: float = 1.0
    max_delay: float = 60.0


def shown(url: str) -> str:
    """The URL without user, password and query."""
    address, _, _ = url.partition("?")
    scheme, separator, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


def url_of(endpoint: ApiEndpoint, path: str, deployment: str | None = None) -> str:
    """Where `path` ("chat/completions", "embeddings", "models") is asked for at `endpoint`."""
    base = endpoint.base_url.rstrip("/").removesuffix("/chat/completions").removesuffix("/embeddings")
    if endpoint.provider == "azure" and not base.endswith("/openai/v1"):
        version = quote(endpoint.api_version or "", safe="")
        where = f"deployments/{quote(deployment, safe='')}/" if deployment else ""
        return f"{base.removesuffix('/openai')}/openai/{where}{path}?api-version={version}"
    if endpoint.provider == "ollama" and not base.endswith("/v1"):
        base += "/v1"
    return f"{base}/{path}"


def headers_of(endpoint: ApiEndpoint) -> dict[str, str]:
    """The headers, with the key where the provider wants it. Raises SettingsError for a key that none can hold."""
    headers = {"Content-Type": "application/json", "User-Agent": "tea-llm"}
    key = endpoint.api_key
    if not key:
        return headers
    if not (key.isascii() and key.isprintable() and key == key.strip()):
        raise SettingsError(
            f"the key for {endpoint.provider} holds a space at an end, a line break or a character that HTTP can't "
            f"send; set {key_variable(endpoint)} again"
        )
    return headers | ({"api-key": key} if endpoint.provider == "azure" else {"Authorization": f"Bearer {key}"})


def key_variable(endpoint: ApiEndpoint) -> str:
    """Where the endpoint's key is set."""
    variable = _KEY_VARIABLES.get(endpoint.provider)
    return f"{variable} or llm.api_key" if variable else "llm.api_key"


def is_own(endpoint: ApiEndpoint) -> bool:
    """Whether this is OpenAI or Azure itself, which refuse fields that they don't know."""
    host = urlsplit(endpoint.base_url).hostname or ""
    return endpoint.provider == "azure" or host.endswith((".openai.com", ".azure.com"))


def chat_body(params: LlmCallParams, model: str, *, stream: bool, own: bool) -> dict[str, Any]:
    """The body of a chat completion; with a `suffix` of a completion.

    Raises BadRequest for a field that OpenAI or Azure (`own`) don't know."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [dict(m) for m in params.messages or ({"role": "user", "content": params.prompt},)],
        "temperature": params.temperature,
    }
    if params.suffix is not None:
        body |= _infill(params)
        del body["messages"]
    if params.n > 1:
        body["n"] = params.n
    if params.logprobs:
        body["logprobs"] = True
    if params.top_logprobs:  # 0 is left out: llama-server would give no logprobs at all
        body["top_logprobs"] = params.top_logprobs
    if params.max_tokens is not None:
        body["max_tokens"] = params.max_tokens
    if params.stops:
        body["stop"] = list(params.stops)
    for name in ("regex", "choices"):
        if getattr(params, name) is not None:
            raise BadRequest(
                f"{name} is set, and no API knows it by that name; give a schema, put the server's own parameter under "
                "extra_body, or use backend: local"
            )
    if params.schema is not None:
        schema = {"name": "answer", "schema": json_schema_of(params), "strict": params.strict}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif params.response_format is not None:
        body["response_format"] = params.response_format
    given = params.given() | ({} if params.grammar is None else {"grammar": params.grammar})
    for name, value in given.items():
        row = BODY_FIELDS[name]
        if own and not row.openai:
            raise _unknown(name)
        if value is None:
            value = row.off
        if name == "samplers":
            order = sampler_order(value)
            value = None if order is None else list(order)
        if name == "logit_bias" and value is not None:
            value = {str(token): bias for token, bias in value.items()}
        if value is not None:
            body[row.name] = value
    if params.template_kwargs is not None:  # llama-server's and vLLM's name
        if own:
            raise _unknown("template_kwargs")
        body["chat_template_kwargs"] = dict(params.template_kwargs)
    body |= _tools_body(params) | _reasoning_body(params, body.get("chat_template_kwargs") or {}, own=own)
    body |= extra_body(params.extra)
    if stream:
        body = {"stream_options": {"include_usage": True}} | body | {"stream": True}
    return body


def _unknown(name: str) -> BadRequest:
    return BadRequest(
        f"{name} is set, and OpenAI's and Azure's APIs have no such parameter; leave it out, or set llm.api_base to a "
        "server that has it, such as llama-server or vLLM"
    )


def _tools_body(params: LlmCallParams) -> dict[str, Any]:
    body = {
        "tools": params.tools and list(params.tools),
        "tool_choice": params.tool_choice,
        "parallel_tool_calls": params.parallel_tool_calls,
    }
    return {name: value for name, value in body.items() if value is not None}


def _reasoning_body(params: LlmCallParams, template_kwargs: Mapping[str, Any], *, own: bool) -> dict[str, Any]:
    """The switch of thinking and its budget, as servers of different kinds know them; beside other `template_kwargs`.

    OpenAI, Azure and Ollama have `reasoning_effort`; llama-server and vLLM hand `enable_thinking` to the template.
    """
    body: dict[str, Any] = {}
    if params.reasoning is False:
        body["reasoning_effort"] = "none"
    if params.reasoning is not None and not own:
        body["chat_template_kwargs"] = {**template_kwargs, "enable_thinking": params.reasoning}
    if params.reasoning_budget is not None:
        if own:
            raise BadRequest(
                "reasoning_budget is set, and OpenAI's and Azure's APIs have no such parameter; leave it out, or give "
                "reasoning_effort"
            )
        body["thinking_budget_tokens"] = params.reasoning_budget
    return body


def _infill(params: LlmCallParams) -> dict[str, Any]:
    """What a text between two others is asked for with. Raises BadRequest for what no API has beside it."""
    for name in ("input_extra", "logprobs"):
        if getattr(params, name):
            raise BadRequest(f"{name} is set with suffix, and no API has both; leave it out, or use backend: local")
    return {"prompt": params.prompt, "suffix": params.suffix}


def extra_body(extra: Mapping[str, Any]) -> dict[str, Any]:
    """What `extra` adds to a body: its keys but for ours, and whatever `extra_body` in it holds."""
    more = extra.get("extra_body") or {}
    if not isinstance(more, Mapping):
        raise BadRequest(f"extra_body is {type(more).__name__}; give a mapping of further API parameters")
    return {key: value for key, value in extra.items() if key not in _NEVER_SENT} | dict(more)


def patience_of(settings: LlmSettings, extra: Mapping[str, Any], timeout_s: float | None) -> Patience:
    """The settings' patience, but for what a call says itself."""
    said = {key: extra[key] for key in _RETRY_KEYS if extra.get(key) is not None}
    for key, value in said.items():
        kinds = int if key == "max_retries" else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value <= 1e9:  # and no NaN
            what = "whole number of retries" if key == "max_retries" else "number of seconds"
            raise BadRequest(f"{key} is {value!r}; give a {what}, 0 or more")
    check_timeout_s(timeout_s)
    return Patience(
        # A socket whose timeout is 0 doesn't wait at all, and fails in other ways than by time.
        timeout_s=settings.timeout if timeout_s is None else max(timeout_s, 1e-3),
        max_retries=said.pop("max_retries", settings.max_retries),
        **said,
    )


def amended(body: Mapping[str, Any] | None, status: int, words: str) -> dict[str, Any] | None:
    """The body in the server's own dialect, where it was refused for one of two known differences; else None."""
    if body is None or status not in (400, 422):
        return None
    if "stream_options" in body and "stream_options" in words:  # older and smaller servers
        return {key: value for key, value in body.items() if key != "stream_options"}
    if "max_tokens" in body and "max_completion_tokens" in words:  # OpenAI's reasoning models
        return {("max_completion_tokens" if key == "max_tokens" else key): value for key, value in body.items()}
    return None


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The seconds that a Retry-After header asks for, in either of its forms (RFC 9110, 10.2.3)."""
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            until = parsedate_to_datetime(value)
        except ValueError:
            return None
        if until.tzinfo is None:  # "-0000": a time in UTC, from nowhere in particular
            until = until.replace(tzinfo=UTC)
        seconds = (until - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None


class Answer:
    """A chat completion, fed object by object: one whole reply, or each event of a stream."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.finish_reason: str | None = None
        self._chunks: list[str] = []
        self._thoughts: list[str] = []
        self._calls = GrowingCalls()
        self._usage: Usage | None = None
        self._logprobs: list[TokenLogprob] | None = None
        self._others: dict[int, Answer] = {}  # the texts after the first, where several were asked for

    @property
    def content(self) -> str:
        """The text so far."""
        return "".join(self._chunks)

    def feed(self, reply: Mapping[str, Any]) -> str | Delta | None:
        """What `reply` adds: a chunk where that is only text. None for nothing.

        Raises KeyError, TypeError, ValueError or AttributeError where it isn't a completion.
        """
        self.model = reply.get("model") or self.model
        if usage := reply.get("usage"):
            self._usage = usage_of(usage)
        said: str | Delta | None = None
        for choice in reply.get("choices") or ():  # an event that only counts usage has none
            index = choice.get("index", 0)
            if index == 0:
                said = self._take(choice)
            else:
                self._others.setdefault(index, Answer(self.model))._take(choice)
        return said

    def result(self, finish_reason: str | None = None) -> LlmCallResult:
        """What was said, with `finish_reason` in place of the server's."""
        first = self._completion(finish_reason)
        others = [self._others[index]._completion() for index in sorted(self._others)]
        return LlmCallResult(
            first.content,
            self.model,
            tokens_used=self._usage.total_tokens if self._usage else None,
            finish_reason=first.finish_reason,
            usage=self._usage,
            tool_calls=first.tool_calls,
            reasoning=first.reasoning,
            logprobs=first.logprobs,
            completions=(first, *others) if others else (),
        )

    def _completion(self, finish_reason: str | None = None) -> Completion:
        reason = finish_reason or self.finish_reason
        calls = self._calls.calls(cut=reason in ("length", "cancelled"))
        if calls and reason == "stop":  # of some servers, and of OpenAI's where a tool was named
            reason = "tool_calls"
        return Completion(
            self.content,
            reason,
            reasoning="".join(self._thoughts) or None,
            tool_calls=calls,
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
        )

    def _take(self, choice: Mapping[str, Any]) -> str | Delta | None:
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        told = (choice.get("logprobs") or {}).get("content")
        if told is not None:
            self._logprobs = [*(self._logprobs or ()), *map(_token_logprob, told)]
        return self._said(choice.get("delta") or choice.get("message") or {"content": choice.get("text")})

    def _said(self, message: Mapping[str, Any]) -> str | Delta | None:
        calls = [self._calls.add(piece) for piece in message.get("tool_calls") or ()]
        content = message.get("content") or ""
        if not isinstance(content, str):  # a list of parts
            content = "".join(part.get("text") or "" for part in content)
        thought = message.get("reasoning_content") or message.get("reasoning")  # llama-server, vLLM; Ollama, OpenRouter
        thought = thought if isinstance(thought, str) else ""
        if content:
            self._chunks.append(content)
        if not thought and not calls:
            return content or None
        if thought:
            self._thoughts.append(thought)
        return Delta(content, thought, tuple(calls))


def _top_logprob(told: Mapping[str, Any]) -> TopLogprob:
    token, exact = str(told["token"]), told.get("bytes")
    return TopLogprob(token, token.encode() if exact is None else bytes(exact), float(told["logprob"]))


def _token_logprob(told: Mapping[str, Any]) -> TokenLogprob:
    token = _top_logprob(told)
    top = tuple(map(_top_logprob, told.get("top_logprobs") or ()))
    return TokenLogprob(token.token, token.bytes, token.logprob, top)


def usage_of(usage: Mapping[str, Any]) -> Usage:
    """The tokens that a reply counts."""
    return Usage(int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))


def server_words(reply: Any) -> str:
    """What an error reply says for itself, in the forms that servers use; at most 500 characters."""
    if isinstance(reply, Mapping):
        said = next((reply[key] for key in ("error", "message", "detail") if reply.get(key)), reply)
        if isinstance(said, Mapping):
            said = said.get("message") or said
        reply = said
    text = reply if isinstance(reply, str) else json.dumps(reply, ensure_ascii=False, default=str)
    return " ".join(text.split())[:500]


def vectors_of(reply: Mapping[str, Any], n_texts: int) -> list[list[float]]:
    """The vectors of an embedding reply in the order asked. Raises as `Answer.feed` does."""
    by_index = {row.get("index", i): row["embedding"] for i, row in enumerate(reply["data"])}
    if sorted(by_index) != list(range(n_texts)):
        raise ValueError(f"{len(by_index)} vectors for {n_texts} texts")
    return [[float(x) for x in by_index[i]] for i in range(n_texts)]


def cut(vector: list[float], dimensions: int | None) -> list[float]:
    """The first `dimensions` numbers; None: all. Raises BadRequest when there are fewer."""
    if dimensions is None:
        return vector
    if dimensions > len(vector):
        raise BadRequest(f"dimensions is {dimensions}, and the model's vectors have {len(vector)}; ask for fewer")
    return vector[:dimensions]


def normalized(vector: list[float]) -> list[float]:
    """The vector at length 1; one of zeros stays as it is."""
    length = math.hypot(*vector)
    return [x / length for x in vector] if length else vector


def as_float32(vectors: list[list[float]]) -> Any:
    """The vectors as one numpy array. Raises BadRequest without numpy."""
    try:
        import numpy as np
    except ImportError as exc:
        raise BadRequest("as_numpy needs numpy, which isn't installed; pip install numpy, or leave it out") from exc
    return np.asarray(vectors, dtype=np.float32).reshape(len(vectors), -1 if vectors else 0)


def status_line(status: int) -> str:
    """The status with its name: "429 Too Many Requests"."""
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)
