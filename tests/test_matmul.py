"""Products of 4-bit weights with many rows at once are what they are row by row."""

from __future__ import annotations

import pytest

pytest.importorskip("tea_llm._llama", reason="tea_llm was built without llama.cpp")
from tea_llm._llama import Context, Generation, Model, Sampler

from .random_models import write_random


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(write_random("gpt2", tmp_path_factory.mktemp("matmul") / "q4_0.gguf", quantised="Q4_0"))


def continuation(model: Model, n_rows: int, seed: int) -> str:
    """A text drawn after a prompt that was read in batches of `n_rows`."""
    context = Context(model, n_batch=n_rows, n_threads=1)
    prompt = [1, *(260 + (seed * 37 + i * i) % 90 for i in range(70))]
    return Generation(context, Sampler(model, temperature=1, top_k=0, seed=seed), prompt, max_tokens=60).run() or ""


@pytest.fixture(scope="module")
def token_by_token(model: Model) -> list[str]:
    return [continuation(model, 1, seed) for seed in range(4)]


@pytest.mark.parametrize("n_rows", [4, 7, 8, 12, 16, 21, 64])
def test_a_prompt_read_many_tokens_at_once_is_the_one_read_token_by_token(model, token_by_token, n_rows):
    assert [continuation(model, n_rows, seed) for seed in range(4)] == token_by_token
