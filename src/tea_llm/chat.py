"""From messages to the text a model reads."""

from __future__ import annotations

from collections.abc import Sequence

from .params import Message

__all__ = ["format_chat_prompt"]


def format_chat_prompt(messages: Sequence[Message], chat_format: str | None) -> str:
    """`messages` as one prompt. Skeleton: filled in next."""
    raise NotImplementedError
