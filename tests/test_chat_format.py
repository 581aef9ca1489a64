"""format_chat_prompt: CONTRACT section 5. The expected texts are written out from it by hand."""

from __future__ import annotations

import pytest

from tea_llm.chat import format_chat_prompt
from tea_llm.errors import BadRequest

SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = {"role": "user", "content": "Hello"}
HI = {"role": "assistant", "content": "Hi!"}
AGAIN = {"role": "user", "content": "And now?"}


@pytest.mark.parametrize(
    ("chat_format", "messages", "prompt"),
    [
        ("chatml", [HELLO], "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"),
        (
            "chatml",
            [SYSTEM, HELLO, HI, AGAIN],
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
            "<|im_start|>assistant\nHi!<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("gemma", [HELLO], "<start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"),
        (
            "gemma",
            [SYSTEM, HELLO, HI, AGAIN],
            "<start_of_turn>user\nBe brief.\n\nHello<end_of_turn>\n<start_of_turn>model\nHi!<end_of_turn>\n"
            "<start_of_turn>user\nAnd now?<end_of_turn>\n<start_of_turn>model\n",
        ),
        (
            "gemma",
            [HI, SYSTEM, HELLO],
            "<start_of_turn>model\nHi!<end_of_turn>\n<start_of_turn>user\nBe brief.\n\nHello<end_of_turn>\n"
            "<start_of_turn>model\n",
        ),
        ("gemma", [SYSTEM], "<start_of_turn>user\nBe brief.<end_of_turn>\n<start_of_turn>model\n"),
        (None, [HELLO], "user: Hello\nassistant: "),
        (None, [SYSTEM, HELLO, HI], "system: Be brief.\nuser: Hello\nassistant: Hi!\nassistant: "),
    ],
)
def test_each_format_writes_what_the_contract_shows(chat_format, messages, prompt):
    assert format_chat_prompt(messages, chat_format) == prompt


def test_content_is_not_trimmed_nor_rewritten():
    content = "  {{ x }} \n\t<b>&amp;</b> \u00e9\U0001f600\n"
    assert format_chat_prompt([{"role": "user", "content": content}], "chatml").count(content) == 1


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert format_chat_prompt([{"role": "user", "content": parts}], None) == "user: Hello\nassistant: "


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "tool_calls": []},
    ],
)
def test_an_assistant_turn_without_text_is_empty(message):
    assert format_chat_prompt([message], "chatml") == "<|im_start|>assistant\n<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "'image_url'"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, "type 'text'"),
        ({"role": "user", "content": ["Hello"]}, "a str"),
        ({"role": "user", "content": 5}, "content is 5"),
        ({"role": "user", "contents": "Hello"}, "'contents'"),
        ({"content": "Hello"}, "'role'"),
        ("Hello", "'role'"),
    ],
)
def test_a_message_that_is_not_text_is_refused(message, says):
    with pytest.raises(BadRequest, match=says):
        format_chat_prompt([message], "chatml")


@pytest.mark.parametrize("chat_format", ["llama-2", "ChatML", ""])
def test_an_unknown_format_names_the_known_ones(chat_format):
    with pytest.raises(BadRequest, match="'chatml', 'gemma', or None"):
        format_chat_prompt([HELLO], chat_format)


@pytest.mark.parametrize("chat_format", [3, ["chatml"], {}])
def test_a_format_that_is_no_name_is_refused(chat_format):
    with pytest.raises(BadRequest, match="choose one of 'chatml', 'gemma'"):
        format_chat_prompt([HELLO], chat_format)


@pytest.mark.parametrize("chat_format", ["chatml", "gemma", None])
@pytest.mark.parametrize("messages", [None, 3, "Hello", HELLO])
def test_messages_that_are_no_list_are_refused(chat_format, messages):
    with pytest.raises(BadRequest, match="give a list"):
        format_chat_prompt(messages, chat_format)
