"""Weights and vocabulary loaded side by side are the model that llama.cpp loads one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tea_llm.errors import Cancelled, ModelLoadError

pytest.importorskip("tea_llm._llama", reason="tea_llm was built without llama.cpp")
from tea_llm._llama import Context, Generation, Loading, Model, Sampler

GREETING = [{"role": "user", "content": "Hello!"}]


def _text(model: Model, prompt: str, **sampling: object) -> str:
    tokens = model.tokenize(prompt, parse_special=True)
    return Generation(Context(model), Sampler(model, seed=1, **sampling), tokens, max_tokens=100).run()


@pytest.fixture(params=["stories260K-f32.gguf", "stories260K-chat-q8_0.gguf", "scripted-f16.gguf"])
def both(request: pytest.FixtureRequest, shared_models: Path) -> tuple[Model, Model]:
    path = shared_models / request.param
    return Model(path, split_load=True), Model(path, split_load=False)


def test_a_split_model_says_the_same_of_itself(both):
    split, plain = both
    for name in ("metadata", "description", "n_ctx_train", "n_embd", "n_layer", "n_head_kv", "n_params", "size_bytes",
                 "has_encoder", "has_decoder", "chat_template", "bos", "eos", "eot", "add_bos", "n_vocab"):  # fmt: skip
        assert getattr(split, name) == getattr(plain, name), name


def test_a_split_model_reads_and_writes_the_same_tokens(both):
    split, plain = both
    text = "Once upon a time, café 🐌 <|im_start|>"
    for parse_special in (True, False):
        tokens = plain.tokenize(text, parse_special=parse_special)
        assert split.tokenize(text, parse_special=parse_special) == tokens
        assert split.detokenize(tokens) == plain.detokenize(tokens)
    assert [split.is_eog(t) for t in range(split.n_vocab)] == [plain.is_eog(t) for t in range(plain.n_vocab)]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 0.8, "repeat_penalty": 1.3, "dry_multiplier": 0.8},
        {"temperature": 0.8, "grammar": 'root ::= [a-z ]+ "."'},
    ],
    ids=["greedy", "drawn", "penalised", "grammar"],
)
def test_a_split_model_generates_the_same_text(both, sampling):
    split, plain = both
    assert _text(split, "Once upon a time", **sampling) == _text(plain, "Once upon a time", **sampling)


def test_a_split_model_renders_the_same_chat(both):
    split, plain = both
    if plain.chat_template is not None:
        assert split.apply_chat_template(GREETING).text == plain.apply_chat_template(GREETING).text


def test_a_split_encoder_gives_the_same_vectors(shared_models):
    path = shared_models / "all-MiniLM-L6-v2-f16.gguf"  # large enough to be split by itself
    vectors = []
    for split_load in (None, False):
        model = Model(path, split_load=split_load)
        vectors.append(Context(model, embeddings=True).embed([model.tokenize("a cat on a mat")]).tolist())
    assert vectors[0] == vectors[1]


@pytest.mark.parametrize("n_bytes", [3, 100, 20_000, 300_000])
def test_a_truncated_file_is_refused_in_the_same_words(shared_models, tmp_path, n_bytes):
    path = tmp_path / "cut.gguf"
    path.write_bytes((shared_models / "stories260K-f32.gguf").read_bytes()[:n_bytes])
    said = []
    for split_load in (True, False):
        with pytest.raises(ModelLoadError) as refused:
            Model(path, split_load=split_load)
        said.append(str(refused.value))
    assert said[0] == said[1]


def test_a_cancelled_split_load_raises_cancelled(shared_models):
    loading = Loading()
    loading.cancel()
    with pytest.raises(Cancelled):
        Model(shared_models / "stories260K-f32.gguf", split_load=True, loading=loading)
