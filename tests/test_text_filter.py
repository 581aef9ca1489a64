"""What is handed out of a generation: no part of a stop string, and no part of a character."""

from __future__ import annotations

import codecs
import itertools
from random import Random

import pytest

pytest.importorskip("tea_llm._llama", reason="tea_llm was built without llama.cpp")
from tea_llm._llama import Context, Generation, Model, Sampler

FOX = " quick brown fox jumps over a lazy dog."


@pytest.fixture(scope="module")
def context(shared_models) -> Context:
    """Says " quick brown fox …" after "The", a token to a word; anything byte by byte where a grammar asks for it."""
    return Context(Model(shared_models / "scripted-f16.gguf"))


def chunks(context: Context, prompt: str = "The", *, stop=(), max_tokens=None, grammar=None) -> tuple[list[str], str]:
    """The chunks of a streamed generation and why it ended; the whole text has been compared with them."""
    model = context.model

    def generation() -> Generation:
        sampler = Sampler(model, temperature=0, grammar=grammar)
        return Generation(context, sampler, model.tokenize(prompt), stop=stop, max_tokens=max_tokens)

    streamed = generation()
    found = list(iter(lambda: streamed.run(stream=True), None))
    whole = generation()
    assert (whole.run() or "") == "".join(found)
    assert whole.run() is None
    assert whole.finish_reason == streamed.finish_reason
    return found, streamed.finish_reason


def spelled(text: str) -> str:
    """A grammar that makes the model say `text`; what has no token of its own comes byte by byte."""
    return f'root ::= "{text}"'


def recited(context: Context, text: bytes) -> list[str]:
    """The chunks of `text`, whose bytes differ: each has a token, a bias by its place, and is said only once."""
    model = context.model
    bias = {byte + 3: 1e4 * (len(text) - i) for i, byte in enumerate(text)}  # token 3 is byte 0
    sampler = Sampler(model, temperature=0, logit_bias=bias, presence_penalty=1e6)
    generation = Generation(context, sampler, model.tokenize("The"), max_tokens=len(text))
    return list(iter(lambda: generation.run(stream=True), None))


# --- stop strings -----------------------------------------------------------------------------------------------------
def test_without_a_stop_string_each_token_is_a_chunk(context):
    words = [" quick", " brown", " fox", " jumps", " over", " a", " lazy", " dog", "."]
    assert chunks(context) == (words, "stop")


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ([" fox"], [" quick", " brown"]),  # one token
        (["fox"], [" quick", " brown", " "]),  # the end of one
        (["own fo"], [" quick", " br"]),  # over two
        (["k brown fox j"], [" quic"]),  # over four
        (["wn fox jumps over a lazy d"], [" quick", " bro"]),  # over seven
        ([" dog."], [" quick", " brown", " fox", " jumps", " over", " a", " lazy"]),  # the last
    ],
)
def test_a_stop_string_split_over_tokens_never_leaks(context, stop, expected):
    assert chunks(context, stop=stop) == (expected, "stop")


def test_no_stop_string_leaks_wherever_it_begins_and_ends(context):
    for begin, end in itertools.combinations(range(len(FOX) + 1), 2):
        stop = FOX[begin:end]
        found, reason = chunks(context, stop=[stop])
        assert ("".join(found), reason) == (FOX[: FOX.index(stop)], "stop")
        assert all(found)


def test_what_began_like_a_stop_string_and_went_on_otherwise_is_handed_out(context):
    found, _ = chunks(context, stop=[" brown cow"])
    assert found == [" quick", " brown fox", " jumps", " over", " a", " lazy", " dog", "."]


def test_a_stop_string_that_was_only_begun_is_text_at_the_end(context):
    assert chunks(context, stop=["dog. And"]) == ([*chunks(context)[0][:7], " ", "dog."], "stop")
    assert chunks(context, stop=[" quick brown foxes"], max_tokens=2) == ([" quick brown"], "length")


def test_a_stop_string_at_the_very_start_leaves_no_chunk(context):
    assert chunks(context, stop=[" "]) == ([], "stop")
    assert chunks(context, stop=[" quick"]) == ([], "stop")
    assert chunks(context, stop=[" quick brown"]) == ([], "stop")


def test_of_overlapping_stop_strings_the_first_in_the_text_ends_it(context):
    assert chunks(context, stop=["brown fox", "quick brown"]) == ([" "], "stop")
    assert chunks(context, stop=["fox jumps", "brown fox"]) == ([" quick", " "], "stop")


def test_of_several_stop_strings_in_one_token_the_first_in_the_text_ends_it(context):
    for stop in (["fox", "ox"], ["ox", "fox"], ["zebra", "fox"], ["fox", "zebra"]):
        assert chunks(context, stop=stop) == ([" quick", " brown", " "], "stop")


def test_of_a_stop_string_and_its_prefix_the_prefix_ends_the_text(context):
    for stop in (["fox", "fox jumps"], ["fox jumps", "fox"], ["fox", "fo"], ["f", "fox", "fox jumps over"]):
        assert chunks(context, stop=stop) == ([" quick", " brown", " "], "stop")


def test_a_longer_stop_string_that_fails_does_not_hide_the_one_inside_it(context):
    assert chunks(context, stop=["brown fox runs", "fox j"]) == ([" quick", " ", "brown "], "stop")


def test_a_stop_string_that_repeats_itself_is_found(context):
    grammar = spelled("aab aaab")
    assert "".join(chunks(context, grammar=grammar)[0]) == "aab aaab"
    assert "".join(chunks(context, grammar=grammar, stop=["aaab"])[0]) == "aab "
    assert "".join(chunks(context, grammar=grammar, stop=["ab a"])[0]) == "a"


def test_the_tokens_of_a_stop_string_count(context):
    model = context.model
    generation = Generation(context, Sampler(model, temperature=0), model.tokenize("The"), stop=["fox"])
    generation.run()
    assert (generation.n_generated, generation.finish_reason) == (3, "stop")


def test_a_stop_string_of_many_bytes_is_found_byte_by_byte(context):
    assert chunks(context, grammar=spelled("é🐌ü"), stop=["🐌"]) == (["é"], "stop")
    assert chunks(context, grammar=spelled("é🐌ü"), stop=["é🐌"]) == ([], "stop")
    # 🐌 and 🐍 differ in the last byte only
    assert chunks(context, grammar=spelled("é🐌ü"), stop=["🐍"]) == (["é", "🐌", "ü"], "stop")


# --- characters -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["é", "€", "🐌", "éé", "a€b", "🐌🐍", "日本語", "👩‍👩‍👧", "naïve café — 🙂!"])
def test_a_character_of_many_tokens_arrives_whole(context, text):
    found, reason = chunks(context, grammar=spelled(text))
    assert ("".join(found), reason) == (text, "stop")
    assert "\ufffd" not in "".join(found)
    assert all(len(chunk) == 1 for chunk in found)


@pytest.mark.parametrize(("text", "n_bytes"), [("é", 2), ("€", 3), ("🐌", 4)])
def test_an_unfinished_character_at_the_end_is_left_out(context, text, n_bytes):
    assert len(text.encode()) == n_bytes
    for n in range(1, n_bytes):
        assert chunks(context, grammar=spelled(text), max_tokens=n) == ([], "length")
        assert chunks(context, grammar=spelled(f"a{text}"), max_tokens=n + 1) == (["a"], "length")
    assert chunks(context, grammar=spelled(text), max_tokens=n_bytes) == ([text], "length")


def test_bytes_that_are_no_characters_are_replaced_as_python_replaces_them(context):
    random = Random(0)
    # the first and last bytes of each length, of what is too long, of surrogates, and what is never a byte of UTF-8
    alphabet = bytes.fromhex("41 80 8f 90 9f a0 bf c0 c1 c2 c3 df e0 e2 ed ef f0 f4 f5 ff")
    for _ in range(2000):
        text = bytes(random.sample(alphabet, k=random.randint(1, 6)))
        # an unfinished character at the end is left out
        whole = codecs.getincrementaldecoder("utf-8")("replace").decode(text)
        assert "".join(recited(context, text)) == whole, text
