"""From messages to the text a model reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from .errors import BadRequest
from .params import UNSET, Message

__all__ = ["PromptPart", "chat_parts", "checked_message", "format_chat_prompt", "message_text"]

_Turn: TypeAlias = tuple[str, str]
"""The role and the text of one message."""

PromptPart: TypeAlias = tuple[str, bool]
"""Text of a prompt, and whether control tokens are read in it."""


def checked_message(message: Message) -> Message:
    """A message for a model's own template, which may have its own way to join text parts.

    Raises BadRequest for content that isn't text.
    """
    text = message_text(message)
    content = message.get("content")
    return {**message, "content": [dict(part) for part in content] if isinstance(content, (list, tuple)) else text}


def message_text(message: Message) -> str:
    """The text of a message's `content`: a string as it is, text parts joined, "" where it is None.

    Raises BadRequest for content that isn't text.
    """
    content = message.get("content", "" if "tool_calls" in message else UNSET)
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)):
        return "".join(_part_text(part) for part in content)
    if content is UNSET:
        raise BadRequest(f"A message has no 'content', only {sorted(map(str, message))}; give its text there")
    raise BadRequest(f"A message's content is {content!r}; give a text, or a list of text parts")


def _part_text(part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = repr(part.get("type")) if isinstance(part, Mapping) else f"a {type(part).__name__}"
    raise BadRequest(
        f"A message holds a part of type {kind}; a local model reads only {{'type': 'text', 'text': …}}, for others "
        "use backend: api"
    )


def format_chat_prompt(messages: Sequence[Message], chat_format: str | None) -> str:
    """`messages` as one prompt that ends where the assistant's answer begins, for models without a template.

    `chat_format` is "chatml", "gemma", or None for plain `role: content` lines.
    Raises BadRequest for another format, and for content that isn't text.
    """
    return "".join(text for text, _ in chat_parts(messages, chat_format))


def chat_parts(messages: Sequence[Message], chat_format: str | None) -> list[PromptPart]:
    """`format_chat_prompt` in parts: control tokens are those of the format, and none that a message spells out."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise BadRequest(f"messages is {messages!r:.60}; give a list of {{'role': …, 'content': …}}")
    if not isinstance(chat_format, str | None) or chat_format not in _FORMATS:
        known = ", ".join(repr(name) for name in _FORMATS if name)
        raise BadRequest(f"chat_format is {chat_format!r}; choose one of {known}, or None for plain text")
    return list(_FORMATS[chat_format]([_turn(message) for message in messages]))


def _turn(message: Message) -> _Turn:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise BadRequest(f"A message is {message!r}; each is a mapping with a 'role' and a 'content'")
    return message["role"], message_text(message)


def _chatml(turns: Sequence[_Turn]) -> Iterator[PromptPart]:
    for role, text in turns:
        yield "<|im_start|>", True
        yield f"{role}\n{text}", False
        yield "<|im_end|>\n", True
    yield "<|im_start|>assistant\n", True


def _gemma(turns: Sequence[_Turn]) -> Iterator[PromptPart]:
    """Gemma knows no system role: such a message goes into the user turn that follows it."""
    waiting = ""  # system text without its user turn yet
    for role, text in turns:
        if role in ("system", "developer"):
            waiting += text + "\n\n"
        elif role == "assistant":
            yield from _gemma_turn("model", text)
        else:
            yield from _gemma_turn(role, waiting + text)
            waiting = ""
    if waiting:
        yield from _gemma_turn("user", waiting.removesuffix("\n\n"))
    yield "<start_of_turn>model\n", True


def _gemma_turn(role: str, text: str) -> Iterator[PromptPart]:
    yield "<start_of_turn>", True
    yield f"{role}\n{text}", False
    yield "<end_of_turn>\n", True


def _plain(turns: Sequence[_Turn]) -> Iterator[PromptPart]:
    for role, text in turns:
        yield f"{role}: {text}\n", False
    yield "assistant: ", False


_FORMATS: Mapping[str | None, Callable[[Sequence[_Turn]], Iterator[PromptPart]]] = {
    "chatml": _chatml,
    "gemma": _gemma,
    None: _plain,
}
