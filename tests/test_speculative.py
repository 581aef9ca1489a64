"""Guesses at what comes next: right ones save steps, wrong ones are dropped, and no text is another one for it."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from tea_llm import LlmCallParams, LlmCallResult, LocalLlmBackend, create_llm_backend, run_workflow
from tea_llm.errors import BadRequest, ModelLoadError, ModelNotFound, SettingsError

pytest.importorskip("tea_llm._llama", reason="tea_llm was built without llama.cpp")
from tea_llm._llama import Context, Generation, Model, Sampler

from .generating import alone, greedy, together
from .random_models import write_random

PROMPTS = [
    "Once upon a time", "Tom and Lily went to the park. Tom and Lily went to the", "The big dog", "Mom said", "A bird",
    "Lily had a red ball. Lily had a red", "One day", "Max was a small mouse. Max was a small",
]  # fmt: skip
WAYS = ["another model", "itself", "ngram", "mtp", "mtp of a recurrent model"]


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """With a layer that predicts the token after the next one."""
    return Model(write_random("glm4moe", tmp_path_factory.mktemp("drafting") / "drafting.gguf"), load_mtp=True)


@pytest.fixture(scope="module")
def recurrent_drafting(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The same, and its state has to be rolled back where a guess was wrong."""
    return Model(write_random("qwen35", tmp_path_factory.mktemp("drafting") / "recurrent.gguf"), load_mtp=True)


@pytest.fixture(params=WAYS)
def guessing(request: pytest.FixtureRequest) -> tuple[Model, Any]:
    """A model, and what guesses for it."""
    if request.param == "mtp":
        return request.getfixturevalue("drafting"), "mtp"
    if request.param == "mtp of a recurrent model":
        return request.getfixturevalue("recurrent_drafting"), "mtp"
    stories, quantised = request.getfixturevalue("stories"), request.getfixturevalue("quantised")
    guesses: dict[str, Any] = {"another model": stories, "itself": quantised, "ngram": "ngram"}
    return quantised, guesses[request.param]


def some_texts(model: Model, n: int = 8) -> list[list[int]]:
    """Prompts as tokens: of a model that was trained, those that make sense to it."""
    if model.n_mtp_layer:
        return [[1, *random.Random(seed).choices(range(260, 350), k=12)] for seed in range(n)]
    return [model.tokenize(prompt) for prompt in PROMPTS[:n]]


# --- the same texts ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n_draft", [1, 3, 8])
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_a_text_is_the_same_with_guesses(guessing, temperature, n_draft):
    model, draft = guessing
    plain = Context(model, n_ctx=1024, reuse=False)
    context = Context(model, n_ctx=1024, draft=draft, n_draft=n_draft, reuse=False)
    n_drafted = n_accepted = 0
    for seed, tokens in enumerate(some_texts(model)):
        expected = Generation(plain, Sampler(model, temperature=temperature, seed=seed), tokens, max_tokens=60)
        guessed = Generation(context, Sampler(model, temperature=temperature, seed=seed), tokens, max_tokens=60)
        assert guessed.run() == expected.run()
        assert guessed.n_generated == expected.n_generated
        n_drafted += guessed.n_drafted
        n_accepted += guessed.n_accepted
    assert 0 < n_accepted <= n_drafted
    assert (n_accepted == n_drafted) == (draft is model and temperature == 0)


@pytest.mark.parametrize("n_batch", [7, 64])
def test_texts_side_by_side_are_the_same_with_guesses(guessing, n_batch):
    model, draft = guessing
    if model.is_recurrent:
        pytest.skip("its texts are guessed one at a time; test_texts_with_a_state_are_guessed_one_at_a_time")
    plain = Context(model, n_ctx=1024, reuse=False)
    context = Context(model, n_ctx=2048, n_seq_max=8, n_batch=n_batch, draft=draft, n_draft_rows=n_batch)
    prompts = some_texts(model)
    expected = [Generation(plain, Sampler(model, temperature=0), tokens, max_tokens=40).run() for tokens in prompts]
    for _ in range(2):  # the second time from what was kept
        asked = [Generation(context, Sampler(model, temperature=0), tokens, max_tokens=40) for tokens in prompts]
        assert together(context, asked) == expected
        assert sum(g.n_drafted for g in asked) > 0
    assert all(g.n_cached for g in asked)


def test_guesses_at_a_text_with_a_window_are_checked_like_others(tmp_path):
    model = Model(write_random("gemma2", tmp_path / "window.gguf"))
    prompt = [1, *[300, 301, 302, 303] * 10]
    expected = Generation(Context(model), Sampler(model, temperature=0), prompt, max_tokens=80).run()
    context = Context(model, draft="ngram", n_draft=1)
    guessed = Generation(context, Sampler(model, temperature=0), prompt, max_tokens=80)
    assert guessed.run() == expected
    assert guessed.n_drafted


# --- what they save ---------------------------------------------------------------------------------------------------
def n_steps(generation: Generation) -> int:
    """Times that the model computed for a text, after its prompt."""
    n = 0
    while not generation.ended:
        n += len(generation.context.run([generation]))
    return n


def test_a_model_that_guesses_its_own_tokens_takes_a_step_for_four_of_them(scripted):
    context = Context(scripted, draft=scripted, n_draft=3)
    assert n_steps(greedy(context, "count", max_tokens=80, stream=True)) <= 22
    assert n_steps(greedy(Context(scripted), "count", max_tokens=80, stream=True)) == 80


def test_what_a_text_repeats_is_guessed_without_another_model(scripted):
    context = Context(scripted, draft="ngram", n_draft=3)
    asked = greedy(context, "count one two three four one two three four", max_tokens=80, stream=True)
    assert n_steps(asked) < 40
    assert asked.n_accepted > 40


def test_nothing_is_guessed_unless_asked(quantised):
    asked = greedy(Context(quantised), PROMPTS[1], max_tokens=40)
    asked.run()
    assert (asked.n_drafted, asked.n_accepted) == (0, 0)


def test_several_texts_share_the_rows_for_guesses(quantised):
    context = Context(quantised, n_seq_max=4, draft=quantised, n_draft=3)
    asked = [greedy(context, prompt, max_tokens=40) for prompt in PROMPTS[:4]]
    together(context, asked)
    assert [g.n_drafted for g in asked] == [0] * 4  # four rows hold four texts and no guess


# --- where a text ends ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("max_tokens", range(1, 12))
def test_a_text_with_guesses_has_max_tokens_and_no_more(scripted, max_tokens):
    asked = greedy(Context(scripted, draft=scripted, n_draft=8), "count", max_tokens=max_tokens)
    assert asked.run() == alone(scripted, "count", max_tokens)
    assert (asked.n_generated, asked.finish_reason) == (max_tokens, "length")


@pytest.mark.parametrize("stop", [" two", " three", "wo thr"])
def test_a_stop_string_ends_a_text_in_the_middle_of_right_guesses(scripted, stop):
    plain = greedy(Context(scripted), "count", stop=[stop])
    asked = greedy(Context(scripted, draft=scripted, n_draft=8), "count", stop=[stop])
    assert asked.run() == plain.run()
    assert (asked.n_generated, asked.finish_reason) == (plain.n_generated, "stop")


def test_a_model_that_ends_its_text_ends_it_in_the_middle_of_guesses(scripted):
    plain = greedy(Context(scripted), "The")
    asked = greedy(Context(scripted, draft=scripted, n_draft=8), "The")
    assert asked.run() == plain.run() != ""
    assert (asked.n_generated, asked.finish_reason) == (plain.n_generated, "stop")


def test_a_full_context_ends_a_text_with_guesses_where_it_ends_without(scripted):
    plain = greedy(Context(scripted, n_ctx=256), "count")
    asked = greedy(Context(scripted, n_ctx=256, draft=scripted, n_draft=8), "count")
    assert asked.run() == plain.run()
    assert asked.finish_reason == plain.finish_reason == "length"


# --- beside the cache -------------------------------------------------------------------------------------------------
def test_what_is_kept_ends_where_right_guesses_end(quantised):
    context = Context(quantised, n_seq_max=4, draft="ngram", n_draft=8)
    text = PROMPTS[1]
    for _ in range(4):
        asked = greedy(context, text, max_tokens=17)
        added = asked.run()
        assert added == alone(quantised, text, 17)
        text += added
    assert asked.n_cached > 40


@pytest.mark.parametrize("n_host_max", [0, 1 << 24])
def test_texts_that_push_each_other_out_are_the_same_with_guesses(quantised, stories, n_host_max):
    prompts = [prompt * 3 for prompt in PROMPTS]
    expected = [alone(quantised, prompt, 60) for prompt in prompts]
    context = Context(quantised, n_ctx=384, n_seq_max=8, n_host_max=n_host_max, draft=stories, n_draft_rows=64)
    for _ in range(3):
        asked = [greedy(context, prompt, max_tokens=60) for prompt in prompts]
        assert together(context, asked) == expected
    assert sum(g.n_accepted for g in asked) > 0


def test_a_saved_state_goes_on_with_guesses(quantised, stories):
    first = greedy(Context(quantised), PROMPTS[0], max_tokens=40, save=True)
    prompt = PROMPTS[0] + first.run()
    known = first.take_state()
    asked = greedy(Context(quantised, draft=stories), prompt, max_tokens=40, known=known)
    assert asked.run() == alone(quantised, prompt, 40)
    assert asked.n_cached > 40
    assert asked.n_drafted


def test_a_cancelled_prompt_leaves_a_context_that_guesses(guessing):
    model, draft = guessing
    context = Context(model, n_ctx=1024, n_batch=16, draft=draft)
    prompt = [1, *random.Random(0).choices(range(260, 350), k=300)]
    cancelled = Generation(context, Sampler(model, temperature=0), prompt)
    context.wake()
    context.run([cancelled])
    cancelled.cancel()
    cancelled.run()
    assert cancelled.finish_reason == "cancelled"
    asked = Generation(context, Sampler(model, temperature=0), prompt, max_tokens=20)
    plain = Generation(Context(model, n_ctx=1024), Sampler(model, temperature=0), prompt, max_tokens=20)
    assert asked.run() == plain.run()
    assert asked.n_cached


@pytest.mark.parametrize("max_tokens", [5, 6, 7, 8])
def test_a_saved_state_holds_no_wrong_guess(guessing, max_tokens):
    model, draft = guessing
    for tokens in some_texts(model, 4):
        context = Context(model, n_ctx=1024, draft=draft)
        first = Generation(context, Sampler(model, temperature=0), tokens, max_tokens=max_tokens, save=True)
        first.run()
        known, state = first.take_state()
        longer = [*known, 300, 301]
        expected = Generation(Context(model, n_ctx=1024), Sampler(model, temperature=0), longer, max_tokens=20).run()
        context = Context(model, n_ctx=1024, draft=draft)
        asked = Generation(context, Sampler(model, temperature=0), longer, max_tokens=20, known=(known, state))
        assert asked.run() == expected
        assert asked.n_cached == len(known)


# --- who can't guess --------------------------------------------------------------------------------------------------
def refusal(model: Model, draft: Any) -> str:
    with pytest.raises(BadRequest) as caught:
        Context(model, n_ctx=256, draft=draft)
    return str(caught.value)


def test_a_model_with_another_vocabulary_is_refused(quantised, drafting):
    assert "same vocabulary" in refusal(quantised, drafting)


def test_a_recurrent_model_can_not_guess_and_is_not_guessed_for(tmp_path):
    recurrent = Model(write_random("mamba", tmp_path / "recurrent.gguf"))
    assert "recurrent state" in refusal(recurrent, recurrent)
    assert "take tokens back" in refusal(recurrent, "ngram")


def test_texts_with_a_state_are_guessed_one_at_a_time(recurrent_drafting):
    with pytest.raises(BadRequest, match="of one text only"):
        Context(recurrent_drafting, n_ctx=256, n_seq_max=2, draft="mtp")


def test_an_encoder_can_not_guess(quantised, shared_models):
    assert "encoder" in refusal(quantised, Model(shared_models / "all-MiniLM-L6-v2-f16.gguf", split_load=False))


def test_layers_that_are_not_there_can_not_guess(quantised, drafting):
    assert "no MTP layers" in refusal(quantised, "mtp")
    assert "load_mtp=True" in refusal(Model(drafting.path), "mtp")


def test_vocabularies_are_compared_where_they_are_loaded_whole(shared_models, quantised):
    split = Model(shared_models / "stories260K-q8_0.gguf", split_load=True)
    assert "split_load=False" in refusal(split, quantised)
    assert "split_load=False" in refusal(quantised, split)


@pytest.mark.parametrize("draft", ["guess", 3, "eagle3"])
def test_an_unknown_way_to_guess_is_refused(quantised, draft):
    assert "'mtp' or 'ngram'" in refusal(quantised, draft)


def test_llama_cpp_writes_nothing_to_stderr_about_guesses(quantised, drafting, capfd):
    greedy(Context(quantised, n_ctx=256, draft=quantised), "One day", max_tokens=10).run()
    refusal(quantised, drafting)
    assert capfd.readouterr().err == ""


# --- for those who call -----------------------------------------------------------------------------------------------
REPEAT = LlmCallParams("count one two three four one two three four", max_tokens=60, temperature=0)


@pytest.fixture(scope="module")
def counts(shared_models: Path) -> str:
    return str(shared_models / "scripted-f16.gguf")


@pytest.mark.parametrize("n_draft", [None, 8])
@pytest.mark.parametrize("way", ["ngram", "draft", None])
def test_a_backend_guesses_on_request_and_says_how_well(counts, way, n_draft):
    path = None if way == "ngram" else counts
    guessing = LocalLlmBackend(counts, speculative=way, draft_model_path=path, n_draft=n_draft)
    with LocalLlmBackend(counts) as plain, guessing:
        expected, result = plain.call(REPEAT), guessing.call(REPEAT)
    assert result.content == expected.content
    assert (expected.timings.draft_tokens, expected.timings.accepted_tokens) == (0, 0)
    assert 30 < result.timings.accepted_tokens <= result.timings.draft_tokens
    assert result.usage == expected.usage


def test_guesses_can_be_switched_off_where_a_draft_model_is_set(counts):
    with LocalLlmBackend(counts, draft_model_path=counts, speculative="off") as backend:
        assert backend.call(REPEAT).timings.draft_tokens == 0


def test_the_pieces_of_a_stream_with_guesses_are_the_text(counts):
    with LocalLlmBackend(counts, speculative="ngram") as backend:
        expected = backend.call(REPEAT).content
        pieces = list(backend.stream(REPEAT))
    assert "".join(pieces) == expected
    assert len(pieces) < 40


def test_a_workflow_asks_for_guesses(counts):
    workflow = {
        "settings": {"llm": {"backend": "local", "model_path": counts, "speculative": "ngram"}},
        "nodes": [{
            "name": "count", "uses": "llm.call", "with": {"prompt": REPEAT.prompt, "max_tokens": 60, "temperature": 0},
            "output": "answer",
        }],
    }  # fmt: skip
    assert run_workflow(workflow, {})["answer"]["timings"]["accepted_tokens"] > 30


def test_a_draft_model_that_is_missing_is_named(counts, tmp_path):
    with pytest.raises(ModelNotFound, match=r"no model file at .*draft\.gguf"):
        LocalLlmBackend(counts, draft_model_path=tmp_path / "draft.gguf")


def test_a_draft_model_that_does_not_fit_ends_the_load(counts, shared_models):
    with pytest.raises(ModelLoadError, match="same vocabulary"):
        LocalLlmBackend(counts, draft_model_path=shared_models / "stories260K-q8_0.gguf")


def test_a_draft_model_that_does_not_fit_is_a_reason_to_fall_back(counts, shared_models, server):
    llm = {
        "backend": "local", "model_path": counts, "draft_model_path": str(shared_models / "stories260K-q8_0.gguf"),
        "api_base": server.base, "api_key": "k", "model": "m",
    }  # fmt: skip
    with create_llm_backend({"llm": llm}) as backend:
        assert "same vocabulary" in backend.call(REPEAT).fallback_reason


def test_draft_without_a_model_that_drafts_is_a_mistake_in_the_settings(counts):
    with pytest.raises(SettingsError, match="draft_model_path"):
        LocalLlmBackend(counts, speculative="draft")


def test_a_model_that_only_embeds_is_loaded_with_settings_for_texts(shared_models):
    with LocalLlmBackend(shared_models / "all-MiniLM-L6-v2-f16.gguf", speculative="ngram") as backend:
        assert len(backend.embed("a text")) == 384


async def _both(backend: LocalLlmBackend) -> list[LlmCallResult]:
    return await asyncio.gather(*(backend.acall(LlmCallParams(text, max_tokens=30)) for text in ("ab", "ac")))


def test_a_model_with_a_state_is_guessed_for_one_request_at_a_time(recurrent_drafting):
    with LocalLlmBackend(recurrent_drafting.path, speculative="mtp", n_parallel=4) as backend:
        results = asyncio.run(_both(backend))
        assert backend._open_engine().n_parallel == 1
    assert all(result.timings.draft_tokens for result in results)
