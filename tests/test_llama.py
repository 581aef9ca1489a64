"""The native handles: how long they live, who may use them, and how llama.cpp's failures reach Python."""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from tea_llm.errors import (
    BadRequest,
    Cancelled,
    ContextOverflow,
    EngineClosed,
    EngineError,
    EngineFault,
    GrammarError,
    ModelError,
    ModelLoadError,
    ModelNotFound,
)

pytest.importorskip("tea_llm._llama", reason="tea_llm was built without llama.cpp")
from tea_llm._llama import Context, Generation, Grammar, Loading, Model, Sampler

from .generating import TOO_WIDE
from .random_models import write_random

FOX = " quick brown fox jumps over a lazy dog."


@pytest.fixture(scope="module")
def scripted_path(shared_models) -> Path:
    return shared_models / "scripted-f16.gguf"


@pytest.fixture(scope="module")
def model(scripted_path) -> Model:
    """Says " quick brown fox …" after "The", and " one two three …" for ever after "count"."""
    return Model(scripted_path)


@pytest.fixture(scope="module")
def embedder(shared_models) -> Model:
    return Model(shared_models / "all-MiniLM-L6-v2-f16.gguf")


def greedy(context: Context, text: str, **options) -> Generation:
    model = context.model
    return Generation(context, Sampler(model, temperature=0), model.tokenize(text), **options)


def says_fox(model: Model) -> bool:
    return greedy(Context(model), "The").run() == FOX


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# --- after close ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "use",
    [
        lambda m: m.metadata,
        lambda m: m.description,
        lambda m: m.n_ctx_train,
        lambda m: m.n_embd,
        lambda m: m.n_layer,
        lambda m: m.n_head_kv,
        lambda m: m.n_params,
        lambda m: m.size_bytes,
        lambda m: m.has_encoder,
        lambda m: m.has_decoder,
        lambda m: m.chat_template,
        lambda m: m.apply_chat_template([]),
        lambda m: (m.bos, m.eos),
        lambda m: m.eot,
        lambda m: m.add_bos,
        lambda m: m.is_eog(1),
        lambda m: m.is_control(1),
        lambda m: m.tokenize("x"),
        lambda m: m.detokenize([1]),
        lambda m: m.piece(1),
        Context,
        Sampler,
    ],
)
def test_a_model_that_was_never_loaded_is_closed(use):
    with pytest.raises(EngineClosed):
        use(Model.__new__(Model))


def test_a_closed_context_refuses_every_use(model):
    context = Context(model)
    begun, unbegun = greedy(context, "count"), greedy(context, "The")
    assert begun.run(stream=True) == " one"
    context.close()
    assert context.closed
    context.cancel()
    for use in (
        begun.run,
        unbegun.run,
        lambda: greedy(context, "The"),
        lambda: context.embed([[1]]),
        lambda: context.pooling,
    ):
        with pytest.raises(EngineClosed, match="make a new one"):
            use()
    assert "closed" in repr(context)


def test_an_unmade_context_is_a_closed_one():
    context = Context.__new__(Context)
    context.close()
    context.cancel()
    assert (context.closed, context.poisoned) == (True, False)
    assert "closed" in repr(context)
    with pytest.raises(EngineClosed):
        context.embed([[1]])


def test_an_unmade_sampler_is_refused(model):
    unmade = Sampler.__new__(Sampler)
    unmade.reset()
    with pytest.raises(BadRequest):
        Generation(Context(model), unmade, [1])


def test_an_ended_generation_gives_none_again_and_again(model):
    generation = greedy(Context(model), "The")
    assert [generation.run() for _ in range(3)] == [FOX, None, None]
    assert generation.finish_reason == "stop"
    generation.context.close()
    assert generation.run() is None


def test_an_unmade_generation_is_closed():
    generation = Generation.__new__(Generation)
    assert "never made" in repr(generation)
    for use in (
        generation.run,
        generation.cancel,
        lambda: generation.ended,
        lambda: generation.error,
        lambda: generation.finish_reason,
        lambda: (generation.n_prompt, generation.n_generated),
        lambda: generation.n_cached,
        lambda: generation.queue_s,
        lambda: generation.prompt_s,
        lambda: generation.generation_s,
    ):
        with pytest.raises(EngineClosed, match="never made"):
            use()


def test_a_finished_load_can_not_be_cancelled_any_more(scripted_path):
    loading = Loading()
    model = Model(scripted_path, loading=loading)
    assert loading.fraction == 1.0
    loading.cancel()
    assert says_fox(model)


# --- closed, made or cancelled twice ----------------------------------------------------------------------------------
def test_a_context_may_be_closed_twice(model):
    context = Context(model)
    context.close()
    context.close()


def test_no_handle_is_made_twice(model, scripted_path):
    context, sampler = Context(model), Sampler(model, temperature=0)
    generation = Generation(context, sampler, model.tokenize("The"))
    for again in (
        lambda: model.__init__(scripted_path),
        lambda: context.__init__(model),
        lambda: sampler.__init__(model),
        lambda: generation.__init__(context, sampler, [1]),
    ):
        with pytest.raises(EngineError, match="make a new one"):
            again()
    assert generation.run() == FOX


def test_cancelling_twice_is_cancelling(model, scripted_path):
    generation, loading = greedy(Context(model), "count"), Loading()
    for _ in range(2):
        generation.cancel()
        loading.cancel()
    assert generation.run() is None
    assert generation.finish_reason == "cancelled"
    with pytest.raises(Cancelled):
        Model(scripted_path, loading=loading)


# --- parent dropped first ---------------------------------------------------------------------------------------------
def test_a_context_outlives_its_model_reference(scripted_path):
    context = Context(Model(scripted_path))
    gc.collect()
    assert greedy(context, "The").run() == FOX


def test_a_sampler_outlives_its_model_reference(scripted_path):
    model = Model(scripted_path)
    sampler = Sampler(model, temperature=0, grammar='root ::= " one" " two"', dry_multiplier=1.0)
    context, prompt = Context(model), model.tokenize("count")
    del model
    gc.collect()
    assert Generation(context, sampler, prompt).run() == " one two"


def test_a_generation_outlives_its_context_and_sampler_references(scripted_path):
    model = Model(scripted_path)
    generation = Generation(Context(model), Sampler(model, temperature=0), model.tokenize("The"))
    del model
    gc.collect()
    assert generation.run(stream=True) == " quick"
    gc.collect()
    assert generation.run() == FOX.removeprefix(" quick")


def test_a_model_outlives_its_loading(scripted_path):
    model = Model(scripted_path, loading=Loading())
    gc.collect()
    assert says_fox(model)


# --- in a cycle, then collected ---------------------------------------------------------------------------------------
class CyclicModel(Model):
    pass


class CyclicContext(Context):
    pass


class CyclicSampler(Sampler):
    pass


class CyclicGeneration(Generation):
    pass


class CyclicLoading(Loading):
    pass


def test_every_handle_in_one_cycle_is_collected(scripted_path):
    loading = CyclicLoading()
    model = CyclicModel(scripted_path, loading=loading)
    context = CyclicContext(model)
    sampler = CyclicSampler(model, temperature=0)
    generation = CyclicGeneration(context, sampler, model.tokenize("count"))
    assert generation.run(stream=True) == " one"
    handles = [loading, model, context, sampler, generation]
    for handle in handles:
        handle.all = handles
    gone = [weakref.ref(handle) for handle in handles]
    del handle, handles, loading, model, context, sampler, generation
    gc.collect()
    assert [ref() for ref in gone] == [None] * 5


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc to read the resident memory")
def test_what_a_collected_handle_held_is_freed(scripted_path):
    def cycle() -> None:
        model = CyclicModel(scripted_path, use_mmap=False)
        context = CyclicContext(model, n_ctx=2048)
        model.context, context.itself = context, context
        assert greedy(context, "The", max_tokens=2).run() == " quick brown"

    for _ in range(5):
        cycle()
        gc.collect()
    before = resident_bytes()
    for _ in range(40):
        cycle()
        gc.collect()
    # one model and its context are 5 MB and more: 40 that stay would be 200
    assert resident_bytes() - before < 50e6


# --- from a second thread at once -------------------------------------------------------------------------------------
def refusals_while(work: Callable[[], object], second: Callable[[], object]) -> set[str]:
    """The messages that `second` is refused with while `work` computes on a thread of its own."""
    refused: set[str] = set()
    worker = threading.Thread(target=work)
    worker.start()
    while worker.is_alive():
        try:
            second()
        except EngineError as exc:
            refused.add(str(exc).split(";")[0])
    worker.join()
    return refused


def test_a_context_has_one_owner_at_a_time(model):
    context = Context(model, n_ctx=4096)
    first = greedy(context, "count")
    spoken: list[str] = []
    second = greedy(context, "The", max_tokens=1)
    assert refusals_while(lambda: spoken.append(first.run()), first.run) == {
        "this Context is computing on another thread"
    }
    assert spoken[0].startswith(" one two three four five one")
    assert first.n_generated > 4000
    assert second.run() == " quick"


def test_a_context_that_computes_is_not_closed(model):
    context = Context(model, n_ctx=4096)
    generation = greedy(context, "count")
    assert refusals_while(generation.run, lambda: context.close() if generation.n_generated else None) == {
        "this Context is computing on another thread"
    }
    assert generation.n_generated > 4000


def test_an_embedding_context_has_one_owner_at_a_time(embedder):
    context = Context(embedder, embeddings=True, n_seq_max=64)
    batch = [[101, *range(2000, 2006), 102]] * 64
    assert refusals_while(lambda: context.embed(batch), lambda: context.embed([[101, 102]])) == {
        "this Context is computing on another thread"
    }


def test_a_sampler_has_one_user_at_a_time(model):
    sampler = Sampler(model, temperature=0, grammar="root ::= [a-z ]+")
    one, two = Context(model), Context(model)
    prompt = model.tokenize("count")
    first = Generation(one, sampler, prompt, max_tokens=1500)
    refused = refusals_while(first.run, sampler.reset)
    assert refused == {"this Sampler is in use on another thread"}
    assert Generation(two, Sampler(model, temperature=0), prompt, max_tokens=2).run() == " one two"


def test_a_model_is_read_by_many_threads_at_once(model):
    texts = ["The quick brown fox", "count one two", "Hello from the scripted model!"] * 50
    expected = [model.tokenize(text) for text in texts]
    found: dict[int, list[list[int]]] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: [model.tokenize(text) for text in texts]}))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == [expected] * 4


def test_a_generation_keeps_the_only_sequence_until_it_ends(model):
    context = Context(model)
    first, second = greedy(context, "count", max_tokens=2), greedy(context, "The")
    assert first.run(stream=True) == " one"
    with pytest.raises(EngineError, match="other generations hold all 1 sequences of this Context; raise n_seq_max"):
        second.run()
    assert first.run() == " two"
    assert second.run() == FOX


# --- after fork() -----------------------------------------------------------------------------------------------------
AFTER_FORK = """
import gc, os, sys
import tea_llm
from tea_llm._llama import Context, Generation, Model, Sampler

path = sys.argv[1]
model = Model(path)
context, vectors = Context(model, n_threads=2), Context(model, embeddings=True, pooling="mean")
sampler = Sampler(model, temperature=0)
prompt = model.tokenize("The")
generation = Generation(context, sampler, prompt)
assert generation.run(stream=True) == " quick"
backend = tea_llm.LocalLlmBackend(path)
child = os.fork()
if child == 0:
    uses = {
        "model": lambda: model.tokenize("x"),
        "metadata": lambda: model.metadata,
        "context": lambda: Context(model),
        "sampler": lambda: Sampler(model),
        "begun": generation.run,
        "new": lambda: Generation(context, sampler, prompt),
        "embed": lambda: vectors.embed([[1]]),
        "backend": lambda: backend.call(tea_llm.LlmCallParams("The")),
        "backend embed": lambda: backend.embed("The"),
    }
    for name, use in uses.items():
        try:
            use()
        except tea_llm.LlmError as exc:
            print(name, type(exc).__name__, "fork" in str(exc))
    context.close()
    fresh = Model(path)
    print(Generation(Context(fresh), Sampler(fresh, temperature=0), prompt).run())
    backend.close()
    del uses, use, model, context, vectors, sampler, generation, fresh
    gc.collect()
    sys.stdout.flush()
    os._exit(0)
print("child", os.waitpid(child, 0)[1])
print("parent", generation.run(), backend.call(tea_llm.LlmCallParams("The")).content)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork()")
def test_every_handle_refuses_a_child_process_and_serves_its_parent_on(scripted_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", AFTER_FORK, scripted_path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if " " in line][-12:]
    names = ["model", "metadata", "context", "sampler", "begun", "new", "embed", "backend", "backend embed"]
    assert lines == [
        *(f"{name} EngineClosed True" for name in names),
        FOX,
        "child 0",
        f"parent {FOX.removeprefix(' quick')} {FOX}",
    ], done.stderr
    assert done.returncode == 0


# --- loading ----------------------------------------------------------------------------------------------------------
def test_a_load_is_cancelled_from_another_thread(shared_models):
    loading = Loading()

    def cancel_once_begun() -> None:
        while loading.fraction == 0:
            time.sleep(0)
        loading.cancel()

    def load_again_and_again() -> None:  # so that the watcher's turn comes in the middle of one
        while True:
            Model(shared_models / "all-MiniLM-L6-v2-f16.gguf", use_mmap=False, loading=loading)

    watcher = threading.Thread(target=cancel_once_begun)
    watcher.start()
    try:
        with pytest.raises(Cancelled, match="was cancelled"):
            load_again_and_again()
    finally:
        loading.cancel()
        watcher.join()
    assert loading.cancelled


def test_a_missing_file_is_not_found(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path / "a" / "b.gguf", "nul\0.gguf", ""):
        with pytest.raises(ModelNotFound) as found:
            Model(path)
        assert isinstance(found.value, FileNotFoundError)


def test_what_is_no_regular_file_is_refused_without_opening_it(tmp_path):
    fifo = tmp_path / "fifo.gguf"
    os.mkfifo(fifo)
    for path in (tmp_path, fifo, "/dev/null"):
        with pytest.raises(ModelLoadError, match="not a regular file"):
            Model(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"This is a text file, not a model.", "invalid magic characters: 'This', expected 'GGUF'"),
        (b"", "failed to read magic"),
        (b"GGUF", "failed to read header"),
        (b"GGUF\x63\0\0\0" + bytes(64), "version 99"),
    ],
)
def test_a_file_that_is_no_gguf_is_refused_in_llama_cpps_words(tmp_path, content, words):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError) as refused:
        Model(path)
    assert words in str(refused.value)
    assert str(path) in str(refused.value)
    assert isinstance(refused.value, RuntimeError)


@pytest.mark.parametrize(
    ("n_bytes", "words"), [(100, "failed to read key-value pairs"), (-1, "data is not within the file bounds")]
)
def test_a_truncated_file_is_refused_in_llama_cpps_words(shared_models, tmp_path, n_bytes, words):
    path = tmp_path / "cut.gguf"
    path.write_bytes((shared_models / "stories260K-f32.gguf").read_bytes()[:n_bytes])
    with pytest.raises(ModelLoadError, match=words):
        Model(path)


def test_one_failure_does_not_tell_the_words_of_another(tmp_path, scripted_path):
    (tmp_path / "bad.gguf").write_bytes(b"nothing")
    (tmp_path / "cut.gguf").write_bytes(scripted_path.read_bytes()[:-1])
    with pytest.raises(ModelLoadError, match="invalid magic"):
        Model(tmp_path / "bad.gguf")
    with pytest.raises(ModelLoadError) as cut:
        Model(tmp_path / "cut.gguf")
    assert "magic" not in str(cut.value)


def test_a_vocabulary_alone_tokenizes_and_refuses_to_compute(scripted_path):
    model = Model(scripted_path, vocab_only=True)
    assert model.detokenize(model.tokenize("count"), remove_special=True).strip() == "count"
    assert (model.n_layer, model.n_head_kv) == (0, 0)
    with pytest.raises(BadRequest, match="vocab_only"):
        Context(model)
    with pytest.raises(BadRequest, match="vocab_only"):
        Context(model, embeddings=True, pooling="mean")


# --- what llama.cpp says ----------------------------------------------------------------------------------------------
def test_nothing_is_written_to_the_terminal(shared_models, tmp_path, capfd):
    (tmp_path / "bad.gguf").write_bytes(b"nothing")
    with pytest.raises(ModelLoadError):
        Model(tmp_path / "bad.gguf")
    model = Model(shared_models / "stories260K-chat-q8_0.gguf")
    with pytest.raises(GrammarError):
        Sampler(model, grammar="root ::= (")
    with Path(os.devnull).open("w") as nowhere:
        print(model.apply_chat_template([{"role": "user", "content": "Hello!"}]).text, file=nowhere)
    context = Context(model)
    sampler = Sampler(model, seed=1, dry_multiplier=1.0, mirostat=2, grammar="root ::= [a-z ]+")
    assert Generation(context, sampler, model.tokenize("Once"), max_tokens=20).run()
    vectors = Context(model, embeddings=True, pooling="mean")
    vectors.embed([[1, 2, 3]])
    del context, vectors
    assert capfd.readouterr() == ("", "")


def test_llama_cpps_log_reaches_logging_when_somebody_listens(scripted_path, caplog, capfd):
    said = {}
    for level in (logging.DEBUG, logging.INFO, logging.WARNING):
        caplog.set_level(level, logger="tea_llm.llama")
        caplog.clear()
        Context(Model(scripted_path), n_ctx=4096)
        said[level] = [(r.levelno, r.getMessage()) for r in caplog.records if r.name == "tea_llm.llama"]
    details, hints = said[logging.DEBUG], said[logging.INFO]
    assert any("general.name" in text for _, text in details)
    assert {level for level, _ in details} == {logging.DEBUG, logging.INFO}
    # a warning of llama.cpp's; INFO, so that it is not on stderr where logging was never set up
    assert [level for level, text in hints if "training context overflow" in text] == [logging.INFO]
    assert said[logging.WARNING] == []
    assert capfd.readouterr() == ("", "")


# --- failures inside llama.cpp ----------------------------------------------------------------------------------------
def test_an_assert_inside_llama_cpp_poisons_the_context_and_spares_the_model(embedder, capfd):
    # An encoder asserts n_ubatch >= n_tokens (llama-context.cpp, encode). n_ubatch is ours to set in this test only.
    context = Context(embedder, embeddings=True, n_ubatch=8)
    with pytest.raises(EngineFault, match="encoder requires n_ubatch >= n_tokens"):
        context.embed([[101, *range(2000, 2020), 102]])
    assert context.poisoned
    with pytest.raises(EngineClosed, match="failed inside this Context"):
        context.embed([[101, 102]])
    context.close()
    assert len(Context(embedder, embeddings=True).embed([[101, 102]]).tolist()[0]) == 384
    assert capfd.readouterr().err == ""


def test_an_assert_in_the_middle_of_a_text_poisons_its_context_and_spares_the_model(tmp_path):
    # The model has learned 16 positions, and llama.cpp's get_rows asserts that there is one. n_ctx is ours to set here.
    model = Model(write_random("gpt2", tmp_path / "learned.gguf", n_ctx=16))
    context = Context(model, n_ctx=64, n_seq_max=2)
    short, long = (Generation(context, Sampler(model, temperature=0), [5], max_tokens=n) for n in (4, 40))
    expected = short.run()
    with pytest.raises(EngineFault):
        long.run()
    assert context.poisoned
    assert (long.ended, long.finish_reason) == (False, None)
    for use in (long.run, lambda: Generation(context, Sampler(model), [5])):
        with pytest.raises(EngineClosed, match="failed inside this Context"):
            use()
    context.close()
    assert Generation(Context(model), Sampler(model, temperature=0), [5], max_tokens=4).run() == expected


def test_an_exception_of_a_sampler_ends_its_text_and_no_other(model):
    sampler = Sampler(model, temperature=0, grammar=Grammar(model, "json_schema", json.dumps(TOO_WIDE)))
    context = Context(model, n_seq_max=2)
    failing, other = Generation(context, sampler, [1]), greedy(context, "The")
    news = context.run([failing, other])
    assert news == [(failing, "")]
    assert (failing.ended, failing.finish_reason) == (True, None)
    assert isinstance(failing.error, EngineFault)
    for _ in range(2):
        with pytest.raises(EngineFault, match="gave up on the grammar"):
            failing.run()
    assert not context.poisoned
    assert other.run() == FOX
    assert other.error is None


# --- what is refused before llama.cpp sees it -------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ("not a grammar", "expecting ::="),
        ("root ::= (", "unexpected end of input|expecting"),
        ('root ::= "a', "unexpected end of input"),
        ("root ::= [a", "unexpected end of input|expecting"),
        ('root ::= "a" | missing', "there is no rule missing"),
        ('other ::= "a"', "does not contain a 'root' symbol"),
        ('root ::= root "a"', "left recursion"),
        ('root ::= "\\q"', "unknown escape"),
        ('root ::= "a"{5,', "expecting"),
        ('root ::= "a"\0', "NUL"),
        ("root ::= " + "(" * 100_000, "more than 1000 nested parentheses"),
        ("".join(f"r{i} ::= r{i + 1}\n" for i in range(200_000)), "more than 20000 rules"),
    ],
    ids=range(12),
)
def test_a_bad_grammar_is_refused_in_llama_cpps_words(model, capfd, grammar, words):
    with pytest.raises(GrammarError, match=words) as refused:
        Sampler(model, grammar=grammar)
    assert isinstance(refused.value, ValueError)
    assert capfd.readouterr().err == ""
    assert says_fox(model)


def test_brackets_in_literals_and_comments_are_not_nesting(model):
    literal = " | ".join(['"("', "[(]", '"\\"("', "[\\](]"] * 600)
    grammar = f'# {"(" * 2000}\nroot ::= word # {"(" * 2000}\nword ::= " one" | {literal}\n'
    sampler = Sampler(model, temperature=0, grammar=grammar)
    assert Generation(Context(model), sampler, model.tokenize("count"), max_tokens=1).run() == " one"


@pytest.mark.parametrize("token", [-1, 448, 2**31, 2**40, -(2**40), 2**70])
def test_a_token_that_is_not_in_the_vocabulary_is_refused(model, token):
    context, vectors = Context(model), Context(model, embeddings=True, pooling="mean")
    for use in (
        lambda: model.detokenize([1, token]),
        lambda: model.piece(token),
        lambda: model.is_eog(token),
        lambda: model.is_control(token),
        lambda: Sampler(model, logit_bias={token: 1.0}),
        lambda: Generation(context, Sampler(model), [1, token]),
        lambda: vectors.embed([[1, token]]),
    ):
        with pytest.raises(BadRequest, match=f"token {token} is not in the vocabulary; ids go from 0 to 447"):
            use()


@pytest.mark.parametrize(
    "options",
    [
        {"n_ctx": -1},
        {"n_batch": 0},
        {"n_batch": 8, "n_ubatch": 9},
        {"n_seq_max": 0},
        {"n_seq_max": 1000},
        {"n_threads": 0},
        {"n_threads": 100_000},
        {"embeddings": True, "pooling": "average"},
        {"embeddings": True, "pooling": "none"},
        {"embeddings": True, "pooling": "rank"},
    ],
)
def test_a_context_of_sizes_llama_cpp_can_not_take_is_refused(model, options):
    with pytest.raises(BadRequest):
        Context(model, **options)


def test_a_batch_that_does_not_fit_is_refused(model):
    context = Context(model, embeddings=True, pooling="mean", n_batch=8, n_seq_max=2)
    for texts in ([[5] * 9], [[5]] * 3, [[]], [[5], []]):
        with pytest.raises(BadRequest):
            context.embed(texts)
    assert context.embed([[5], [6]]).shape == (2, 448)
    assert not context.poisoned


def test_a_context_is_for_text_or_for_vectors(model, embedder):
    with pytest.raises(BadRequest, match="embeddings=True"):
        Context(model).embed([[1]])
    with pytest.raises(BadRequest, match="computes embeddings"):
        greedy(Context(model, embeddings=True, pooling="mean"), "The")
    with pytest.raises(ModelError, match="encoder"):
        Context(embedder)


def test_a_prompt_that_does_not_fit_says_both_numbers(model):
    context = Context(model, n_ctx=256)
    assert context.n_ctx == 256
    with pytest.raises(ContextOverflow, match=r"300 tokens.* 256") as refused:
        Generation(context, Sampler(model), [5] * 300)
    assert (refused.value.n_prompt, refused.value.n_ctx) == (300, 256)
    last = Generation(context, Sampler(model, temperature=0), [*([5] * 254), *model.tokenize("count")[-1:]])
    assert last.run() == " one"
    assert last.finish_reason == "length"


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m.tokenize("\ud800"),
        lambda m: Sampler(m, grammar="\ud800"),
        lambda m: Sampler(m, dry_multiplier=1.0, dry_sequence_breakers=["\ud800"]),
        lambda m: greedy(Context(m), "The", stop=["\ud800"]),
        lambda m: greedy(Context(m), "The", stop=[""]),
        lambda m: Generation(Context(m), Sampler(m), []),
    ],
)
def test_text_that_is_none_is_refused(model, use):
    with pytest.raises(BadRequest):
        use(model)


def test_a_sampler_of_another_model_is_refused(model, scripted_path):
    with pytest.raises(BadRequest, match="another Model"):
        Generation(Context(model), Sampler(Model(scripted_path)), [1])


# --- cancel -----------------------------------------------------------------------------------------------------------
def test_cancel_ends_a_long_generation_soon(model):
    generation = greedy(Context(model, n_ctx=16384), "count")  # 17 seconds where it was measured
    threading.Timer(0.2, generation.cancel).start()
    begun = time.monotonic()
    text = generation.run()
    assert time.monotonic() - begun < 5
    assert generation.finish_reason == "cancelled"
    assert text is not None
    assert text.startswith(" one two three four five one")
    assert 0 < generation.n_generated < 16000
    assert generation.run() is None


def test_cancel_ends_a_long_prompt_soon(shared_models):
    model = Model(shared_models / "stories260K-f32.gguf")
    context = Context(model, n_ctx=32768, n_batch=4096)
    generation = Generation(context, Sampler(model, temperature=0), [1] + [300] * 30000, max_tokens=1)
    threading.Timer(0.2, generation.cancel).start()
    begun = time.monotonic()
    assert generation.run() is None
    assert time.monotonic() - begun < 5
    assert (generation.finish_reason, generation.n_generated) == ("cancelled", 0)
    prompt = model.tokenize("Once upon a time")
    again = Generation(context, Sampler(model, temperature=0), prompt, max_tokens=4)
    assert again.run() == ", there was a"


def test_cancel_ends_an_embedding(embedder):
    context = Context(embedder, embeddings=True, n_batch=512, n_seq_max=64)
    batch = [[101, *range(2000, 2006), 102]] * 64
    ended = threading.Event()

    def keep_cancelling() -> None:
        while not ended.wait(0.001):
            context.cancel()

    thread = threading.Thread(target=keep_cancelling)
    thread.start()
    try:
        with pytest.raises(Cancelled):
            context.embed(batch)
    finally:
        ended.set()
        thread.join()
    assert context.embed([[101, 102]]).shape == (1, 384)
