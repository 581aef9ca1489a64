"""The engine: who shares a model, who waits for it, how a request ends early, and what survives."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tea_llm import (
    BadRequest,
    Cancelled,
    ContextOverflow,
    DeadlineExceeded,
    EngineClosed,
    EngineFault,
    LlmCallParams,
    LocalLlmBackend,
    ModelError,
    ModelNotFound,
)

pytest.importorskip("tea_llm._llama", reason="tea_llm was built without llama.cpp")
from tea_llm.engine import Engine, EngineOptions, TextRequest
from tea_llm.registry import open_engine, release_engine
from tea_llm.sizing import fit_threads

from .generating import TOO_WIDE
from .random_models import with_trained_context, write_random

FOX = " quick brown fox jumps over a lazy dog."
THE = LlmCallParams("The", temperature=0)
FOR_EVER = LlmCallParams("count", temperature=0, max_tokens=None)  # " one two three …", until the context is full
SOON_S = 8.0  # FOR_EVER takes more than twice as long where nobody ends it, on an idle machine


@pytest.fixture(scope="module")
def scripted_path(shared_models: Path) -> Path:
    return shared_models / "scripted-f16.gguf"


@pytest.fixture(scope="module")
def endless_path(scripted_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripted model with room for a text of 20 seconds."""
    return with_trained_context(scripted_path, 16384, tmp_path_factory.mktemp("endless") / "endless.gguf")


@pytest.fixture(scope="module")
def endless(endless_path: Path) -> Iterator[LocalLlmBackend]:
    with LocalLlmBackend(endless_path) as backend:
        yield backend


@pytest.fixture(scope="module")
def single(endless_path: Path) -> Iterator[LocalLlmBackend]:
    """The same for one request at a time: the others wait."""
    with LocalLlmBackend(endless_path, n_parallel=1) as backend:
        yield backend


@pytest.fixture
def scripted(scripted_path: Path) -> Iterator[LocalLlmBackend]:
    with LocalLlmBackend(scripted_path) as backend:
        yield backend


@contextlib.contextmanager
def soon() -> Iterator[None]:
    """What runs in here waits for no text to end by itself."""
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < SOON_S


@contextlib.contextmanager
def busy(backend: LocalLlmBackend) -> Iterator[threading.Event]:
    """The model computes for somebody else, until the event that this gives is set."""
    begun, enough = threading.Event(), threading.Event()

    def take(chunk: str) -> bool:
        begun.set()
        return not enough.is_set()

    thread = threading.Thread(target=backend.stream, args=(FOR_EVER, take))
    thread.start()
    assert begun.wait(SOON_S)
    try:
        yield enough
    finally:
        enough.set()
        thread.join()


def says_fox(backend: LocalLlmBackend) -> bool:
    return backend.call(THE).content == FOX


# --- one file, one model ----------------------------------------------------------------------------------------------
def test_backends_of_one_file_and_options_share_one_load(scripted_path, tmp_path):
    loads: list[float] = []
    link = tmp_path / "link.gguf"
    link.symlink_to(scripted_path)
    with (
        LocalLlmBackend(scripted_path, n_ctx=100, progress=loads.append) as first,
        LocalLlmBackend(str(scripted_path), n_ctx=100, progress=lambda done: pytest.fail("loaded again")) as second,
        LocalLlmBackend(link, n_ctx=100) as third,
    ):
        assert loads[-1] == 1.0
        assert first._open_engine() is second._open_engine() is third._open_engine()
        assert says_fox(first)
        assert says_fox(second)


def test_eight_threads_that_open_one_file_at_once_load_it_once(scripted_path):
    options = EngineOptions(n_ctx=99)
    engines: list[Engine] = []
    threads = [
        threading.Thread(target=lambda: engines.append(open_engine(str(scripted_path), options))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(engines)) == 1
    for engine in engines:
        assert engine.model.n_vocab
        release_engine(engine)
    with pytest.raises(EngineClosed):
        engines[0].generate(TextRequest("The"))


@pytest.mark.parametrize("options", [{"n_ctx": 101}, {"n_batch": 7}, {"n_gpu_layers": 0}, {"pooling": "cls"}])
def test_other_options_are_another_engine(scripted_path, options):
    options = {"n_ctx": 100} | options
    with LocalLlmBackend(scripted_path, n_ctx=100) as first, LocalLlmBackend(scripted_path, **options) as other:
        assert first._open_engine() is not other._open_engine()
        assert says_fox(other)


def test_a_file_that_was_replaced_is_another_model(shared_models, scripted_path, tmp_path):
    path, other = tmp_path / "model.gguf", tmp_path / "other.gguf"
    shutil.copy(scripted_path, path)
    shutil.copy(shared_models / "stories260K-f32.gguf", other)
    with LocalLlmBackend(path) as old:
        assert says_fox(old)
        other.replace(path)
        with LocalLlmBackend(path) as new:
            assert new._open_engine() is not old._open_engine()
            story = new.call(LlmCallParams("Once upon a time", temperature=0, max_tokens=4)).content
            assert story == ", there was a"
            assert says_fox(old)


def test_the_last_of_its_backends_frees_the_model(scripted_path):
    backends = [LocalLlmBackend(scripted_path, n_ctx=98) for _ in range(3)]
    engine = weakref.ref(backends[0]._open_engine())
    thread = engine()._thread
    backends.pop().close()
    assert thread.is_alive()
    backends.pop()  # dropped without a close
    gc.collect()
    assert thread.is_alive()
    assert says_fox(backends[0])
    backends[0].close()
    assert not thread.is_alive()
    gc.collect()
    assert engine() is None


def test_backends_that_nobody_closed_free_the_model_when_they_are_collected(scripted_path):
    backend = LocalLlmBackend(scripted_path, n_ctx=97)
    assert says_fox(backend)
    engine, thread = weakref.ref(backend._open_engine()), backend._open_engine()._thread
    cycle: list[Any] = [backend]
    cycle.append(cycle)
    del backend, cycle
    gc.collect()
    thread.join(SOON_S)  # it frees the model itself: a collection must not wait for what is computed
    assert not thread.is_alive()
    gc.collect()
    assert engine() is None


def test_a_backend_closed_twice_gives_its_model_back_once(scripted_path):
    with LocalLlmBackend(scripted_path, n_ctx=96) as kept:
        other = LocalLlmBackend(scripted_path, n_ctx=96)
        other.close()
        other.close()
        del other
        gc.collect()
        assert says_fox(kept)


def test_a_model_that_was_freed_is_loaded_again(scripted_path):
    for _ in range(3):
        with LocalLlmBackend(scripted_path, n_ctx=95) as backend:
            assert says_fox(backend)


# --- loading ----------------------------------------------------------------------------------------------------------
def test_progress_rises_to_1(shared_models):
    told: list[float] = []
    with LocalLlmBackend(shared_models / "all-MiniLM-L6-v2-f16.gguf", n_ctx=94, progress=told.append):
        assert told == sorted(told)
        assert told[-1] == 1.0
        assert all(0 <= fraction <= 1 for fraction in told)


SLOW_MODEL_BYTES = 300 << 20


@pytest.fixture(scope="module")
def slow_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of some hundred MB, so that its load can be watched."""
    gguf = pytest.importorskip("gguf", reason="gguf writes the model that is slow to load")
    np = pytest.importorskip("numpy")
    path = tmp_path_factory.mktemp("slow") / "slow.gguf"
    n_vocab, n_embd = 512, 1024
    n_row_bytes = n_embd // 32 * 18  # Q4_0, which llama.cpp arranges anew while it loads
    n_layer = SLOW_MODEL_BYTES // (7 * n_embd * n_row_bytes)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(n_embd)
    writer.add_head_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *map(str, range(253))])
    writer.add_token_scores([0.0] * n_vocab)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 253)
    square, one = np.zeros((n_embd, n_row_bytes), np.uint8), np.ones(n_embd, np.float32)
    writer.add_tensor("token_embd.weight", np.zeros((n_vocab, n_embd), np.float32))
    writer.add_tensor("output_norm.weight", one)
    for layer in range(n_layer):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", one)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", square, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_progress_that_returns_false_cancels_the_load(slow_path):
    told: list[float] = []

    def stop(fraction: float) -> bool:
        told.append(fraction)
        return False

    with pytest.raises(Cancelled, match="cancelled"):
        LocalLlmBackend(slow_path, progress=stop)
    assert told
    assert max(told) < 1
    with LocalLlmBackend(slow_path, progress=told.append):
        assert told[-1] == 1.0


CLOSE_WHILE_LOADING = """
import gc, sys
from tea_llm import LocalLlmBackend, LlmCallParams

scripted, slow = sys.argv[1:]
kept, *backends = [LocalLlmBackend(scripted, n_ctx=n) for n in (100, 101, 102)]
cycle = [backends.pop()]
cycle.append(cycle)
del cycle

def progress(fraction):
    gc.collect()  # finds the backend in the cycle, as any allocation may
    while backends:
        backends.pop().close()
    LocalLlmBackend(scripted, n_ctx=100).close()

print(LocalLlmBackend(slow, progress=progress).is_available())
"""


def test_backends_are_shared_closed_and_collected_while_another_loads(scripted_path, slow_path):
    done = python(CLOSE_WHILE_LOADING, scripted_path, slow_path)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(ModelNotFound, match=r"missing\.gguf") as raised:
        LocalLlmBackend(tmp_path / "missing.gguf")
    assert isinstance(raised.value, FileNotFoundError)


# --- many requests ----------------------------------------------------------------------------------------------------
def test_requests_queue_and_each_gets_its_own_answer(single):
    answers: dict[int, tuple[str, float]] = {}

    def ask(n: int) -> None:
        result = single.call(LlmCallParams("count" if n % 2 else "The", temperature=0, max_tokens=n % 7))
        answers[n] = (result.content, result.timings.queue_s)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(40)]
    with busy(single) as enough:
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        assert answers == {}
        enough.set()
        for thread in threads:
            thread.join()
    words = {0: FOX.split(" ")[1:], 1: ["one", "two", "three", "four", "five", "one", "two"]}
    for n, (text, queue_s) in answers.items():
        assert text == "".join(f" {word}" for word in words[n % 2][: n % 7]), n
        assert queue_s > 0.05


def test_requests_are_answered_in_the_order_they_came(endless):
    async def ask(n: int, order: list[int]) -> None:
        await endless.acall(THE)
        order.append(n)

    async def ask_all() -> list[int]:
        order: list[int] = []
        await asyncio.gather(*(ask(n, order) for n in range(20)))
        return order

    assert asyncio.run(ask_all()) == list(range(20))


def test_threads_tasks_texts_and_vectors_share_one_model(endless):
    expected = endless.embed("count one two")
    faults: list[object] = []

    async def several() -> None:
        asks = [endless.acall(THE) if i % 2 else endless.aembed("count one two") for i in range(10)]
        for i, answer in enumerate(await asyncio.gather(*asks)):
            if (answer.content if i % 2 else answer) != (FOX if i % 2 else expected):
                faults.append(answer)

    def blocking() -> None:
        for _ in range(5):
            if not says_fox(endless) or endless.embed("count one two") != expected:
                faults.append("blocking")

    threads = [threading.Thread(target=target) for target in (lambda: asyncio.run(several()), blocking) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


# --- cancel -----------------------------------------------------------------------------------------------------------
def test_a_request_cancelled_in_the_queue_is_answered_at_once_and_never_begun(single):
    with busy(single):
        ticket = single._open_engine().generate(TextRequest("count"))
        ticket.cancel()
        with soon(), pytest.raises(Cancelled, match="before its turn"):
            list(ticket)
        assert not ticket.begun
    assert says_fox(single)


@pytest.mark.parametrize("when", ["queued", "at once", "generating"])
def test_a_cancelled_task_gives_the_model_back(single, when):
    async def cancel() -> None:
        begun = asyncio.Event()
        task = asyncio.create_task(single.astream(FOR_EVER, lambda chunk: begun.set()))
        if when == "generating":
            await begun.wait()
        elif when == "queued":
            await asyncio.sleep(0.05)
        else:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert begun.is_set() == (when == "generating")

    with contextlib.ExitStack() as stack:
        enough = stack.enter_context(busy(single)) if when == "queued" else None
        with soon():
            asyncio.run(cancel())
        if enough:
            enough.set()
        with soon():
            assert says_fox(single)


def test_a_task_cancelled_while_its_prompt_is_read_gives_the_model_back(shared_models, tmp_path):
    path = with_trained_context(shared_models / "stories260K-f32.gguf", 32768, tmp_path / "long.gguf")
    with LocalLlmBackend(path, n_batch=2048) as backend:
        prompt = LlmCallParams("word " * 10000, temperature=0, max_tokens=1)

        async def cancel() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(backend.acall(prompt), 0.1)

        with soon():
            asyncio.run(cancel())
            story = backend.call(LlmCallParams("Once upon a time", temperature=0, max_tokens=4))
        assert story.content == ", there was a"


def test_a_callback_that_returns_false_frees_the_model_at_once(endless):
    with soon():
        result = endless.stream(FOR_EVER, lambda chunk: False)
        assert (result.content, result.finish_reason) == (" one", "cancelled")
        assert says_fox(endless)


def test_a_callback_that_raises_frees_the_model_at_once(endless):
    def fail(chunk: str) -> None:
        raise ZeroDivisionError

    with soon():
        with pytest.raises(ZeroDivisionError):
            endless.stream(FOR_EVER, fail)
        assert says_fox(endless)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # asyncio's own, on a task left behind
def test_a_loop_that_ended_in_the_middle_of_a_text_leaves_the_engine_well(endless):
    async def abandon() -> None:
        begun = asyncio.Event()
        asyncio.get_running_loop().create_task(endless.astream(FOR_EVER, lambda chunk: begun.set()))
        await begun.wait()

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda loop, context: None)
    loop.run_until_complete(abandon())
    tasks = asyncio.all_tasks(loop)
    loop.close()  # and nobody cancelled the task
    with soon():
        assert says_fox(endless)
    for task in tasks:
        task._log_destroy_pending = False
        task.get_coro().close()


# --- deadlines --------------------------------------------------------------------------------------------------------
LATE = LlmCallParams("count", temperature=0, max_tokens=None, timeout_s=0.3)


@pytest.mark.parametrize(
    "ask",
    [
        lambda b: b.call(LATE),
        lambda b: b.stream(LATE, lambda chunk: None),
        lambda b: asyncio.run(b.acall(LATE)),
        lambda b: asyncio.run(b.astream(LATE, lambda chunk: None)),
    ],
)
@pytest.mark.parametrize("where", ["queued", "running"])
def test_a_deadline_ends_a_request_and_the_engine_goes_on(single, ask, where):
    with contextlib.ExitStack() as stack:
        enough = stack.enter_context(busy(single)) if where == "queued" else None
        with soon(), pytest.raises(DeadlineExceeded, match=r"within 0\.3 s; raise timeout") as raised:
            ask(single)
        assert isinstance(raised.value, TimeoutError)
        if enough:
            enough.set()
        with soon():
            assert says_fox(single)


def test_an_embedding_has_a_deadline_too(endless):
    texts = [" one" * 1000] * 500
    with soon(), pytest.raises(DeadlineExceeded):
        endless.embed(texts, timeout_s=0.1)
    with soon(), pytest.raises(DeadlineExceeded):
        asyncio.run(endless.aembed(texts, timeout_s=0.1))
    with soon():
        assert says_fox(endless)


def test_a_request_in_time_has_its_answer(scripted):
    params = LlmCallParams("The", temperature=0, timeout_s=60)
    assert scripted.call(params).content == asyncio.run(scripted.acall(params)).content == FOX


# --- close ------------------------------------------------------------------------------------------------------------
def test_close_ends_what_runs_and_refuses_what_waits(endless_path):
    backend = LocalLlmBackend(endless_path, n_ctx=16000, n_parallel=1)
    begun = threading.Event()
    ended: list[object] = []

    def ask(params: LlmCallParams) -> None:
        try:
            ended.append(backend.stream(params, lambda chunk: begun.set()).finish_reason)
        except EngineClosed as exc:
            ended.append(type(exc))

    threads = [threading.Thread(target=ask, args=(FOR_EVER,))]
    threads[0].start()
    assert begun.wait(SOON_S)
    threads += [threading.Thread(target=ask, args=(THE,)) for _ in range(3)]
    for thread in threads[1:]:
        thread.start()
    while len(backend._open_engine()._waiting) < 3:
        time.sleep(0.01)
    with soon():
        backend.close()
        for thread in threads:
            thread.join()
    assert sorted(map(str, ended)) == sorted(map(str, [EngineClosed] * 3 + ["cancelled"]))


def test_closing_one_backend_does_not_disturb_the_other_users_of_its_model(endless_path):
    with LocalLlmBackend(endless_path, n_ctx=15000) as kept:
        with LocalLlmBackend(endless_path, n_ctx=15000), busy(kept):
            pass
        assert says_fox(kept)


# --- limits -----------------------------------------------------------------------------------------------------------
def test_n_ctx_is_cut_to_what_the_model_was_trained_for_and_says_so(scripted_path, caplog):
    with caplog.at_level(logging.INFO, logger="tea_llm"), LocalLlmBackend(scripted_path, n_ctx=5000) as backend:
        assert backend.n_ctx == 2048
        assert ("tea_llm", logging.WARNING, "n_ctx cut from 5000 to 2048: the model was trained for 2048") in (
            caplog.record_tuples
        )
        assert says_fox(backend)


@pytest.mark.parametrize("n_ctx", [None, 0, 64, 2048])
def test_n_ctx_that_fits_is_kept_in_silence(scripted_path, caplog, n_ctx):
    with caplog.at_level(logging.INFO, logger="tea_llm"), LocalLlmBackend(scripted_path, n_ctx=n_ctx) as backend:
        assert backend.n_ctx == (n_ctx or 2048)
    assert [record for record in caplog.records if record.name == "tea_llm"] == []


def test_n_threads_is_cut_to_the_cpus_and_says_so(scripted_path, caplog):
    n_cpus = len(os.sched_getaffinity(0))
    with LocalLlmBackend(scripted_path, n_threads=n_cpus + 3) as backend:
        assert backend._open_engine().n_threads == n_cpus
        assert caplog.messages == [
            f"n_threads cut from {n_cpus + 3} to {n_cpus}: this process may use no more CPUs",
        ]


def test_a_tiny_model_gets_one_thread_and_a_large_one_a_core_each():
    assert fit_threads(None, 1 << 20) == 1
    assert 1 <= fit_threads(None, 1 << 30) <= len(os.sched_getaffinity(0))
    assert fit_threads(1, 1 << 30) == 1


def test_a_prompt_that_is_too_long_says_both_numbers(scripted):
    n_prompt = 1 + 2100  # BOS and the words
    with pytest.raises(ContextOverflow, match=rf"{n_prompt} tokens.* 2048") as raised:
        scripted.call(LlmCallParams("count" + " one" * 2099, temperature=0))
    assert (raised.value.n_prompt, raised.value.n_ctx) == (n_prompt, 2048)
    assert isinstance(raised.value, BadRequest)
    assert says_fox(scripted)


def test_truncate_keeps_the_end_of_the_prompt_and_room_for_the_answer(scripted):
    params = LlmCallParams("count" + " one" * 3000 + " two", temperature=0, max_tokens=48, truncate=True)
    result = scripted.call(params)
    assert result.content == " three four five one two" * 9 + " three four five"
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (2000, 48)


def test_truncate_leaves_a_prompt_that_fits_alone(scripted):
    assert scripted.call(LlmCallParams("The", temperature=0, truncate=True)).usage.prompt_tokens == 2


def test_a_text_ends_with_length_where_the_context_is_full(scripted_path):
    with LocalLlmBackend(scripted_path, n_ctx=64) as backend:
        result = backend.call(FOR_EVER)
        assert result.finish_reason == "length"
        assert result.usage.total_tokens == backend.n_ctx == 64
        with pytest.raises(ContextOverflow, match=r"101 tokens.* 64"):
            backend.call(LlmCallParams("count" + " one" * 99, temperature=0))


# --- faults -----------------------------------------------------------------------------------------------------------
ASKS = [lambda b, p: b.call(p), lambda b, p: b.stream(p, print), lambda b, p: asyncio.run(b.acall(p))]


@pytest.mark.parametrize("ask", ASKS)
def test_a_fault_of_one_text_is_its_callers_and_no_other_text_ends(endless, ask):
    params = LlmCallParams("x", temperature=0, schema=TOO_WIDE)
    with busy(endless):
        context = endless._open_engine()._text
        with pytest.raises(EngineFault, match="grammar"):
            ask(endless, params)
        assert says_fox(endless)
    assert not context.poisoned
    assert endless._open_engine()._text is context


@pytest.fixture(scope="module")
def learned_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a vector for each of 16 positions. llama.cpp asserts that there is one; so does the engine."""
    return write_random("gpt2", tmp_path_factory.mktemp("learned") / "learned.gguf", n_ctx=16)


@pytest.mark.parametrize("ask", ASKS)
def test_a_poisoned_context_is_replaced_for_the_next_request(learned_path, ask):
    long, short = (LlmCallParams("x", temperature=0, max_tokens=n) for n in (40, 4))
    with LocalLlmBackend(learned_path, n_parallel=8) as backend:
        expected = backend.call(short).content
        engine = backend._open_engine()
        context, engine.n_ctx = engine._text, 100  # now nothing but llama.cpp stops a text that grows too long
        with pytest.raises(EngineFault):
            ask(backend, long)
        assert context.poisoned
        assert backend.call(short).content == expected
        assert engine._text is not context


def test_a_fault_inside_llama_cpp_reaches_all_whom_it_computed_for(learned_path):
    long = LlmCallParams("x", temperature=0, max_tokens=40)
    with LocalLlmBackend(learned_path, n_parallel=8) as backend:
        backend._open_engine().n_ctx = 100

        async def ask_all() -> list[Any]:
            return await asyncio.gather(*(backend.acall(long) for _ in range(6)), return_exceptions=True)

        faults = asyncio.run(ask_all())
        assert [type(fault) for fault in faults] == [EngineFault] * 6
        assert len(set(map(id, faults))) == 6  # each has a traceback of its own


def test_a_request_that_fails_leaves_the_next_one_alone(scripted):
    for params in (LlmCallParams("x", grammar="root ::= ("), LlmCallParams("x " * 5000), LlmCallParams("\0" * 9000)):
        with pytest.raises(BadRequest):
            scripted.call(params)
        assert says_fox(scripted)


def test_a_progress_callback_of_an_embedding_that_raises_reaches_the_caller(scripted):
    def fail(n_done: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        scripted.embed(["x"], on_progress=fail)
    assert says_fox(scripted)


# --- embeddings beside text -------------------------------------------------------------------------------------------
def test_an_embedding_model_is_loaded_when_it_is_needed_and_freed_with_its_backend(shared_models, scripted_path):
    minilm = shared_models / "all-MiniLM-L6-v2-f16.gguf"
    backend = LocalLlmBackend(scripted_path, n_threads=1, embedding_model_path=minilm)
    assert says_fox(backend)
    assert backend._embedding is None
    assert len(backend.embed("x")) == len(asyncio.run(backend.aembed("x"))) == 384
    engine = weakref.ref(backend._embedding._open_engine())
    backend.close()
    gc.collect()
    assert engine() is None
    with pytest.raises(EngineClosed):
        backend.embed("x")


def test_a_missing_embedding_model_is_an_error_of_the_embedding_only(scripted_path, tmp_path):
    with LocalLlmBackend(scripted_path, embedding_model_path=tmp_path / "missing.gguf") as backend:
        for _ in range(2):
            with pytest.raises(ModelNotFound, match=r"missing\.gguf"):
                backend.embed("x")
        assert says_fox(backend)


def test_pooling_is_the_engines(scripted_path):
    with LocalLlmBackend(scripted_path, pooling="cls") as cls, LocalLlmBackend(scripted_path, pooling="last") as last:
        text = "count one two"
        first, *_, end = cls._open_engine().model.tokenize(text)
        vectors = cls.embed(text), last.embed(text)
    assert [max(range(448), key=vector.__getitem__) for vector in vectors] == [first, end]  # one-hot, see make_scripted


def test_an_encoder_that_is_asked_for_text_goes_on_embedding(shared_models):
    with LocalLlmBackend(shared_models / "all-MiniLM-L6-v2-f16.gguf", n_threads=1) as backend:
        with pytest.raises(ModelError, match="encoder"):
            backend.call(THE)
        assert len(backend.embed("x")) == 384


# --- processes --------------------------------------------------------------------------------------------------------
QUIET = os.environ | {"SKBUILD_EDITABLE_VERBOSE": "0"}  # an editable install would say that it rebuilds


def python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    """`code` in a process of its own, warnings as errors."""
    command = [sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning", "-c", code]
    return subprocess.run(
        [*command, *map(str, args)], capture_output=True, text=True, timeout=30, check=False, env=QUIET
    )


INTERRUPTED = """
import asyncio, sys
from tea_llm import LlmCallParams, LocalLlmBackend

path, way = sys.argv[1:]
params = LlmCallParams("count", temperature=0, max_tokens=None)
backend = LocalLlmBackend(path)

def say_begun(chunk, said=[]):
    if not said:
        said.append(print("begun", flush=True))

ways = {
    "call": lambda: (print("begun", flush=True), backend.call(params)),
    "stream": lambda: backend.stream(params, say_begun),
    "astream": lambda: asyncio.run(backend.astream(params, say_begun)),
}
try:
    ways[way]()
except KeyboardInterrupt:
    print(backend.call(LlmCallParams("The", temperature=0)).content, flush=True)
    raise
"""


@pytest.mark.parametrize("way", ["call", "stream", "astream"])
def test_ctrl_c_ends_a_long_text_and_the_program(endless_path, way):
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, endless_path, way],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=QUIET,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.2)
        with soon():
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
    assert out == f"{FOX}\n"
    assert err.splitlines()[-1] == "KeyboardInterrupt"
    assert process.returncode == -signal.SIGINT


IN_FLIGHT = """
import asyncio, sys, threading, time
from tea_llm import LlmCallParams, LocalLlmBackend

path, way = sys.argv[1:]
params = LlmCallParams("count", temperature=0, max_tokens=None)
backend = LocalLlmBackend(path)
begun = threading.Event()
said = lambda chunk: begun.set()
texts = [" one" * 500] * 2000

async def task():
    asyncio.create_task(backend.astream(params, said))
    while not begun.is_set():
        await asyncio.sleep(0.01)

ways = {
    "call": lambda: (begun.set(), backend.call(params)),
    "stream": lambda: backend.stream(params, said),
    "queued": lambda: backend.stream(params, said),
    "embed": lambda: backend.embed(texts, on_progress=said),
    "task": lambda: asyncio.run(task()),
}
def quietly():
    try:
        ways[way]()
    except Exception as exc:
        if type(exc).__name__ not in ("EngineClosed", "Cancelled"):
            raise
for _ in range(4 if way == "queued" else 1):
    threading.Thread(target=quietly, daemon=True).start()
begun.wait()
time.sleep(0.2)
print("end of the program")
"""


@pytest.mark.parametrize("way", ["call", "stream", "queued", "embed", "task"])
def test_a_program_ends_cleanly_with_requests_in_flight(endless_path, way):
    with soon():
        done = python(IN_FLIGHT, endless_path, way)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "end of the program\n")


FORKED = """
import os, sys
from tea_llm import EngineClosed, LlmCallParams, LocalLlmBackend

path = sys.argv[1]
the = LlmCallParams("The", temperature=0)
backend = LocalLlmBackend(path)
assert backend.call(the).content
if child := os.fork():
    status = os.waitpid(child, 0)[1]
    print(status, backend.call(the).content)
else:
    for use in (lambda: backend.call(the), lambda: backend.embed("x")):
        try:
            use()
        except EngineClosed as exc:
            print(exc)
    with LocalLlmBackend(path) as own:
        print(own.call(the).content, len(own.embed("x")))
    backend.close()
    sys.exit(0)  # the child's own end, with all that runs at exit
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork()")
def test_a_child_process_is_told_to_make_a_backend_of_its_own_and_can(scripted_path):
    done = python(FORKED, scripted_path)
    first, second, own, parent = done.stdout.splitlines()
    assert first == second
    assert "before fork()" in first
    assert "make the backend in this process" in first
    assert own == f"{FOX} 448"
    assert (parent, done.returncode, done.stderr) == (f"0 {FOX}", 0, "")
