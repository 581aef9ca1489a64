"""Tools: how functions are described, how they are asked for over an API, and how `llm.tools` runs them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from tea_llm import ApiLlmBackend, BadRequest, LlmCallParams, ToolCall, register_actions
from tea_llm.tools import GrowingCalls, check_arguments, function_tool

from .api_server import ApiServer, chat, delta, sse, stream
from .conftest import serving
from .reciting_models import write_reciting

pytestmark = pytest.mark.usefixtures("bare_environment")

USER = [{"role": "user", "content": "2 + 3?"}]
CALL = ("<tool_call>", '\n{"name": "add", ', '"arguments": {"a": 2', ', "b": 3}}\n', "</tool_call>")
THINKING = ("<think>", "\nI wonder", ".\n", "</think>", "\n\n", "Let me", " see.\n")


def add(a: int, b: int = 0) -> int:
    """Add two
    numbers.

    More for people than for models.
    """
    return a + b


ADD_PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
ADD = {"type": "function", "function": {"name": "add", "description": "Add two numbers.", "parameters": ADD_PARAMETERS}}


# --- functions as tools -----------------------------------------------------------------------------------------------
def test_a_function_is_described_by_its_name_its_docstring_and_its_types() -> None:
    assert function_tool(add) == ADD


@pytest.mark.parametrize(
    ("hint", "schema"),
    [
        (str, {"type": "string"}),
        (float, {"type": "number"}),
        (bool, {"type": "boolean"}),
        (Any, {}),
        (list, {"type": "array"}),
        (dict, {"type": "object"}),
        (list[int], {"type": "array", "items": {"type": "integer"}}),
        (dict[str, float], {"type": "object", "additionalProperties": {"type": "number"}}),
        (Literal["C", "F"], {"enum": ["C", "F"]}),
        (int | None, {"anyOf": [{"type": "integer"}, {"type": "null"}]}),
        (Annotated[str, "a city"], {"type": "string", "description": "a city"}),
        (list[Annotated[Literal[1, 2], "one"]], {"type": "array", "items": {"enum": [1, 2], "description": "one"}}),
    ],
)
def test_a_type_has_its_schema(hint: Any, schema: dict[str, Any]) -> None:
    def tool(x) -> None:  # type: ignore[no-untyped-def]
        pass

    tool.__annotations__["x"] = hint
    assert function_tool(tool)["function"]["parameters"]["properties"] == {"x": schema}


def test_a_parameter_without_a_type_takes_anything() -> None:
    def tool(x, y=1):  # type: ignore[no-untyped-def]
        pass

    parameters = function_tool(tool)["function"]["parameters"]
    assert (parameters["properties"], parameters["required"]) == ({"x": {}, "y": {}}, ["x"])


def _unknown_type(x: Path) -> None: ...
def _unreadable(x: NoSuchType) -> None: ...  # type: ignore[name-defined]  # noqa: F821
def _rest(*x: int) -> None: ...
def _by_place(x: int, /) -> None: ...


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (_unknown_type, "x of _unknown_type has the type .*Path"),
        (_unreadable, "NoSuchType"),
        (_rest, r"_rest takes \*x"),
        (_by_place, "_by_place takes x"),
        (lambda x: x, "no name"),
    ],
)
def test_a_function_that_can_not_be_described_is_refused(function: Callable[..., Any], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        LlmCallParams("", tools=[function])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"a": 1, "b": 2}, None),
        ({"a": 1.0}, None),
        ({"a": 1.5}, "'a' of add is 1.5; it has to be of type integer"),
        ({"a": True}, "of type integer"),
        ({"a": "1"}, "of type integer"),
        ({"a": None}, "of type integer"),
        ({}, "needs 'a'"),
        ({"a": 1, "c": 2}, "no parameter 'c'"),
    ],
)
def test_arguments_are_checked_for_the_model_to_read(arguments: dict[str, Any], words: str | None) -> None:
    if words is None:
        check_arguments("add", ADD_PARAMETERS, arguments)
    else:
        with pytest.raises(BadRequest, match=words):
            check_arguments("add", ADD_PARAMETERS, arguments)


def test_an_argument_is_one_of_its_enum() -> None:
    parameters = {"properties": {"unit": {"enum": ["C", "F"]}, "of": {"type": ["string", "null"]}}}
    check_arguments("t", parameters, {"unit": "C", "of": None})
    with pytest.raises(BadRequest, match=r"one of \['C', 'F'\]"):
        check_arguments("t", parameters, {"unit": "K"})


# --- calls ------------------------------------------------------------------------------------------------------------
def test_a_call_is_openais_mapping_and_has_its_arguments() -> None:
    mapping = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    call = ToolCall(mapping)
    assert call == mapping
    assert json.loads(json.dumps(call)) == mapping
    assert (call.name, call.arguments, call.is_whole) == ("add", {"a": 1}, True)


@pytest.mark.parametrize("text", ['{"a": 1', "[1]", "7", "{" * 100_000, '{"a": "\ud800"}'])
def test_arguments_that_are_no_object_are_a_bad_request(text: str) -> None:
    call = ToolCall(id="1", function={"name": "add", "arguments": text})
    if text.startswith('{"a": "'):
        assert call.arguments == {"a": "\ud800"}
        return
    assert not call.is_whole
    with pytest.raises(BadRequest, match="give a JSON object"):
        _ = call.arguments


def test_a_call_without_arguments_has_none() -> None:
    call = ToolCall(id="1", function={"name": "now", "arguments": ""})
    assert (call.arguments, call.is_whole) == ({}, False)


def test_pieces_that_belong_nowhere_are_refused() -> None:
    calls = GrowingCalls()
    with pytest.raises(ValueError, match="tool call 1 follows 0"):
        calls.add({"index": 1, "function": {"name": "add"}})


# --- over an API ------------------------------------------------------------------------------------------------------
@pytest.fixture
def api(server: ApiServer) -> Iterator[ApiLlmBackend]:
    with ApiLlmBackend({"llm": {"api_base": server.base, "model": "m"}}) as backend:
        yield backend


def test_tools_are_sent_as_the_api_spells_them(server: ApiServer, api: ApiLlmBackend) -> None:
    api.chat(USER, tools=[add], tool_choice="add", parallel_tool_calls=False)
    body = server.seen[0].body
    assert body["tools"] == [ADD]
    assert body["tool_choice"] == {"type": "function", "function": {"name": "add"}}
    assert body["parallel_tool_calls"] is False


def test_without_tools_nothing_of_them_is_sent(server: ApiServer, api: ApiLlmBackend) -> None:
    api.chat(USER, tools=[])
    assert not {"tools", "tool_choice", "parallel_tool_calls", "reasoning_effort"} & set(server.seen[0].body)


@pytest.mark.parametrize(
    ("options", "body"),
    [
        ({"reasoning": False}, {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": False}}),
        ({"reasoning": True}, {"chat_template_kwargs": {"enable_thinking": True}}),
        ({"reasoning_budget": 7}, {"thinking_budget_tokens": 7}),
    ],
)
def test_reasoning_is_asked_for_as_servers_know_it(
    server: ApiServer, api: ApiLlmBackend, options: dict[str, Any], body: dict[str, Any]
) -> None:
    api.chat(USER, **options)
    assert server.seen[0].body.items() >= body.items()


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thinking_is_told_apart(server: ApiServer, api: ApiLlmBackend, name: str) -> None:
    thoughts = [delta(**{name: "Well"}), delta(**{name: " …"})]
    server.replies = [stream(sse(*thoughts, delta("Yes."), delta(finish_reason="stop")))]
    chunks: list[str] = []
    result = api.stream(LlmCallParams("?"), chunks.append)
    assert (result.reasoning, result.content, chunks) == ("Well …", "Yes.", ["Yes."])


def test_thinking_is_told_apart_in_a_whole_reply(server: ApiServer, api: ApiLlmBackend) -> None:
    server.replies = [chat("Yes.", message={"role": "assistant", "content": "Yes.", "reasoning_content": "Well"})]
    result = api.chat(USER)
    assert (result.reasoning, result.content) == ("Well", "Yes.")


def test_deltas_of_a_stream_are_the_servers(server: ApiServer, api: ApiLlmBackend) -> None:
    begun = {"index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": ""}}
    rest = {"index": 0, "function": {"arguments": '{"a": 1}'}}
    reply = (delta(reasoning_content="Well"), delta("Yes"), delta(tool_calls=[begun]), delta(tool_calls=[rest]))
    server.replies = [stream(sse(*reply, delta(finish_reason="tool_calls")))]
    answer = api.stream(LlmCallParams("?", tools=[add]))
    deltas = list(answer.deltas())
    assert [d.reasoning for d in deltas] == ["Well", "", "", ""]
    assert [d.content for d in deltas] == ["", "Yes", "", ""]
    assert [list(d.tool_calls) for d in deltas] == [[], [], [begun], [rest]]
    assert answer.result.tool_calls[0].arguments == {"a": 1}


def _cut_call(reason: str) -> Any:
    calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": "add", "arguments": text}}
        for i, text in enumerate(['{"a": 1}', '{"a": 1'])
    ]
    return chat(None, tool_calls=calls, finish_reason=reason)


def test_a_call_that_was_cut_is_not_passed_as_complete(server: ApiServer, api: ApiLlmBackend) -> None:
    server.replies = [_cut_call("length")]
    result = api.chat(USER, tools=[add])
    assert (result.finish_reason, [call.arguments for call in result.tool_calls]) == ("length", [{"a": 1}])


def test_an_answer_that_calls_says_so_whatever_the_server_calls_it(server: ApiServer, api: ApiLlmBackend) -> None:
    """OpenAI says `stop` where a tool was named, and some servers always do."""
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    server.replies = [chat(None, tool_calls=[call], finish_reason="stop")]
    result = api.chat(USER, tools=[add], tool_choice="add")
    assert result.finish_reason == "tool_calls"
    assert result.tool_calls[0]["function"]["arguments"] == '{"a": 1}'


# --- llama-server and a local model on one file -----------------------------------------------------------------------
@pytest.fixture(scope="module")
def reciting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thinks, talks and calls `add`; and after the result of a tool says "It is 5."."""
    path = tmp_path_factory.mktemp("models") / "reciting.gguf"
    return write_reciting(path, {"\n": (*THINKING, *CALL), "<|again|>": ("It is", " 5.")})


@pytest.fixture(scope="module")
def server_of_reciting(reciting: Path) -> Iterator[str]:
    with serving(reciting) as address:
        yield f"{address}/v1"


@pytest.fixture(params=["api", "local"])
def settings(request: pytest.FixtureRequest, reciting: Path) -> dict[str, Any]:
    """`settings.llm` for the same model here and in llama-server."""
    if request.param == "local":
        pytest.importorskip("tea_llm._llama", reason="tea_llm was built without llama.cpp")
        return {"backend": "local", "model_path": str(reciting)}
    return {"backend": "api", "api_base": request.getfixturevalue("server_of_reciting"), "model": "m"}


@pytest.fixture
def actions(settings: dict[str, Any]) -> dict[str, Callable[..., Any]]:
    registry: dict[str, Callable[..., Any]] = {}
    engine = type("Engine", (), {"_config": {"settings": {"llm": settings}}})()
    register_actions(registry, engine)
    registry["math.add"] = lambda state, a, b: {"sum": a + b + state.get("more", 0)}
    return registry


TOOL = {"name": "add", "description": "Add", "parameters": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
ASKED: dict[str, Any] = {"prompt": "2 + 3?", "temperature": 0}


def test_the_action_of_a_tool_is_run_and_the_model_hears_of_it(actions: dict[str, Any]) -> None:
    result = actions["llm.tools"](state={"more": 10}, tools=[{**TOOL, "action": "math.add"}], **ASKED)
    assert (result["content"], result["rounds"], result["finish_reason"]) == ("It is 5.", 1, "stop")
    (call,) = result["tool_calls"]
    assert (call["name"], call["arguments"]) == ("add", {"a": 2, "b": 3})
    assert result["tool_results"] == [{"tool_call_id": call["id"], "name": "add", "result": '{"sum": 15}'}]


def test_a_python_function_is_a_tool(actions: dict[str, Any]) -> None:
    result = actions["llm.tools"](state={}, tools=[add], **ASKED)
    assert (result["content"], result["tool_results"][0]["result"]) == ("It is 5.", "5")


def _raises(a: int, b: int) -> int:
    raise RuntimeError("no adding today")


def _gives_an_object(a: int, b: int) -> object:
    return Path("a file")


def _gives_itself(a: int, b: int) -> Any:
    own: list[Any] = []
    own.append(own)
    return own


@pytest.mark.parametrize(
    ("function", "heard"),
    [
        (_raises, {"error": "no adding today"}),
        (_gives_an_object, "a file"),
        (_gives_itself, {"error": "Circular reference detected"}),
    ],
)
def test_a_tool_may_fail_or_give_what_is_no_json(actions: dict[str, Any], function: Any, heard: Any) -> None:
    result = actions["llm.tools"](state={}, tools=[{**TOOL, "action": function}], **ASKED)
    assert result["content"] == "It is 5."
    assert json.loads(result["tool_results"][0]["result"]) == heard


def test_the_rounds_are_bounded_and_the_result_says_so(actions: dict[str, Any]) -> None:
    result = actions["llm.tools"](state={}, tools=[add], max_tool_rounds=1, **ASKED)
    assert result["rounds"] == 1
    assert result["warning"] == "Max tool rounds (1) reached"
    assert result["tool_results"][0]["result"] == "5"


def test_no_tool_of_an_answer_that_was_cut_is_run(actions: dict[str, Any]) -> None:
    result = actions["llm.tools"](state={}, tools=[add], **ASKED, max_tokens=11)
    assert (result["rounds"], result["tool_results"], result["finish_reason"]) == (0, [], "length")
    assert "cut" in result["warning"]


def test_a_tool_that_has_to_be_called_is_demanded_once(actions: dict[str, Any]) -> None:
    result = actions["llm.tools"](state={}, tools=[add], tool_choice="required", **ASKED)
    assert (result["rounds"], result["content"]) == (1, "It is 5.")


def test_a_coroutine_function_is_no_tool(actions: dict[str, Any]) -> None:
    async def later(a: int) -> int:
        return a

    assert "nobody would await" in actions["llm.tools"](state={}, tools=[later], **ASKED)["error"]


def test_two_tools_of_one_name_are_refused(actions: dict[str, Any]) -> None:
    assert "names" in actions["llm.tools"](state={}, tools=[add, add], **ASKED)["error"]


def test_thinking_is_in_the_result_of_an_action(actions: dict[str, Any]) -> None:
    result = actions["llm.chat"](state={}, **ASKED)
    assert result["reasoning"].strip() == "I wonder."
    off = actions["llm.chat"](state={}, reasoning=False, **ASKED)
    assert "reasoning" not in off
    assert off["content"].strip() == result["content"].strip()


def test_the_calls_of_an_answer_are_in_the_result_of_an_action(actions: dict[str, Any]) -> None:
    result = actions["llm.chat"](state={}, tools=[add], **ASKED)
    assert result["finish_reason"] == "tool_calls"
    assert json.loads(result["tool_calls"][0]["function"]["arguments"]) == {"a": 2, "b": 3}
