"""Plugging into The Edge Agent by each of its three ways (CONTRACT §8).

TEA is on no registry, so an engine stands in for it here. It does what TEA's `yaml_imports`, its command's
`--actions-module` and its node factory do to a module and to an action, in the same order; nothing of it is ours.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest

from .api_server import ApiServer, chat

pytestmark = pytest.mark.usefixtures("bare_environment")

WAYS = ("imports", "actions-module", "direct")


class TeaEngine:
    """As much of TEA's YAMLEngine as a package of actions meets."""

    def __init__(self) -> None:
        self.actions_registry: dict[str, Callable[..., Any]] = {"math.add": lambda state, a, b, **more: {"sum": a + b}}
        self.llm_settings: dict[str, Any] = {}
        self.variables: dict[str, Any] = {}
        self.secrets: dict[str, Any] = {}

    def import_package(self, package: str, namespace: str = "") -> None:
        """`imports: [{package: …}]`: the module registers into a registry of its own, and names may get a prefix."""
        module = importlib.import_module(package)
        own: dict[str, Callable[..., Any]] = {}
        module.register_actions(own, self)
        prefix = f"{namespace}." if namespace else ""
        self.actions_registry.update({f"{prefix}{name}": action for name, action in own.items()})

    def use_actions_module(self, name: str) -> None:
        """`tea run --actions-module …`: the names that the module lists must be there after it has registered."""
        module = importlib.import_module(name)
        module.register_actions(self.actions_registry, self)
        assert set(module.__tea_actions__["actions"]) <= set(self.actions_registry)

    def load(self, config: dict[str, Any]) -> None:
        """What TEA knows only after the imports."""
        self._config = config
        self.variables = config.get("variables", {})
        known = ("provider", "model", "temperature", "timeout", "backend", "model_path")
        llm = config.get("settings", {}).get("llm", {})
        self.llm_settings = {key: llm[key] for key in known if key in llm}

    def run_node(self, action: str, state: dict[str, Any], **params: Any) -> Any:
        """A node: the settings that TEA knows are put among its parameters, and the engine's own things follow."""
        function = self.actions_registry[action]
        if action in ("llm.call", "llm.chat", "llm.stream", "llm.tools"):
            params = {**self.llm_settings, **params, "opik_trace": True, "opik_project_name": "x"}
        return function(state=state, **params, config=self._config, node="n", graph=object())


@pytest.fixture(params=WAYS)
def engine(request: pytest.FixtureRequest, server: ApiServer) -> TeaEngine:
    """An engine that has taken us in one of its ways, and then read a workflow."""
    engine = TeaEngine()
    if request.param == "imports":
        engine.import_package("tea_llm")
    elif request.param == "actions-module":
        engine.use_actions_module("tea_llm")
    else:
        from tea_llm import register_actions

        register_actions(engine.actions_registry, engine)
    llm = {"api_base": "{{ variables.base }}", "api_key": "k", "model": "m", "temperature": 0.1, "max_tokens": 7}
    engine.load({"settings": {"llm": llm}, "variables": {"base": server.base}})
    return engine


def test_a_node_finds_the_settings_that_came_after_the_import(engine: TeaEngine, server: ApiServer) -> None:
    result = engine.run_node("llm.call", {}, prompt="Hello")
    assert result["content"] == "Hi."
    assert server.seen[0].body == {
        "model": "m",
        "messages": [{"role": "user", "content": "Hello"}],
        "temperature": 0.1,
        "max_tokens": 7,
    }


@pytest.mark.parametrize("name", ["llm.chat", "llm.stream", "llm.retry", "llm.local.chat", "actions.llm_call"])
def test_every_text_action_answers(engine: TeaEngine, name: str) -> None:
    assert engine.run_node(name, {}, messages=[{"role": "user", "content": "Hello"}])["content"] == "Hi."


def test_a_nodes_own_parameter_beats_the_workflows_settings(engine: TeaEngine, server: ApiServer) -> None:
    engine.run_node("llm.call", {}, prompt="Hello", temperature=0.9)
    assert server.seen[0].body["temperature"] == 0.9


def test_a_tool_may_be_one_of_the_engines_own_actions(engine: TeaEngine, server: ApiServer) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    server.replies = [chat(None, tool_calls=[call]), chat("3")]
    tool = {"name": "add", "parameters": {"a": "integer", "b": "integer"}, "action": "math.add"}
    result = engine.run_node("llm.tools", {}, prompt="1 + 2?", tools=[tool])
    assert (result["content"], result["tool_results"][0]["result"]) == ("3", '{"sum": 3}')


def test_a_local_model_that_is_not_there_falls_back_to_the_api(engine: TeaEngine) -> None:
    engine._config["settings"]["llm"] |= {"backend": "local", "model_path": "/no/such/model.gguf"}
    engine.load(engine._config)
    result = engine.run_node("llm.call", {}, prompt="Hello")
    assert (result["content"], result["backend"]) == ("Hi.", "api")
    assert result["fallback_reason"]


def test_a_namespace_may_go_before_the_names() -> None:
    engine = TeaEngine()
    engine.import_package("tea_llm", namespace="local")
    assert "local.llm.call" in engine.actions_registry


def test_an_engine_of_mocks_is_as_good_as_one_without_settings(server: ApiServer) -> None:
    from unittest.mock import MagicMock

    from tea_llm import register_actions

    registry: dict[str, Callable[..., Any]] = {}
    register_actions(registry, MagicMock())
    result = registry["llm.call"](state={}, prompt="Hello", model="m", api_base=server.base, api_key="k")
    assert result["content"] == "Hi."
