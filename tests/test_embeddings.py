"""Vectors: all-MiniLM-L6-v2 against sentence-transformers' own, alone, in batches and in any order."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Iterator

import pytest

from tea_llm import LlmCallParams, LocalLlmBackend
from tea_llm.errors import BadRequest, ContextOverflow, ModelError

pytest.importorskip("tea_llm._llama", reason="tea_llm was built without llama.cpp")

MINILM, SCRIPTED, STORIES = "all-MiniLM-L6-v2-f16.gguf", "scripted-f16.gguf", "stories260K-f32.gguf"


@pytest.fixture(scope="module")
def minilm(shared_models) -> Iterator[LocalLlmBackend]:
    with LocalLlmBackend(shared_models / MINILM, n_threads=1) as backend:
        yield backend


@pytest.fixture(scope="module")
def sentences(shared_models) -> Iterator[LocalLlmBackend]:
    """The model as sentence-transformers runs it: the reference's longest text is cut there at 256 tokens."""
    with LocalLlmBackend(shared_models / MINILM, n_ctx=256, n_threads=1) as backend:
        yield backend


@pytest.fixture(scope="module")
def scripted(shared_models) -> Iterator[LocalLlmBackend]:
    with LocalLlmBackend(shared_models / SCRIPTED) as backend:
        yield backend


@pytest.fixture(scope="module")
def reference(shared_models) -> dict[str, list[float]]:
    """Vector by text."""
    found = json.loads((shared_models / "all-MiniLM-L6-v2.reference.json").read_text())
    assert len(found["texts"]) == len(set(found["texts"])) == 20
    return dict(zip(found["texts"], found["embeddings"], strict=True))


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def largest_difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


# --- against the reference --------------------------------------------------------------------------------------------
def test_each_text_alone_has_sentence_transformers_vector(sentences, reference):
    for text, vector in reference.items():
        assert cosine(sentences.embed(text, truncate=True), vector) >= 0.9995, text


def test_all_texts_at_once_have_sentence_transformers_vectors(sentences, reference):
    vectors = sentences.embed(list(reference), truncate=True)
    for (text, expected), found in zip(reference.items(), vectors, strict=True):
        assert cosine(found, expected) >= 0.9995, text


def test_the_order_of_the_texts_is_the_order_of_the_vectors(sentences, reference):
    texts = list(reference) * 4  # more than one batch holds
    random.Random(1).shuffle(texts)
    for text, vector in zip(texts, sentences.embed(texts, truncate=True), strict=True):
        assert cosine(vector, reference[text]) >= 0.9995, text


def test_a_text_has_the_same_vector_alone_and_in_a_batch(minilm, reference):
    texts = list(reference)
    for text, vector in zip(texts, minilm.embed(texts), strict=True):
        assert largest_difference(minilm.embed(text), vector) < 1e-3, text


def test_the_async_twin_gives_the_same_vectors(minilm, reference):
    texts = list(reference)[:3]
    assert asyncio.run(minilm.aembed(texts)) == minilm.embed(texts)


# --- shape ------------------------------------------------------------------------------------------------------------
def test_one_text_gives_a_vector_and_a_list_gives_a_list(minilm):
    one, several = minilm.embed("x"), minilm.embed(["x", "y"])
    assert [type(x) for x in one] == [float] * 384
    assert [len(vector) for vector in several] == [384, 384]


def test_a_vector_has_length_one_unless_told_otherwise(minilm):
    one, raw = minilm.embed("A man is eating food."), minilm.embed("A man is eating food.", normalize=False)
    assert math.hypot(*one) == pytest.approx(1, abs=1e-5)
    assert abs(math.hypot(*raw) - 1) > 0.1
    assert cosine(one, raw) == pytest.approx(1, abs=1e-6)


def test_dimensions_cut_before_the_vector_is_normalised(minilm):
    whole = minilm.embed("A man is eating food.")
    cut = minilm.embed("A man is eating food.", dimensions=64)
    assert len(cut) == 64
    assert math.hypot(*cut) == pytest.approx(1, abs=1e-5)
    assert cosine(cut, whole[:64]) == pytest.approx(1, abs=1e-6)
    raw = minilm.embed("A man is eating food.", dimensions=64, normalize=False)
    assert raw == minilm.embed("A man is eating food.", normalize=False)[:64]
    assert minilm.embed("x", dimensions=384) == pytest.approx(minilm.embed("x"), abs=1e-6)


@pytest.mark.parametrize("dimensions", [0, -1, 385])
def test_dimensions_that_a_vector_has_not_are_refused(minilm, dimensions):
    with pytest.raises(BadRequest, match=str(dimensions)):
        minilm.embed("x", dimensions=dimensions)


def test_as_numpy_gives_the_same_numbers_in_an_array_of_its_own(minilm):
    np = pytest.importorskip("numpy")
    for options in ({}, {"dimensions": 64}, {"normalize": False}, {"dimensions": 64, "normalize": False}):
        array = minilm.embed(["x", "y"], as_numpy=True, **options)
        assert (array.dtype, array.ndim, len(array)) == (np.float32, 2, 2)
        np.testing.assert_allclose(array, minilm.embed(["x", "y"], **options), atol=1e-6)
        array[0, 0] = 7  # writable, and nobody else's
    assert minilm.embed("x", as_numpy=True).shape == (384,)
    assert minilm.embed([], as_numpy=True).shape == (0, 384)


def test_an_empty_list_gives_an_empty_list(minilm):
    result = minilm.embeddings([])
    assert result.embeddings == []
    assert result.usage.total_tokens == 0


def test_the_result_says_who_answered_and_counts_the_tokens(minilm):
    result = minilm.embeddings(["x", "A man is eating food."])
    assert (result.model, result.backend) == ("all-MiniLM-L6-v2-f16", "local")
    # [CLS] x [SEP]; [CLS] a man is eating food . [SEP]
    assert result.usage.as_dict() == {"prompt_tokens": 11, "completion_tokens": 0, "total_tokens": 11}


def test_progress_counts_the_texts(minilm):
    done: list[int] = []
    minilm.embeddings(["word " * 100] * 20, on_progress=done.append)
    assert done[-1] == 20
    assert done == sorted(set(done))
    assert len(done) > 1


def test_what_is_no_text_is_refused(minilm):
    for wrong in ([1], ["x", None], [["x"]]):
        with pytest.raises(BadRequest, match="embed takes"):
            minilm.embed(wrong)


# --- long and empty texts ---------------------------------------------------------------------------------------------
def test_a_text_that_is_too_long_says_both_numbers(minilm):
    # the model takes 512 tokens, of which two are [CLS] and [SEP]
    assert len(minilm.embed("word " * 510)) == 384
    with pytest.raises(ContextOverflow, match=r"602 tokens.* 512") as refused:
        minilm.embed(["short", "word " * 600])
    assert (refused.value.n_prompt, refused.value.n_ctx) == (602, 512)
    assert "text 1" in str(refused.value)


def test_truncate_keeps_the_beginning_and_the_closing_token(minilm):
    cut = minilm.embed("word " * 510 + "zebra " * 90, truncate=True)
    assert largest_difference(cut, minilm.embed("word " * 510)) < 1e-3
    assert len(minilm.embed("short", truncate=True)) == 384


def test_a_batch_of_mixed_lengths_keeps_each_vector(minilm):
    texts = ["word " * n for n in (500, 1, 300, 2, 510, 50)]
    for text, vector in zip(texts, minilm.embed(texts), strict=True):
        assert largest_difference(minilm.embed(text), vector) < 1e-3


def test_an_empty_text_has_the_vector_of_its_two_special_tokens(minilm, reference):
    assert cosine(minilm.embed(""), reference[""]) >= 0.9995
    assert len(minilm.embed(["", "x", ""])) == 3


# --- models that generate ---------------------------------------------------------------------------------------------
def test_a_generative_model_embeds_by_mean_pooling(scripted):
    # One-hot vectors in, a layer that adds nothing, and RMSNorm: a token is sqrt(448) at its own place. Their mean over
    # BOS and the text's tokens, by hand:
    tokens = [1, *scripted._open_engine().model.tokenize("count one two", add_special=False)]
    expected = [tokens.count(i) / len(tokens) * math.sqrt(448) for i in range(448)]
    assert scripted.embed("count one two", normalize=False) == pytest.approx(expected, abs=0.05)
    assert cosine(scripted.embed("count one two"), expected) > 0.9999


def test_texts_of_a_generative_model_do_not_see_each_other(scripted, shared_models):
    texts = ["Once upon a time", "Lily", "the cat sat on the mat", "Tom ran home."]
    with LocalLlmBackend(shared_models / STORIES) as stories:
        for text, vector in zip(texts, stories.embed(texts), strict=True):
            assert largest_difference(stories.embed(text), vector) < 1e-3
            assert len(vector) == 64


def test_pooling_is_chosen_by_name(shared_models):
    vectors = {}
    for pooling in ("mean", "cls", "last"):
        with LocalLlmBackend(shared_models / SCRIPTED, pooling=pooling) as backend:
            vectors[pooling] = backend.embed("count one two")
            tokens = backend._open_engine().model.tokenize("count one two")
    assert max(range(448), key=vectors["cls"].__getitem__) == tokens[0]
    assert max(range(448), key=vectors["last"].__getitem__) == tokens[-1]
    assert vectors["mean"] not in (vectors["cls"], vectors["last"])


@pytest.mark.parametrize("pooling", ["none", "rank"])
def test_a_pooling_that_makes_no_vector_of_a_text_is_refused(shared_models, pooling):
    with LocalLlmBackend(shared_models / SCRIPTED, pooling=pooling) as backend, pytest.raises(BadRequest):
        backend.embed("x")


def test_an_empty_text_has_a_vector_of_a_generative_model_too(scripted):
    vector = scripted.embed("")
    assert math.hypot(*vector) == pytest.approx(1, abs=1e-5)
    assert vector == scripted.embed("")


def test_a_model_writes_between_two_embeddings(scripted):
    first = scripted.embed("count one two")
    assert scripted.call(LlmCallParams("The", temperature=0)).content == " quick brown fox jumps over a lazy dog."
    assert scripted.embed("count one two") == first


def test_an_encoder_says_that_it_can_not_write(minilm):
    with pytest.raises(ModelError, match="encoder"):
        minilm.call(LlmCallParams("The"))
    assert len(minilm.embed("x")) == 384


def test_an_embedding_model_beside_the_text_model_answers_embeddings(shared_models, reference):
    with LocalLlmBackend(shared_models / SCRIPTED, embedding_model_path=shared_models / MINILM) as backend:
        assert cosine(backend.embed("x"), reference["x"]) >= 0.9995
        assert backend.embeddings(["x"]).model == "all-MiniLM-L6-v2-f16"
        assert backend.call(LlmCallParams("The", temperature=0)).model == "scripted-f16"
