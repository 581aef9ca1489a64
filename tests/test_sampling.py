"""Exact tokens: llama2.c's own continuation, and what llama.cpp's chains draw at a fixed seed.

reference_tokens.json is the word of an independent program: tools/reference_tokens.py builds each chain by hand through
llama-cpp-python's binding of the same llama.cpp.
"""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tea_llm.errors import BadRequest, LlmError

pytest.importorskip("tea_llm._llama", reason="tea_llm was built without llama.cpp")
from tea_llm._llama import Context, Generation, Model, Sampler

REFERENCE = json.loads(Path(__file__).with_name("reference_tokens.json").read_text())


@pytest.fixture(scope="module")
def stories(shared_models) -> Model:
    return Model(shared_models / REFERENCE["model"])


@pytest.fixture(scope="module")
def context(stories) -> Context:
    return Context(stories, flash_attn=False)  # as the reference was drawn: src/attention.cpp rounds otherwise


@pytest.fixture(scope="module")
def scripted(shared_models) -> Context:
    return Context(Model(shared_models / "scripted-f16.gguf"))


def chunks(generation: Generation) -> list[str]:
    """The text token by token."""
    found = []
    while (text := generation.run(stream=True)) is not None:
        found.append(text)
    return found


def drawn(context: Context, prompt: str, n_tokens: int, **options: Any) -> list[str]:
    model = context.model
    return chunks(Generation(context, Sampler(model, **options), model.tokenize(prompt), max_tokens=n_tokens))


def options_of(case: dict[str, Any]) -> dict[str, Any]:
    options = dict(case["options"])
    if "logit_bias" in options:
        options["logit_bias"] = {int(token): bias for token, bias in options["logit_bias"].items()}
    return options


# --- greedy -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n_threads", [1, 2])
def test_greedy_continues_once_upon_a_time_as_llama2c_does(shared_models, stories, n_threads):
    expected = (shared_models / "stories260K.reference.txt").read_text().removesuffix("\n")
    context = Context(stories, n_threads=n_threads)
    prompt = "Once upon a time"
    texts = []
    for _ in range(2):
        sampler = Sampler(stories, temperature=0)
        texts.append(prompt + "".join(chunks(Generation(context, sampler, stories.tokenize(prompt), max_tokens=200))))
    assert texts[0] == texts[1]
    assert texts[0].startswith(expected)


def test_streaming_and_not_give_the_same_text(context, stories):
    texts = []
    for stream in (True, False):
        generation = Generation(context, Sampler(stories, seed=3), stories.tokenize("Tom"), max_tokens=100)
        texts.append("".join(chunks(generation)) if stream else generation.run())
    assert texts[0] == texts[1]


def test_a_prompt_in_small_batches_gives_the_same_text(stories):
    prompt = "Once upon a time, there was a little girl named Lily. She loved to play outside."
    texts = {
        "".join(drawn(Context(stories, n_batch=n_batch), prompt, 30, temperature=0)) for n_batch in (1, 3, 16, 512)
    }
    assert len(texts) == 1


# --- each sampler against llama.cpp's own chain -----------------------------------------------------------------------
@pytest.mark.parametrize("name", REFERENCE["cases"])
def test_a_sampler_draws_the_tokens_that_llama_cpps_own_chain_draws(context, stories, name):
    case = REFERENCE["cases"][name]
    expected = [stories.piece(token).decode() for token in case["tokens"]]
    assert drawn(context, REFERENCE["prompt"], REFERENCE["n_tokens"], **options_of(case)) == expected


@pytest.mark.parametrize("name", [name for name, case in REFERENCE["cases"].items() if "logprobs" in case])
def test_logprobs_are_numpys_log_softmax_of_the_models_own_logits(context, stories, name):
    case = REFERENCE["cases"][name]
    n_top = len(case["logprobs"][0][1])
    sampler = Sampler(stories, **options_of(case))
    prompt = stories.tokenize(REFERENCE["prompt"])
    text = Generation(context, sampler, prompt, max_tokens=REFERENCE["n_tokens"], logprobs=n_top)
    text.run()
    pairs = list(struct.iter_unpack("=if", text.take_logprobs()))
    rows = [pairs[i : i + 1 + n_top] for i in range(0, len(pairs), 1 + n_top)]
    assert len(rows) == len(case["tokens"])
    for row, token, (logprob, top) in zip(rows, case["tokens"], case["logprobs"], strict=True):
        assert [t for t, _ in row] == [token, *(t for t, _ in top)]
        # Two builds of llama.cpp agree so far: the last bit of a sum may be another bit of a key in the KV cache (F16).
        assert [p for _, p in row] == pytest.approx([logprob, *(p for _, p in top)], abs=0.01)


def test_no_two_samplers_of_the_reference_draw_alike():
    # else one of them might do nothing, here and in llama.cpp
    tokens = [tuple(case["tokens"]) for case in REFERENCE["cases"].values()]
    assert len(set(tokens)) == len(tokens)


def test_a_seed_repeats_and_none_is_random(context, stories):
    seeds = {Sampler(stories).seed for _ in range(20)}
    assert len(seeds) == 20
    seed = seeds.pop()
    assert drawn(context, "Tom", 30, seed=seed) == drawn(context, "Tom", 30, seed=seed)
    assert drawn(context, "Tom", 30, seed=seed) != drawn(context, "Tom", 30, seed=seed ^ 1)


def test_reset_starts_the_random_numbers_again(context, stories):
    sampler = Sampler(stories, seed=11, repeat_penalty=1.2)
    prompt = stories.tokenize("Tom")
    texts = []
    for _ in range(2):
        texts.append(Generation(context, sampler, prompt, max_tokens=30).run())
        sampler.reset()
    assert texts[0] == texts[1]
    assert texts[0] != Generation(context, Sampler(stories, seed=12, repeat_penalty=1.2), prompt, max_tokens=30).run()


# --- by hand, on the scripted model: the successor's logit is 2 x sqrt(448), every other one is 0 ---------------------
def test_a_bias_moves_the_choice_by_exactly_its_amount(scripted):
    # RMSNorm makes a one-hot vector of length 448 into sqrt(448); the output matrix doubles it
    logit = 2 * math.sqrt(448)
    two = scripted.model.tokenize(" two", add_special=False)[-1]
    assert drawn(scripted, "count", 1, temperature=0, logit_bias={two: logit - 0.1}) == [" one"]
    assert drawn(scripted, "count", 1, temperature=0, logit_bias={two: logit + 0.1}) == [" two"]


def test_a_bias_of_minus_infinity_forbids_a_token(scripted):
    one, two = (scripted.model.tokenize(text, add_special=False)[-1] for text in (" one", " two"))
    forbidden = {one: float("-inf"), two: 1.0}
    for temperature in (0, 0.01):
        assert drawn(scripted, "count", 3, temperature=temperature, logit_bias=forbidden)[0] == " two"


def test_a_penalty_divides_a_positive_logit_and_takes_its_part_from_it(scripted):
    # " one" and " two" come again after 5 tokens, each seen once then: 42.3 / repeat_penalty - frequency - presence
    logit = 2 * math.sqrt(448)
    plain = " one two three four five one two"
    for options, changes in (
        ({"presence_penalty": logit - 0.1}, False),
        ({"presence_penalty": logit + 0.1}, True),
        ({"frequency_penalty": logit - 0.1}, False),
        ({"frequency_penalty": logit + 0.1}, True),
        ({"repeat_penalty": 2.0, "presence_penalty": logit / 2 - 0.1}, False),
        ({"repeat_penalty": 2.0, "presence_penalty": logit / 2 + 0.1}, True),
        ({"presence_penalty": logit + 0.1, "repeat_last_n": 4}, False),
        ({"presence_penalty": logit + 0.1, "repeat_last_n": 0}, False),
    ):
        text = "".join(drawn(scripted, "count", 7, temperature=0, **options))
        assert (text != plain) == changes, (options, text)


def test_the_penalties_also_look_at_the_prompt(scripted):
    words = "count one two three four five"
    assert drawn(scripted, words, 1, temperature=0) == [" one"]
    assert drawn(scripted, words, 1, temperature=0, presence_penalty=50.0, repeat_last_n=-1) != [" one"]
    assert drawn(scripted, words, 1, temperature=0, presence_penalty=50.0, repeat_last_n=2) == [" one"]


def test_a_grammar_decides_where_the_model_would_go_elsewhere(scripted):
    text = "".join(drawn(scripted, "count", 50, temperature=0, grammar='root ::= " one" " two" " cat"'))
    assert text == " one two cat"


def test_the_likelihoods_of_a_large_vocabulary_add_up_to_one(large):
    model = large.model
    text = Generation(large, Sampler(model, seed=2), model.tokenize("One"), max_tokens=3, logprobs=model.n_vocab)
    text.run()
    pairs = list(struct.iter_unpack("=if", text.take_logprobs()))
    for first in range(0, len(pairs), 1 + model.n_vocab):
        (token, logprob), *all_of_them = pairs[first : first + 1 + model.n_vocab]
        assert dict(all_of_them)[token] == logprob
        assert math.fsum(math.exp(p) for _, p in all_of_them) == pytest.approx(1, abs=2e-6)


# --- the shortcuts past llama.cpp's candidate array -------------------------------------------------------------------
@pytest.fixture(scope="module")
def large(shared_models, tmp_path_factory) -> Context:
    """Random weights over a real vocabulary of 151,936 tokens."""
    vocabs = Path(os.environ.get("TEA_LLM_VOCABS") or Path(__file__).parents[1] / "build" / "vocabs")
    if not (vocabs / "ggml-vocab-qwen2.gguf").exists():
        pytest.skip(f"no vocabularies at {vocabs}; run ci/fetch-vocabs, or set TEA_LLM_VOCABS")
    pytest.importorskip("gguf", reason="the model is written with the gguf package")
    out = tmp_path_factory.mktemp("large")
    command = [sys.executable, "-W", "ignore", shared_models / "make_random.py", "--which", "qwen2-tiny"]
    subprocess.run([*command, "--vocab-dir", vocabs, "--outdir", out], check=True, capture_output=True)
    (path,) = out.glob("*.gguf")
    return Context(Model(path), n_ctx=256)


PLAIN = {"shortcuts": False}  # llama.cpp's samplers on the candidate array of the whole vocabulary


def test_the_likeliest_token_is_llama_cpps(large):
    prompt = "The quick brown fox"
    assert drawn(large, prompt, 60, temperature=0) == drawn(large, prompt, 60, temperature=0, **PLAIN)


@pytest.mark.parametrize("k", [1, 2, 3, 40, 127, 128, 1000])  # with more, some logits are equal
def test_the_k_likeliest_tokens_are_llama_cpps(large, k):
    for seed in range(3):
        options = {"top_k": k, "top_p": 0.98, "min_p": 0.0, "temperature": 2.0, "seed": seed}
        assert drawn(large, "One", 30, **options) == drawn(large, "One", 30, **options, **PLAIN)


PENALTIES = {"repeat_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": -0.2}
DRY = {"dry_multiplier": 1.5, "dry_base": 2.0, "dry_allowed_length": 1, "dry_penalty_last_n": -1}


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 0},
        {"top_k": 0, "temperature": 3.0, "min_p": 0.01},
        {"top_k": 0, "top_p": 1.0, "min_p": 0.02},
        {"top_k": 0, "top_p": 0.0},
        {"top_k": 0, "top_p": 1e-3, "min_p": 0.0},
        {"top_k": 0, "top_p": 0.3, "min_p": 0.0},
        {"top_k": 0, "top_p": 0.5, "min_keep": 3},
        {"top_k": 0, "top_p": 0.9, "typical_p": 0.9},
        {"top_k": 0, "top_p": 0.9, "xtc_probability": 0.5},
        {"top_k": 0, "top_p": 0.5, "logit_bias": {i: float("-inf") for i in range(0, 150_000, 2)}},
        {"samplers": ["top_p", "xtc", "min_p", "temperature"], "top_p": 0.2, "xtc_probability": 0.5, "min_p": 0.2},
        {"samplers": ["min_p", "top_k", "temperature"], "min_p": 0.1, "top_k": 9},
        {"samplers": ["top_k", "penalties", "temperature"], "top_k": 20, **PENALTIES},
        PENALTIES,
        {"top_k": 0, **PENALTIES, "repeat_last_n": -1},
        {**PENALTIES, "repeat_last_n": 3},
        DRY,
        {**DRY, **PENALTIES, "samplers": ["dry", "penalties", "top_k", "temperature"]},
        {"temperature": 0, **PENALTIES},
        {"temperature": 0, **DRY, **PENALTIES},
        {"top_n_sigma": 1.0, "top_k": 0, **PENALTIES},
    ],
    ids=str,
)
def test_tokens_are_those_of_llama_cpps_whole_chain(large, options):
    for seed in range(3):
        said = {"seed": seed, **options}
        prompt = "One two one two three one two"
        assert drawn(large, prompt, 25, **said) == drawn(large, prompt, 25, **said, **PLAIN)


def test_a_bias_comes_before_the_shortcuts(large):
    token = 77_777
    text = large.model.piece(token).decode()
    for options in ({"temperature": 0}, {"top_k": 1}, {"top_k": 40, "temperature": 0.001}):
        assert drawn(large, "One", 3, logit_bias={token: 1000.0}, **options) == [text] * 3


def test_a_bias_that_is_no_number_forbids_its_token_alone(scripted):
    assert drawn(scripted, "count", 3, temperature=0, logit_bias={5: float("nan")}) == [" one", " two", " three"]


def test_a_bias_that_is_infinite_forces_its_token(scripted):
    for options in ({"temperature": 0}, {"temperature": 1e-5}, {"top_k": 0, "temperature": 2.0}):
        for bias in (float("inf"), 1e38):
            (text,) = drawn(scripted, "count", 1, logit_bias={280: bias}, **options)
            assert text == scripted.model.piece(280).decode()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-30}, {"temperature": 1e38}, {"repeat_penalty": 1e38}, {"presence_penalty": -1e300},
        {"frequency_penalty": 1e300, "repeat_last_n": 2**31 - 1}, {"top_k": 2**31 - 1}, {"min_keep": 2**31 - 1},
        {"top_k": 0, "min_keep": 10**6}, {"top_n_sigma": 1e300}, {"dynatemp_range": 1e300, "dynatemp_exponent": 1e300},
        {"adaptive_target": 1.0, "adaptive_decay": 1.0}, {"mirostat": 2, "mirostat_tau": 1e300, "mirostat_eta": 1e300},
        {"samplers": []}, {"samplers": ["adaptive_p"]}, {"samplers": ["top_k", "infill", "dry"]},
        {"dry_multiplier": 1e300, "dry_base": 1e300, "dry_allowed_length": 2**31 - 1},
        {"xtc_probability": 1.0, "xtc_threshold": 0.0, "top_k": 0}, {"top_p": 0.0, "min_p": 1.0, "typical_p": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_no_value_of_a_sampler_ends_the_process(context, stories, options):
    for shortcuts in (True, False):
        text = Generation(context, Sampler(stories, seed=1, shortcuts=shortcuts, **options), [1, 400], max_tokens=20)
        with suppress(LlmError):  # where the sampler leaves no number
            text.run()
        assert text.ended


@pytest.mark.parametrize("samplers", [["top_q"], ["top_k", "top_k"], ["infill"], ["infill", "top_k"]])
def test_samplers_that_make_no_chain_are_refused(stories, samplers):
    with pytest.raises(BadRequest, match="samplers has"):
        Sampler(stories, samplers=samplers)


def test_a_bias_on_no_token_is_refused(stories):
    with pytest.raises(BadRequest):
        Sampler(stories, logit_bias={512: 1.0})
