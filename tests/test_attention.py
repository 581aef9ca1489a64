"""Attention of our own: right next to llama.cpp's plain one, and the same bits whoever else is in the batch."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tea_llm._llama", reason="tea_llm was built without llama.cpp")
from tea_llm._llama import Context, Generation, Model, Sampler

PROMPT = "Once upon a time, there was a little girl named Lily. She loved to play outside with her red ball. " * 6
OTHERS = ("The big dog", "Tom and his mom went to the park. " * 9, "Once upon a time, there was a girl named Tim")


@pytest.fixture(scope="module", params=["stories260K-q8_0.gguf", "stories260K-f32.gguf", "scripted-f16.gguf"])
def model(request: pytest.FixtureRequest, shared_models: Path) -> Model:
    return Model(shared_models / request.param)


def begin(context: Context, text: str, max_tokens: int = 150) -> Generation:
    forbidden = {token: float("-inf") for token in (context.model.bos, context.model.eos) if token >= 0}
    sampler = Sampler(context.model, temperature=0, logit_bias=forbidden)
    return Generation(context, sampler, context.model.tokenize(text), max_tokens=max_tokens)


def all_of(generations: list[Generation]) -> list[str]:
    texts = dict.fromkeys(generations, "")
    while running := [g for g in generations if not g.ended]:
        for generation, text in generations[0].context.run(running):
            texts[generation] += text
    return list(texts.values())


def test_a_vector_is_that_of_plain_attention(model: Model) -> None:
    vectors = [
        Context(model, embeddings=True, pooling="mean", flash_attn=flash).embed([model.tokenize(PROMPT)]).tolist()[0]
        for flash in (True, False)
    ]
    assert sum(a * b for a, b in zip(*vectors, strict=True)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("n_batch", [1, 7, 64, 512])
def test_a_text_is_the_same_however_its_prompt_is_cut(quantised: Model, n_batch: int, n_threads: int) -> None:
    expected = begin(Context(quantised, n_ctx=1024), PROMPT).run()
    assert begin(Context(quantised, n_ctx=1024, n_batch=n_batch, n_threads=n_threads), PROMPT).run() == expected


def test_a_text_is_the_same_beside_others(quantised: Model) -> None:
    alone = [begin(Context(quantised, n_ctx=1024), text).run() for text in (*OTHERS, PROMPT)]
    together = Context(quantised, n_ctx=4096, n_seq_max=8, n_batch=32)
    assert all_of([begin(together, text) for text in (*OTHERS, PROMPT)]) == alone


@pytest.mark.parametrize("n_before", [1, 20, 60, 150])
def test_a_text_is_the_same_in_cells_that_others_left(quantised: Model, n_before: int) -> None:
    """llama.cpp takes any cell that is free: the text goes on in cells that lie before those of its beginning."""
    expected = begin(Context(quantised, n_ctx=1024), PROMPT, 300).run()
    context = Context(quantised, n_ctx=1024, n_seq_max=2, reuse=False)
    before = begin(context, OTHERS[1], n_before)
    assert all_of([before, begin(context, PROMPT, 300)])[1] == expected


def test_a_text_is_the_same_when_its_beginning_was_known(quantised: Model) -> None:
    expected = begin(Context(quantised, n_ctx=1024, reuse=False), PROMPT).run()
    context = Context(quantised, n_ctx=2048, n_seq_max=8)
    for beginning in (PROMPT[:50], PROMPT[:200], PROMPT):
        begin(context, beginning).run()
    known = begin(context, PROMPT)
    assert known.run() == expected
    assert known.n_cached == known.n_prompt - 1


def test_a_long_text_is_the_same_for_any_number_of_threads(quantised: Model) -> None:
    """Beyond 1,024 cells the threads share one token's cells; with more than that, what each did is added up."""
    texts = {
        begin(Context(quantised, n_ctx=4096, n_threads=n, n_batch=n_batch), "Once upon a time", 3000).run()
        for n, n_batch in ((1, 512), (2, 512), (1, 1))
    }
    assert len(texts) == 1
