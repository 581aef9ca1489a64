"""Many texts in one batch: each is what it is alone, none holds up another, and all find room."""

from __future__ import annotations

import gc
import threading
from collections.abc import Sequence

import pytest

from tea_llm.errors import BadRequest, EngineClosed, EngineError

pytest.importorskip("tea_llm._llama", reason="tea_llm was built without llama.cpp")
from tea_llm._llama import Context, Generation, Sampler

from .generating import alone, greedy, together

PROMPTS = [
    "Once upon a time", "Lily and Ben", "The big red dog", "One day, a little girl", "There was a cat", "Tom", "Hello",
    "Sara was sad", "In the park", "A bird", "Max the mouse was very small and", "It was a sunny day", "Mom said",
    "The sun", "The moon", "Once there was a tree",
]  # fmt: skip
ANSWERS = {
    "Hello!": "Hi there! How can I help you today?",
    "Hi": "Hello! How can I help you today?",
    "What is your name?": "I'm a tiny AI assistant. Nice to meet you!",
    "How are you?": "I'm doing great, thanks for asking! How about you?",
    "Tell me a story.": "Once upon a time, there was a little cat named Max. He loved to play in the park. The end.",
    "Thank you!": "You're welcome! Happy to help.",
    "What is the capital of France?": "The capital of France is Paris.",
    "What color is the sky?": "The sky is blue.",
    "Can you help me?": "Of course! I'll do my best to assist you.",
    "Goodbye!": "Goodbye! Have a wonderful day!",
}
"""What the chat model has learned by heart."""

FOX = " quick brown fox jumps over a lazy dog."


# --- each is what it is alone -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("n_batch", [7, 512])
@pytest.mark.parametrize("name", ["stories", "quantised"])
def test_texts_computed_together_are_what_each_is_alone(request, name, n_batch):
    model = request.getfixturevalue(name)
    context = Context(model, n_ctx=4096, n_batch=n_batch, n_seq_max=16)
    generations = [greedy(context, prompt, max_tokens=40) for prompt in PROMPTS]
    assert together(context, generations) == [alone(model, prompt, 40) for prompt in PROMPTS]
    assert all(generation.n_generated for generation in generations)


@pytest.mark.parametrize("n_before", [20, 150])
def test_a_text_is_what_it_is_alone_when_those_before_it_end(quantised, n_before):
    prompt = "Mom said A Lily and Ben"  # two of its words are about as likely
    context = Context(quantised, n_ctx=1024, n_seq_max=2, reuse=False)
    prompt_before = [1, *(300 + n % 100 for n in range(n_before))]
    before = Generation(context, Sampler(quantised, temperature=0), prompt_before, stream=True)
    before.run(stream=True)
    text = greedy(context, prompt, max_tokens=38, stream=True)
    said = ""
    while text.n_generated < 5:
        said += dict(context.run([before, text])).get(text, "")
    before.cancel()
    context.run([before])
    assert said + together(context, [text])[0] == alone(quantised, prompt, 38)


def test_texts_join_and_leave_a_running_batch(stories):
    context = Context(stories, n_ctx=2048, n_seq_max=4)
    waiting = [(prompt, n) for prompt, n in zip(PROMPTS, [5, 30, 12, 40, 3, 25, 60, 1] * 2, strict=True)]
    running: dict[Generation, tuple[str, int]] = {}
    texts: dict[tuple[str, int], str] = {}
    most = 0
    while waiting or running:
        if waiting and len(running) < 4:
            asked = waiting.pop(0)
            running[greedy(context, asked[0], max_tokens=asked[1], stream=True)] = asked
            texts[asked] = ""
        most = max(most, len(running))
        for generation, text in context.run(running):
            texts[running[generation]] += text
            if generation.ended:
                del running[generation]
    assert most == 4
    assert texts == {asked: alone(stories, *asked) for asked in texts}


def test_more_texts_than_sequences_take_turns(scripted):
    context = Context(scripted, n_seq_max=2)
    generations = [greedy(context, "count" if n % 2 else "The", max_tokens=9 + n) for n in range(7)]
    texts = together(context, generations)
    assert texts[::2] == [FOX] * 4
    assert [text.split()[:5] for text in texts[1::2]] == [["one", "two", "three", "four", "five"]] * 3
    assert [len(text.split()) for text in texts[1::2]] == [10, 12, 14]


def test_each_text_has_its_own_samplers_and_stop_strings(scripted):
    context = Context(scripted, n_seq_max=4)
    prompt = scripted.tokenize("count")
    free, bound, stopped = (
        Generation(context, Sampler(scripted, temperature=0, **sampling), prompt, max_tokens=4, **options)
        for sampling, options in (({}, {}), ({"grammar": 'root ::= " one" " two"'}, {}), ({}, {"stop": [" three"]}))
    )
    assert together(context, [free, bound, stopped]) == [" one two three four", " one two", " one two"]
    assert [g.finish_reason for g in (free, bound, stopped)] == ["length", "stop", "stop"]


# --- who is heard when ------------------------------------------------------------------------------------------------
def test_run_gives_the_news_of_those_that_stream_and_the_whole_of_the_others(scripted):
    context = Context(scripted, n_seq_max=2)
    heard, silent = greedy(context, "count", max_tokens=3, stream=True), greedy(context, "The")
    assert [context.run([heard, silent]) for _ in range(3)] == [[(heard, t)] for t in (" one", " two", " three")]
    assert context.run([silent]) == [(silent, FOX)]
    assert (heard.finish_reason, silent.finish_reason) == ("length", "stop")


def test_a_long_prompt_does_not_hold_up_the_texts_of_others(scripted):
    context = Context(scripted, n_ctx=2048, n_batch=16, n_seq_max=3)
    others = [greedy(context, "count", max_tokens=500, stream=True) for _ in range(2)]
    for _ in range(4):
        context.run(others)
    long = Generation(context, Sampler(scripted, temperature=0), scripted.tokenize("The" + " cat" * 600), stream=True)
    said = [g.n_generated for g in others]
    while not (long.n_generated or long.ended):
        context.run([*others, long])
    n_steps = -(-long.n_prompt // (context.n_batch - len(others)))  # rows that the others leave in each batch
    assert n_steps > 30
    # The end of the prompt, as long as a short one, goes first: batch.hpp, short_prompt.
    assert all(n_steps - 5 <= g.n_generated - n <= n_steps for g, n in zip(others, said, strict=True))


def test_short_prompts_go_before_the_next_tokens_of_others_for_a_second_at_most(scripted):
    context = Context(scripted, n_ctx=2048, n_batch=16, n_seq_max=8)
    other = greedy(context, "count", max_tokens=500, stream=True)
    context.run([other])
    short = [greedy(context, f"{n} " + "The cat " * 20, max_tokens=1) for n in range(4)]
    said = other.n_generated
    while running := [g for g in short if not g.ended]:
        context.run([other, *running])
    n_steps = sum(-(-g.n_prompt // 16) for g in short)
    assert n_steps > 8
    assert other.n_generated - said <= n_steps // 2


def test_prompts_are_read_in_the_order_given(stories):
    def first_to_speak(order: Sequence[int]) -> int:
        context = Context(stories, n_ctx=2048, n_batch=32, n_seq_max=3, reuse=False)
        generations = [
            Generation(context, Sampler(stories, temperature=0), [1, *[300 + n] * 200], max_tokens=1) for n in range(3)
        ]
        for _ in range(2):  # some of the first prompt is read already when another comes before it
            context.wake()
            assert context.run(generations) == []
        [(first, _)] = context.run([generations[n] for n in order])
        return generations.index(first)

    assert [first_to_speak(order) for order in ([0, 1, 2], [1, 0, 2], [2, 1, 0])] == [0, 1, 2]


def test_wake_brings_run_back_after_one_step(scripted):
    context = Context(scripted, n_seq_max=1)
    generation = greedy(context, "count", max_tokens=5)
    for n in range(1, 5):
        context.wake()
        assert context.run([generation]) == []
        assert generation.n_generated == n
    assert context.run([generation]) == [(generation, " one two three four five")]


def test_wake_from_another_thread_brings_run_back(scripted):
    context = Context(scripted, n_ctx=16384)
    generation = greedy(context, "count")
    threading.Timer(0.1, context.wake).start()
    assert context.run([generation]) == []
    assert 0 < generation.n_generated < 16000


def test_run_with_nothing_to_compute_returns_at_once(scripted):
    context = Context(scripted)
    assert context.run([]) == []
    done = greedy(context, "The")
    assert done.run() == FOX
    assert context.run([done]) == [(done, "")]


# --- cancelled --------------------------------------------------------------------------------------------------------
def test_a_prompt_that_is_cancelled_beside_others_is_read_no_further(stories):
    context = Context(stories, n_ctx=8192, n_batch=32, n_seq_max=2)
    other = greedy(context, "Once upon a time", max_tokens=60, stream=True)
    text = context.run([other])[0][1]
    long = Generation(context, Sampler(stories, temperature=0), [1, *[300] * 5000])
    for _ in range(3):
        text += dict(context.run([other, long]))[other]
    long.cancel()
    news = dict(context.run([other, long]))
    assert (news.pop(long), long.finish_reason, long.n_generated) == ("", "cancelled", 0)
    text += news.get(other, "")
    while not other.ended:
        text += dict(context.run([other]))[other]
    assert text == alone(stories, "Once upon a time", 60)


def test_a_cancelled_text_keeps_what_it_has(scripted):
    context = Context(scripted, n_seq_max=2)
    cancelled, other = greedy(context, "count"), greedy(context, "The")
    for _ in range(3):
        context.wake()
        context.run([cancelled, other])
    cancelled.cancel()
    assert context.run([cancelled, other]) == [(cancelled, " one two three")]
    assert other.run() == FOX


def test_a_text_cancelled_before_its_turn_is_never_begun(scripted):
    context = Context(scripted, n_seq_max=1)
    first, waiting = greedy(context, "count", max_tokens=3, stream=True), greedy(context, "The")
    context.run([first, waiting])
    waiting.cancel()
    assert context.run([first, waiting]) == [(waiting, "")]
    assert (waiting.finish_reason, waiting.prompt_s, waiting.n_generated) == ("cancelled", 0, 0)
    assert first.run() == " two three"


def test_a_text_that_nobody_holds_any_more_gives_its_sequence_back(scripted):
    context = Context(scripted, n_seq_max=1)
    for _ in range(3):
        dropped = greedy(context, "count")
        assert dropped.run(stream=True) == " one"
        del dropped
        gc.collect()
        assert greedy(context, "The").run() == FOX


# --- room -------------------------------------------------------------------------------------------------------------
def test_texts_longer_than_the_cache_together_wait_for_each_other_and_are_all_right(stories):
    context = Context(stories, n_ctx=256, n_seq_max=8)
    generations = [greedy(context, prompt, max_tokens=100) for prompt in PROMPTS[:8]]
    assert sum(generation.n_prompt + 100 for generation in generations) > 3 * context.n_ctx
    assert together(context, generations) == [alone(stories, prompt, 100) for prompt in PROMPTS[:8]]


@pytest.mark.parametrize("n_host_max", [0, 1 << 20, 1 << 30])
def test_prompts_longer_than_the_cache_together_are_all_read(stories, n_host_max):
    context = Context(stories, n_ctx=256, n_batch=64, n_seq_max=8, n_host_max=n_host_max)
    words = stories.tokenize("Once upon a time there was a little dog. " * 20)
    prompts = [[*words[:n], *stories.tokenize(PROMPTS[n % 16], add_special=False)] for n in range(100, 148, 6)]

    def ask(context: Context, prompt: list[int]) -> Generation:
        return Generation(context, Sampler(stories, temperature=0), prompt, max_tokens=60)

    expected = [ask(Context(stories, reuse=False), prompt).run() for prompt in prompts]
    for _ in range(2):
        assert together(context, [ask(context, prompt) for prompt in prompts]) == expected


def test_a_text_that_fills_the_cache_alone_ends_with_length(scripted):
    context = Context(scripted, n_ctx=256, n_seq_max=2)
    text = greedy(context, "count")
    assert len((text.run() or "").split()) == text.n_generated
    assert text.finish_reason == "length"
    assert text.n_prompt + text.n_generated == 256
    assert greedy(context, "The").run() == FOX


def test_the_text_that_comes_last_gives_way(scripted):
    context = Context(scripted, n_ctx=256, n_seq_max=2, n_batch=64)
    first, last = greedy(context, "count", max_tokens=200), greedy(context, "count one", max_tokens=200)
    [(ended, _)] = context.run([first, last])
    assert ended is first
    assert 0 < last.n_generated < 200
    assert len((last.run() or "").split()) == 200


def test_a_text_that_gave_way_comes_back_as_soon_as_another_ends(scripted):
    context = Context(scripted, n_ctx=256, n_seq_max=3, reuse=False)
    prompt = scripted.tokenize("The" + " cat" * 77 + " count")
    ends_soon, long, last = (
        Generation(context, Sampler(scripted, temperature=0), prompt, max_tokens=n) for n in (20, 80, 80)
    )
    assert 3 * (len(prompt) + 10) > context.n_ctx > 2 * (len(prompt) + 40)
    context.run([ends_soon, long, last])
    assert (ends_soon.ended, long.ended, last.ended) == (True, False, False)
    given_way_at = last.n_generated
    while last.n_generated < 40:
        assert not long.ended
        context.wake()
        context.run([long, last])
    assert given_way_at < 10


# --- what is refused --------------------------------------------------------------------------------------------------
def test_a_generation_of_another_context_is_refused(scripted):
    context, other = Context(scripted, n_seq_max=2), greedy(Context(scripted), "The")
    mine = greedy(context, "The")
    with pytest.raises(BadRequest, match="another Context"):
        context.run([mine, other])
    assert (mine.run(), other.run()) == (FOX, FOX)


def test_one_sampler_for_two_texts_at_once_is_refused(scripted):
    context, sampler = Context(scripted, n_seq_max=2), Sampler(scripted, temperature=0)
    first, second = (Generation(context, sampler, scripted.tokenize("The")) for _ in range(2))
    for twice in ([first, second], [first, first]):
        with pytest.raises(EngineError, match="make one for each Generation"):
            context.run(twice)
    assert (first.run(), second.run()) == (FOX, FOX)


def test_what_is_no_generation_is_refused(scripted):
    context = Context(scripted)
    for wrong in ([None], ["The"], [Generation.__new__(Generation)]):
        with pytest.raises((TypeError, BadRequest, EngineClosed)):
            context.run(wrong)
    assert greedy(context, "The").run() == FOX


# --- what took how long -----------------------------------------------------------------------------------------------
def test_a_text_that_waits_counts_the_wait_and_not_the_prompt(scripted):
    context = Context(scripted, n_seq_max=1)
    first, second = greedy(context, "count", max_tokens=300), greedy(context, "The")
    assert (second.prompt_s, second.generation_s) == (0, 0)
    together(context, [first, second])
    assert second.queue_s > first.prompt_s + first.generation_s > 0
    assert 0 < second.prompt_s < second.queue_s
    assert second.generation_s > 0
