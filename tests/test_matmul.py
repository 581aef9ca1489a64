"""A row's product with weights of any type is what it is alone, however many rows there are.

For all types on CPUs with AVX-512 VNNI, where the products are ours (docs/architecture.md).
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tea_llm._llama", reason="tea_llm was built without llama.cpp")
from tea_llm._llama import Context, Generation, Model, Sampler, system_info

from .random_models import write_random

EVERYWHERE = ("Q4_0",)
OURS = ("F32", "F16", "BF16", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")


@pytest.fixture(scope="module", params=EVERYWHERE + OURS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    quantised: str = request.param
    if quantised in OURS and "AVX512_VNNI = 1" not in system_info():
        pytest.skip(f"this CPU has no products of ours with {quantised}")
    path: Path = tmp_path_factory.mktemp("matmul") / f"{quantised}.gguf"
    return Model(write_random("gpt2", path, n_embd=256, quantised=quantised))


def prompt_of(seed: int, n: int = 70) -> list[int]:
    return [1, *(260 + (seed * 37 + i * i) % 90 for i in range(n))]


def continuation(model: Model, n_rows: int, seed: int) -> tuple[str, bytes]:
    """A text drawn after a prompt that was read in batches of `n_rows`; what the KV cache has of both."""
    context = Context(model, n_batch=n_rows, n_threads=1)
    sampler = Sampler(model, temperature=1, top_k=0, seed=seed)
    generation = Generation(context, sampler, prompt_of(seed), max_tokens=60, save=True)
    text = generation.run() or ""
    return text, state_of(generation)


def state_of(generation: Generation) -> bytes:
    """Keys and values (F16): what comes before them says in which sequence they were."""
    known = generation.take_state()
    assert known is not None
    tokens, state = known
    model = generation.context.model
    return state[-len(tokens) * model.n_layer * 2 * model.n_embd * 2 :]


@pytest.fixture(scope="module")
def token_by_token(model: Model) -> list[tuple[str, bytes]]:
    return [continuation(model, 1, seed) for seed in range(2)]


@pytest.mark.parametrize("n_rows", [4, 7, 8, 12, 16, 21, 64])
def test_a_prompt_read_many_tokens_at_once_is_the_one_read_token_by_token(model, token_by_token, n_rows):
    assert [continuation(model, n_rows, seed) for seed in range(2)] == token_by_token


@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_text_is_the_same_bits_beside_others_and_after_a_beginning_that_was_found(model, token_by_token, n_threads):
    context = Context(model, n_ctx=2048, n_seq_max=12, n_threads=n_threads)
    for n in (20, 61, 70):  # the next prompt's beginning: all but 50, 9 and no tokens
        Generation(context, Sampler(model, temperature=0), prompt_of(0, n), max_tokens=1).run()
    others = [
        Generation(context, Sampler(model, temperature=0), prompt_of(seed, 9 + seed), max_tokens=20 + 4 * seed)
        for seed in range(2, 11)
    ]
    text = Generation(context, Sampler(model, temperature=1, top_k=0, seed=0), prompt_of(0), max_tokens=60, save=True)
    said = ""
    while not text.ended:
        said += dict(context.run([*(other for other in others if not other.ended), text])).get(text, "")
    assert text.n_cached == 70
    assert (said, state_of(text)) == token_by_token[0]
