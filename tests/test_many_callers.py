"""Many callers of one model: each gets its own text, none holds up another, and all may leave at any time."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import multiprocessing
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tea_llm import (
    BackendPool,
    Cancelled,
    DeadlineExceeded,
    EngineBusy,
    EngineClosed,
    EngineError,
    LlmCallParams,
    LocalLlmBackend,
)
from tea_llm.settings import LlmSettings

from .api_server import ApiServer, chat

pytest.importorskip("tea_llm._llama", reason="tea_llm was built without llama.cpp")
from tea_llm import engine as engine_room
from tea_llm import registry
from tea_llm._llama import Context, Generation, Model, Sampler
from tea_llm.engine import EmbedRequest, TextRequest

from .random_models import with_trained_context

FOX = " quick brown fox jumps over a lazy dog."
THE = LlmCallParams("The", temperature=0)
FOR_EVER = LlmCallParams("count", temperature=0, max_tokens=None)
SOON_S = 20.0  # only a test that fails waits for so long

BEGINNINGS = ("Once upon a time", "Lily and Ben", "One day, a little girl", "Tom", "The red dog was", "Mom said", "A")


@pytest.fixture(scope="module")
def endless_path(shared_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripted model with room for a text of many seconds."""
    path = tmp_path_factory.mktemp("endless") / "endless.gguf"
    return with_trained_context(shared_models / "scripted-f16.gguf", 16384, path)


@pytest.fixture(scope="module")
def endless(endless_path: Path) -> Iterator[LocalLlmBackend]:
    with LocalLlmBackend(endless_path, n_batch=16) as backend:
        yield backend


@pytest.fixture(scope="module")
def single(endless_path: Path) -> Iterator[LocalLlmBackend]:
    """One request at a time: the others wait."""
    with LocalLlmBackend(endless_path, n_parallel=1) as backend:
        yield backend


@pytest.fixture(scope="module")
def stories_path(shared_models: Path) -> Path:
    return shared_models / "stories260K-f32.gguf"


class Running:
    """A text that a thread of its own streams, and how many chunks of it have come."""

    def __init__(self, backend: LocalLlmBackend) -> None:
        self.n_chunks = 0
        self._begun, self._enough = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=backend.stream, args=(FOR_EVER, self._take))
        self._thread.start()
        assert self._begun.wait(SOON_S)

    def _take(self, chunk: str) -> bool:
        self.n_chunks += 1
        self._begun.set()
        return not self._enough.is_set()

    def end(self) -> None:
        self._enough.set()
        self._thread.join()


@contextlib.contextmanager
def busy(backend: LocalLlmBackend) -> Iterator[Running]:
    """The model computes for somebody else."""
    running = Running(backend)
    try:
        yield running
    finally:
        running.end()


def in_threads(*work: Callable[[], Any]) -> list[Any]:
    """What each gives, or the error it raises, on a thread of its own."""

    def caught(one: Callable[[], Any]) -> Any:
        try:
            return one()
        except Exception as exc:  # noqa: BLE001 - the test looks at it
            return exc

    with ThreadPoolExecutor(len(work)) as pool:
        return list(pool.map(caught, work))


def wait_until(done: Callable[[], object]) -> None:
    end = time.monotonic() + SOON_S
    while not done():
        assert time.monotonic() < end
        time.sleep(0.002)


@functools.cache
def _model(path: Path) -> Model:
    return Model(path)


@functools.cache
def alone(path: Path, prompt: str, max_tokens: int) -> str:
    """What the model says where nobody else is there and nothing is found again."""
    model = _model(path)
    context = Context(model, reuse=False)
    tokens = model.tokenize(prompt, parse_special=True)
    return Generation(context, Sampler(model, temperature=0), tokens, max_tokens=max_tokens).run() or ""


def asks(n: int, seed: int) -> list[LlmCallParams]:
    """Requests that often begin alike."""
    draw = random.Random(seed)
    return [
        LlmCallParams(
            " ".join(draw.choice(BEGINNINGS) for _ in range(draw.randint(1, 4))),
            temperature=0,
            max_tokens=draw.randint(1, 40),
        )
        for _ in range(n)
    ]


# --- each its own text ------------------------------------------------------------------------------------------------
def test_threads_and_tasks_mixed_each_get_the_text_they_get_alone(stories_path):
    by_thread = [asks(6, seed) for seed in range(16)]
    by_loop = [asks(16, seed) for seed in range(100, 104)]
    with LocalLlmBackend(stories_path) as backend:

        def one_after_the_other(params: Sequence[LlmCallParams]) -> list[str]:
            texts = []
            for i, p in enumerate(params):
                chunks: list[str] = []
                result = backend.stream(p, chunks.append) if i % 2 else backend.call(p)
                assert "".join(chunks) == (result.content if i % 2 else "")
                texts.append(result.content)
            return texts

        async def all_at_once(params: Sequence[LlmCallParams]) -> list[str]:
            return [result.content for result in await asyncio.gather(*map(backend.acall, params))]

        texts = in_threads(
            *(functools.partial(one_after_the_other, params) for params in by_thread),
            *(lambda params=params: asyncio.run(all_at_once(params)) for params in by_loop),
        )
    assert texts == [[alone(stories_path, p.prompt, p.max_tokens) for p in params] for params in by_thread + by_loop]


LEARNED = {
    "Hello!": "Hi there! How can I help you today?",
    "What is your name?": "I'm a tiny AI assistant. Nice to meet you!",
    "Thank you!": "You're welcome! Happy to help.",
    "What is the capital of France?": "The capital of France is Paris.",
    "What color is the sky?": "The sky is blue.",
}


def test_sixteen_threads_and_tasks_that_chat_are_each_answered(shared_models):
    def asked(n: int) -> list[str]:
        return [list(LEARNED)[(n + i) % len(LEARNED)] for i in range(6)]

    with LocalLlmBackend(shared_models / "stories260K-chat-q8_0.gguf") as backend:

        def one_after_the_other(n: int) -> list[str]:
            questions = [[{"role": "user", "content": question}] for question in asked(n)]
            return [backend.chat(messages, temperature=0, max_tokens=40).content for messages in questions]

        async def at_once(n: int) -> list[str]:
            questions = [[{"role": "user", "content": question}] for question in asked(n)]
            asks = (backend.achat(messages, temperature=0, max_tokens=40) for messages in questions)
            return [result.content for result in await asyncio.gather(*asks)]

        answers = in_threads(
            *(functools.partial(one_after_the_other, n) for n in range(16)),
            *(lambda n=n: asyncio.run(at_once(n)) for n in range(4)),
        )
    assert answers == [[LEARNED[question] for question in asked(n)] for n in [*range(16), *range(4)]]


def test_texts_that_together_are_longer_than_the_cache_are_all_right(stories_path):
    with LocalLlmBackend(stories_path, n_parallel=12) as backend:
        engine = backend._open_engine()
        engine.n_cells = 256  # of the cache that the first request makes
        params = [LlmCallParams(f"{a} {b}", temperature=0, max_tokens=100) for a in BEGINNINGS for b in BEGINNINGS[:2]]
        results = in_threads(*(functools.partial(backend.call, p) for p in params))
        assert engine._text.n_ctx == 256
    assert [r.content for r in results] == [alone(stories_path, p.prompt, 100) for p in params]


def test_several_models_answer_at_once(shared_models, endless):
    with (
        LocalLlmBackend(shared_models / "all-MiniLM-L6-v2-f16.gguf", n_threads=1) as vectors,
        LocalLlmBackend(shared_models / "stories260K-f32.gguf") as stories,
    ):
        expected = vectors.embed("one text")
        story = LlmCallParams("Once upon a time", temperature=0, max_tokens=4)
        work = (
            lambda: endless.call(THE).content,
            lambda: stories.call(story).content,
            lambda: vectors.embed("one text"),
        )
        assert in_threads(*work * 5) == [FOX, ", there was a", expected] * 5


def test_samplers_of_texts_in_one_batch_stay_apart(endless):
    async def ask_all() -> list[str]:
        asked = [
            LlmCallParams("count", temperature=0, max_tokens=6, stop=" four"),
            LlmCallParams("count", temperature=0, max_tokens=6, grammar='root ::= " one" " two"'),
            LlmCallParams("count", temperature=0, max_tokens=6, logit_bias={}),
            LlmCallParams("count", temperature=1.5, top_k=1, max_tokens=6, seed=1),
        ]
        return [result.content for result in await asyncio.gather(*map(endless.acall, asked * 4))]

    six = " one two three four five one"
    assert asyncio.run(ask_all()) == [" one two three", " one two", six, six] * 4


# --- who holds up whom ------------------------------------------------------------------------------------------------
def test_a_long_prompt_does_not_stall_the_streams_of_others(endless):
    long = LlmCallParams("The" + " cat" * 4000, temperature=0, max_tokens=1)
    with busy(endless) as first, busy(endless) as second:
        before = first.n_chunks, second.n_chunks
        endless.call(long)
        n_steps = 4000 // 16  # batches that the prompt takes at least
        assert first.n_chunks - before[0] > n_steps // 2
        assert second.n_chunks - before[1] > n_steps // 2


def test_a_consumer_that_waits_for_others_holds_up_none_of_them(endless):
    others_done = threading.Event()
    chunks: list[str] = []

    def slow(chunk: str) -> None:
        chunks.append(chunk)
        assert others_done.wait(SOON_S)

    def others() -> list[str]:
        texts = [endless.call(THE).content for _ in range(5)]
        others_done.set()
        return texts

    params = LlmCallParams("count", temperature=0, max_tokens=100)
    slow_one, texts = in_threads(lambda: endless.stream(params, slow), others)
    assert texts == [FOX] * 5
    assert slow_one.content == "".join(chunks) == " one two three four five" * 20


def test_a_task_that_waits_for_others_holds_up_none_of_them(endless):
    async def ask() -> tuple[str, list[str]]:
        others_done = asyncio.Event()

        async def slow(chunk: str) -> None:
            await others_done.wait()

        params = LlmCallParams("count", temperature=0, max_tokens=100)
        slow_one = asyncio.create_task(endless.astream(params, slow))
        texts = [(await endless.acall(THE)).content for _ in range(5)]
        others_done.set()
        return (await slow_one).content, texts

    assert asyncio.run(ask()) == (" one two three four five" * 20, [FOX] * 5)


def test_vectors_are_computed_in_turns_with_texts(endless):
    texts = [f"count one{' two' * (n % 50)}" for n in range(600)]
    expected = endless.embed(texts)
    with busy(endless) as running:
        heard: list[int] = []
        assert endless.embed(texts, on_progress=lambda n_done: heard.append(running.n_chunks)) == expected
        assert len(heard) > 5
        assert heard[-1] - heard[0] >= len(heard) - 2  # a step of the text between two batches of vectors


def test_vectors_do_not_wait_for_the_end_of_a_text_that_nobody_streams(endless):
    engine = endless._open_engine()
    with engine.generate(TextRequest("count", sampling={"temperature": 0})):
        wait_until(lambda: engine._live)
        assert len(endless.embed("count one two")) == 448
        assert engine._live
    wait_until(lambda: not engine._live)


def test_a_few_vectors_do_not_wait_for_many(endless):
    engine = endless._open_engine()
    heard: list[str] = []

    def long_heard(n_done: int) -> None:
        heard.append("long")
        if len(heard) == 1:
            engine.embed(EmbedRequest(["one"], on_progress=lambda n_done: heard.append("short")))

    endless.embed(["count one" + " two" * 40] * 100, on_progress=long_heard)
    assert len(heard) > 5
    assert heard[:3] == ["long", "long", "short"] or heard[:2] == ["long", "short"]


def test_vectors_that_are_given_up_end_no_others(shared_models):
    texts = ["one two three four five six seven " * 8] * 100
    with LocalLlmBackend(shared_models / "all-MiniLM-L6-v2-f16.gguf", n_threads=1) as vectors:

        def give_up(n: int) -> list[str]:
            faults = []
            for i in range(12):
                try:
                    vectors.embed(texts, timeout_s=0.03 + (7 * i + n) % 12 * 0.01)
                except DeadlineExceeded:
                    pass
                except EngineError as exc:
                    faults.append(str(exc))
            return faults

        stay, *faults = in_threads(lambda: len(vectors.embed(texts * 3)), *(lambda n=n: give_up(n) for n in range(2)))
    assert (stay, faults) == (300, [[], []])


def test_vectors_given_up_before_the_engine_has_them_are_not_computed(endless):
    engine = endless._open_engine()
    heard: list[int] = []

    async def give_up() -> None:
        with engine._wake:  # no request comes to the engine while this is held
            asking = asyncio.create_task(endless.aembeddings(["one" + " cat" * 100] * 100, on_progress=heard.append))
            await asyncio.sleep(0.1)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    asyncio.run(give_up())  # ends when its threads have
    wait_until(lambda: not engine._embedding)
    assert len(heard) <= 1  # of 20 batches


# --- whose turn it is -------------------------------------------------------------------------------------------------
def order_of(backend: LocalLlmBackend, *asked: LlmCallParams, pause_s: float = 0) -> list[int]:
    """In which order requests are answered that came one after the other while the model was busy."""
    order: list[int] = []

    async def ask(n: int) -> None:
        await backend.acall(asked[n])
        order.append(n)

    async def ask_all() -> None:
        tasks = []
        for n in range(len(asked)):
            tasks.append(asyncio.create_task(ask(n)))
            await asyncio.sleep(pause_s)
        running.end()
        await asyncio.gather(*tasks)

    running = Running(backend)
    asyncio.run(ask_all())
    return order


def the(**params: Any) -> LlmCallParams:
    return LlmCallParams(params.pop("prompt", "The"), temperature=0, max_tokens=2, **params)


def test_equal_requests_are_answered_in_the_order_they_came(single):
    assert order_of(single, *[the()] * 8) == list(range(8))


def test_of_those_that_wait_a_higher_priority_comes_first(single):
    asked = [the(priority=priority) for priority in (0, -1, 5, 0, 5, 7)]
    assert order_of(single, *asked) == [5, 2, 4, 0, 3, 1]


def test_who_leaves_the_queue_changes_no_turn_of_others(single):
    engine = single._open_engine()
    request = TextRequest("The", sampling={"temperature": 0})
    with busy(single):
        tickets = [engine.generate(request, priority=-n) for n in (1, 5, 2, 6, 7, 3, 4)]
        tickets.pop(2).cancel()
        waiting = engine._waiting
        assert len(waiting) == 6
        assert all(waiting[(i - 1) // 2] < waiting[i] for i in range(1, 6))  # the first is next, and so on (heapq)
    assert ["".join(ticket) for ticket in tickets] == [FOX] * 6


def test_a_short_prompt_comes_before_a_long_one(single):
    asked = [the(prompt="The" + " cat" * n) for n in (4000, 2000, 1)]
    assert order_of(single, *asked) == [2, 1, 0]


def test_a_long_prompt_does_not_wait_for_all_short_ones_that_come_later(single):
    asked = [the(prompt="The" + " cat" * 100), the()]
    assert order_of(single, *asked, pause_s=0.3) == [0, 1]  # more than the 100 tokens count


@pytest.mark.parametrize(("priorities", "first"), [((0, 0), "early"), ((0, 1), "late"), ((1, 1), "early")])
def test_prompts_are_read_by_priority(endless, priorities, first):
    order: list[str] = []

    def ask(name: str, priority: int) -> None:
        prompt = f"{name[0]} {priorities}" + " cat" * 6000  # like no other, so that nothing of it is known
        endless.call(LlmCallParams(prompt, temperature=0, max_tokens=1, priority=priority))
        order.append(name)

    threads = [threading.Thread(target=ask, args=asked) for asked in zip(("early", "late"), priorities, strict=True)]
    threads[0].start()
    wait_until(lambda: endless._open_engine()._live)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert order[0] == first


# --- too many ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def impatient(endless_path: Path) -> Iterator[LocalLlmBackend]:
    with LocalLlmBackend(endless_path, n_parallel=1, queue_timeout=0.1) as backend:
        yield backend


@pytest.mark.parametrize("ask", [lambda b: b.call(THE), lambda b: asyncio.run(b.acall(THE))], ids=["sync", "async"])
def test_no_turn_within_queue_timeout_is_engine_busy(impatient, ask):
    with busy(impatient):
        with pytest.raises(EngineBusy, match=r"busy with other requests for 0\.1 s; raise queue_timeout") as raised:
            ask(impatient)
        assert isinstance(raised.value, (EngineError, TimeoutError))
        assert impatient._open_engine()._waiting == []
    assert impatient.call(THE).content == FOX


def test_a_text_that_has_its_turn_may_take_longer_than_queue_timeout(impatient):
    begun = time.monotonic()
    result = impatient.stream(FOR_EVER, lambda chunk: time.monotonic() - begun < 0.3)
    assert result.finish_reason == "cancelled"
    assert len(result.content.split()) > 1


def test_queue_timeout_0_takes_a_free_place_and_waits_for_none(endless_path):
    with LocalLlmBackend(endless_path, n_parallel=1, queue_timeout=0) as backend:
        for _ in range(20):
            assert backend.call(THE).content == FOX
        with busy(backend), pytest.raises(EngineBusy, match="for 0 s"):
            backend.call(THE)


def test_a_busy_model_is_answered_for_by_the_api_with_the_reason(endless_path, server: ApiServer):
    server.replies = [chat("From the API.")]
    settings = {"backend": "local", "model_path": str(endless_path), "n_parallel": 1, "queue_timeout": 0.1}
    pool = BackendPool()
    try:
        backend = pool.get(LlmSettings.from_mapping(settings | {"api_base": server.base, "model": "served-1"}))
        with LocalLlmBackend(endless_path, n_parallel=1) as same_engine, busy(same_engine):
            result = backend.call(THE)
        assert (result.content, result.backend) == ("From the API.", "api")
        assert "busy with other requests for 0.1 s" in result.fallback_reason
        assert (backend.call(THE).content, backend.call(THE).backend) == (FOX, "local")
    finally:
        pool.close()


def test_a_queue_that_is_full_refuses_at_once(single, monkeypatch):
    monkeypatch.setattr(engine_room, "_MAX_QUEUE", 3)
    engine = single._open_engine()
    with busy(single):
        tickets = [engine.generate(TextRequest("The", sampling={"temperature": 0})) for _ in range(3)]
        with pytest.raises(EngineBusy, match=r"3 requests wait for .*; send fewer at once"):
            single.call(THE)
        tickets[0].cancel()  # makes room
        tickets.append(engine.generate(TextRequest("The", sampling={"temperature": 0})))
    with pytest.raises(Cancelled):
        list(tickets[0])
    assert ["".join(ticket) for ticket in tickets[1:]] == [FOX] * 3


def test_a_cancel_waits_for_nobody_who_waits_for_it(single):
    """As where a collection of garbage cancels a stream of its own in the midst of another request."""
    engine = single._open_engine()
    with busy(single):
        ticket = engine.generate(TextRequest("The", sampling={"temperature": 0}))
        with engine._wake:
            leaving = threading.Thread(target=ticket.cancel)
            leaving.start()
            leaving.join(SOON_S)
            assert not leaving.is_alive()
    assert list(ticket) == []
    assert ticket.outcome.finish_reason == "cancelled"


# --- leaving ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("beside", ["alone", "beside others"])
@pytest.mark.parametrize("way", ["timeout", "task"])
def test_leaving_in_the_middle_of_a_long_prompt_frees_its_place(endless, beside, way):
    prompt = f"{way} {beside}" + " cat" * 12000  # like no other, so that nothing of it is known

    async def cancelled() -> None:
        await asyncio.wait_for(endless.acall(LlmCallParams(prompt, temperature=0)), 0.2)

    def leave() -> None:
        if way == "task":
            asyncio.run(cancelled())
        else:
            endless.call(LlmCallParams(prompt, temperature=0, timeout_s=0.2))

    with busy(endless) if beside == "beside others" else contextlib.nullcontext():
        with pytest.raises(TimeoutError):
            leave()
        begun = time.monotonic()
        wait_until(lambda: len(endless._open_engine()._live) == (beside != "alone"))
        assert time.monotonic() - begun < 1  # 100 ms and a batch where the machine is idle
        assert endless.call(THE).content == FOX


def test_leaving_a_ticket_before_its_outcome_ends_the_request(single):
    engine = single._open_engine()
    with engine.generate(TextRequest("count", sampling={"temperature": 0}, stream=True)) as ticket:
        assert next(ticket) == " one"
        assert engine._live
    begun = time.monotonic()
    wait_until(lambda: not engine._live)
    assert time.monotonic() - begun < 2  # the text would take more than twice as long


def test_those_who_leave_disturb_none_of_those_who_stay(endless):
    def fail(chunk: str) -> None:
        raise ZeroDivisionError

    def leave(n: int) -> object:
        params = LlmCallParams("count", temperature=0, max_tokens=None, timeout_s=0.05 if n % 3 == 0 else None)
        return endless.stream(params, (lambda chunk: None, lambda chunk: False, fail)[n % 3]).finish_reason

    def stay() -> str:
        return endless.call(LlmCallParams("count", temperature=0, max_tokens=400)).content

    answers = in_threads(*(functools.partial(leave, n) for n in range(9)), *[stay] * 6)
    assert [type(answer) if not isinstance(answer, str) else answer for answer in answers[:9]] == [
        DeadlineExceeded, "cancelled", ZeroDivisionError,
    ] * 3  # fmt: skip
    assert answers[9:] == [" one two three four five" * 80] * 6


def test_random_comings_and_goings_leave_every_text_right_and_nothing_behind(stories_path):
    with LocalLlmBackend(stories_path, n_parallel=6) as backend:
        engine = backend._open_engine()

        def thread(seed: int) -> list[str]:
            draw, faults = random.Random(seed), []
            for p in asks(12, seed):
                kept: list[str] = []
                n_wanted = draw.choice([0, 1, 3, None])

                def take(chunk: str, kept: list[str] = kept, n_wanted: int | None = n_wanted) -> bool:
                    kept.append(chunk)
                    return n_wanted is None or len(kept) <= n_wanted

                text = backend.stream(p, take).content
                expected = alone(stories_path, p.prompt, p.max_tokens)
                if text != "".join(kept) or not expected.startswith(text) or (n_wanted is None and text != expected):
                    faults.append(f"{p.prompt!r}: {text!r}")
            return faults

        async def tasks(seed: int) -> list[str]:
            draw, faults = random.Random(seed), []

            async def one(p: LlmCallParams, patience_s: float | None) -> None:
                try:
                    text = (await asyncio.wait_for(backend.acall(p), patience_s)).content
                except TimeoutError:
                    return
                if text != alone(stories_path, p.prompt, p.max_tokens):
                    faults.append(f"{p.prompt!r}: {text!r}")

            asked = asks(40, seed)
            await asyncio.gather(*(one(p, draw.choice([None, 0, 0.005, 0.05])) for p in asked))
            return faults

        for p in itertools.chain.from_iterable([*(asks(12, s) for s in range(8)), *(asks(40, s) for s in (50, 51))]):
            alone(stories_path, p.prompt, p.max_tokens)
        found = in_threads(
            *(functools.partial(thread, seed) for seed in range(8)),
            *(lambda seed=seed: asyncio.run(tasks(seed)) for seed in (50, 51)),
        )
        assert found == [[]] * 10
        wait_until(lambda: not engine._live)
        assert engine._waiting == []
        story = LlmCallParams("Once upon a time", temperature=0, max_tokens=4)
        assert backend.call(story).content == alone(stories_path, story.prompt, 4)


def test_close_ends_all_that_runs_and_refuses_all_that_waits(endless_path):
    backend = LocalLlmBackend(endless_path, n_ctx=16001, n_parallel=4)
    threads_of = [threading.Event() for _ in range(12)]
    ended: list[object] = []

    def ask(begun: threading.Event) -> None:
        try:
            ended.append(backend.stream(FOR_EVER, lambda chunk: begun.set()).finish_reason)
        except EngineClosed:
            ended.append(EngineClosed)

    threads = [threading.Thread(target=ask, args=(begun,)) for begun in threads_of]
    for thread in threads:
        thread.start()
    wait_until(lambda: sum(begun.is_set() for begun in threads_of) == 4)
    wait_until(lambda: len(backend._open_engine()._waiting) == 8)
    backend.close()
    for thread in threads:
        thread.join(SOON_S)
    assert ended.count("cancelled") == 4
    assert ended.count(EngineClosed) == 8


# --- what is found again ----------------------------------------------------------------------------------------------
def n_computed(results: Sequence[Any]) -> int:
    return sum(result.usage.prompt_tokens - result.timings.cached_tokens for result in results)


def common_beginning(path: Path, prompts: Sequence[str]) -> int:
    """Tokens that all prompts begin with."""
    columns = zip(*(_model(path).tokenize(prompt) for prompt in prompts), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def test_a_prompt_asked_again_is_known_but_for_its_last_token(stories_path):
    params = LlmCallParams("Once upon a time there was a big dog", temperature=0, max_tokens=8)
    with LocalLlmBackend(stories_path) as backend:
        first, second = backend.call(params), backend.call(params)
    assert first.timings.cached_tokens == 0
    assert second.timings.cached_tokens == second.usage.prompt_tokens - 1
    assert first.content == second.content == alone(stories_path, params.prompt, 8)


@pytest.mark.parametrize(("n_batch", "n_twice"), [(512, 0), (None, 31), (16, 31)])
def test_a_system_prompt_that_many_share_is_computed_once(stories_path, n_batch, n_twice):
    """But for `n_twice` tokens for each of the others at most: for fewer than 32 nobody waits (prefix_cache.hpp)."""
    shared = "Lily and Tom went to the park with a big red ball. " * 8
    prompts = [f"{shared}{beginning}" for beginning in BEGINNINGS]
    n_shared = common_beginning(stories_path, prompts)
    n_own = sum(len(_model(stories_path).tokenize(prompt)) - n_shared for prompt in prompts)
    assert n_shared > 100
    with LocalLlmBackend(stories_path, n_batch=n_batch) as backend:

        async def ask_all() -> list[Any]:
            params = [LlmCallParams(prompt, temperature=0, max_tokens=10) for prompt in prompts]
            return await asyncio.gather(*map(backend.acall, params))

        cold, warm = asyncio.run(ask_all()), asyncio.run(ask_all())
    assert 0 <= n_computed(cold) - (n_shared + n_own) <= n_twice * (len(prompts) - 1)
    assert n_computed(warm) == len(prompts)
    for results in cold, warm:
        assert [result.content for result in results] == [alone(stories_path, prompt, 10) for prompt in prompts]


def test_unrelated_requests_in_between_make_no_prompt_unknown(stories_path, monkeypatch):
    monkeypatch.setattr(engine_room, "_KEPT_CELLS", 1024)
    long = LlmCallParams("One day, Tom saw a big cat in the park. " * 25, temperature=0, max_tokens=4)
    with LocalLlmBackend(stories_path) as backend:
        first = backend.call(long)
        for n in range(40):
            backend.call(LlmCallParams(f"{BEGINNINGS[n % 7]} {n} and then " * 8, temperature=0, max_tokens=4))
        again = backend.call(long)
        assert backend._open_engine()._text.n_host_bytes > 0
    assert again.content == first.content == alone(stories_path, long.prompt, 4)
    assert again.timings.cached_tokens == again.usage.prompt_tokens - 1 > 250


@pytest.mark.parametrize(("cache_ram_mib", "is_kept"), [(0, False), (None, True), (8, True)])
def test_cache_ram_mib_is_the_memory_for_what_leaves_the_cache(stories_path, monkeypatch, cache_ram_mib, is_kept):
    monkeypatch.setattr(engine_room, "_KEPT_CELLS", 500)
    params = [LlmCallParams(f"{n} One day, Tom saw a big cat. " * 20, temperature=0, max_tokens=4) for n in range(12)]
    with LocalLlmBackend(stories_path, cache_ram_mib=cache_ram_mib) as backend:
        for p in params:
            backend.call(p)
        n_host_bytes = backend._open_engine()._text.n_host_bytes
        again = backend.call(params[5])
    assert (n_host_bytes > 0) == is_kept
    assert n_host_bytes <= (8 << 20 if cache_ram_mib is None else cache_ram_mib << 20)
    assert (again.timings.cached_tokens == again.usage.prompt_tokens - 1) == is_kept
    assert again.content == alone(stories_path, params[5].prompt, 4)


# --- timings ----------------------------------------------------------------------------------------------------------
def test_timings_tell_the_wait_the_prompt_and_the_text_apart(single):
    params = LlmCallParams("one" + " blue" * 500 + " count", temperature=0, max_tokens=50)
    with busy(single) as running:
        begun = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(single.call, params)
            time.sleep(0.2)
            running.end()
            timings = asked.result().timings
        took_s = time.monotonic() - begun
    assert timings.queue_s >= 0.19
    assert timings.prompt_s > 0
    assert timings.generation_s > 0
    assert timings.first_token_s == pytest.approx(timings.queue_s + timings.prompt_s)
    assert timings.first_token_s + timings.generation_s <= took_s
    assert timings.cached_tokens < 5


def test_a_request_that_had_no_token_has_no_time_of_its_first(endless):
    result = endless.call(LlmCallParams("count", temperature=0, max_tokens=0))
    assert result.timings.first_token_s is None
    assert (result.timings.prompt_s, result.timings.generation_s) == (0, 0)


# --- kept alive -------------------------------------------------------------------------------------------------------
def test_keep_alive_keeps_a_model_after_its_last_user_for_a_while(endless_path):
    backend = LocalLlmBackend(endless_path, n_ctx=128, keep_alive=0.5)
    engine = backend._open_engine()
    backend.close()
    with pytest.raises(EngineClosed):
        backend.call(THE)
    again = LocalLlmBackend(endless_path, n_ctx=128, progress=lambda done: pytest.fail("loaded again"))
    assert again._open_engine() is engine
    time.sleep(0.7)  # what the first release has said is no longer true
    assert again.call(THE).content == FOX
    again.close()
    assert not engine._thread.is_alive()


def test_an_expiry_that_comes_while_a_model_is_used_again_frees_nothing(endless_path):
    backend = LocalLlmBackend(endless_path, n_ctx=133, keep_alive=0.01)
    engine = backend._open_engine()
    backend.close()
    expiry = registry._expiries[engine]
    with registry._lock:
        time.sleep(0.1)  # the expiry waits for the lock
        LocalLlmBackend(endless_path, n_ctx=133, keep_alive=1000).close()
    expiry.join()
    with LocalLlmBackend(endless_path, n_ctx=133) as again:
        assert again._open_engine() is engine
        assert again.call(THE).content == FOX
    assert not engine._thread.is_alive()


def test_a_file_that_was_written_to_is_another_model(endless_path, tmp_path):
    path = tmp_path / "model.gguf"
    shutil.copy(endless_path, path)
    with LocalLlmBackend(path) as first, LocalLlmBackend(path) as second:
        os.utime(path, (1, 1))
        with LocalLlmBackend(path) as third:
            assert first._open_engine() is second._open_engine() is not third._open_engine()


def test_keep_alive_ends(endless_path):
    with LocalLlmBackend(endless_path, n_ctx=129, keep_alive=0.1) as backend:
        thread = backend._open_engine()._thread
    assert thread.is_alive()
    thread.join(SOON_S)
    assert not thread.is_alive()
    loads: list[float] = []
    with LocalLlmBackend(endless_path, n_ctx=129, progress=loads.append):
        assert loads


def test_a_model_that_is_opened_again_and_again_is_kept_by_one_thread(endless_path):
    n_before = threading.active_count()
    for _ in range(20):
        LocalLlmBackend(endless_path, n_ctx=130, keep_alive=1000).close()
    wait_until(lambda: threading.active_count() <= n_before + 2)  # the engine's own, and one that waits
    LocalLlmBackend(endless_path, n_ctx=130).close()
    wait_until(lambda: threading.active_count() == n_before)


@pytest.mark.parametrize("keep_alive", [0, 0.01])
def test_a_model_is_given_back_once_by_all_who_close_its_backend_at_once(endless_path, keep_alive):
    with LocalLlmBackend(endless_path, n_ctx=131) as user:
        engine = user._open_engine()
        for _ in range(50):
            backend = LocalLlmBackend(endless_path, n_ctx=131, keep_alive=keep_alive)
            assert in_threads(*[backend.close] * 4) == [None] * 4
            assert engine.n_users == 1
        assert user.call(THE).content == FOX
    assert not engine._thread.is_alive()


def test_a_pickled_backend_is_its_configuration(endless_path):
    with LocalLlmBackend(endless_path, n_ctx=132, queue_timeout=0.5, chat_format="chatml") as backend:
        pickled = pickle.dumps(backend)
        assert len(pickled) < 1000
        with pickle.loads(pickled) as other:
            assert other._open_engine() is backend._open_engine()
            assert (other.n_ctx, other.chat_format, other._settings.queue_timeout) == (132, "chatml", 0.5)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
            assert processes.submit(backend.call, THE).result().content == FOX


KEPT = """
import sys
from tea_llm import LlmCallParams, LocalLlmBackend

with LocalLlmBackend(sys.argv[1], keep_alive=1000) as backend:
    print(backend.call(LlmCallParams("The", temperature=0)).content)
"""


def test_a_program_does_not_wait_for_models_that_are_kept_alive(endless_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", KEPT, endless_path],
        capture_output=True, text=True, timeout=60, check=False, env=os.environ | {"SKBUILD_EDITABLE_VERBOSE": "0"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{FOX}\n", "")


LEFT_RUNNING = """
import asyncio, sys, threading, time
from tea_llm import LlmCallParams, LocalLlmBackend

backend = LocalLlmBackend(sys.argv[1], n_parallel=2)
params = LlmCallParams("count", temperature=0, max_tokens=None)
texts = ["count one two three"] * 3000
asks = [
    *[lambda: backend.call(params)] * 3,
    lambda: list(backend.stream(params)),
    lambda: asyncio.run(backend.acall(params)),
    lambda: backend.embed(texts),
    lambda: asyncio.run(backend.aembed(texts)),
]
for ask in asks:
    threading.Thread(target=ask, daemon=True).start()
engine = backend._open_engine()
while len(engine._live) + len(engine._waiting) < 5 or len(engine._embedding) < 2:
    time.sleep(0.01)
print("end of the program")
"""


def test_a_program_ends_without_a_word_of_the_requests_of_its_daemons(endless_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LEFT_RUNNING, endless_path],
        capture_output=True, text=True, timeout=60, check=False, env=os.environ | {"SKBUILD_EDITABLE_VERBOSE": "0"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "end of the program\n", "")
