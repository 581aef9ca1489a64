"""What a local model says, taken apart as its chat template means it: answer, thinking, calls of tools."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
import secrets
import string
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from .constraint import Constraint
from .errors import BadRequest
from .params import Delta, LlmCallParams
from .tools import GrowingCalls, ToolCall

if TYPE_CHECKING:
    from ._llama import ChatParser, ChatPrompt
    from .engine import TextRequest

__all__ = ["AnswerReader", "call_constraint", "chat_request"]

logger = logging.getLogger("tea_llm")

_ID_LETTERS = string.ascii_letters + string.digits
_ID_LENGTH = 9  # what Mistral's templates insist on
_PARTS = re.compile(r'"(?:[^"\\]|\\.)*"|[\w-]+\??|.')  # of a rule in GBNF: a literal, a name, a sign
_ANY_TEXT = re.compile(r"until-\d+\??")  # llama.cpp's names for text before a mark, which may be empty
_TOOL_NAME = re.compile(r"[\w.:/-]{1,128}")  # what templates write it into has other characters as markup


def chat_request(
    request: TextRequest, chat: ChatPrompt, params: LlmCallParams, path: str
) -> tuple[TextRequest, Callable[[], AnswerReader] | None]:
    """The request for the answer to a chat; and what makes a reader of one, None where all of it is content.

    Raises BadRequest for tools that the chat template of the model at `path` doesn't know.
    """
    parser = chat.parser()
    if params.tools and params.tool_choice != "none":
        _check_tools(request, chat, parser, params, path)
        request = dataclasses.replace(request, constraint=call_constraint(chat))
    thinking = _thinking(request, chat, params)
    if thinking is not None:
        request = dataclasses.replace(request, sampling={**request.sampling, "thinking": thinking})
    request = dataclasses.replace(
        request, prompt=chat.tokenize(), stop=(*request.stop, *chat.stops), markup=chat.preserved_tokens
    )
    return request, None if parser.is_plain else lambda: AnswerReader(chat.parser())


def _check_tools(
    request: TextRequest, chat: ChatPrompt, parser: ChatParser, params: LlmCallParams, path: str
) -> None:
    names = [tool["function"]["name"] for tool in params.tools or () if not callable(tool)]
    for name in names:
        if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
            raise BadRequest(f"a tool is called {name!r:.80}; give a name of letters, digits and _ . : / -")
    if len(set(names)) < len(names):
        raise BadRequest(f"{len(names)} tools have {len(set(names))} names: {', '.join(names):.200}; give each its own")
    if request.constraint is not None:
        raise BadRequest(
            f"tools are given, and {request.constraint.kind} says what the answer has to be; give one of them, or "
            "tool_choice: none"
        )
    if not parser.reads_calls:
        raise BadRequest(
            f"tools are given, and the chat template of {path} doesn't know how one is called; use a model that was "
            "trained for it, or leave tools out"
        )
    if not any(name in chat.text for name in names):  # of several one may be named, and is then the only one shown
        _warn_of_silence(path)


@functools.cache
def _warn_of_silence(path: str) -> None:
    logger.warning("The chat template of %s doesn't tell the model of its tools; say in a message what they do", path)


def call_constraint(chat: ChatPrompt) -> Constraint | None:
    """What holds a call of a tool to its schema; it binds the whole answer where one is required."""
    if not chat.grammar:
        return None
    markup = tuple(chat.preserved_tokens)
    if not chat.grammar_lazy:
        return Constraint("gbnf", _without_preface(chat), prefix=chat.generation_prompt, markup=markup)
    triggers = tuple((kind, value) for kind, value, _ in chat.grammar_triggers)
    return Constraint("gbnf", chat.grammar, triggers, markup=markup)


def _without_preface(chat: ChatPrompt) -> str:
    """The grammar of an answer that has to call, without the text that llama.cpp lets come between thinking and call.

    It may be of any length: who has to call a tool could talk until the context is full.
    """
    before, root, after = re.split(r"^(root ::= .*)$", chat.grammar, maxsplit=1, flags=re.MULTILINE)
    thought = max((root.rfind(tag) for tag in chat.thinking_end_tags), default=-1)
    depth, kept = 0, []
    for part in _PARTS.finditer(root):
        depth += (part[0] == "(") - (part[0] == ")")
        if depth or part.start() < thought or not _ANY_TEXT.fullmatch(part[0]):
            kept.append(part[0])
    return before + "".join(kept) + after


def _thinking(
    request: TextRequest, chat: ChatPrompt, params: LlmCallParams
) -> tuple[str, list[str], str, int | None] | None:
    """The argument `thinking` of `_llama.Sampler`; None where nothing depends on the thinking."""
    budget = 0 if params.reasoning is False else params.reasoning_budget
    if not chat.thinking_start_tag or not chat.thinking_end_tags:
        if params.reasoning_budget is not None and chat.supports_thinking:
            raise BadRequest("reasoning_budget is set, and the model's chat template has no tags around its thinking")
        return None
    if budget is None and request.constraint is None:
        return None
    return chat.thinking_start_tag, chat.thinking_end_tags, chat.generation_prompt, budget


class AnswerReader:
    """Makes pieces of a stream, chunks or deltas, of the text that a model generates."""

    def __init__(self, parser: ChatParser) -> None:
        self._parser = parser
        self._calls = GrowingCalls()

    def read(self, text: str, *, end: Literal["whole", "cut"] | None = None) -> str | Delta | None:
        """What is new with this piece of the text, at its `end` all of the rest. None for nothing."""
        content, reasoning, news = self._parser.read(text, end=end)
        if end and self._parser.unread:
            logger.warning(
                "The answer leaves its chat template's format, and is taken as it stands from here on: %.80r",
                self._parser.unread,
            )
        if not reasoning and not news:
            return content or None
        return Delta(content, reasoning, tuple(self._calls.add(_piece(*call)) for call in news))

    def calls(self) -> tuple[ToolCall, ...]:
        """The calls of tools that are whole."""
        return self._calls.calls(cut=True)


def _piece(index: int, call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A piece of a call in the form of OpenAI's streams."""
    if not name:
        return {"index": index, "function": {"arguments": arguments}}
    call_id = call_id or "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_LENGTH))
    return {"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
