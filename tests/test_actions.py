"""The llm actions: their names, what they send, what they return, and that nothing they do raises."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from tea_llm.actions import ACTIONS, __tea_actions__, register_actions
from tea_llm.backend import LlmBackend
from tea_llm.params import LlmCallParams, LlmCallResult, Usage

from .api_server import ApiServer, chat, delta, failure, json_reply, sse, stream

pytestmark = pytest.mark.usefixtures("bare_environment")

Actions = dict[str, Callable[..., dict[str, Any]]]

NAMES = ("call", "chat", "stream", "embed", "retry", "tools")
VECTORS = {"model": "emb-1", "data": [{"index": 0, "embedding": [3.0, 4.0]}], "usage": {"prompt_tokens": 2}}


class Engine:
    """As much of an engine as the actions ask for."""

    def __init__(self, llm: dict[str, Any] | None = None, **attributes: Any) -> None:
        if llm is not None:
            self._config = {"settings": {"llm": llm}}
        self.llm_settings: dict[str, Any] = {}
        self.__dict__.update(attributes)


class Parrot(LlmBackend):
    """Says what it was asked; keeps the request."""

    def __init__(self) -> None:
        self.asked: list[LlmCallParams] = []

    def call(self, params: LlmCallParams) -> LlmCallResult:
        self.asked.append(params)
        text = params.messages[-1]["content"] if params.messages else params.prompt
        return LlmCallResult(text, "parrot", finish_reason="stop", usage=Usage(3, 2), backend="local")

    def chat(self, messages: Any, **options: Any) -> LlmCallResult:
        return self.call(LlmCallParams("", messages=messages, **options))

    def stream(self, params: LlmCallParams, callback: Callable[[str], object]) -> LlmCallResult:
        said = ""
        for chunk in self.call(params).content.split(" "):
            said += chunk
            if callback(chunk) is False:
                break
        return LlmCallResult(said, "parrot", backend="local")

    def embed(self, text: Any, **options: Any) -> Any:
        return [1.0, 0.0] if isinstance(text, str) else [[1.0, float(i)] for i, _ in enumerate(text)]

    def is_available(self) -> bool:
        return True


@pytest.fixture
def actions(server: ApiServer) -> Actions:
    """Actions whose settings name the server."""
    return _actions({"api_base": server.base, "api_key": "k", "model": "set-1"})


def _actions(llm: dict[str, Any] | None = None, **attributes: Any) -> Actions:
    registry: Actions = {}
    register_actions(registry, Engine(llm, **attributes))
    return registry


# --- names -----------------------------------------------------------------------------------------------------------


def test_every_action_has_its_two_names() -> None:
    registry = _actions()
    for name in NAMES:
        assert registry[f"llm.{name}"] is registry[f"actions.llm_{name}"]


@pytest.mark.parametrize("name", ["call", "chat", "stream", "embed"])
def test_the_local_names_are_names_of_the_same_functions(name: str) -> None:
    registry = _actions()
    assert registry[f"llm.local.{name}"] is registry[f"llm.{name}"]


def test_tea_actions_lists_what_is_registered() -> None:
    registry: Actions = {}
    register_actions(registry)
    assert set(__tea_actions__["actions"]) == set(registry)
    assert {"version", "description", "actions"} <= set(__tea_actions__)
    assert len(registry) == 2 * len(NAMES) + 4


def test_the_parameters_stand_in_the_contracts_order() -> None:
    signature = inspect.signature(_actions()["llm.call"])
    assert list(signature.parameters)[:5] == ["state", "model", "messages", "prompt", "system"]
    assert signature.parameters["temperature"].default == 0.7
    assert signature.parameters["max_tokens"].default == 100
    assert signature.parameters["timeout"].default == 300


def test_every_action_says_what_it_does() -> None:
    registry = _actions()
    assert all(registry[row.names[0]].__doc__ for row in ACTIONS)


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_a_call_over_the_api_returns_all_that_is_promised(server: ApiServer, actions: Actions) -> None:
    result = actions["llm.call"](state={}, prompt="Hello")
    assert result == {
        "content": "Hi.",
        "model": "served-1",
        "backend": "api",
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        "tokens_used": 5,
        "finish_reason": "stop",
        "provider": "openai",
        "attempts": 1,
        "total_delay": 0.0,
    }
    body = server.seen[-1].body
    assert body["messages"] == [{"role": "user", "content": "Hello"}]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("set-1", 0.7, 100)


def test_state_model_and_messages_may_be_positional(server: ApiServer, actions: Actions) -> None:
    actions["llm.call"]({}, "asked-1", [{"role": "user", "content": "a"}])
    assert server.seen[-1].body["model"] == "asked-1"
    assert server.seen[-1].body["messages"] == [{"role": "user", "content": "a"}]


def test_a_nodes_parameter_beats_the_settings_and_they_beat_the_default(server: ApiServer) -> None:
    llm = {"api_base": server.base, "api_key": "k", "model": "m", "temperature": 0.2, "max_tokens": 9}
    call = _actions(llm)["llm.call"]
    call(state={}, prompt="a")
    call(state={}, prompt="a", temperature=0.7, max_tokens=100, model="node")
    bodies = [seen.body for seen in server.seen]
    assert [(b["temperature"], b["max_tokens"], b["model"]) for b in bodies] == [(0.2, 9, "m"), (0.7, 100, "node")]


def test_settings_are_read_when_the_action_runs(server: ApiServer) -> None:
    engine = Engine()
    registry: Actions = {}
    register_actions(registry, engine)
    engine._config = {"settings": {"llm": {"api_base": server.base, "api_key": "k", "model": "late"}}}
    assert registry["llm.call"](state={}, prompt="a")["content"] == "Hi."
    engine._config["settings"]["llm"]["model"] = "later"
    registry["llm.call"](state={}, prompt="a")
    assert [seen.body["model"] for seen in server.seen] == ["late", "later"]


def test_templates_in_settings_are_rendered_before_use(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", server.base)
    llm = {"api_base": "{{ env.WHERE }}", "api_key": "{{ secrets.k }}", "model": "{{ variables.m }}-{{ state.n }}"}
    call = _actions(llm, variables={"m": "model"}, secrets={"k": "s3cret"})["llm.call"]
    assert call(state={"n": 7}, prompt="a")["content"] == "Hi."
    assert server.seen[-1].body["model"] == "model-7"
    assert server.seen[-1].headers["Authorization"] == "Bearer s3cret"


def test_the_engines_own_settings_serve_where_it_has_no_config(server: ApiServer) -> None:
    call = _actions(None, llm_settings={"api_base": server.base, "api_key": "k", "model": "own"})["llm.call"]
    call(state={}, prompt="a")
    assert server.seen[-1].body["model"] == "own"


def test_without_an_engine_the_environment_serves(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.base)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    registry: Actions = {}
    register_actions(registry)
    assert registry["llm.call"](state={}, prompt="a", model="m")["content"] == "Hi."


def test_what_engines_pass_and_local_keys_never_reach_the_api(server: ApiServer, actions: Actions) -> None:
    actions["llm.call"](
        state={}, prompt="a", config={"x": 1}, node="n", graph=object(), parallel_results=[], opik_trace=True,
        n_ctx=512, n_threads=2, n_gpu_layers=0, chat_format="chatml", pooling="mean", n_batch=64, api_key="k2",
    )  # fmt: skip
    assert set(server.seen[-1].body) == {"model", "messages", "temperature", "max_tokens"}
    assert server.seen[-1].headers["Authorization"] == "Bearer k2"


def test_unknown_parameters_reach_the_api(server: ApiServer, actions: Actions) -> None:
    form = {"type": "json_object"}
    actions["llm.call"](state={}, prompt="a", response_format=form, top_p=0.5, user="u", extra_body={"x": 1}, seed=4)
    body = server.seen[-1].body
    assert (body["response_format"], body["top_p"], body["user"], body["x"], body["seed"]) == (form, 0.5, "u", 1, 4)


def test_a_nodes_api_base_and_provider_beat_the_settings(server: ApiServer) -> None:
    llm = {"backend": "local", "fallback": "error", "provider": "openai", "api_base": "http://127.0.0.1:9/v1"}
    call = _actions(llm)["llm.call"]
    result = call(state={}, prompt="a", model="m", provider="ollama", api_base=server.base)
    assert (result["content"], result["provider"]) == ("Hi.", "ollama")


@pytest.mark.parametrize("messages", [None, []])
def test_messages_beat_the_prompt(messages: Any) -> None:
    parrot = Parrot()
    call = _actions(llm_backend=parrot)["llm.call"]
    assert call(state={}, prompt="p", messages=[{"role": "user", "content": "m"}])["content"] == "m"
    assert call(state={}, prompt="p", messages=messages)["content"] == "p"


def test_a_prompt_alone_is_raw_and_with_system_a_chat() -> None:
    parrot = Parrot()
    actions = _actions(llm_backend=parrot)
    actions["llm.call"](state={}, prompt="p")
    actions["llm.call"](state={}, prompt="p", system="s")
    actions["llm.chat"](state={}, prompt="p")
    assert [params.messages for params in parrot.asked] == [
        None,
        [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}],
        [{"role": "user", "content": "p"}],
    ]
    assert parrot.asked[0].prompt == "p"


def test_a_system_text_goes_before_messages_that_have_none() -> None:
    parrot = Parrot()
    chat = _actions(llm_backend=parrot)["llm.chat"]
    chat(state={}, system="s", messages=[{"role": "user", "content": "m"}])
    chat(state={}, system="s", messages=[{"role": "system", "content": "own"}, {"role": "user", "content": "m"}])
    assert [params.messages[0]["content"] for params in parrot.asked if params.messages] == ["s", "own"]


def test_a_number_is_a_fine_prompt() -> None:
    assert _actions(llm_backend=Parrot())["llm.call"](state={}, prompt=42)["content"] == "42"


def test_a_timeout_in_the_settings_bounds_a_call_unless_the_node_says_otherwise() -> None:
    parrot = Parrot()
    call = _actions({"timeout": 7}, llm_backend=parrot)["llm.call"]
    call(state={}, prompt="a")
    call(state={}, prompt="a", timeout=3)
    _actions(llm_backend=parrot)["llm.call"](state={}, prompt="a")
    assert [params.timeout_s for params in parrot.asked] == [7, 3, None]


def test_sampling_fields_travel_in_the_request() -> None:
    parrot = Parrot()
    said = {"top_k": 5, "seed": 1, "stop": ["x"], "truncate": True, "timeout": 3}
    _actions(llm_backend=parrot)["llm.call"](state={}, prompt="a", **said)
    params = parrot.asked[0]
    assert (params.top_k, params.seed, params.stop, params.truncate, params.timeout_s) == (5, 1, ["x"], True, 3)


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["call", "chat", "stream", "retry"])
def test_neither_prompt_nor_messages_is_said_so(name: str, actions: Actions) -> None:
    result = actions[f"llm.{name}"](state={})
    assert result == {"error": "Missing required parameter: prompt or messages", "success": False}


@pytest.mark.parametrize(
    "parameters",
    [
        {"prompt": ["no", "text"]},
        {"prompt": "a", "temperature": -1},
        {"prompt": "a", "messages": "no list"},
        {"messages": [{"content": "no role"}]},
        {"prompt": "a", "max_tokens": "many"},
        {"prompt": "a", "backend": "locl"},
        {"prompt": "a", "model_path": 7, "backend": "local"},
        {"prompt": "a", "callback": "no callable"},
    ],
)
def test_a_bad_parameter_is_an_error_result(parameters: dict[str, Any], actions: Actions) -> None:
    result = actions["llm.stream"](state={}, **parameters)
    assert result["success"] is False
    assert result["error"]


def test_no_state_at_all_is_an_error_result(actions: Actions) -> None:
    assert actions["llm.call"](prompt="a")["success"] is False


def test_an_unknown_settings_key_is_an_error_that_names_the_nearest() -> None:
    result = _actions({"modle": "x"})["llm.call"](state={}, prompt="a")
    assert "modle" in result["error"]
    assert "'model'" in result["error"]


def test_an_http_error_says_its_status_and_attempts(server: ApiServer, actions: Actions) -> None:
    server.replies = [failure(400, "bad field")]
    result = actions["llm.call"](state={}, prompt="a", max_retries=5, base_delay=0.01)
    assert (result["success"], result["status_code"], result["attempts"], result["total_delay"]) == (False, 400, 1, 0.0)
    assert "bad field" in result["error"]


def test_a_model_file_that_is_not_there_is_said_so_first() -> None:
    for said in ({"provider": "local"}, {"provider": "local", "model": "/no/such.gguf"}, {"backend": "local"}):
        result = _actions()["llm.call"](state={}, prompt="a", **said)
        assert result["error"].startswith("No local model found")
        assert "OPENAI_API_KEY" in result["error"]


def test_a_fault_of_the_backend_is_an_error_result(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Parrot):
        def call(self, params: LlmCallParams) -> LlmCallResult:
            raise ZeroDivisionError("oops")

    with caplog.at_level(logging.ERROR, "tea_llm"):
        result = _actions(llm_backend=Broken())["llm.call"](state={}, prompt="a")
    assert result == {"error": "oops", "success": False}
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(("said", "n_requests"), [({}, 1), ({"max_retries": 2}, 3)])
def test_a_passing_fault_is_retried_as_often_as_said(
    server: ApiServer, actions: Actions, said: dict[str, Any], n_requests: int
) -> None:
    server.replies = [failure(503)]
    result = actions["llm.call"](state={}, prompt="a", base_delay=0.01, **said)
    assert len(server.seen) == result["attempts"] == n_requests
    assert result["status_code"] == 503


def test_llm_retry_retries_three_times_unless_it_is_told_otherwise(server: ApiServer, actions: Actions) -> None:
    server.replies = [failure(503)]
    assert actions["llm.retry"](state={}, prompt="a", base_delay=0.01)["attempts"] == 4
    assert actions["llm.retry"](state={}, prompt="a", base_delay=0.01, max_retries=1)["attempts"] == 2


def test_a_success_after_a_retry_says_how_many_attempts_it_took(server: ApiServer, actions: Actions) -> None:
    server.replies = [failure(503), chat("Late.")]
    result = actions["llm.call"](state={}, prompt="a", max_retries=1, base_delay=0.01)
    assert (result["content"], result["attempts"]) == ("Late.", 2)
    assert result["total_delay"] > 0


# --- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_hands_each_chunk_to_the_callback(server: ApiServer, actions: Actions) -> None:
    server.replies = [stream(sse(delta("One"), delta(" two"), delta(" three", "stop")))]
    chunks: list[str] = []
    result = actions["llm.stream"](state={}, prompt="count", callback=chunks.append)
    assert chunks == ["One", " two", " three"]
    assert (result["content"], result["streamed"], result["chunk_count"]) == ("One two three", True, 3)


def test_a_stream_prints_to_stderr_only_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    actions = _actions(llm_backend=Parrot())
    actions["llm.stream"](state={}, prompt="quiet")
    assert capsys.readouterr() == ("", "")
    actions["llm.stream"](state={}, prompt="loud words", print=True)
    assert capsys.readouterr() == ("", "loudwords\n")


def test_a_callback_that_returns_false_ends_the_stream() -> None:
    actions = _actions(llm_backend=Parrot())
    result = actions["llm.stream"](state={}, prompt="one two three", callback=lambda chunk: False)
    assert (result["content"], result["chunk_count"]) == ("one", 1)


def test_a_callback_that_raises_is_an_error_result() -> None:
    def callback(chunk: str) -> None:
        raise RuntimeError("reader left")

    result = _actions(llm_backend=Parrot())["llm.stream"](state={}, prompt="a", callback=callback)
    assert result == {"error": "reader left", "success": False}


# --- vectors ---------------------------------------------------------------------------------------------------------


def test_embedding_a_text_gives_its_vector(server: ApiServer, actions: Actions) -> None:
    server.replies = [json_reply(VECTORS)]
    result = actions["llm.embed"](state={}, text="a", model="emb-1")
    assert result["embedding"] == pytest.approx([0.6, 0.8])
    assert (result["dimensions"], result["model"], result["backend"], result["tokens_used"]) == (2, "emb-1", "api", 2)
    assert "embeddings" not in result
    assert server.seen[-1].body["model"] == "emb-1"


def test_embedding_passes_unknown_parameters_on_and_retries(server: ApiServer, actions: Actions) -> None:
    server.replies = [failure(503), json_reply(VECTORS)]
    result = actions["llm.embed"](state={}, text="a", user="u", n_ctx=5, node="n", max_retries=1, base_delay=0.01)
    assert result["attempts"] == 2
    assert set(server.seen[-1].body) == {"model", "input", "encoding_format", "user"}


def test_embedding_without_normalising_leaves_the_length(server: ApiServer, actions: Actions) -> None:
    server.replies = [json_reply(VECTORS)]
    assert actions["llm.embed"](state={}, text="a", normalize=False)["embedding"] == [3.0, 4.0]


def test_embedding_a_list_also_gives_every_vector() -> None:
    result = _actions(llm_backend=Parrot())["llm.embed"](state={}, text=["a", "b"])
    assert result["embeddings"] == [[1.0, 0.0], [1.0, 1.0]]
    assert result["embedding"] == [1.0, 0.0]


@pytest.mark.parametrize(("text", "words"), [(None, "Missing required parameter: text"), ([], "non-empty"), (7, "7")])
def test_embedding_nothing_is_an_error_result(text: Any, words: str, actions: Actions) -> None:
    result = actions["llm.embed"](state={}, text=text)
    assert result["success"] is False
    assert words in result["error"]


# --- tools -----------------------------------------------------------------------------------------------------------


def _tool_call(name: str, arguments: str, call_id: str = "c1") -> Any:
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return chat(None, tool_calls=[call], finish_reason="tool_calls")


ADD = {
    "name": "add",
    "description": "Add two numbers",
    "parameters": {"a": {"type": "integer", "required": True}, "b": {"type": "integer"}},
    "action": "math.add",
}


@pytest.fixture
def adding(actions: Actions) -> Actions:
    def add(state: Any, a: int, b: int = 0) -> dict[str, Any]:
        return {"sum": a + b + state.get("offset", 0)}

    actions["math.add"] = add
    return actions


def test_a_tool_is_run_and_its_result_fed_back(server: ApiServer, adding: Actions) -> None:
    server.replies = [_tool_call("add", '{"a": 2, "b": 3}'), chat("It is 5.")]
    result = adding["llm.tools"](state={"offset": 0}, prompt="2 + 3?", tools=[ADD])
    assert result["content"] == "It is 5."
    assert result["rounds"] == 1
    assert result["tool_calls"] == [{"id": "c1", "name": "add", "arguments": {"a": 2, "b": 3}}]
    assert result["tool_results"] == [{"tool_call_id": "c1", "name": "add", "result": '{"sum": 5}'}]
    first, second = (seen.body for seen in server.seen)
    assert first["tool_choice"] == "auto"
    assert first["tools"][0]["function"]["parameters"] == {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a"],
    }
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "tool"]
    assert second["messages"][2] == {"role": "tool", "tool_call_id": "c1", "content": '{"sum": 5}'}


def test_openais_own_form_of_a_tool_is_passed_on(server: ApiServer, adding: Actions) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "add", "parameters": schema, "strict": True}, "action": "math.add"}
    server.replies = [_tool_call("add", '{"a": 2}'), chat("2.")]
    assert adding["llm.tools"](state={}, prompt="?", tools=[tool])["tool_results"][0]["result"] == '{"sum": 2}'
    assert server.seen[0].body["tools"] == [{"type": "function", "function": tool["function"]}]


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("add", '{"a": "x"}', "of type integer"),
        ("add", "{}", "needs 'a'"),
        ("add", '{"a": 1, "b": NaN}', "of type integer"),
        ("add", '{"a": 1', "delimiter"),
        ("add", "[1]", "JSON object"),
        ("add", '{"a": 1, "state": {}}', "no parameter 'state'"),
        ("subtract", "{}", "no tool 'subtract'"),
    ],
)
def test_a_tool_that_fails_tells_the_model(
    server: ApiServer, adding: Actions, name: str, arguments: str, words: str
) -> None:
    server.replies = [_tool_call(name, arguments), chat("Sorry.")]
    result = adding["llm.tools"](state={}, prompt="?", tools=[ADD])
    assert result["content"] == "Sorry."
    assert words in json.loads(result["tool_results"][0]["result"])["error"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("tools", 3), ("tools", "add"), ("tools", {"name": "add"}), ("max_tool_rounds", "x"), ("max_tool_rounds", -1)],
)
def test_a_bad_parameter_of_llm_tools_is_refused_by_name(
    server: ApiServer, adding: Actions, name: str, value: Any
) -> None:
    result = adding["llm.tools"](state={}, **{"prompt": "?", "tools": [ADD], name: value})
    assert result["error"].startswith(f"{name} is")
    assert not server.seen


def test_a_tool_without_an_action_is_noted(server: ApiServer, actions: Actions) -> None:
    server.replies = [_tool_call("look", "{}"), chat("Done.")]
    result = actions["llm.tools"](state={}, prompt="?", tools=[{"name": "look"}])
    assert "no action mapped" in result["tool_results"][0]["result"]


def test_the_rounds_are_bounded(server: ApiServer, adding: Actions) -> None:
    server.replies = [_tool_call("add", '{"a": 1}')]
    result = adding["llm.tools"](state={}, prompt="?", tools=[ADD], max_tool_rounds=2)
    assert len(server.seen) == result["rounds"] == 2
    assert "Max tool rounds (2)" in result["warning"]


@pytest.mark.parametrize(
    ("tool", "words"),
    [("add", "tools[0]"), ({"description": "x"}, "has no name"), ({"name": "x", "action": "no.such"}, "no.such"),
     ({"name": "x", "action": ["a"]}, "tools[0].action is ['a']")],
)
def test_a_bad_tool_is_an_error_before_anything_is_sent(
    server: ApiServer, actions: Actions, tool: Any, words: str
) -> None:
    result = actions["llm.tools"](state={}, prompt="?", tools=[tool])
    assert words in result["error"]
    assert not server.seen


