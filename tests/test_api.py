"""The API backend against real HTTP servers: a table of faults on loopback, and llama.cpp's own server."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import inspect
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

pytest.importorskip("httpx", reason="the API backend needs httpx")

import httpx
import httpx_sse

from tea_llm.api import ApiLlmBackend
from tea_llm.api_format import BODY_FIELDS, EMBEDDING_BATCH, retry_after_s, url_of
from tea_llm.api_io import ERRORS, HTTPX_ERRORS, error_class
from tea_llm.backend import LlmBackend
from tea_llm.errors import (
    ApiConnectionError,
    ApiError,
    ApiResponseError,
    ApiStatusError,
    ApiTimeout,
    BadRequest,
    EngineClosed,
    FallbackError,
    LlmError,
    ModelNotFound,
    SettingsError,
)
from tea_llm.params import UNSET, LlmCallParams, LlmCallResult, Usage
from tea_llm.settings import ApiEndpoint

from .api_server import ApiServer, Reply, chat, delta, failure, json_reply, sse, stream

KEY = "sk-secret-0123456789"
HELLO = LlmCallParams("Hello!", model="asked-1")
STREAMED = stream(sse(delta("Hi"), {"object": "ping"}, delta(" there", "stop"), {"usage": {"prompt_tokens": 4}}))

pytestmark = pytest.mark.usefixtures("bare_environment")

Generate = Callable[..., LlmCallResult]


@pytest.fixture
def open_backend() -> Iterator[Callable[..., ApiLlmBackend]]:
    """Makes backends and closes them."""
    backends: list[ApiLlmBackend] = []

    def make(base: str, *, fallback_from: LlmError | None = None, **llm: Any) -> ApiLlmBackend:
        settings = {"llm": {"api_base": base, "api_key": KEY, "timeout": 5} | llm}
        backends.append(ApiLlmBackend(settings, fallback_from=fallback_from))
        return backends[-1]

    yield make
    for backend in backends:
        backend.close()


@pytest.fixture
def backend(server: ApiServer, open_backend: Callable[..., ApiLlmBackend]) -> ApiLlmBackend:
    return open_backend(server.base)


@pytest.fixture(params=["blocking", "asyncio"])
def generate(request: pytest.FixtureRequest) -> Generate:
    """`generate` or, in a loop of its own, `agenerate`: every fault is tried on both."""
    if request.param == "blocking":
        return lambda backend, *args: backend.generate(*args)
    return lambda backend, *args: asyncio.run(backend.agenerate(*args))


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_a_prompt_alone_becomes_one_user_message(server: ApiServer, backend: ApiLlmBackend, generate: Generate) -> None:
    result = generate(backend, LlmCallParams("Hello!", 7, 0.0, "\n", model="asked-1"))
    (seen,) = server.seen
    assert (seen.method, seen.path) == ("POST", "/v1/chat/completions")
    assert seen.headers["Authorization"] == f"Bearer {KEY}"
    assert seen.body == {
        "model": "asked-1",
        "messages": [{"role": "user", "content": "Hello!"}],
        "temperature": 0.0,
        "max_tokens": 7,
        "stop": ["\n"],
    }
    assert result == LlmCallResult(
        "Hi.",
        "served-1",
        5,
        "stop",
        usage=Usage(3, 2),
        backend="api",
        provider="openai",
        attempts=1,
    )


def test_messages_beat_the_prompt(server: ApiServer, backend: ApiLlmBackend) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "A"}]},
    ]
    backend.call(LlmCallParams("not this", messages=messages, model="m"))
    assert server.seen[0].body["messages"] == messages


def test_every_sampling_field_has_an_api_name() -> None:
    sampling = {f.name for f in dataclasses.fields(LlmCallParams) if f.default is UNSET} | {"grammar"}
    assert set(BODY_FIELDS) == sampling


NO_ONE: dict[str, Any] = {  # values of the fields that don't take a 1
    "dry_sequence_breakers": ["\n"],
    "grammar": 'root ::= "a"',
    "samplers": ["top_k", "min_p"],
    "ignore_eos": True,
    "adaptive_decay": 0.5,
}


@pytest.mark.parametrize("name", sorted(BODY_FIELDS))
def test_a_sampling_field_is_sent_under_its_api_name(server: ApiServer, backend: ApiLlmBackend, name: str) -> None:
    value = ({"logit_bias": {15: -1.5}} | NO_ONE).get(name, 1)
    backend.call(LlmCallParams("a", model="m", **{name: value}))
    sent = server.seen[0].body[BODY_FIELDS[name].name]
    assert sent == ({"15": -1.5} if name == "logit_bias" else value)


@pytest.mark.parametrize("name", sorted(name for name, row in BODY_FIELDS.items() if not row.openai))
def test_a_field_that_azure_has_not_is_refused_by_name(
    server: ApiServer, open_backend: Callable[..., ApiLlmBackend], name: str
) -> None:
    azure = open_backend(server.address, provider="azure", deployment="d")
    with pytest.raises(BadRequest, match=rf"^{name} is set"):
        azure.call(LlmCallParams("a", **{name: NO_ONE.get(name, 1)}))
    assert server.seen == []


def test_template_kwargs_go_to_a_server_and_the_settings_for_local_templates_do_not(
    server: ApiServer, open_backend: Callable[..., ApiLlmBackend]
) -> None:
    local = {"chat_template": "x", "chat_template_name": "y", "template_kwargs": {"enable_thinking": False}}
    open_backend(server.address).call(LlmCallParams("a", model="m", **local))
    assert server.seen[0].body["chat_template_kwargs"] == {"enable_thinking": False}
    assert not local.keys() & server.seen[0].body.keys()
    with pytest.raises(BadRequest, match="template_kwargs is set"):
        open_backend(server.address, provider="azure", deployment="d").call(LlmCallParams("a", template_kwargs={}))


def test_openai_itself_is_never_sent_a_field_it_has_not(open_backend: Callable[..., ApiLlmBackend]) -> None:
    with pytest.raises(BadRequest, match="top_k is set"):  # refused before any connection
        open_backend("https://api.openai.com/v1").call(LlmCallParams("a", top_k=3))


def test_none_switches_a_sampling_field_off(server: ApiServer, backend: ApiLlmBackend) -> None:
    backend.call(LlmCallParams("a", None, model="m", top_p=None, top_k=None, seed=None, logit_bias=None))
    body = server.seen[0].body
    assert (body["top_p"], body["top_k"]) == (1.0, 0)
    assert not {"seed", "max_tokens", "logit_bias"} & set(body)


def test_extra_goes_into_the_body_but_for_local_and_retry_keys(server: ApiServer, backend: ApiLlmBackend) -> None:
    extra = {
        "response_format": {"type": "json_object"},
        "extra_body": {"user": "u"},
        "n_ctx": 9,
        "n_gpu_layers": -1,
        "model_path": "x.gguf",
        "truncate": True,
        "max_retries": 1,
        "base_delay": 0.0,
        "max_delay": 0,
        "state": {},
        "config": {},
        "node": "n",
        "graph": None,
        "parallel_results": [],
    }
    backend.call(dataclasses.replace(HELLO, extra=extra))
    body = server.seen[0].body
    assert set(body) == {"model", "messages", "temperature", "max_tokens", "response_format", "user"}


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        (ApiEndpoint("openai", "http://h/v1"), "http://h/v1/chat/completions"),
        (ApiEndpoint("openai", "http://h/v1/"), "http://h/v1/chat/completions"),
        (ApiEndpoint("openai", "http://h/v1/chat/completions"), "http://h/v1/chat/completions"),
        (ApiEndpoint("ollama", "http://h:11434"), "http://h:11434/v1/chat/completions"),
        (ApiEndpoint("ollama", "http://h:11434/v1"), "http://h:11434/v1/chat/completions"),
        (
            ApiEndpoint("azure", "https://r.openai.azure.com", api_version="2024-10-21"),
            "https://r.openai.azure.com/openai/deployments/my%20gpt/chat/completions?api-version=2024-10-21",
        ),
        (
            ApiEndpoint("azure", "https://r.openai.azure.com/openai/v1", api_version="2024-10-21"),
            "https://r.openai.azure.com/openai/v1/chat/completions",
        ),
    ],
)
def test_each_provider_is_addressed_its_own_way(endpoint: ApiEndpoint, url: str) -> None:
    assert url_of(endpoint, "chat/completions", "my gpt") == url


def test_azure_takes_its_key_in_a_header_of_its_own(
    server: ApiServer, open_backend: Callable[..., ApiLlmBackend]
) -> None:
    open_backend(server.address, provider="azure", deployment="dep").call(LlmCallParams("a"))
    (seen,) = server.seen
    assert seen.path == "/openai/deployments/dep/chat/completions?api-version=2024-10-21"
    assert seen.headers["api-key"] == KEY
    assert "Authorization" not in seen.headers


def test_azure_without_a_deployment_says_where_to_set_it(
    server: ApiServer, open_backend: Callable[..., ApiLlmBackend]
) -> None:
    with pytest.raises(SettingsError, match="AZURE_OPENAI_DEPLOYMENT"):
        open_backend(server.address, provider="azure").call(LlmCallParams("a"))


def test_the_first_model_that_a_server_lists_is_asked_for_once(server: ApiServer, backend: ApiLlmBackend) -> None:
    server.replies = [json_reply({"data": [{"id": "first"}, {"id": "second"}]}), chat()]
    results = [backend.call(LlmCallParams("a")) for _ in range(2)]
    assert [seen.path for seen in server.seen] == ["/v1/models", "/v1/chat/completions", "/v1/chat/completions"]
    assert server.seen[1].body["model"] == "first"
    assert [result.attempts for result in results] == [1, 1]


def test_a_server_that_has_no_model_needs_one_in_the_settings(server: ApiServer, backend: ApiLlmBackend) -> None:
    server.replies = [json_reply({"data": []})]
    with pytest.raises(SettingsError, match=r"set llm\.model"):
        backend.call(LlmCallParams("a"))


@pytest.mark.parametrize(
    "reply", [failure(404), failure(501), failure(500), json_reply([]), chat(), Reply(hang_up=True)]
)
def test_a_server_without_a_list_of_models_is_asked_for_openais_default(
    server: ApiServer, backend: ApiLlmBackend, reply: Reply
) -> None:
    server.replies = [reply, failure(500), chat("Hi.")]
    result = backend.call(LlmCallParams("a", extra={"max_retries": 1, "base_delay": 0}))
    assert (result.content, result.attempts) == ("Hi.", 2)
    assert [(seen.method, (seen.body or {}).get("model")) for seen in server.seen[-2:]] == [("POST", "gpt-4o-mini")] * 2


@pytest.mark.parametrize("key", ["sk-1\n", "sk-1\r\nX-Injected: 1", "sk-1 ", "schlüssel"])
def test_a_key_that_no_header_can_hold_is_refused_unseen(
    server: ApiServer, open_backend: Callable[..., ApiLlmBackend], key: str
) -> None:
    backend = open_backend(server.base, model="m")
    object.__setattr__(backend._settings, "api_key", key)  # past the settings' own checks
    with pytest.raises(SettingsError, match="OPENAI_API_KEY") as caught:
        backend.call(LlmCallParams("a"))
    assert key not in str(caught.value)
    assert server.seen == []


def test_what_json_cannot_hold_is_a_bad_request(backend: ApiLlmBackend) -> None:
    with pytest.raises(BadRequest, match="JSON"):
        backend.call(dataclasses.replace(HELLO, extra={"metadata": object()}))


# --- what is answered ------------------------------------------------------------------------------------------------


def test_content_that_is_null_is_an_empty_text_with_tool_calls(
    server: ApiServer, backend: ApiLlmBackend, generate: Generate
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    server.replies = [chat(None, tool_calls=[call], finish_reason="tool_calls")]
    result = generate(backend, HELLO)
    assert (result.content, list(result.tool_calls), result.finish_reason) == ("", [call], "tool_calls")


def test_a_stream_hands_out_each_delta_and_counts_usage(
    server: ApiServer, backend: ApiLlmBackend, generate: Generate
) -> None:
    server.replies = [STREAMED]
    chunks: list[str] = []
    result = generate(backend, HELLO, chunks.append)
    assert chunks == ["Hi", " there"]
    assert (result.content, result.finish_reason, result.tokens_used) == ("Hi there", "stop", 4)
    assert server.seen[0].body["stream_options"] == {"include_usage": True}


def test_a_server_without_stream_options_is_asked_again_without_them(
    server: ApiServer, backend: ApiLlmBackend, generate: Generate
) -> None:
    server.replies = [failure(400, "Unrecognized request argument: stream_options"), STREAMED]
    result = generate(backend, HELLO, lambda chunk: None)
    assert (result.content, result.attempts) == ("Hi there", 2)
    assert "stream_options" not in server.seen[1].body


def test_a_model_that_counts_completion_tokens_gets_that_name(server: ApiServer, backend: ApiLlmBackend) -> None:
    words = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    server.replies = [failure(400, words), chat()]
    backend.call(HELLO)
    assert server.seen[1].body["max_completion_tokens"] == 100
    assert "max_tokens" not in server.seen[1].body


TEXT = "Grüße, 世界 🌍!\u2028next"
EVENTS = sse(delta(TEXT), delta(finish_reason="stop"))


@pytest.mark.parametrize(
    ("pieces", "why"),
    [
        ([EVENTS[i : i + 1] for i in range(len(EVENTS))], "a byte at a time"),
        ([EVENTS[:n] + EVENTS[n:] for n in [len(EVENTS)]], "in one piece"),
        ([b": ping\n\n", b"event: message\nid: 1\nretry: 10\n" + EVENTS, b":\n\n"], "comments and other fields"),
        ([EVENTS.replace(b"\n", b"\r\n")], "CRLF"),
        ([b"\xef\xbb\xbf" + EVENTS], "a byte order mark"),
        ([EVENTS.replace(b"data: ", b"data:")], "no space after the colon"),
        ([sse(delta(TEXT), delta(finish_reason="stop"), done=False)], "no [DONE] after the finish"),
        ([sse(delta(TEXT))], "no finish_reason before [DONE]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_stream_gives_the_right_text_however_it_is_cut_up(
    server: ApiServer, backend: ApiLlmBackend, generate: Generate, pieces: list[bytes], why: str
) -> None:
    server.replies = [stream(*pieces)]
    chunks: list[str] = []
    result = generate(backend, HELLO, chunks.append)
    assert "".join(chunks) == result.content == TEXT


def test_a_stream_cut_after_its_finish_reason_is_whole(
    server: ApiServer, backend: ApiLlmBackend, generate: Generate
) -> None:
    server.replies = [stream(sse(delta("Hi", "stop"), done=False), cut=True)]
    assert generate(backend, HELLO, lambda chunk: None).content == "Hi"


@pytest.mark.parametrize(
    "reply",
    [
        stream(sse(delta("Hel"), done=False), cut=True),
        stream(sse(delta("Hel"), done=False)),
        stream(sse(delta("Hel"), {"error": {"message": "overloaded", "code": 500}})),
        stream(sse(delta("Hel"), {"error": {"message": "x"}, "choices": [{"delta": {"content": ""}}]})),
        stream(sse(delta("Hel"), done=False) + b"event: error\ndata: overloaded\n\n"),
        stream(sse(delta("Hel"), done=False) + b"data: {broken\n\n"),
        stream(sse(delta("Hel"), [1])),
        stream(sse(delta("Hel"), {"choices": ["text"]})),
    ],
    ids=["cut", "early end", "error object", "error beside choices", "error event", "no JSON", "a list", "odd choice"],
)
def test_a_stream_that_breaks_says_so_and_keeps_its_text(
    server: ApiServer, open_backend: Callable[..., ApiLlmBackend], generate: Generate, reply: Reply
) -> None:
    server.replies = [reply]
    chunks: list[str] = []
    with pytest.raises(ApiResponseError) as caught:
        generate(open_backend(server.base, max_retries=3), HELLO, chunks.append)
    assert caught.value.partial == "Hel" == "".join(chunks)
    assert caught.value.attempts == len(server.seen) == 1  # nothing is retried once a chunk was handed out


def test_an_error_event_is_told_in_the_servers_words(
    server: ApiServer, backend: ApiLlmBackend, generate: Generate
) -> None:
    server.replies = [stream(sse(delta("Hel"), done=False) + b'event: error\ndata: {"message": "overloaded"}\n\n')]
    with pytest.raises(ApiResponseError, match=r"answered with an error.*overloaded"):
        generate(backend, HELLO, lambda chunk: None)


def test_a_stream_cut_before_any_text_is_asked_for_again(
    server: ApiServer, open_backend: Callable[..., ApiLlmBackend], generate: Generate
) -> None:
    server.replies = [stream(sse(delta(role="assistant"), done=False), cut=True), STREAMED]
    result = generate(
        open_backend(server.base, max_retries=1), dataclasses.replace(HELLO, extra={"base_delay": 0}), lambda chunk: 1
    )
    assert (result.content, result.attempts) == ("Hi there", 2)


def test_a_server_that_does_not_stream_gives_one_chunk(
    server: ApiServer, backend: ApiLlmBackend, generate: Generate
) -> None:
    chunks: list[str] = []
    assert generate(backend, HELLO, chunks.append).content == "Hi."
    assert chunks == ["Hi."]


def test_returning_false_ends_the_stream(server: ApiServer, backend: ApiLlmBackend, generate: Generate) -> None:
    server.replies = [stream(sse(delta("one"), done=False), sse(delta("two"), done=False), EVENTS, pause_s=0.1)]
    chunks: list[str] = []

    def take_one(chunk: str) -> bool:
        chunks.append(chunk)
        return False

    result = generate(backend, HELLO, take_one)
    assert chunks == ["one"]
    assert (result.content, result.finish_reason) == ("one", "cancelled")
    assert server.all_closed()  # and the server need not go on


def test_what_a_callback_raises_reaches_the_caller(
    server: ApiServer, open_backend: Callable[..., ApiLlmBackend], generate: Generate
) -> None:
    server.replies = [STREAMED]

    def fail(chunk: str) -> None:
        raise httpx.ReadTimeout("the callback's own request")

    with pytest.raises(httpx.ReadTimeout, match="callback's own"):
        generate(open_backend(server.base, max_retries=2), HELLO, fail)
    assert len(server.seen) == 1


def test_a_callback_may_be_a_coroutine_function_in_asyncio_only(server: ApiServer, backend: ApiLlmBackend) -> None:
    server.replies = [STREAMED]
    chunks: list[str] = []

    async def take(chunk: str) -> None:
        await asyncio.sleep(0)
        chunks.append(chunk)

    assert asyncio.run(backend.astream(HELLO, take)).content == "".join(chunks) == "Hi there"
    with pytest.raises(BadRequest, match="agenerate"):
        backend.stream(HELLO, take)


def test_tool_call_deltas_are_merged(server: ApiServer, backend: ApiLlmBackend, generate: Generate) -> None:
    def call(index: int, **more: Any) -> dict[str, Any]:
        return delta(tool_calls=[{"index": index} | more])

    server.replies = [
        stream(
            sse(
                call(0, id="a", type="function", function={"name": "add", "arguments": ""}),
                call(0, function={"arguments": '{"x": '}),
                call(0, function={"arguments": "1}"}),
                call(1, id="b", function={"name": "sub", "arguments": "{}"}),
                delta(finish_reason="tool_calls"),
            )
        )
    ]
    result = generate(backend, HELLO, lambda chunk: None)
    assert list(result.tool_calls) == [
        {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}},
        {"id": "b", "type": "function", "function": {"name": "sub", "arguments": "{}"}},
    ]


def test_tool_calls_without_index_or_id_stay_apart(server: ApiServer, backend: ApiLlmBackend) -> None:
    named = [{"function": {"name": name, "arguments": "{}"}} for name in ("add", "sub")]
    server.replies = [chat(None, tool_calls=named)]
    assert [call["function"]["name"] for call in backend.call(HELLO).tool_calls] == ["add", "sub"]


@pytest.mark.parametrize(
    "reply",
    [
        Reply([b"<html>It works!</html>"], content_type="text/html"),
        Reply([b""]),
        json_reply([]),
        json_reply({}),
        json_reply({"choices": []}),
        json_reply({"choices": [None]}),
        json_reply({"choices": "text"}),
        json_reply({"error": {"message": "no"}}),
        Reply([b"{}"], headers={"Content-Encoding": "gzip"}),
        Reply(status=302, headers={"Location": "http://elsewhere.example/v1"}),
        Reply(status=204),
    ],
    ids=["html", "empty", "list", "object", "no choice", "null choice", "text", "error", "gzip", "redirect", "204"],
)
def test_an_answer_that_is_none_is_an_api_response_error(
    server: ApiServer, backend: ApiLlmBackend, generate: Generate, reply: Reply
) -> None:
    server.replies = [reply]
    with pytest.raises(ApiResponseError, match=r"^POST http://127.0.0.1"):
        generate(backend, HELLO)


def test_a_redirect_never_takes_the_key_along(server: ApiServer, open_backend: Callable[..., ApiLlmBackend]) -> None:
    with ApiServer() as elsewhere:
        server.replies = [Reply(status=307, headers={"Location": f"{elsewhere.base}/chat/completions?k={KEY}"})]
        with pytest.raises(ApiResponseError, match=r"307 .*set llm\.api_base") as caught:
            open_backend(server.address, provider="azure", deployment="d").call(HELLO)
        assert elsewhere.seen == []
    assert KEY not in str(caught.value)


# --- faults and retries ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 413, 422, 451, 408, 409, 429, 500, 502, 503, 529])
def test_only_passing_faults_are_tried_again(
    server: ApiServer, backend: ApiLlmBackend, generate: Generate, status: int
) -> None:
    server.replies = [failure(status, "the server's own words")]
    asked = dataclasses.replace(HELLO, extra={"max_retries": 2, "base_delay": 0.01})
    with pytest.raises(ApiStatusError, match="the server's own words") as caught:
        generate(backend, asked)
    retried = status in (408, 409, 429) or status >= 500
    assert caught.value.attempts == len(server.seen) == (3 if retried else 1)
    assert caught.value.total_delay_s == pytest.approx(0.03 if retried else 0.0)  # 0.01 + 0.02
    assert caught.value.status_code == status


def test_a_retry_that_succeeds_says_what_it_took(server: ApiServer, backend: ApiLlmBackend, generate: Generate) -> None:
    server.replies = [failure(503), Reply(hang_up=True), chat()]
    result = generate(backend, dataclasses.replace(HELLO, extra={"max_retries": 5, "base_delay": 0.01}))
    assert (result.content, result.attempts) == ("Hi.", 3)
    assert result.total_delay_s == pytest.approx(0.03)


def test_nothing_is_tried_again_unless_asked(server: ApiServer, backend: ApiLlmBackend) -> None:
    server.replies = [failure(503)]
    with pytest.raises(ApiStatusError, match="raise max_retries"):
        backend.call(HELLO)
    assert len(server.seen) == 1


def test_retry_after_is_honoured_and_capped(server: ApiServer, backend: ApiLlmBackend, generate: Generate) -> None:
    server.replies = [failure(429, Retry_After="0.05"), failure(429, Retry_After="3600"), chat()]
    began = time.monotonic()
    result = generate(backend, dataclasses.replace(HELLO, extra={"max_retries": 2, "base_delay": 9, "max_delay": 0.1}))
    assert result.total_delay_s == pytest.approx(0.15)
    assert time.monotonic() - began >= 0.15


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("2", 2.0),
        ("0.5", 0.5),
        ("-1", 0.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("soon", None),
        ("", None),
        ("nan", None),
        ("inf", None),
    ],
)
def test_retry_after_is_read_in_each_form(value: str, seconds: float | None) -> None:
    assert retry_after_s(httpx.Headers({"Retry-After": value})) == seconds


def test_retry_after_may_be_a_date() -> None:
    then = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert retry_after_s(httpx.Headers({"Retry-After": then})) == pytest.approx(30, abs=2)


def test_no_server_is_a_connection_error(open_backend: Callable[..., ApiLlmBackend], generate: Generate) -> None:
    with ApiServer() as gone:
        base = gone.base
    with pytest.raises(ApiConnectionError, match="check that the server runs") as caught:
        generate(open_backend(base), dataclasses.replace(HELLO, extra={"max_retries": 1, "base_delay": 0}))
    assert caught.value.attempts == 2
    assert isinstance(caught.value, ConnectionError)


@pytest.mark.parametrize(
    "reply",
    [chat(), Reply([b" "] * 40, pause_s=0.1), stream(*[b": ping\n\n"] * 40, pause_s=0.1)],
    ids=["silent", "dripping", "pinging"],
)
def test_a_slow_answer_times_out_once_per_attempt(
    server: ApiServer, backend: ApiLlmBackend, generate: Generate, reply: Reply
) -> None:
    server.replies = [dataclasses.replace(reply, wait_s=1.0) if reply.content_type and reply.pause_s == 0 else reply]
    asked = dataclasses.replace(HELLO, timeout_s=0.3, extra={"max_retries": 1, "base_delay": 0})
    on_chunk = None if reply.content_type == "application/json" else lambda chunk: None
    began = time.monotonic()
    with pytest.raises(ApiTimeout, match=r"within 0\.3 s") as caught:
        generate(backend, asked, on_chunk)
    assert 0.6 <= time.monotonic() - began < 2
    assert caught.value.attempts == 2
    assert isinstance(caught.value, TimeoutError)


def test_a_timeout_in_a_stream_keeps_the_text_and_is_not_retried(
    server: ApiServer, backend: ApiLlmBackend, generate: Generate
) -> None:
    server.replies = [stream(sse(delta("Hel"), done=False), EVENTS, pause_s=0.25)]
    asked = dataclasses.replace(HELLO, timeout_s=0.4, extra={"max_retries": 2, "base_delay": 0})
    with pytest.raises(ApiTimeout) as caught:
        generate(backend, asked, lambda chunk: None)
    assert caught.value.partial == "Hel"
    assert caught.value.attempts == len(server.seen) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_retries", -1), ("max_retries", 1.5), ("base_delay", "soon"), ("max_delay", math.inf), ("max_delay", 1e300)],
)
def test_a_bad_retry_knob_is_refused_by_name(backend: ApiLlmBackend, name: str, value: Any) -> None:
    with pytest.raises(BadRequest, match=f"^{name} is"):
        backend.call(dataclasses.replace(HELLO, extra={name: value}))


@pytest.mark.parametrize("timeout_s", ["3", -1, math.nan, 1e300])
def test_a_bad_timeout_of_an_embedding_is_refused_by_name(backend: ApiLlmBackend, timeout_s: Any) -> None:
    with pytest.raises(BadRequest, match=r"^timeout_s is"):
        backend.embed("a", model="m", timeout_s=timeout_s)


def test_no_time_at_all_is_a_timeout(backend: ApiLlmBackend) -> None:
    with pytest.raises(ApiTimeout):
        backend.call(dataclasses.replace(HELLO, timeout_s=0))


def test_every_httpx_error_is_one_of_ours() -> None:
    classes = {c for c in vars(httpx).values() if inspect.isclass(c) and issubclass(c, Exception)} | {
        httpx_sse.SSEError
    }
    for kind in classes:
        assert issubclass(kind, HTTPX_ERRORS), f"{kind.__name__} would pass uncaught"
        assert issubclass(error_class(kind), LlmError)
    assert error_class(httpx.ConnectTimeout) is ApiTimeout
    assert error_class(httpx.ConnectError) is ApiConnectionError
    assert error_class(httpx.DecodingError) is ApiResponseError
    assert set(ERRORS) <= classes


def test_the_key_is_in_no_repr_error_or_log(
    server: ApiServer, open_backend: Callable[..., ApiLlmBackend], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    backend = open_backend(server.base, max_retries=1)
    server.replies = [failure(500, f"bad key {KEY} for SECRET-PROMPT"), failure(401, f"bad key {KEY}")]
    with pytest.raises(ApiStatusError, match=r"401 Unauthorized; check OPENAI_API_KEY") as caught:
        backend.call(LlmCallParams("SECRET-PROMPT", model="m", extra={"base_delay": 0}))
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("tea_llm")]
    assert any("status 500" in line for line in ours)
    text = "\n".join([repr(backend), repr(caught.value), *ours])
    assert KEY not in text
    assert not any("SECRET-PROMPT" in line for line in ours)


# --- falling back ----------------------------------------------------------------------------------------------------


def test_after_a_fallback_each_result_says_why(server: ApiServer, open_backend: Callable[..., ApiLlmBackend]) -> None:
    cause = ModelNotFound("No local model found")
    backend = open_backend(server.base, fallback_from=cause)
    server.replies = [chat()]
    assert backend.call(HELLO).fallback_reason == "No local model found"
    server.replies = [json_reply({"data": [{"index": 0, "embedding": [1.0]}]})]
    assert backend.embeddings(["a"], model="m").fallback_reason == "No local model found"


@pytest.mark.parametrize(("reply", "kind"), [(failure(400), ApiStatusError), (Reply(hang_up=True), ApiConnectionError)])
def test_when_the_api_fails_too_both_causes_are_named(
    server: ApiServer,
    open_backend: Callable[..., ApiLlmBackend],
    generate: Generate,
    reply: Reply,
    kind: type[ApiError],
) -> None:
    cause = ModelNotFound("No local model found")
    server.replies = [reply]
    with pytest.raises(FallbackError, match=r"No local model found.*POST http") as caught:
        generate(open_backend(server.base, fallback_from=cause), HELLO)
    (_, local), (_, api) = caught.value.causes
    assert [name for name, _ in caught.value.causes] == ["local", "api"]
    assert local is cause
    assert isinstance(api, kind)


def test_without_a_key_either_both_are_named() -> None:
    cause = ModelNotFound("No local model found")
    with ApiLlmBackend({"llm": {}}, fallback_from=cause) as backend:
        assert not backend.is_available()
        with pytest.raises(FallbackError, match=r"No local model found.*OPENAI_API_KEY"):
            backend.call(LlmCallParams("a"))


def test_a_model_file_that_failed_is_not_asked_of_the_api(
    server: ApiServer, open_backend: Callable[..., ApiLlmBackend]
) -> None:
    backend = open_backend(server.base, model="remote-1", fallback_from=ModelNotFound("No local model found"))
    backend.call(LlmCallParams("a", model="here/model.gguf"))
    assert server.seen[0].body["model"] == "remote-1"


# --- embeddings ------------------------------------------------------------------------------------------------------


def _embedding(*vectors: list[float], **more: Any) -> Reply:
    rows = [{"index": i, "embedding": vector} for i, vector in enumerate(vectors)]
    return json_reply({"model": "e-1", "data": rows[::-1], "usage": {"prompt_tokens": 2, "total_tokens": 2}} | more)


def test_embeddings_keep_the_order_asked(server: ApiServer, backend: ApiLlmBackend) -> None:
    server.replies = [_embedding([3.0, 4.0], [0.0, 0.0], [0.0, 2.0])]
    result = backend.embeddings(["a", "b", "c"], model="e")
    assert result.embeddings == [[0.6, 0.8], [0.0, 0.0], [0.0, 1.0]]
    assert (result.model, result.usage, result.backend, result.attempts) == ("e-1", Usage(2), "api", 1)
    assert server.seen[0].path == "/v1/embeddings"
    assert server.seen[0].body == {"model": "e", "input": ["a", "b", "c"], "encoding_format": "float"}
    assert backend.embeddings(["a", "b", "c"], model="e", normalize=False).embeddings[0] == [3.0, 4.0]


def test_a_text_gives_a_vector_and_a_list_gives_vectors(server: ApiServer, backend: ApiLlmBackend) -> None:
    server.replies = [_embedding([1.0])]
    assert backend.embed("a", model="e") == [1.0]
    assert asyncio.run(backend.aembed(["a"], model="e")) == [[1.0]]


def test_dimensions_cut_before_normalising(server: ApiServer, backend: ApiLlmBackend) -> None:
    server.replies = [_embedding([3.0, 4.0, 12.0])]
    assert backend.embed("a", model="e", dimensions=2) == [0.6, 0.8]
    assert "dimensions" not in server.seen[0].body
    with pytest.raises(BadRequest, match="dimensions is 4, and the model's vectors have 3"):
        backend.embed("a", model="e", dimensions=4)


def test_azure_cuts_dimensions_itself(server: ApiServer, open_backend: Callable[..., ApiLlmBackend]) -> None:
    server.replies = [_embedding([1.0, 0.0])]
    open_backend(server.address, provider="azure", embedding_model="e3").embed("a", dimensions=2)
    assert server.seen[0].path == "/openai/deployments/e3/embeddings?api-version=2024-10-21"
    assert server.seen[0].body["dimensions"] == 2


def test_an_empty_list_asks_nothing(server: ApiServer, backend: ApiLlmBackend) -> None:
    assert backend.embed([]) == []
    assert server.seen == []


def test_many_texts_go_in_batches(server: ApiServer, backend: ApiLlmBackend) -> None:
    server.replies = [_embedding(*[[1.0]] * EMBEDDING_BATCH), _embedding([-1.0], [-1.0])]
    result = backend.embeddings(["a"] * (EMBEDDING_BATCH + 2), model="e")
    assert [len(seen.body["input"]) for seen in server.seen] == [EMBEDDING_BATCH, 2]
    assert result.embeddings[-3:] == [[1.0], [-1.0], [-1.0]]
    assert (result.usage, result.attempts) == (Usage(4), 2)


def test_embeddings_as_numpy_are_float32(server: ApiServer, backend: ApiLlmBackend) -> None:
    numpy = pytest.importorskip("numpy")
    server.replies = [_embedding([3.0, 4.0])]
    vectors = backend.embed(["a"], model="e", as_numpy=True)
    assert (vectors.dtype, vectors.shape) == (numpy.float32, (1, 2))
    assert backend.embed([], as_numpy=True).shape == (0, 0)


@pytest.mark.parametrize(
    "reply",
    [_embedding([1.0]), _embedding([1.0], [1.0], [1.0]), _embedding([1.0], [None]), json_reply({"data": None})],
    ids=["too few", "too many", "null", "no data"],
)
def test_vectors_that_do_not_fit_the_texts_are_an_error(
    server: ApiServer, backend: ApiLlmBackend, reply: Reply
) -> None:
    server.replies = [reply]
    with pytest.raises(ApiResponseError):
        backend.embed(["a", "b"], model="e")


# --- lifetime --------------------------------------------------------------------------------------------------------


def test_is_available_asks_for_credentials_only(open_backend: Callable[..., ApiLlmBackend]) -> None:
    with ApiLlmBackend({"llm": {}}) as keyless:
        assert not keyless.is_available()
    backend = open_backend("http://127.0.0.1:9/v1")  # nobody listens
    assert backend.is_available()
    backend.close()
    assert not backend.is_available()


def test_a_closed_backend_stays_closed(server: ApiServer, backend: ApiLlmBackend, generate: Generate) -> None:
    generate(backend, HELLO)
    backend.close()
    backend.close()
    with pytest.raises(EngineClosed):
        generate(backend, HELLO)
    with pytest.raises(EngineClosed):
        backend.embed([])


def test_close_ends_a_call_that_waits_for_its_retry(
    server: ApiServer, open_backend: Callable[..., ApiLlmBackend], generate: Generate
) -> None:
    backend = open_backend(server.base, fallback_from=ModelNotFound("not the cause of this"))
    server.replies = [failure(503)]
    asked = dataclasses.replace(HELLO, extra={"max_retries": 9, "base_delay": 0.3})
    closing = threading.Timer(0.1, backend.close)
    closing.start()
    with pytest.raises(EngineClosed, match="make a new one"):
        generate(backend, asked)
    closing.join()
    assert len(server.seen) == 1


def test_one_backend_serves_several_loops_and_threads_at_once(server: ApiServer, backend: ApiLlmBackend) -> None:
    server.replies = [STREAMED]
    texts: list[str] = []

    async def several() -> None:
        results = await asyncio.gather(*(backend.astream(HELLO, lambda chunk: None) for _ in range(5)))
        texts.extend(result.content for result in results)

    def blocking() -> None:
        texts.extend(backend.stream(HELLO, lambda chunk: None).content for _ in range(5))

    threads = [threading.Thread(target=target) for target in (lambda: asyncio.run(several()), blocking) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["Hi there"] * 30


def test_connections_are_kept_within_a_loop_and_among_blocking_calls(server: ApiServer, backend: ApiLlmBackend) -> None:
    async def twice() -> None:
        await backend.acall(HELLO)
        await backend.acall(HELLO)

    asyncio.run(twice())
    assert server.n_connections == 1
    backend.call(HELLO)
    backend.call(HELLO)
    assert server.n_connections == 2


@pytest.mark.parametrize("how", ["in the loop", "from another thread", "between runs of the loop", "after the loop"])
def test_close_leaves_no_open_socket(server: ApiServer, how: str, recwarn: pytest.WarningsRecorder) -> None:
    backend = ApiLlmBackend({"llm": {"api_base": server.base}})

    async def use() -> None:
        await backend.acall(HELLO)
        if how == "in the loop":
            backend.close()
        elif how == "from another thread":
            await asyncio.to_thread(backend.close)
        if backend._clients.closed:
            assert await asyncio.to_thread(server.all_closed)

    with asyncio.Runner() as runner:
        runner.run(use())
        if how == "between runs of the loop":
            backend.close()
            assert server.all_closed()
    assert server.all_closed()
    backend.close()
    gc.collect()
    assert [str(warning.message) for warning in recwarn] == []


def test_a_cancelled_task_gives_its_connection_back(server: ApiServer, backend: ApiLlmBackend) -> None:
    server.replies = [stream(sse(delta("a"), done=False), EVENTS, pause_s=0.2), chat("after")]

    async def use() -> str:
        started = asyncio.Event()
        task = asyncio.create_task(backend.astream(HELLO, lambda chunk: started.set()))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.all_closed)
        return (await backend.acall(HELLO)).content

    assert asyncio.run(use()) == "after"


def test_a_blocking_call_works_inside_a_running_loop(server: ApiServer, backend: ApiLlmBackend) -> None:
    server.replies = [STREAMED]

    async def use() -> str:
        return backend.stream(HELLO, lambda chunk: None).content

    assert asyncio.run(use()) == "Hi there"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_opens_connections_of_its_own(server: ApiServer, backend: ApiLlmBackend) -> None:
    backend.call(HELLO)
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if backend.call(HELLO).content == "Hi." else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert server.n_connections == 2
    assert backend.call(HELLO).content == "Hi."
    assert server.n_connections == 2


# --- llama.cpp's own server, and openai's own client -----------------------------------------------------------------

GREETING = [{"role": "user", "content": "Hello!"}]


@pytest.fixture
def llama(llama_server: str, open_backend: Callable[..., ApiLlmBackend]) -> LlmBackend:
    return open_backend(llama_server, timeout=60)


@pytest.fixture
def openai_client(llama_server: str) -> Iterator[Any]:
    openai = pytest.importorskip("openai", reason="openai's client is the reference here")
    with openai.OpenAI(base_url=llama_server, api_key=KEY) as client:
        yield client


def test_chat_agrees_with_openais_client(llama: LlmBackend, openai_client: Any) -> None:
    ours = llama.chat(GREETING, temperature=0.0, max_tokens=30)
    theirs = openai_client.chat.completions.create(model=ours.model, messages=GREETING, temperature=0.0, max_tokens=30)
    assert ours.content == theirs.choices[0].message.content == "Hi there! How can I help you today?"
    assert ours.finish_reason == theirs.choices[0].finish_reason
    assert ours.model == theirs.model
    assert ours.usage is not None
    assert ours.usage.total_tokens == ours.tokens_used == theirs.usage.total_tokens


def test_a_stream_agrees_with_openais_client(llama: LlmBackend, openai_client: Any) -> None:
    chunks: list[str] = []
    ours = llama.stream_chat(GREETING, chunks.append, temperature=0.0, max_tokens=30)
    events = list(
        openai_client.chat.completions.create(
            model=ours.model, messages=GREETING, temperature=0.0, max_tokens=30, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    theirs = [event.choices[0].delta.content for event in events if event.choices]
    assert chunks == [text for text in theirs if text]
    assert "".join(chunks) == ours.content == "Hi there! How can I help you today?"
    assert ours.tokens_used == events[-1].usage.total_tokens


def test_embeddings_agree_with_openais_client(llama: LlmBackend, openai_client: Any) -> None:
    texts = ["Once upon a time", "a dog"]
    ours = llama.embed(texts, normalize=False)
    theirs = openai_client.embeddings.create(model="any", input=texts, encoding_format="float")
    for our_vector, row in zip(ours, theirs.data, strict=True):
        assert our_vector == pytest.approx(row.embedding)
    assert math.hypot(*llama.embed("a dog")) == pytest.approx(1)


def test_llama_server_takes_the_local_sampling_fields(llama: LlmBackend) -> None:
    result = llama.chat(GREETING, temperature=0.0, max_tokens=4, grammar='root ::= "no" | "yes"', top_k=5, min_p=0.0)
    assert result.content in ("no", "yes")


def test_llama_servers_refusal_comes_through(llama: LlmBackend) -> None:
    with pytest.raises(ApiStatusError, match=r"400 Bad Request.*grammar") as caught:
        llama.chat(GREETING, grammar="root ::= (")
    assert caught.value.status_code == 400
