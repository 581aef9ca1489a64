"""What comes out of a chat: the answer, the thinking before it and the calls of tools, told apart; by local models."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tea_llm import BadRequest, Delta, EngineFault, LlmCallParams, LocalLlmBackend, ToolCall

pytest.importorskip("tea_llm._llama", reason="tea_llm was built without llama.cpp")
from tea_llm._llama import ChatParser, Model
from tea_llm.answer import AnswerReader

from .reciting_models import TEMPLATE, write_reciting

USER = [{"role": "user", "content": "2 + 3?"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
WEATHER_SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Rome", "Oslo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        "note": {"type": "string", "maxLength": 8},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": WEATHER_SCHEMA}}

THOUGHT, TALK = "I wonder.\n", "Let me see.\n"
CALL = ("<tool_call>", '\n{"name": "add", ', '"arguments": {"a": 2', ', "b": 3}}\n', "</tool_call>")
CALLING = ("<think>", "\nI wonder", ".\n", "</think>", "\n\n", "Let me", " see.\n", *CALL)
CALLED = {"name": "add", "arguments": '{"a": 2, "b": 3}'}
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 50}


@pytest.fixture(scope="module")
def reciting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thinks, talks and calls `add`; and after the result of a tool says "It is 5."."""
    path = tmp_path_factory.mktemp("models") / "reciting.gguf"
    return write_reciting(path, {"\n": CALLING, "<|again|>": ("It is", " 5.")})


@pytest.fixture(scope="module")
def backend(reciting: Path) -> Iterator[LocalLlmBackend]:
    with LocalLlmBackend(reciting, n_parallel=2) as backend:
        yield backend


@pytest.fixture(scope="module")
def model(reciting: Path) -> Model:
    return Model(reciting)


# --- a call of a tool, from end to end --------------------------------------------------------------------------------
def test_an_answer_is_told_apart(backend: LocalLlmBackend) -> None:
    result = backend.chat(USER, tools=[ADD], **GREEDY)
    assert (result.reasoning, result.content) == (THOUGHT, TALK)
    assert result.finish_reason == "tool_calls"
    (call,) = result.tool_calls
    assert call["function"] == CALLED
    assert (call.name, call.arguments) == ("add", {"a": 2, "b": 3})
    assert call["id"]


def test_a_conversation_goes_on_with_the_result_of_a_tool(backend: LocalLlmBackend) -> None:
    first = backend.chat(USER, tools=[ADD], **GREEDY)
    said = {"role": "assistant", "content": first.content, "tool_calls": list(first.tool_calls)}
    heard = {"role": "tool", "tool_call_id": first.tool_calls[0]["id"], "content": "5"}
    result = backend.chat([*USER, said, heard], tools=[ADD], **GREEDY)
    assert (result.content, result.finish_reason, result.tool_calls) == ("It is 5.", "stop", ())


def _deltas_by_for(stream: Any) -> list[Delta]:
    return list(stream.deltas())


def _deltas_by_async_for(stream: Any) -> list[Delta]:
    async def read() -> list[Delta]:
        return [delta async for delta in stream.deltas()]

    return asyncio.run(read())


@pytest.mark.parametrize("read", [_deltas_by_for, _deltas_by_async_for])
def test_deltas_have_all_that_the_result_has(
    backend: LocalLlmBackend, read: Callable[[Any], list[Delta]]
) -> None:
    stream = backend.stream(LlmCallParams("", messages=USER, tools=[ADD], **GREEDY))
    deltas = read(stream)
    assert "".join(d.reasoning for d in deltas) == THOUGHT == stream.result.reasoning
    assert "".join(d.content for d in deltas) == TALK == stream.result.content
    pieces = [piece for d in deltas for piece in d.tool_calls]
    assert {piece["index"] for piece in pieces} == {0}
    assert pieces[0]["id"] == stream.result.tool_calls[0]["id"]
    assert pieces[0]["function"]["name"] == "add"
    assert "".join(piece["function"]["arguments"] for piece in pieces) == CALLED["arguments"]


def test_chunks_are_content_alone(backend: LocalLlmBackend) -> None:
    chunks: list[str] = []
    result = backend.stream(LlmCallParams("", messages=USER, tools=[ADD], **GREEDY), chunks.append)
    assert "".join(chunks) == TALK == result.content
    assert len(result.tool_calls) == 1


def test_deltas_of_a_plain_text_are_its_chunks(shared_models: Path) -> None:
    with LocalLlmBackend(shared_models / "scripted-f16.gguf") as backend:
        deltas = list(backend.stream(LlmCallParams("The", temperature=0)).deltas())
    assert len(deltas) > 5
    assert "".join(d.content for d in deltas) == " quick brown fox jumps over a lazy dog."
    assert not any(d.reasoning or d.tool_calls for d in deltas)


@pytest.mark.parametrize("n_tokens", range(len(CALLING)))
def test_a_text_that_is_cut_says_so_and_has_no_part_of_a_call(backend: LocalLlmBackend, n_tokens: int) -> None:
    result = backend.chat(USER, tools=[ADD], temperature=0, max_tokens=n_tokens)
    assert result.finish_reason == "length"
    assert THOUGHT.startswith(result.reasoning or "")
    assert TALK.startswith(result.content)
    assert [call["function"] for call in result.tool_calls] == ([CALLED] if n_tokens == len(CALLING) - 1 else [])


@pytest.mark.parametrize("n_chunks", range(6))
def test_a_text_that_is_cancelled_has_no_part_of_a_call(backend: LocalLlmBackend, n_chunks: int) -> None:
    stream = backend.stream(LlmCallParams("", messages=USER, tools=[ADD], **GREEDY))
    for i, _ in enumerate(stream.deltas()):
        time.sleep(0.002)  # so that each piece is looked at
        if i == n_chunks:
            stream.cancel()
    assert all(call["function"] == CALLED for call in stream.result.tool_calls)
    assert stream.result.finish_reason in ("cancelled", "tool_calls")


def test_a_call_is_held_to_its_schema(reciting: Path, tmp_path: Path) -> None:
    """The model would name a tool that there is not; it can't."""
    path = write_reciting(tmp_path / "wrong.gguf", {"\n": ("<tool_call>", '\n{"name": "', "multiply", '", ')})
    with LocalLlmBackend(path) as backend:
        result = backend.chat(USER, tools=[ADD], temperature=0, max_tokens=400)
    assert not any(call.name != "add" for call in result.tool_calls)
    assert "multiply" not in result.content


# --- whether and which ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("choice", ["required", "add", {"type": "function", "function": {"name": "add"}}])
def test_a_tool_that_has_to_be_called_is_called_without_talk(backend: LocalLlmBackend, choice: Any) -> None:
    result = backend.chat(USER, tools=[ADD, WEATHER], tool_choice=choice, temperature=0, max_tokens=200)
    assert result.content == ""
    assert result.tool_calls
    if choice != "required":
        assert {call.name for call in result.tool_calls} == {"add"}


def test_tool_choice_none_has_the_call_as_text(backend: LocalLlmBackend) -> None:
    result = backend.chat(USER, tools=[ADD], tool_choice="none", **GREEDY)
    assert (result.tool_calls, result.finish_reason) == ((), "stop")
    assert result.content == TALK + "".join(CALL)


def test_without_tools_a_call_is_text(backend: LocalLlmBackend) -> None:
    assert backend.chat(USER, **GREEDY).content == TALK + "".join(CALL)


@pytest.mark.parametrize("seed", range(8))
def test_a_random_model_that_has_to_call_gives_valid_arguments(random_backend: LocalLlmBackend, seed: int) -> None:
    result = random_backend.chat(
        USER, tools=[WEATHER, ADD], tool_choice="required", temperature=1.5, seed=seed, max_tokens=400,
        reasoning_budget=10,
    )  # fmt: skip
    assert result.tool_calls or result.finish_reason == "length"
    schemas = {"weather": WEATHER_SCHEMA, "add": ADD["function"]["parameters"]}
    for call in result.tool_calls:
        jsonschema.validate(call.arguments, schemas[call.name])


@pytest.fixture(scope="module")
def random_backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalLlmBackend]:
    with LocalLlmBackend(write_reciting(tmp_path_factory.mktemp("models") / "random.gguf", None)) as backend:
        yield backend


def test_a_random_model_calls_now_and_then(random_backend: LocalLlmBackend) -> None:
    """Else the test above would say nothing."""
    options = {"tools": [ADD], "tool_choice": "required", "temperature": 1.5, "max_tokens": 400, "reasoning_budget": 10}
    results = [random_backend.chat(USER, seed=seed, **options) for seed in range(8)]
    assert sum(len(result.tool_calls) for result in results) >= 4


# --- thinking ---------------------------------------------------------------------------------------------------------
def test_thinking_is_told_apart_without_tools(backend: LocalLlmBackend) -> None:
    assert backend.chat(USER, **GREEDY).reasoning == THOUGHT


def test_thinking_is_switched_off(backend: LocalLlmBackend) -> None:
    result = backend.chat(USER, reasoning=False, tools=[ADD], **GREEDY)
    assert (result.reasoning, result.content) == (None, TALK)


def test_thinking_is_switched_off_where_the_template_knows_no_switch(tmp_path: Path) -> None:
    """The prompt of such a template ends with the tag that begins it; so the tag that ends it comes at once."""
    head, _, _ = TEMPLATE.rpartition("{{- '<|im_start|>assistant\\n' }}")
    always = head + "{{- '<|im_start|>assistant\\n<think>\\n' }}\n{%- endif %}"
    answers = {"\n": ("I wonder", ".\n", "</think>", "\n\n", "Yes.")}
    with LocalLlmBackend(write_reciting(tmp_path / "thinks.gguf", answers, always)) as backend:
        thoughtful = backend.chat(USER, **GREEDY)
        assert (thoughtful.reasoning, thoughtful.content) == (THOUGHT, "Yes.")
        result = backend.chat(USER, reasoning=False, **GREEDY)
        assert (result.reasoning, result.content) == (None, "Yes.")


@pytest.mark.parametrize(("budget", "thought"), [(0, None), (1, "I wonder"), (2, THOUGHT), (30, THOUGHT)])
def test_thinking_ends_with_its_budget(backend: LocalLlmBackend, budget: int, thought: str | None) -> None:
    result = backend.chat(USER, reasoning_budget=budget, **GREEDY)
    assert result.reasoning == thought
    assert result.content == TALK + "".join(CALL)


def test_a_call_in_the_midst_of_thinking_is_a_thought(tmp_path: Path) -> None:
    """The grammar of a call begins with the tag, but not there; nor does what the answer has to be bind a thought."""
    thought = ("<think>", "<tool_call>\n", "is what I would say", "</think>", "\n\n", "No.")
    with LocalLlmBackend(write_reciting(tmp_path / "thought.gguf", {"\n": thought})) as backend:
        result = backend.chat(USER, tools=[ADD], **GREEDY)
    assert (result.reasoning, result.content) == ("<tool_call>\nis what I would say", "No.")


@pytest.mark.parametrize("options", [{}, {"reasoning_budget": 3}])
def test_a_tag_in_an_answer_that_has_a_form_begins_no_thinking(tmp_path: Path, options: dict[str, Any]) -> None:
    """The model would write a tag into a text of its JSON, and go on with no JSON at all."""
    pieces = ('{"a": "', "<think>", '" no JSON', "</think>")
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 20}}, "required": ["a"]}
    with LocalLlmBackend(write_reciting(tmp_path / "tag.gguf", {"\n": pieces})) as backend:
        result = backend.chat(USER, schema={**schema, "additionalProperties": False}, **GREEDY, **options)
    assert result.finish_reason == "stop"
    assert str(result.parsed["a"]).startswith("<think>")


def test_a_tag_in_the_arguments_of_a_call_begins_no_thinking(tmp_path: Path) -> None:
    say = {
        "type": "function",
        "function": {
            "name": "say",
            "parameters": {
                "type": "object", "properties": {"a": {"type": "string", "maxLength": 20}}, "required": ["a"],
            },
        },
    }  # fmt: skip
    pieces = ("<tool_call>", '\n{"name": "say", "arguments": {"a": "', "<think>", '" no JSON', "</think>")
    with LocalLlmBackend(write_reciting(tmp_path / "tag.gguf", {"\n": pieces})) as backend:
        result = backend.chat(USER, tools=[say], **GREEDY)
    assert result.content == ""
    assert [set(call.arguments) for call in result.tool_calls] == [{"a"}]


def test_an_answer_that_has_a_form_does_not_end_in_its_thinking(tmp_path: Path) -> None:
    """Else there would be none, and nothing to say that it was not given."""
    head, _, _ = TEMPLATE.rpartition("{{- '<|im_start|>assistant\\n' }}")
    always = head + "{{- '<|im_start|>assistant\\n<think>\\n' }}\n{%- endif %}"
    with LocalLlmBackend(write_reciting(tmp_path / "ends.gguf", {"\n": ("I wonder", " on")}, always)) as backend:
        assert backend.chat(USER, **GREEDY).finish_reason == "stop"
        cut = backend.chat(USER, choices=["yes", "no"], **GREEDY)
        assert (cut.content, cut.finish_reason) == ("", "length")
        result = backend.chat(USER, choices=["yes", "no"], reasoning_budget=5, **GREEDY)
        assert (result.content, result.finish_reason) in (("yes", "stop"), ("no", "stop"))


def test_a_grammar_with_endless_ways_through_a_token_ends_its_text_only(tmp_path: Path) -> None:
    """llama.cpp would try each choice of 26 among 40 optional letters before it refuses the last one."""
    letters = "abcdefghijklmnopqrstuvwxyz!"
    with LocalLlmBackend(write_reciting(tmp_path / "letters.gguf", {"\n": (letters, "x")}), n_threads=1) as backend:
        begin = time.monotonic()
        with pytest.raises(EngineFault, match="too many ways"):
            backend.chat(USER, grammar="root ::= " + "[a-z]? " * 40 + '"."', **GREEDY)
        assert time.monotonic() - begin < 20
        assert backend.chat(USER, **GREEDY).content == letters + "x"


# --- what is refused --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tools": [ADD], "grammar": 'root ::= "a"'}, "give one of them"),
        ({"tools": [{"type": "function", "function": {"name": 'a"b'}}]}, "give a name of letters"),
        ({"tools": [{"type": "function", "function": {"name": "a\nb"}}]}, "give a name of letters"),
        ({"tools": [{"type": "function", "function": {}}]}, "name"),
        ({"tools": [{"type": "function"}]}, "function"),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"tools": [ADD], "tool_choice": "multiply"}, "'multiply'"),
        ({"tool_choice": {"function": {"name": "add"}}}, "tool_choice"),
        ({"tools": [ADD], "parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"reasoning": "high"}, "reasoning"),
        ({"reasoning_budget": -1}, "reasoning_budget"),
        ({"tools": [ADD, ADD]}, "add"),
    ],
)
def test_what_makes_no_sense_is_refused(backend: LocalLlmBackend, options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        backend.chat(USER, **GREEDY, **options)


def test_tools_need_a_template_that_knows_them(shared_models: Path) -> None:
    with LocalLlmBackend(shared_models / "stories260K-chat-q8_0.gguf") as backend:
        with pytest.raises(BadRequest, match="doesn't know how"):
            backend.chat(USER, tools=[ADD])
        with pytest.raises(BadRequest, match="give messages"):
            backend.call(LlmCallParams("2 + 3?", tools=[ADD]))
    with (
        LocalLlmBackend(shared_models / "stories260K-chat-q8_0.gguf", chat_format="chatml") as backend,
        pytest.raises(BadRequest, match="chat_format"),
    ):
        backend.chat(USER, tools=[ADD])


def _nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "properties": {}}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"x": schema}}
    return schema


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object", "properties": {"x": {"enum": [f"name {i}" for i in range(3_000)]}}},
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(300)}},
        {"type": "object", "properties": {'a"b\n\\': {"type": "string"}, "é…\U0001f600": {"enum": ['"', "\n", "\\"]}}},
        {"type": "object", "properties": {"x": {"type": "string", "pattern": "^(a{1,1000}){1,1000}$"}}},
        {"type": "object", "properties": {"x": {"type": "string", "pattern": "("}}},
        {"type": "object", "properties": {"x": {"$ref": "#/$defs/none"}}},
        {"type": "object", "properties": {"x": {"$ref": "#"}}},
        {"type": "object", "properties": {"x": {"type": "nothing"}}},
        {"type": "object", "properties": {"x": {"minimum": 10**30, "type": "integer"}}},
        {"type": "object", "properties": {"x": {"type": "array", "minItems": 10**9}}},
        {"type": "object", "properties": {"x": {"type": "string", "minLength": 10**9}}},
        {"type": "object", "properties": []},
        {"type": "object", "properties": {"x": True}, "required": "x"},
        {"type": 7},
        [],
        "garbage",
        _nested(30),
        _nested(5_000),
    ],
)
def test_no_schema_of_a_tool_ends_the_process(backend: LocalLlmBackend, parameters: Any) -> None:
    """It is used, or refused as a bad request."""
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    try:
        result = backend.chat(USER, tools=[tool], tool_choice="required", temperature=0, max_tokens=5)
    except BadRequest:
        return
    assert result.finish_reason in ("length", "tool_calls", "stop")


# --- the parser alone -------------------------------------------------------------------------------------------------
def _parser(model: Model, tools: Sequence[Any] = (ADD,), **options: Any) -> ChatParser:
    return ChatParser(model.apply_chat_template(USER, tools=tools, **options))


def _read(parser: ChatParser, pieces: Sequence[str], end: Any = "whole") -> tuple[str, str, list[Any]]:
    """All that the parser says of a text that comes in pieces, with time between them."""
    content = reasoning = ""
    calls: dict[int, list[str]] = {}
    for i, piece in enumerate(pieces):
        time.sleep(0.001)
        news = parser.read(piece, end=end if i == len(pieces) - 1 else None)
        content, reasoning = content + news[0], reasoning + news[1]
        for index, call_id, name, arguments in news[2]:
            call = calls.setdefault(index, ["", "", ""])
            call[:] = [call[0] + call_id, call[1] + name, call[2] + arguments]
    return content, reasoning, [tuple(call) for call in calls.values()]


WHOLE = f"<think>\n{THOUGHT}</think>\n\n{TALK}" + "".join(CALL)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_text_means_the_same_in_whichever_pieces_it_comes(model: Model, size: int) -> None:
    pieces = [WHOLE[i : i + size] for i in range(0, len(WHOLE), size)]
    assert _read(_parser(model), pieces) == (TALK, THOUGHT, [("", "add", CALLED["arguments"])])


@pytest.mark.parametrize("n", range(len(WHOLE)))
def test_nothing_is_said_that_has_to_be_taken_back(model: Model, n: int) -> None:
    """Whatever comes next: a beginning of markup is no content, and a beginning of arguments stays one."""
    content, reasoning, calls = _read(_parser(model), [WHOLE[:n]], end="cut")
    assert TALK.startswith(content)
    assert THOUGHT.startswith(reasoning)
    for _, name, arguments in calls:
        assert name == "add"
        assert CALLED["arguments"].startswith(arguments)


@pytest.mark.parametrize("text", ["5 <", "5 <tool", "5 <tool_call", "<th", "a </think", "{", ""])
def test_what_only_began_like_markup_is_content_at_the_end(model: Model, text: str) -> None:
    assert _read(_parser(model), [text]) == (text, "", [])
    assert _read(_parser(model), list(text) or [""])[0] == text


@pytest.mark.parametrize(
    "text",
    [
        'Yes. <tool_call>\n{"name": "multiply", "arguments": {}}\n</tool_call>',
        "<tool_call>\nnonsense</tool_call>",
    ],
)
def test_what_is_no_call_after_all_is_content(model: Model, text: str) -> None:
    parser = _parser(model)
    assert _read(parser, [text]) == (text, "", [])
    assert text.endswith(parser.unread)
    assert parser.unread


def test_text_after_a_call_is_content_too(model: Model) -> None:
    parser = _parser(model)
    assert _read(parser, [WHOLE, " Done."]) == (TALK + "Done.", THOUGHT, [("", "add", CALLED["arguments"])])
    assert parser.unread == "Done."


def test_a_text_nested_too_deep_is_content(model: Model) -> None:
    """llama.cpp's parser is recursive, and 10,000 levels would end the process."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}}
    deep = '<tool_call>\n{"name": "f", "arguments": {"x": ' + "[" * 100_000
    content, _, calls = _read(_parser(model, [tool]), [deep])
    assert content.endswith("[" * 99_000)
    assert not any(ToolCall(id="", function={"name": n, "arguments": a}).is_whole for _, n, a in calls)
    fine = '<tool_call>\n{"name": "f", "arguments": {"x": ' + "[" * 100 + "]" * 100 + "}}\n</tool_call>"
    assert json.loads(_read(_parser(model, [tool]), [fine])[2][0][2])


def test_reading_takes_a_small_part_of_the_time(model: Model) -> None:
    """The parser reads the whole text at each look, so it looks the less often the longer the text is."""
    parser = _parser(model)
    begun, reading_s, n_looks = time.perf_counter(), 0.0, 0
    for _ in range(300):
        before = time.perf_counter()
        n_looks += bool(parser.read("word " * 1_000)[0])
        reading_s += time.perf_counter() - before
        time.sleep(0.0005)
    assert reading_s < 0.4 * (time.perf_counter() - begun)  # all looks: 300 of 1 ms and more
    assert 3 < n_looks < 300


@pytest.mark.parametrize("tools", [None, [ADD]])
def test_a_template_without_markup_has_plain_answers(shared_models: Path, tools: Any) -> None:
    parser = _parser(Model(shared_models / "stories260K-chat-q8_0.gguf", vocab_only=True), tools)
    assert parser.is_plain
    assert not parser.reads_calls


def test_an_answer_that_leaves_its_format_is_logged(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    reader = AnswerReader(_parser(model))
    with caplog.at_level(logging.WARNING, "tea_llm"):
        assert reader.read("<tool_call>\nnonsense", end="whole") == "<tool_call>\nnonsense"
    assert "nonsense" in caplog.text
