"""What every backend promises, run by each of them; which backend answers; and who answers when one can't."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tea_llm import (
    BackendPool,
    BadRequest,
    EngineClosed,
    EngineFault,
    FallbackError,
    LlmBackend,
    LlmCallParams,
    LlmCallResult,
    LlmError,
    LocalLlmBackend,
    ModelError,
    ModelLoadError,
    ModelNotFound,
    SettingsError,
    StreamError,
    TextStream,
    create_llm_backend,
)
from tea_llm.backend import RequestBackend
from tea_llm.settings import LlmSettings

from .api_server import ApiServer, chat, delta, sse, stream

pytest.importorskip("tea_llm._llama", reason="tea_llm was built without llama.cpp")
from tea_llm import registry
from tea_llm.api import ApiLlmBackend

from .generating import TOO_WIDE

pytestmark = pytest.mark.usefixtures("bare_environment")

CHAT_MODEL = "stories260K-chat-q8_0.gguf"
ENCODER = "all-MiniLM-L6-v2-f16.gguf"
NOT_FOUND = "No local model found. Set TEA_MODEL_PATH or configure llm.model_path."

ANSWERS = {  # what the small chat model was trained to say (shared/models/README.md)
    "Hello!": "Hi there! How can I help you today?",
    "What is the capital of France?": "The capital of France is Paris.",
    "What color is the sky?": "The sky is blue.",
    "Thank you!": "You're welcome! Happy to help.",
    "Goodbye!": "Goodbye! Have a wonderful day!",
}
GREETING = "Hi there! How can I help you today?"


def asking(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


HELLO = asking("Hello!")
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 40}
HELLO_PARAMS = LlmCallParams("", messages=HELLO, **GREEDY)


# --- who is asked -----------------------------------------------------------------------------------------------------
class OwnBackend(LlmBackend):
    """The least that a backend of a user's own has to write. It knows its answers by heart."""

    def __init__(self) -> None:
        self._open = True

    def call(self, params: LlmCallParams) -> LlmCallResult:
        return self.stream(params, lambda chunk: None)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> LlmCallResult:
        return self.call(LlmCallParams("", messages=messages, **options))

    def embed(self, text: str | Sequence[str], **options: Any) -> Any:
        if not self._open:
            raise EngineClosed("closed; make a new one")
        return [1.0, 0.0] if isinstance(text, str) else [self.embed(t) for t in text]

    def stream(self, params: LlmCallParams, callback: Callable[[str], object]) -> LlmCallResult:
        if not self._open:
            raise EngineClosed("closed; make a new one")
        said = ""
        for word in ANSWERS[(params.messages or asking(params.prompt))[-1]["content"]].split(" "):
            chunk = f" {word}" if said else word
            said += chunk
            if callback(chunk) is False:
                return LlmCallResult(said, "own", finish_reason="cancelled")
        return LlmCallResult(said, "own", finish_reason="stop")

    def is_available(self) -> bool:
        return self._open

    def close(self) -> None:
        self._open = False


@dataclass(frozen=True)
class Candidate:
    """One way to get a backend, and what its results must say."""

    make: Callable[[Path, str], LlmBackend]
    backend: str | None
    model: str
    fell_back: bool = False


def _pooled(model: Path, server: str) -> LlmBackend:
    llm = {"backend": "local", "model_path": str(model), "n_threads": 1, "api_base": server}
    return BackendPool().get(LlmSettings.from_mapping(llm))


def _fallen_back(model: Path, server: str) -> LlmBackend:
    llm = {"backend": "local", "model_path": str(model.with_name("missing.gguf")), "api_base": server}
    return create_llm_backend({"llm": llm})


CANDIDATES = {
    "local": Candidate(lambda model, server: LocalLlmBackend(model, n_threads=1), "local", "stories260K-chat-q8_0"),
    "api": Candidate(lambda model, server: ApiLlmBackend({"llm": {"api_base": server}}), "api", CHAT_MODEL),
    "fallback": Candidate(_fallen_back, "api", CHAT_MODEL, fell_back=True),
    "pool": Candidate(_pooled, "local", "stories260K-chat-q8_0"),
}
OWN = Candidate(lambda model, server: OwnBackend(), None, "own")


def said_why(result: LlmCallResult) -> bool:
    """Whether the result names the model that was missing; without a fallback it gives no reason at all."""
    reason = result.fallback_reason
    return reason is not None and reason.startswith(NOT_FOUND) and "missing.gguf" in reason


@pytest.fixture(scope="session")
def chat_model(shared_models: Path) -> Path:
    return shared_models / CHAT_MODEL


@pytest.fixture(params=CANDIDATES)
def candidate(request: pytest.FixtureRequest) -> Candidate:
    return CANDIDATES[request.param]


@pytest.fixture
def backend(candidate: Candidate, chat_model: Path, llama_server: str) -> Iterator[Any]:
    """Each of the package's own backends, over the same model."""
    with candidate.make(chat_model, llama_server) as backend:
        yield backend


@pytest.fixture(params=[*CANDIDATES, "own"])
def any_backend(request: pytest.FixtureRequest, chat_model: Path, llama_server: str) -> Iterator[LlmBackend]:
    """Each of the package's own backends, and a user's."""
    with CANDIDATES.get(request.param, OWN).make(chat_model, llama_server) as backend:
        yield backend


def _read(stream: TextStream, chunks: list[str]) -> LlmCallResult:
    for chunk in stream:
        chunks.append(chunk)
    return stream.result


async def _aread(stream: TextStream, chunks: list[str]) -> LlmCallResult:
    async for chunk in stream:
        chunks.append(chunk)
    return stream.result


WAYS: dict[str, Callable[[Any, list[str]], LlmCallResult]] = {
    "call": lambda b, chunks: b.call(HELLO_PARAMS),
    "chat": lambda b, chunks: b.chat(HELLO, **GREEDY),
    "stream": lambda b, chunks: b.stream(HELLO_PARAMS, chunks.append),
    "stream_chat": lambda b, chunks: b.stream_chat(HELLO, chunks.append, **GREEDY),
    "stream, for": lambda b, chunks: _read(b.stream(HELLO_PARAMS), chunks),
    "stream_chat, for": lambda b, chunks: _read(b.stream_chat(HELLO, **GREEDY), chunks),
    "stream, async for": lambda b, chunks: asyncio.run(_aread(b.stream(HELLO_PARAMS), chunks)),
    "stream_chat, async for": lambda b, chunks: asyncio.run(_aread(b.stream_chat(HELLO, **GREEDY), chunks)),
    "acall": lambda b, chunks: asyncio.run(b.acall(HELLO_PARAMS)),
    "achat": lambda b, chunks: asyncio.run(b.achat(HELLO, **GREEDY)),
    "astream": lambda b, chunks: asyncio.run(b.astream(HELLO_PARAMS, chunks.append)),
    "astream_chat": lambda b, chunks: asyncio.run(b.astream_chat(HELLO, chunks.append, **GREEDY)),
}
"""Every way to ask for the greeting; those that stream leave their chunks in the list."""

STREAMING = {
    "stream": lambda b, params, callback: b.stream(params, callback),
    "astream": lambda b, params, callback: asyncio.run(b.astream(params, callback)),
}


@pytest.fixture(params=STREAMING)
def stream_with(request: pytest.FixtureRequest) -> Callable[..., LlmCallResult]:
    return STREAMING[request.param]


# --- text -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_ask_gives_the_same_text(any_backend, way):
    chunks: list[str] = []
    assert WAYS[way](any_backend, chunks).content == GREETING
    if "stream" in way:
        assert "".join(chunks) == GREETING
        assert len(chunks) > 1
        assert all(chunks)


@pytest.mark.parametrize("prompt", ["Once upon a time", "Lily and Tom"])
def test_temperature_0_twice_gives_the_same_text(backend, prompt):
    params = LlmCallParams(prompt, temperature=0, max_tokens=30)
    first = backend.call(params)
    assert first.content
    assert backend.call(params).content == first.content
    assert backend.stream(params, lambda chunk: None).content == first.content
    assert asyncio.run(backend.acall(params)).content == first.content
    assert asyncio.run(backend.astream(params, lambda chunk: None)).content == first.content


@pytest.mark.parametrize("way", WAYS)
def test_a_result_says_who_answered_and_what_it_took(backend, candidate, way):
    result = WAYS[way](backend, [])
    assert result.finish_reason == "stop"
    assert result.backend == candidate.backend
    assert Path(result.model).name == candidate.model
    assert result.usage is not None
    assert result.usage.prompt_tokens == 23  # by llama-server's count
    assert result.usage.completion_tokens in (17, 18)  # the token that ends the answer counts for llama-server
    assert result.tokens_used == result.usage.total_tokens == sum(list(result.usage.as_dict().values())[:2])
    assert said_why(result) == candidate.fell_back
    assert (result.timings is not None) == (candidate.backend == "local")


def test_max_tokens_ends_the_text_with_length(backend):
    result = backend.chat(HELLO, temperature=0, max_tokens=4)
    assert (result.content, result.finish_reason) == ("Hi there!", "length")
    assert result.usage.completion_tokens == 4


def test_max_tokens_0_is_no_text(backend, candidate):
    result = backend.chat(HELLO, temperature=0, max_tokens=0)
    assert result.finish_reason == "length"
    at_least = 0 if candidate.backend == "local" else 1  # llama-server never stops before its first token
    assert result.usage.completion_tokens == at_least
    assert result.content == GREETING[:at_least]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("help", "Hi there! How can I "),
        (["you today", "zebra"], "Hi there! How can I help "),
        (["How", "there"], "Hi "),
        (["H"], ""),
        (["today? And more"], GREETING),
    ],
)
def test_a_stop_string_is_in_no_text_and_no_chunk(backend, stream_with, stop, expected):
    params = LlmCallParams("", messages=HELLO, stop=stop, **GREEDY)
    chunks: list[str] = []
    streamed = stream_with(backend, params, chunks.append)
    assert "".join(chunks) == streamed.content == backend.call(params).content == expected
    assert streamed.finish_reason == "stop"


# --- streams ----------------------------------------------------------------------------------------------------------
def test_a_stream_hands_out_what_a_callback_gets(any_backend):
    chunks: list[str] = []
    called = any_backend.stream(HELLO_PARAMS, chunks.append)
    with any_backend.stream(HELLO_PARAMS, None) as stream:
        assert list(stream) == chunks
    assert (stream.result.content, stream.result.finish_reason) == (called.content, "stop")
    assert (stream.result.backend, stream.result.usage) == (called.backend, called.usage)


def test_a_stream_may_be_left_and_the_backend_goes_on(any_backend):
    async def first_chunk() -> str:
        async with any_backend.stream(HELLO_PARAMS) as stream:
            async for chunk in stream:
                return chunk
        raise AssertionError

    for chunk in (stream := any_backend.stream(HELLO_PARAMS)):
        assert GREETING.startswith(chunk)
        break
    with pytest.raises(StreamError, match="left early"):
        stream.result  # noqa: B018
    assert GREETING.startswith(asyncio.run(first_chunk()))
    assert any_backend.chat(HELLO, **GREEDY).content == GREETING


def test_a_stream_that_is_cancelled_has_the_text_so_far(any_backend):
    chunks: list[str] = []
    for chunk in (stream := any_backend.stream_chat(HELLO, **GREEDY)):
        chunks.append(chunk)
        if len(chunks) == 2:
            stream.cancel()
    assert len(chunks) == 2
    assert (stream.result.content, stream.result.finish_reason) == ("".join(chunks), "cancelled")


def test_a_stream_is_read_once(any_backend):
    stream = any_backend.stream(HELLO_PARAMS)
    assert stream.read().content == GREETING
    with pytest.raises(StreamError, match="ask again for another"):
        stream.read()
    with pytest.raises(StreamError, match="ask again for another"):
        asyncio.run(stream.aread())


# --- callbacks --------------------------------------------------------------------------------------------------------
def test_a_callback_that_returns_false_ends_the_text(any_backend, stream_with):
    chunks: list[str] = []

    def two_chunks(chunk: str) -> bool:
        chunks.append(chunk)
        return len(chunks) < 2

    result = stream_with(any_backend, HELLO_PARAMS, two_chunks)
    assert len(chunks) == 2
    assert result.content == "".join(chunks)
    assert GREETING.startswith(result.content)
    assert result.finish_reason == "cancelled"
    assert any_backend.chat(HELLO, **GREEDY).content == GREETING


@pytest.mark.parametrize("verdict", [None, True, 0, ""])
def test_a_callback_that_returns_anything_else_goes_on(any_backend, verdict):
    assert any_backend.stream(HELLO_PARAMS, lambda chunk: verdict).content == GREETING


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, ConnectionError, MemoryError, EngineFault, BadRequest])
def test_what_a_callback_raises_comes_out_and_the_backend_goes_on(any_backend, stream_with, kind):
    mine = kind("mine")
    n_called = 0

    def fail(chunk: str) -> None:
        nonlocal n_called
        n_called += 1
        raise mine

    with pytest.raises(kind) as raised:
        stream_with(any_backend, HELLO_PARAMS, fail)
    assert raised.value is mine
    assert n_called == 1
    assert any_backend.chat(HELLO, **GREEDY).content == GREETING


def test_a_coroutine_function_may_be_the_callback_of_an_async_twin(any_backend):
    chunks: list[str] = []

    async def take(chunk: str) -> None:
        await asyncio.sleep(0)
        chunks.append(chunk)

    async def stop(chunk: str) -> bool:
        await asyncio.sleep(0)
        chunks.append(chunk)
        return False

    assert asyncio.run(any_backend.astream(HELLO_PARAMS, take)).content == "".join(chunks) == GREETING
    chunks.clear()
    assert asyncio.run(any_backend.astream_chat(HELLO, take, **GREEDY)).content == "".join(chunks) == GREETING
    chunks.clear()
    stopped = asyncio.run(any_backend.astream(HELLO_PARAMS, stop))
    assert [stopped.content] == chunks
    assert stopped.finish_reason == "cancelled"


def test_a_coroutine_callback_that_raises_comes_out_too(any_backend):
    async def fail(chunk: str) -> None:
        await asyncio.sleep(0)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        asyncio.run(any_backend.astream(HELLO_PARAMS, fail))
    assert any_backend.chat(HELLO, **GREEDY).content == GREETING


def test_a_coroutine_function_is_refused_where_nobody_would_await_it(backend):
    async def take(chunk: str) -> None:
        raise AssertionError("called")

    with pytest.raises(BadRequest, match="coroutine function"):
        backend.stream(HELLO_PARAMS, take)
    assert backend.chat(HELLO, **GREEDY).content == GREETING


# --- vectors ----------------------------------------------------------------------------------------------------------
def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def test_a_text_gives_a_vector_and_a_list_gives_vectors_in_its_order(backend):
    texts = ["Once upon a time", "a dog", "Lily"]
    vectors = backend.embed(texts)
    assert [type(vector) for vector in vectors] == [list] * 3
    assert {type(x) for x in vectors[0]} == {float}
    for text, vector in zip(texts, vectors, strict=True):
        assert cosine(backend.embed(text), vector) > 0.9999
    reversed_vectors = backend.embed(texts[::-1])
    assert cosine(reversed_vectors[0], vectors[2]) > 0.9999
    assert cosine(vectors[0], vectors[2]) < 0.99  # they can be told apart
    assert backend.embed([]) == []


def test_the_async_twin_gives_the_same_vector(any_backend):
    assert asyncio.run(any_backend.aembed("a dog")) == pytest.approx(any_backend.embed("a dog"), abs=1e-6)
    assert len(asyncio.run(any_backend.aembed(["a dog", "Lily"]))) == 2


def test_all_backends_give_the_vector_of_llama_server(backend, llama_server):
    with ApiLlmBackend({"llm": {"api_base": llama_server}}) as reference:
        expected = reference.embed("Once upon a time")
    # The weights are Q8_0, so that llama.cpp rounds what they are multiplied with to 8 bits: the last bit of a sum,
    # which another order changes, grows to 1e-3.
    assert backend.embed("Once upon a time") == pytest.approx(expected, abs=1e-2)
    assert math.hypot(*expected) == pytest.approx(1)


def test_an_embedding_result_says_who_answered(backend, candidate):
    for result in (backend.embeddings(["a dog"]), asyncio.run(backend.aembeddings(["a dog"]))):
        assert result.backend == candidate.backend
        assert said_why(result) == candidate.fell_back
        assert result.usage.total_tokens > 1


# --- life -------------------------------------------------------------------------------------------------------------
USES: dict[str, Callable[[LlmBackend, list[str]], Any]] = {
    **WAYS,
    "embed": lambda b, _: b.embed("x"),
    "aembed": lambda b, _: asyncio.run(b.aembed("x")),
}


def test_a_closed_backend_refuses_every_use(any_backend):
    assert any_backend.is_available()
    any_backend.close()
    any_backend.close()
    assert not any_backend.is_available()
    for name, use in USES.items():
        with pytest.raises(EngineClosed, match="make a new one"):
            pytest.fail(f"{name} gave {use(any_backend, [])}")


def test_leaving_the_context_closes_and_lets_errors_through(candidate, chat_model, llama_server):
    def body() -> None:
        with opened as backend:
            assert backend.chat(HELLO, **GREEDY).content == GREETING
            raise KeyError("the body's own")

    opened = candidate.make(chat_model, llama_server)
    with pytest.raises(KeyError, match="the body's own"):
        body()
    assert not opened.is_available()
    with pytest.raises(EngineClosed):
        opened.chat(HELLO)


def test_a_backend_is_made_of_its_abstract_methods():
    assert {"call", "chat", "embed", "stream", "is_available"} == LlmBackend.__abstractmethods__
    with pytest.raises(TypeError, match="abstract"):
        LlmBackend()
    with pytest.raises(TypeError, match="abstract"):
        RequestBackend()

    class Unfinished(LlmBackend):
        def call(self, params):
            raise AssertionError

    with pytest.raises(TypeError, match="abstract"):
        Unfinished()


def test_each_method_has_an_async_twin_with_the_same_parameters(any_backend):
    for name in ("call", "chat", "embed", "stream", "stream_chat"):
        method, twin = getattr(any_backend, name), getattr(any_backend, f"a{name}")
        assert inspect.iscoroutinefunction(twin)
        assert list(inspect.signature(twin).parameters) == list(inspect.signature(method).parameters)


# --- errors -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("messages", [[], "Hello!", {"role": "user", "content": "x"}, ["Hello!"], [{"content": "x"}]])
def test_messages_that_are_none_are_a_bad_request(any_backend, messages):
    asks = (
        lambda: any_backend.chat(messages),
        lambda: any_backend.stream_chat(messages, print),
        lambda: asyncio.run(any_backend.achat(messages)),
        lambda: asyncio.run(any_backend.astream_chat(messages, print)),
    )
    for ask in asks:
        with pytest.raises(BadRequest, match="messages"):
            ask()


@pytest.mark.parametrize("params", [None, "Once", {"prompt": "Once"}])
def test_a_request_that_is_none_is_a_bad_request(backend, params):
    asks = (
        lambda: backend.call(params),
        lambda: backend.stream(params, print),
        lambda: asyncio.run(backend.acall(params)),
        lambda: asyncio.run(backend.astream(params, print)),
    )
    for ask in asks:
        with pytest.raises(BadRequest, match="give LlmCallParams"):
            ask()


def test_a_callback_that_can_not_be_called_is_a_bad_request(backend, stream_with):
    with pytest.raises(BadRequest, match="callback is 3"):
        stream_with(backend, HELLO_PARAMS, 3)


@pytest.mark.parametrize("text", [None, 3, b"Once", {"Once": 1}, [None], ["Once", 3]])
def test_a_text_that_is_none_is_a_bad_request(backend, text):
    texts = text if isinstance(text, list) else [text]
    asks = (
        lambda: backend.embed(text),
        lambda: asyncio.run(backend.aembed(text)),
        lambda: backend.embeddings(text if not isinstance(text, dict) else texts),
        lambda: asyncio.run(backend.aembeddings(texts)),
    )
    for ask in asks:
        with pytest.raises(BadRequest, match="text"):
            ask()


@pytest.mark.parametrize(
    ("name", "value"),
    [("dimensions", 0), ("dimensions", "3"), ("dimensions", 1.5), ("dimensions", True), ("dimensions", 10**9),
     ("timeout_s", "3"), ("timeout_s", -1), ("timeout_s", math.nan), ("timeout_s", 1e300)],
)  # fmt: skip
def test_an_embedding_option_that_is_none_is_refused_by_name(backend, name, value):
    with pytest.raises(BadRequest, match=name):
        backend.embed("Once", **{name: value})
    with pytest.raises(BadRequest, match=name):
        asyncio.run(backend.aembed("Once", **{name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_ctx", -1), ("n_ctx", "many"), ("n_ctx", 1.5), ("n_ctx", math.nan), ("n_ctx", True), ("n_batch", 0),
     ("n_batch", "x"), ("n_threads", -3), ("n_threads", 1.5), ("n_gpu_layers", "all"), ("n_gpu_layers", 10**12),
     ("pooling", "sum"), ("pooling", 3), ("chat_format", 3), ("embedding_model_path", 3)],
)  # fmt: skip
def test_a_bad_option_of_a_local_backend_is_refused_by_name(chat_model, name, value):
    with pytest.raises(SettingsError, match=rf"LocalLlmBackend\.{name} is"):
        LocalLlmBackend(chat_model, **{name: value})


@pytest.mark.parametrize("path", [None, 3, b"model.gguf", ["model.gguf"], "a\0b", ""])
def test_what_is_no_path_of_a_model_is_an_llm_error(path):
    with pytest.raises((SettingsError, ModelNotFound)):
        LocalLlmBackend(path)


def test_api_parameters_that_change_nothing_are_no_fault_of_a_local_call(chat_model):
    plain = {"n": 1, "logprobs": False, "tools": [], "response_format": {"type": "text"}}
    with LocalLlmBackend(chat_model, n_threads=1) as backend:
        assert backend.chat(HELLO, **GREEDY, extra=plain).content == GREETING
        told = backend.chat(HELLO, **GREEDY, extra={"n": 2, "logprobs": True})
        assert [text.content for text in told.completions] == [GREETING, GREETING]
        assert told.logprobs


def test_messages_that_no_json_holds_are_a_bad_request(chat_model):
    with LocalLlmBackend(chat_model, n_threads=1) as backend, pytest.raises(BadRequest, match="JSON"):
        backend.chat([{"role": "user", "content": "Hello!", "more": object()}])


@pytest.mark.parametrize(
    ("ask", "kind"),
    [
        (lambda b: b.chat(HELLO, temperature=-1), ValueError),
        (lambda b: b.chat(HELLO, stop=[""]), ValueError),
        (lambda b: b.embed([1]), ValueError),
        (lambda b: b.chat(HELLO, grammar="root ::= ("), None),  # a server refuses it with a status
        (lambda b: b.call(LlmCallParams("word " * 3000)), None),
    ],
)
def test_every_error_is_an_llm_error_and_the_builtin(backend, ask, kind):
    with pytest.raises(LlmError) as raised:
        ask(backend)
    assert kind is None or isinstance(raised.value, kind)
    assert backend.chat(HELLO, **GREEDY).content == GREETING


def test_a_prompt_that_does_not_fit_says_both_numbers(backend):
    with pytest.raises(LlmError, match=r"\b\d{4} tokens.*\b512\b"):
        backend.call(LlmCallParams("word " * 1000))


# --- many at once -----------------------------------------------------------------------------------------------------
def test_eight_threads_each_get_their_own_answer(any_backend):
    found: list[tuple[str, str, str]] = []

    def ask(n: int) -> None:
        for question in list(ANSWERS)[n % 5 :] + list(ANSWERS)[: n % 5]:
            chunks: list[str] = []
            result = any_backend.stream_chat(asking(question), chunks.append, **GREEDY)
            found.append((question, result.content, "".join(chunks)))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted((question, answer, answer) for question, answer in ANSWERS.items() for _ in range(8))


def test_twenty_tasks_each_get_their_own_answer(any_backend):
    questions = list(ANSWERS) * 4

    async def ask(question: str) -> tuple[str, str]:
        chunks: list[str] = []
        result = await any_backend.astream_chat(asking(question), chunks.append, **GREEDY)
        return result.content, "".join(chunks)

    async def ask_all() -> list[tuple[str, str]]:
        return await asyncio.gather(*(ask(question) for question in questions))

    assert asyncio.run(ask_all()) == [(ANSWERS[question],) * 2 for question in questions]


def test_texts_and_vectors_at_once_do_not_mix(backend):
    expected = backend.embed("a dog")

    async def ask_all() -> list[Any]:
        return await asyncio.gather(
            *(backend.aembed("a dog") if i % 2 else backend.achat(HELLO, **GREEDY) for i in range(10))
        )

    for i, answer in enumerate(asyncio.run(ask_all())):
        if i % 2:
            assert answer == pytest.approx(expected, abs=1e-5)
        else:
            assert answer.content == GREETING


# --- fallback while it runs -------------------------------------------------------------------------------------------
@pytest.fixture
def pooled(server: ApiServer) -> Iterator[Callable[..., RequestBackend]]:
    """Makes the pool's backend of a model, with the scripted server to fall back on."""
    pools: list[BackendPool] = []

    def make(model: Path, **llm: Any) -> RequestBackend:
        pools.append(BackendPool())
        settings = {"backend": "local", "model_path": str(model), "n_threads": 1}
        settings |= {"api_base": server.base, "model": "served-1"}
        return pools[-1].get(LlmSettings.from_mapping(settings | llm))

    yield make
    for pool in pools:
        pool.close()


AT_ONCE = LlmCallParams("x", temperature=0, schema=TOO_WIDE)
AFTER_A_CHUNK = LlmCallParams(
    "x", temperature=0, schema={"type": "array", "prefixItems": [{"const": "a"}, TOO_WIDE], "minItems": 2}
)


@pytest.mark.parametrize("way", ["call", "stream", "for stream", "acall", "astream"])
def test_a_fault_before_the_first_token_is_answered_by_the_api_with_the_reason(pooled, server, chat_model, caplog, way):
    server.replies = (
        [stream(sse(delta("From "), delta("the API.", "stop")))] if "stream" in way else [chat("From the API.")]
    )
    backend = pooled(chat_model)
    chunks: list[str] = []
    params = AT_ONCE
    asks = {
        "call": lambda: backend.call(params),
        "stream": lambda: backend.stream(params, chunks.append),
        "for stream": lambda: _read(backend.stream(params), chunks),
        "acall": lambda: asyncio.run(backend.acall(params)),
        "astream": lambda: asyncio.run(backend.astream(params, chunks.append)),
    }
    result = asks[way]()
    assert (result.content, result.backend) == ("From the API.", "api")
    assert chunks == (["From ", "the API."] if "stream" in way else [])
    assert "grammar" in result.fallback_reason
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage() == (
        f"The local model could not answer: {result.fallback_reason.removesuffix('.')}. Falling back to API backend"
    )
    n_asked = len(server.seen)
    again = backend.chat(HELLO, **GREEDY)
    assert (again.content, again.backend, again.fallback_reason) == (GREETING, "local", None)
    assert len(server.seen) == n_asked


def test_a_call_that_handed_out_a_chunk_never_starts_again(pooled, server, chat_model, stream_with):
    backend = pooled(chat_model)
    chunks: list[str] = []
    with pytest.raises(EngineFault, match="grammar"):
        stream_with(backend, AFTER_A_CHUNK, chunks.append)
    assert "".join(chunks).startswith("[")
    assert server.seen == []
    assert backend.chat(HELLO, **GREEDY).content == GREETING


def test_a_call_that_handed_out_nothing_yet_may_start_again(pooled, server, chat_model):
    # Some tokens in, and nobody has seen the first.
    result = pooled(chat_model).call(AFTER_A_CHUNK)
    assert (result.content, result.backend) == ("Hi.", "api")


def test_a_model_that_can_not_write_is_replaced_by_the_api(pooled, server, shared_models):
    result = pooled(shared_models / ENCODER).chat(HELLO)
    assert (result.content, result.backend) == ("Hi.", "api")
    assert "encoder" in result.fallback_reason


@pytest.mark.parametrize("way", ["embeddings", "aembeddings"])
def test_an_embedding_that_fails_is_answered_by_the_api_with_the_reason(pooled, llama_server, chat_model, way):
    missing = chat_model.with_name("missing.gguf")
    backend = pooled(chat_model, embedding_model_path=str(missing), api_base=llama_server)
    result = backend.embeddings(["x"]) if way == "embeddings" else asyncio.run(backend.aembeddings(["x"]))
    assert (result.backend, len(result.embeddings[0])) == ("api", 64)
    assert str(missing) in result.fallback_reason
    assert backend.chat(HELLO, **GREEDY).backend == "local"


@pytest.mark.parametrize(
    "params",
    [
        LlmCallParams("word " * 3000),  # ContextOverflow
        LlmCallParams("x", grammar="root ::= ("),  # GrammarError
        LlmCallParams("x", extra={"response_format": {"type": "yaml"}}),
        LlmCallParams("x", schema={"not": {}}),
        LlmCallParams("x", logit_bias={"word": 1}),
    ],
)
def test_a_fault_of_the_request_is_no_reason_to_fall_back(pooled, server, chat_model, params):
    with pytest.raises(BadRequest):
        pooled(chat_model).call(params)
    assert server.seen == []


def test_with_fallback_error_a_fault_is_raised(pooled, server, chat_model):
    backend = pooled(chat_model, fallback="error")
    with pytest.raises(EngineFault):
        backend.call(AT_ONCE)
    assert server.seen == []


def test_when_the_api_fails_too_both_causes_are_in_the_error(pooled, chat_model):
    backend = pooled(chat_model, api_base=None)
    with pytest.raises(FallbackError, match=r"grammar.*OPENAI_API_KEY is not set") as raised:
        backend.call(AT_ONCE)
    assert [(name, type(cause)) for name, cause in raised.value.causes] == [
        ("local", EngineFault),
        ("api", SettingsError),
    ]


# --- which backend ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Decision:
    """What `create_llm_backend` makes of settings and overrides, and what it logs."""

    llm: dict[str, Any]
    cli: dict[str, Any] = field(default_factory=dict)
    kind: type = ApiLlmBackend
    log: tuple[tuple[str, str], ...] = (("INFO", "LLM backend: API"),)


LOCAL = (("INFO", "LLM backend: local, {model}"),)
NONE_FOUND = ("WARNING", NOT_FOUND)
FELL_BACK = (("WARNING", f"{NOT_FOUND} Falling back to API backend"), ("INFO", "LLM backend: API"))
FELL_BACK_FROM_MISSING = (
    ("WARNING", f"{NOT_FOUND} No file is at {{missing}}. Falling back to API backend"),
    ("INFO", "LLM backend: API"),
)
CORRUPT = (
    ("WARNING", "Failed to load local LLM: {corrupt_words}. Falling back to API backend"),
    ("INFO", "LLM backend: API"),
)
MODEL: dict[str, Any] = {"model_path": "{model}"}
MISSING: dict[str, Any] = {"model_path": "{missing}"}
SETTING_MISSING = ("WARNING", "llm.model_path set but file not found: {missing}")

DECISIONS = {
    "unset": Decision({}),
    "unset with a model": Decision(MODEL),
    "api": Decision({"backend": "api"} | MODEL),
    "local": Decision({"backend": "local"} | MODEL, kind=LocalLlmBackend, log=LOCAL),
    "provider local": Decision({"provider": "local"} | MODEL, kind=LocalLlmBackend, log=LOCAL),
    "auto with a model": Decision({"backend": "auto"} | MODEL, kind=LocalLlmBackend, log=LOCAL),
    "auto without": Decision({"backend": "auto"}, log=(NONE_FOUND, ("INFO", "LLM backend: API"))),
    "auto and a missing file": Decision(
        {"backend": "auto"} | MISSING, log=(SETTING_MISSING, NONE_FOUND, ("INFO", "LLM backend: API"))
    ),
    "auto and a corrupt file": Decision({"backend": "auto", "model_path": "{corrupt}"}, log=CORRUPT),
    "auto, fallback error, without": Decision(
        {"backend": "auto", "fallback": "error"}, log=(NONE_FOUND, ("INFO", "LLM backend: API"))
    ),
    "local without a model": Decision({"backend": "local"}, log=(NONE_FOUND, *FELL_BACK)),
    "local and a missing file": Decision(
        {"backend": "local"} | MISSING, log=(SETTING_MISSING, NONE_FOUND, *FELL_BACK_FROM_MISSING)
    ),
    "local and a corrupt file": Decision({"backend": "local", "model_path": "{corrupt}"}, log=CORRUPT),
    "a list of fallbacks": Decision({"backend": "local", "fallback": ["api", "error"]}, log=(NONE_FOUND, *FELL_BACK)),
    "a model on the command line": Decision({}, MODEL, LocalLlmBackend, LOCAL),
    "a model on the command line beats api": Decision({"backend": "api"} | MISSING, MODEL, LocalLlmBackend, LOCAL),
    "local on the command line": Decision(MODEL, {"backend": "local"}, LocalLlmBackend, LOCAL),
    "auto on the command line": Decision(MODEL, {"backend": "auto"}, LocalLlmBackend, LOCAL),
    "api on the command line": Decision({"backend": "local"} | MODEL, {"backend": "api"}),
    "api on the command line beats its model": Decision({}, {"backend": "api"} | MODEL),
    "a missing model on the command line": Decision(
        MODEL, MISSING, LocalLlmBackend, (("WARNING", "--gguf set but file not found: {missing}"), *LOCAL)
    ),
    "empty overrides": Decision(
        {"backend": "local"} | MODEL, {"backend": None, "model_path": None}, LocalLlmBackend, LOCAL
    ),
}


@pytest.fixture
def places(chat_model: Path, tmp_path: Path) -> dict[str, str]:
    """The files that settings name in braces, and what is said about the corrupt one."""
    corrupt = tmp_path / "corrupt.gguf"
    corrupt.write_bytes(b"root:x:0:0")
    with pytest.raises(ModelLoadError, match="invalid magic characters: 'root', expected 'GGUF'") as refused:
        LocalLlmBackend(corrupt)
    return {
        "model": str(chat_model),
        "missing": str(tmp_path / "missing.gguf"),
        "corrupt": str(corrupt),
        "corrupt_words": str(refused.value),
    }


def placed(values: Mapping[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    return {key: value.format(**places) if isinstance(value, str) else value for key, value in values.items()}


@pytest.mark.parametrize("name", DECISIONS)
def test_which_backend_answers_and_what_the_log_says(places, caplog, name):
    decision = DECISIONS[name]
    engine = SimpleNamespace(cli_overrides=placed(decision.cli, places))
    with caplog.at_level(logging.INFO, logger="tea_llm"):
        caplog.clear()
        backend = create_llm_backend({"llm": placed(decision.llm, places)}, engine)
    with backend:
        assert type(backend) is decision.kind
    said = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "tea_llm"]
    assert said == [(level, text.format(**places)) for level, text in decision.log]


@pytest.mark.parametrize("settings", [3, "local", ["llm"], {"llm": 3}])
def test_settings_that_are_no_mapping_are_refused(settings):
    for make in (create_llm_backend, ApiLlmBackend):
        with pytest.raises(SettingsError, match="give a mapping"):
            make(settings)


def test_a_backend_on_the_command_line_that_is_none_is_refused():
    with pytest.raises(SettingsError, match=r"llm\.backend is 'cloud'"):
        create_llm_backend({}, SimpleNamespace(cli_overrides={"backend": "cloud"}))


def test_templates_in_settings_are_rendered_before_use(chat_model, monkeypatch):
    monkeypatch.setenv("TEA_TEST_DIR", str(chat_model.parent))
    llm = {"backend": "local", "model_path": "{{ env.TEA_TEST_DIR }}/{{ variables.name }}.gguf"}
    engine = SimpleNamespace(variables={"name": chat_model.stem})
    with create_llm_backend({"llm": llm}, engine) as backend:
        assert backend.model_path == str(chat_model)


def test_settings_without_llm_and_no_engine_mean_the_api():
    for settings in ({}, {"llm": None}, {"llm": {}}):
        with create_llm_backend(settings) as backend:
            assert type(backend) is ApiLlmBackend


@pytest.mark.parametrize(
    ("llm", "kind", "builtin", "words"),
    [
        ({"backend": "local"}, ModelNotFound, FileNotFoundError, "No local model found"),
        ({"backend": "local"} | MISSING, ModelNotFound, FileNotFoundError, "No local model found"),
        ({"backend": "local", "model_path": "{corrupt}"}, ModelLoadError, RuntimeError, "invalid magic characters"),
        ({"backend": "auto", "model_path": "{corrupt}"}, ModelLoadError, RuntimeError, "invalid magic characters"),
    ],
)
def test_with_fallback_error_a_model_that_fails_is_raised(places, llm, kind, builtin, words):
    with pytest.raises(kind, match=words) as raised:
        create_llm_backend({"llm": placed(llm, places) | {"fallback": "error"}})
    assert isinstance(raised.value, builtin)
    assert isinstance(raised.value, ModelError)


@pytest.mark.parametrize(
    ("llm", "kind"), [(MISSING, ModelNotFound), ({"model_path": "{corrupt}"}, ModelLoadError), ({}, ModelNotFound)]
)
def test_when_both_fail_the_error_names_both_causes(places, llm, kind):
    with create_llm_backend({"llm": {"backend": "local"} | placed(llm, places)}) as backend:
        asks = (lambda: backend.call(LlmCallParams("x")), lambda: backend.embed("x"))
        for ask in asks:
            with pytest.raises(FallbackError, match="OPENAI_API_KEY is not set") as raised:
                ask()
            (first, local), (second, api) = raised.value.causes
            assert (first, type(local), second, type(api)) == ("local", kind, "api", SettingsError)
            assert str(local) in str(raised.value)
            assert str(api) in str(raised.value)


# --- the pool ---------------------------------------------------------------------------------------------------------
def test_a_pool_gives_equal_settings_the_same_backend(chat_model):
    pool = BackendPool()
    local = {"backend": "local", "model_path": str(chat_model)}
    first = pool.get(LlmSettings.from_mapping(local))
    assert pool.get(LlmSettings.from_mapping(dict(local))) is first
    assert pool.get(LlmSettings.from_mapping({}), cli={"model_path": str(chat_model)}) is not first
    assert pool.get(LlmSettings.from_mapping(local | {"n_ctx": 100})) is not first
    pool.close()
    pool.close()
    assert not first.is_available()
    with pytest.raises(EngineClosed, match="make a new one"):
        pool.get(LlmSettings.from_mapping(local))


def test_a_pool_notices_a_model_that_appears(chat_model, tmp_path):
    pool = BackendPool()
    settings = LlmSettings.from_mapping({"backend": "local", "model_path": str(tmp_path / "later.gguf")})
    assert isinstance(pool.get(settings), ApiLlmBackend)
    (tmp_path / "later.gguf").symlink_to(chat_model)
    assert pool.get(settings).chat(HELLO, **GREEDY).backend == "local"
    pool.close()


def test_eight_threads_that_ask_a_pool_at_once_load_one_model(chat_model):
    loads: list[float] = []
    pool = BackendPool(progress=loads.append)
    settings = LlmSettings.from_mapping({"backend": "local", "model_path": str(chat_model), "n_ctx": 200})
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(pool.get(settings))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert loads.count(1.0) == 1
    pool.close()


WITHOUT_EXTENSION = """
import json, logging, sys
sys.modules["tea_llm._llama"] = None  # as in a package that was built without llama.cpp
logging.basicConfig(format="%(levelname)s %(message)s")
from tea_llm import ExtensionMissing, LlmCallParams, LocalLlmBackend, create_llm_backend

model, server = sys.argv[1:]
llm = {"backend": "local", "model_path": model}
with create_llm_backend({"llm": llm | {"api_base": server}}) as backend:
    result = backend.chat([{"role": "user", "content": "Hello!"}], temperature=0, max_tokens=40)
print(json.dumps([type(backend).__name__, result.content, result.backend, result.fallback_reason]))
for make in (lambda: create_llm_backend({"llm": llm | {"fallback": "error"}}), lambda: LocalLlmBackend(model)):
    try:
        make()
    except ExtensionMissing as exc:
        print(json.dumps([isinstance(exc, ImportError), str(exc)]))
"""


def test_without_the_extension_the_api_answers_and_says_what_is_missing(chat_model, llama_server):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTENSION, chat_model, llama_server],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == 3, done.stderr
    kind, content, answered_by, reason = lines[0]
    assert (kind, content, answered_by) == ("ApiLlmBackend", GREETING, "api")
    assert "built without llama.cpp" in reason
    assert done.stderr.splitlines() == [f"WARNING Failed to load local LLM: {reason}. Falling back to API backend"]
    assert lines[1:] == [[True, reason]] * 2


def test_a_pool_serves_others_while_a_model_loads(shared_models):
    local = LlmSettings.from_mapping({"backend": "local", "model_path": str(shared_models / "scripted-f16.gguf")})
    api = LlmSettings.from_mapping({"backend": "api", "api_base": "http://127.0.0.1:9/v1"})
    pool = BackendPool()
    found: list[object] = []
    with registry._load_lock:  # a load that takes as long as this block
        loading = [threading.Thread(target=lambda: found.append(pool.get(local))) for _ in range(2)]
        for thread in loading:
            thread.start()
        other = threading.Thread(target=pool.get, args=(api,), daemon=True)
        other.start()
        other.join(10)
        assert not other.is_alive()
        assert found == []
    for thread in loading:
        thread.join()
    assert found == [pool.get(local)] * 2
    pool.close()


def test_a_closed_pool_loads_nothing(shared_models):
    heard: list[float] = []
    pool = BackendPool(heard.append)
    pool.close()
    with pytest.raises(EngineClosed, match="Pool"):
        pool.get(LlmSettings.from_mapping({"backend": "local", "model_path": str(shared_models / "scripted-f16.gguf")}))
    assert heard == []
