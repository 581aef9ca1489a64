"""What was computed once is found again by its tokens, and never changes a text."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence

import pytest

pytest.importorskip("tea_llm._llama", reason="tea_llm was built without llama.cpp")
from tea_llm._llama import Context, Generation, Model, Sampler

from .random_models import N_VOCAB, write_random

SYSTEM = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her dog. "
"""About forty tokens of the stories model."""


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Every other layer sees the last 16 tokens only."""
    return Model(write_random("gemma2", tmp_path_factory.mktemp("windowed") / "windowed.gguf", n_window=16))


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(write_random("mamba", tmp_path_factory.mktemp("recurrent") / "recurrent.gguf"))


def generation(context: Context, prompt: Sequence[int] | str, max_tokens: int = 8, **options) -> Generation:
    model = context.model
    tokens = model.tokenize(prompt) if isinstance(prompt, str) else prompt
    return Generation(context, Sampler(model, temperature=0), tokens, max_tokens=max_tokens, **options)


def cached(context: Context, prompt: Sequence[int] | str, max_tokens: int = 8) -> int:
    """Tokens of the prompt that were found; the text is what it is without reuse."""
    asked = generation(context, prompt, max_tokens)
    text = asked.run()
    assert text == generation(Context(context.model, n_ctx=context.n_ctx, reuse=False), prompt, max_tokens).run()
    return asked.n_cached


def some_tokens(seed: int, n: int, n_vocab: int = 500) -> list[int]:
    """A text like no other: tokens drawn at random, but for those that end one."""
    return random.Random(seed).choices(range(260, n_vocab), k=n)


# --- found again ------------------------------------------------------------------------------------------------------
def test_a_prompt_asked_twice_is_computed_once_but_for_its_last_token(stories):
    context = Context(stories, n_seq_max=2)
    assert cached(context, SYSTEM) == 0
    n_prompt = len(stories.tokenize(SYSTEM))
    assert [cached(context, SYSTEM) for _ in range(3)] == [n_prompt - 1] * 3


def test_a_shared_beginning_is_found_up_to_where_the_prompts_differ(stories):
    context = Context(stories, n_seq_max=2)
    begin = [1, *some_tokens(0, 50)]
    assert cached(context, [*begin, 300, 301]) == 0
    assert cached(context, [*begin, 400, 401]) == len(begin)
    assert cached(context, [*begin[:20], 402]) == 20
    assert cached(context, [2, *begin]) == 0


def test_a_conversation_is_computed_from_its_last_answer_on(shared_models):
    model = Model(shared_models / "stories260K-chat-q8_0.gguf")
    context = Context(model, n_seq_max=2)
    messages = [{"role": "user", "content": "Hello!"}]
    known = 0
    for answer in ("Tell me a story.", "Who are you?", "Thank you!"):
        prompt = model.tokenize(model.apply_chat_template(messages).text, parse_special=True)
        turn = generation(context, prompt, 24)
        text = turn.run()
        assert turn.n_cached >= known
        # the end of a text is no part of it, and its last token was never computed
        known = turn.n_prompt + turn.n_generated - 1
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": answer}]
    assert known > 60
    assert context.n_kept == 1  # each turn goes on from the one before, and replaces it


@pytest.mark.parametrize("n_batch", [32, 512])
def test_a_beginning_that_many_share_is_computed_once_for_all_of_them(stories, n_batch):
    context = Context(stories, n_ctx=2048, n_batch=n_batch, n_seq_max=8)
    begin = [1, *some_tokens(1, 120)]
    prompts = [[*begin, *some_tokens(n, 10)] for n in range(10, 18)]
    generations = [generation(context, prompt, 12) for prompt in prompts]
    texts = dict.fromkeys(generations, "")
    while running := [g for g in generations if not g.ended]:
        for g, text in context.run(running):
            texts[g] += text
    assert sum(g.n_prompt - g.n_cached for g in generations) == len(begin) + 8 * 10
    expected = [generation(Context(stories, reuse=False), prompt, 12).run() for prompt in prompts]
    assert [texts[g] for g in generations] == expected


def test_a_text_that_still_runs_shares_its_beginning(stories):
    context = Context(stories, n_ctx=1024, n_seq_max=2)
    begin = [1, *some_tokens(2, 60)]
    running = generation(context, [*begin, 300], 200)
    running.run(stream=True)
    second = generation(context, [*begin, 301], 8)
    texts = {running: "", second: ""}
    while not second.ended:
        for g, text in context.run([running, second]):
            texts[g] += text
    assert second.n_cached == len(begin)
    assert texts[second] == generation(Context(stories, reuse=False), [*begin, 301], 8).run()


def test_what_a_cancelled_text_computed_is_found(stories):
    context = Context(stories, n_batch=32)
    prompt = [1, *some_tokens(3, 200)]
    first = generation(context, prompt)
    for _ in range(3):
        context.wake()
        context.run([first])
    first.cancel()
    assert (first.run(), first.finish_reason) == (None, "cancelled")
    assert cached(context, prompt) == 96


def test_what_was_computed_of_a_batch_that_was_cut_short_is_found(stories):
    context = Context(stories, n_ctx=8192, n_batch=8000, n_ubatch=32)
    prompt = [1, *some_tokens(4, 7900)]
    first = generation(context, prompt)
    threading.Timer(0.05, first.cancel).start()  # the whole takes some tenths of a second
    assert (first.run(), first.finish_reason) == (None, "cancelled")
    assert 0 < cached(context, prompt) < len(prompt) - 1


def test_a_text_that_goes_on_from_another_replaces_it(stories):
    context = Context(stories, n_seq_max=4)
    short, long = generation(context, SYSTEM, 4, stream=True), generation(context, SYSTEM, 30, stream=True)
    while not short.ended:
        context.run([short, long])
    assert context.n_kept == 1
    long.run()
    assert context.n_kept == 1
    assert cached(context, SYSTEM, 40) == long.n_prompt - 1


def test_a_text_of_a_few_tokens_is_not_kept(stories):
    context = Context(stories, n_seq_max=4)
    assert cached(context, [1, 300, 301], 4) == 0
    assert context.n_kept == 0
    assert cached(context, [1, 300, 301], 20) == 0
    assert context.n_kept == 1


def test_without_reuse_nothing_is_kept(stories):
    context = Context(stories, n_seq_max=4, n_host_max=1 << 20, reuse=False)
    assert [cached(context, SYSTEM) for _ in range(2)] == [0, 0]
    assert (context.n_kept, context.n_host_bytes) == (0, 0)
    both = [generation(context, SYSTEM, 20) for _ in range(2)]
    while running := [g for g in both if not g.ended]:
        context.run(running)
    assert [g.n_cached for g in both] == [0, 0]


# --- with and without, the same texts ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_seq_max": 12, "n_kept_max": 64},
        {"n_kept_max": 64, "n_host_max": 1 << 18},
        {"n_ctx": 256, "n_host_max": 1 << 20},
        {"n_ctx": 256, "n_batch": 5},
    ],
    ids=str,
)
def test_texts_with_and_without_reuse_are_the_same(stories, options):
    options = {"n_ctx": 1024, "n_seq_max": 4, "n_batch": 32} | options
    plain = Context(stories, n_ctx=options["n_ctx"], reuse=False)
    context = Context(stories, **options)
    draw = random.Random(0)
    begins = [[1, *some_tokens(n, 30 + 10 * n)] for n in range(5)]
    running: dict[Generation, list[int]] = {}
    texts: dict[Generation, str] = {}
    n_cached = n_done = 0
    while n_done < 60 or running:
        if len(running) < 4 and n_done + len(running) < 60:
            begin = draw.choice(begins)
            prompt = begin[: draw.randint(10, len(begin))] + some_tokens(draw.randint(0, 3), draw.randint(1, 20))
            asked = generation(context, prompt, draw.randint(1, 40), stream=True)
            running[asked], texts[asked] = prompt, ""
        if draw.random() < 0.03:
            draw.choice(list(running)).cancel()
        for g, text in context.run(running):
            texts[g] += text
            if g.ended:
                prompt, n_done, n_cached = running.pop(g), n_done + 1, n_cached + g.n_cached
                alone = generation(plain, prompt, g.n_generated).run() or ""
                assert texts[g] == alone, (len(prompt), g)
    assert n_cached > 500


# --- room -------------------------------------------------------------------------------------------------------------
A, B, C, D = (some_tokens(n, 101) for n in range(20, 24))


def test_of_kept_texts_the_least_recently_used_goes_first(stories):
    context = Context(stories, n_seq_max=8, n_kept_max=350)
    for prompt in (A, B, C):
        assert cached(context, prompt) == 0
    assert context.n_kept == 3
    assert cached(context, A) == 100  # used again, so that B is the oldest
    assert cached(context, D) == 0  # and goes for D
    assert context.n_kept == 3
    assert [cached(context, prompt) for prompt in (A, C, D)] == [100] * 3
    assert cached(context, B) == 0


def test_a_text_longer_than_what_may_be_kept_is_still_the_last_one(stories):
    context = Context(stories, n_seq_max=8, n_kept_max=50)
    assert [cached(context, prompt) for prompt in (A, A, B, A)] == [0, 100, 0, 0]
    assert context.n_kept == 1


def test_kept_texts_give_way_to_those_that_run(stories):
    context = Context(stories, n_ctx=256, n_seq_max=8)
    for prompt in (A, B):
        assert cached(context, prompt) == 0
    assert cached(context, some_tokens(30, 201), 40) == 0
    assert context.n_kept == 1
    assert [cached(context, prompt) for prompt in (A, B)] == [0, 0]


def test_with_one_sequence_the_kept_text_gives_way_to_the_next(stories):
    context = Context(stories, n_seq_max=1)
    assert [cached(context, prompt) for prompt in (A, A, B, B, A)] == [0, 100, 0, 100, 0]


# --- host memory ------------------------------------------------------------------------------------------------------
def test_what_leaves_the_cache_comes_back_from_host_memory(stories):
    context = Context(stories, n_ctx=1024, n_seq_max=4, n_kept_max=120, n_host_max=1 << 24)
    long = some_tokens(40, 301)
    assert cached(context, long) == 0
    assert context.n_host_bytes == 0
    assert cached(context, A) == 0
    assert context.n_host_bytes > 300 * stories.n_layer * stories.n_embd
    assert cached(context, [*long, 300, 301]) == len(long)
    assert cached(context, [*long[:250], 302]) == 250


def test_unrelated_texts_in_between_push_nothing_out_of_host_memory(stories):
    context = Context(stories, n_ctx=512, n_seq_max=2, n_host_max=1 << 26)
    long = some_tokens(41, 401)
    assert cached(context, long) == 0
    for n in range(12):
        assert cached(context, some_tokens(50 + n, 150)) == 0
    assert cached(context, [*long, 300]) == len(long)


def test_without_host_memory_what_leaves_the_cache_is_gone(stories):
    context = Context(stories, n_ctx=1024, n_seq_max=4, n_kept_max=120)
    long = some_tokens(40, 301)
    assert [cached(context, prompt) for prompt in (long, A, long)] == [0, 0, 0]
    assert context.n_host_bytes == 0


def test_host_memory_holds_no_more_than_it_may(stories):
    n_host_max = 400_000
    context = Context(stories, n_ctx=1024, n_seq_max=4, n_kept_max=10, n_host_max=n_host_max)
    prompts = [some_tokens(60 + n, 151) for n in range(12)]
    most = 0
    for prompt in prompts:
        assert cached(context, prompt) == 0
        most = max(most, context.n_host_bytes)
        assert context.n_host_bytes <= n_host_max
    assert most > n_host_max // 2
    assert cached(context, [*prompts[-2], 300]) == 151
    assert cached(context, [*prompts[0], 300]) == 0


def test_a_text_too_large_for_host_memory_is_forgotten(stories):
    context = Context(stories, n_ctx=1024, n_seq_max=4, n_kept_max=10, n_host_max=1000)
    assert [cached(context, prompt) for prompt in (A, B, A)] == [0, 0, 0]
    assert context.n_host_bytes == 0


def test_a_short_text_is_computed_sooner_than_fetched_from_host_memory(stories):
    context = Context(stories, n_ctx=1024, n_seq_max=4, n_kept_max=10, n_host_max=1 << 24)
    assert [cached(context, prompt) for prompt in (A, B, A)] == [0, 0, 0]
    assert context.n_host_bytes > 0


# --- models that can't share a beginning ------------------------------------------------------------------------------
@pytest.fixture(params=["windowed", "recurrent"])
def whole(request: pytest.FixtureRequest) -> Model:
    """A model of which a text is found again as a whole or not at all."""
    model: Model = request.getfixturevalue(request.param)
    assert not model.shares_prefixes
    return model


def test_a_plain_transformer_shares_prefixes(stories):
    assert stories.shares_prefixes


def test_a_beginning_that_can_not_be_shared_is_computed_again(whole):
    context = Context(whole, n_ctx=1024, n_seq_max=4)
    begin = some_tokens(5, 60, N_VOCAB)
    assert cached(context, [*begin, 300, 301]) == 0
    assert cached(context, [*begin, 302, 303]) == 0
    assert cached(context, begin[:30]) == 0


def test_a_text_that_goes_on_is_found_where_a_beginning_is_not(whole):
    context = Context(whole, n_ctx=1024, n_seq_max=4)
    begin = some_tokens(6, 60, N_VOCAB)
    always_300 = Sampler(whole, temperature=0, logit_bias={300: 1e6})
    assert Generation(context, always_300, begin, max_tokens=8).run() == whole.detokenize([300] * 8)
    known = [*begin, *[300] * 7]  # the eighth was never computed
    assert cached(context, [*known, 300, 301]) == len(known)
    assert cached(context, [*known, 302, 303]) == 0


def test_many_texts_of_a_model_that_can_not_share_are_what_each_is_alone(whole):
    context = Context(whole, n_ctx=1024, n_batch=32, n_seq_max=6)
    begin = some_tokens(7, 40, N_VOCAB)
    prompts = [[*begin[: 8 * n], *some_tokens(n, 10, N_VOCAB)] for n in range(6)] * 2
    generations = [generation(context, prompt, 30) for prompt in prompts]
    texts = dict.fromkeys(generations, "")
    while running := [g for g in generations if not g.ended]:
        for g, text in context.run(running):
            texts[g] += text
    expected = [generation(Context(whole, n_ctx=1024, reuse=False), prompt, 30).run() for prompt in prompts]
    assert [texts[g] or None for g in generations] == expected
