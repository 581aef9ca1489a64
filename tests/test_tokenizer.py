"""Golden tokenisations: llama.cpp's own vocabularies, texts and tokens, read as its test-tokenizer-0.cpp does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("tea_llm._llama", reason="tea_llm was built without llama.cpp")
from tea_llm._llama import Model

VOCABS = Path(os.environ.get("TEA_LLM_VOCABS") or Path(__file__).parents[1] / "build" / "vocabs")
NAMES = [path.name.removesuffix(".inp") for path in sorted(VOCABS.glob("ggml-vocab-*.gguf.inp"))]
needs_vocabs = pytest.mark.skipif(
    not NAMES, reason=f"no vocabularies at {VOCABS}; run ci/fetch-vocabs, or set TEA_LLM_VOCABS"
)


@needs_vocabs
def test_llama_cpp_brings_a_vocabulary_of_each_kind():
    assert len(NAMES) >= 15
    assert {"ggml-vocab-llama-spm.gguf", "ggml-vocab-qwen2.gguf", "ggml-vocab-bert-bge.gguf"} <= set(NAMES)


@needs_vocabs
@pytest.mark.parametrize("name", NAMES or ["none"])
def test_every_text_becomes_the_tokens_llama_cpp_says(name):
    model = Model(VOCABS / name, vocab_only=True)
    texts = (VOCABS / f"{name}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (VOCABS / f"{name}.out").read_text().splitlines()
    if not texts[-1]:  # test-tokenizer-0.cpp takes no text after the last separator
        texts.pop()
    assert len(texts) == len(lines) > 40
    for text, line in zip(texts, lines, strict=True):
        assert model.tokenize(text, add_special=False) == [int(token) for token in line.split()], repr(text)


def test_tokens_of_a_long_text_are_all_there(shared_models):
    model = Model(shared_models / "stories260K-f32.gguf", vocab_only=True)
    text = "é🙂" * 5000  # a byte to a token, more than the first guess at their number
    tokens = model.tokenize(text, add_special=False)
    assert len(tokens) >= 25_000
    assert model.detokenize(tokens) == text


def test_special_tokens_are_read_and_written_only_on_demand(shared_models):
    model = Model(shared_models / "scripted-f16.gguf", vocab_only=True)
    im_start, im_end = 259, 260
    assert model.tokenize("<|im_start|>", parse_special=True) == [1, im_start]
    assert im_start not in model.tokenize("<|im_start|>")
    assert model.tokenize("The")[0] == model.bos == 1
    assert model.tokenize("The", add_special=False) == model.tokenize("The")[1:]
    assert model.detokenize([im_start, im_end]) == ""
    assert model.detokenize([im_start, im_end], unparse_special=True) == "<|im_start|><|im_end|>"
    assert (model.piece(im_end), model.piece(im_end, special=True)) == (b"", b"<|im_end|>")
    assert [model.is_control(token) for token in (1, im_end, 300)] == [True, True, False]
    assert [model.is_eog(token) for token in (2, im_end, 1, 300)] == [True, True, True, False]


def test_bytes_that_are_no_character_become_one_replacement_character(shared_models):
    model = Model(shared_models / "scripted-f16.gguf", vocab_only=True)
    snail = [byte + 3 for byte in "🐌".encode()]  # token 3 is byte 0
    assert [model.piece(token) for token in snail] == [bytes([byte]) for byte in "🐌".encode()]
    assert model.detokenize(snail) == "🐌"
    assert model.detokenize(snail[:3]) == "\ufffd"


def test_a_nul_character_does_not_end_the_text(shared_models):
    model = Model(shared_models / "scripted-f16.gguf", vocab_only=True)
    assert model.detokenize(model.tokenize("a\0b", add_special=False)) == "a\0b"
