"""The llm actions: what a workflow node calls, under every name an engine knows it by.

Adding an action is one function and one row in `ACTIONS`. Every action takes `state` first, returns a dict, and never
raises: a failure is `{"error": text, "success": False}`. What a node leaves unsaid comes from `settings.llm`, read when
the action runs, and then from the action's row.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from .backend import BackendPool, LlmBackend, RequestBackend, rendered_llm
from .errors import ApiError, BadRequest, FallbackError, LlmError
from .params import Completion, LlmCallParams, LlmCallResult, LlmEmbedResult, Message
from .settings import LlmSettings
from .tools import ToolCall, check_arguments, function_tool

__all__ = ["ACTIONS", "Action", "ActionFunction", "Ask", "__tea_actions__", "register_actions"]

logger = logging.getLogger("tea_llm")

ActionFunction: TypeAlias = Callable[..., Any]

_PARAM_FIELDS = frozenset(f.name for f in dataclasses.fields(LlmCallParams)) - {"extra", "timeout_s"}
_SETTINGS_FIELDS = frozenset(f.name for f in dataclasses.fields(LlmSettings)) | {"api_url", "base_url"}
_CALL_FIELDS = frozenset({  # a call's, not a backend's
    "model", "temperature", "max_tokens", "max_retries", "timeout",
    "chat_template", "chat_template_name", "template_kwargs",
})
_RETRY_FIELDS = ("max_retries", "base_delay", "max_delay")  # travel to the API backend in `LlmCallParams.extra`
_NONE_MEANS_OFF = _PARAM_FIELDS - {"model", "messages", "prompt", "stop", "temperature", "truncate"} | {"timeout"}
_OF_THE_ENGINE = frozenset({  # what engines pass along or inject, and no API is to see
    "config", "node", "graph", "parallel_results", "engine", "checkpoint_dir", "last_checkpoint",
    "opik_trace", "opik_project_name", "shell_provider", "shell_providers",
})


class _Room:
    """What the actions of one engine share: its settings, its registry, and the backends kept between calls."""

    def __init__(self, registry: MutableMapping[str, ActionFunction], engine: Any) -> None:
        self.registry = registry
        self.engine = engine
        self._pool: BackendPool | None = None
        self._lock = threading.Lock()

    def llm_settings(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """`settings.llm` as it is now, its templates filled in; {} where the engine has none."""
        config = _mapping(getattr(self.engine, "_config", None))
        settings = _mapping(config.get("settings"))
        llm = _mapping(settings.get("llm")) or _mapping(getattr(self.engine, "llm_settings", None))
        if not llm:
            return {}
        return dict(rendered_llm(llm, self.engine, settings=settings, state=state))

    @property
    def cli(self) -> Mapping[str, Any]:
        """What the command line said: `model_path` and `backend`, where it said them."""
        return _mapping(getattr(self.engine, "cli_overrides", None))

    def backend(self, settings: LlmSettings) -> LlmBackend:
        """The backend to ask, made once for equal settings."""
        given = getattr(self.engine, "llm_backend", None)
        if isinstance(given, LlmBackend):
            return given
        pool = getattr(self.engine, "llm_backend_pool", None)
        if isinstance(pool, BackendPool):
            return pool.get(settings, cli=self.cli)
        with self._lock:
            if self._pool is None:
                self._pool = BackendPool()
                weakref.finalize(self, self._pool.close)  # when the registry is gone, or at exit
        return self._pool.get(settings, cli=self.cli)

    def actions(self) -> Mapping[str, ActionFunction]:
        """Every action that a tool may name: the engine's, and those registered with these."""
        return {**self.registry, **_mapping(getattr(self.engine, "actions_registry", None))}


@dataclass(frozen=True)
class Ask:
    """One call of an action. `values` has every parameter of the action's row, `more` what was said beyond them."""

    room: _Room
    state: Mapping[str, Any]
    said: Mapping[str, Any]
    values: Mapping[str, Any]
    more: Mapping[str, Any]
    settings: LlmSettings
    limit_s: float | None = None  # `timeout` of settings.llm, where it has one

    @property
    def backend(self) -> LlmBackend:
        """Who answers."""
        of_all_calls = dataclasses.replace(self.settings, temperature=None, max_tokens=None)  # each request has them
        return self.room.backend(of_all_calls)

    @property
    def model(self) -> str | None:
        """The model name that the node gave, unless it is a file to load."""
        model = self.said.get("model")
        return None if _is_model_file(model, self.settings) else model

    @property
    def timeout_s(self) -> float | None:
        """The seconds that the node, else settings.llm, gives the call; None where neither does."""
        seconds: float | None = self.said.get("timeout", self.limit_s)
        return seconds

    @property
    def further(self) -> dict[str, Any]:
        """What no one here knows, for the body of an API call, and how often to retry one."""
        known = _PARAM_FIELDS | _SETTINGS_FIELDS
        unknown = {name: value for name, value in self.more.items() if name not in known and value is not None}
        return unknown | {name: self.said[name] for name in _RETRY_FIELDS if name in self.said}

    def params(self, *, messages: Sequence[Message] | None = None, **further: Any) -> LlmCallParams:
        """The request; `further` fields come before those that the node gave."""
        fields = {name: value for name, value in self.more.items() if name in _PARAM_FIELDS} | further
        prompt = self.values["prompt"]
        if messages is None:
            messages = self.messages()
        return LlmCallParams(
            prompt="" if prompt is None else str(prompt) if isinstance(prompt, (int, float)) else prompt,
            messages=messages,
            model=self.model,
            max_tokens=self.values["max_tokens"],
            temperature=self.values["temperature"],
            stop=self.values["stop"],
            timeout_s=self.timeout_s,
            extra=self.further,
            **fields,
        )

    def messages(self, *, chat: bool = False) -> list[Message] | None:
        """The messages to answer; None for a prompt that is to be continued as it stands (never with `chat`)."""
        messages, prompt, system = self.values["messages"], self.values["prompt"], self.values["system"]
        if not messages and prompt is None:
            raise BadRequest("Missing required parameter: prompt or messages")
        if not messages:
            if system is None and not chat:
                return None
            messages = [{"role": "user", "content": str(prompt)}]
        if system is not None and isinstance(messages, (list, tuple)) and not _has_system(messages):
            messages = [{"role": "system", "content": str(system)}, *messages]
        return messages  # type: ignore[no-any-return]  # whatever was given; LlmCallParams checks it


def _call(ask: Ask) -> dict[str, Any]:
    """Continue `prompt`, or answer `messages` (or `system` and `prompt`); `max_retries` as said."""
    return _as_dict(ask.backend.call(ask.params()))


def _chat(ask: Ask) -> dict[str, Any]:
    """Answer `messages`, or `prompt` with an optional `system`."""
    return _as_dict(ask.backend.call(ask.params(messages=ask.messages(chat=True))))


def _retry(ask: Ask) -> dict[str, Any]:
    """As `llm.call`, with three retries unless the node says otherwise."""
    said = {"max_retries": ask.values["max_retries"], **ask.said}
    return _call(dataclasses.replace(ask, said=said))


def _stream(ask: Ask) -> dict[str, Any]:
    """As `llm.call`, each chunk handed to `callback` and, with `print`, written to stderr, as soon as it is there."""
    callback, printing = ask.values["callback"], ask.values["print"]
    if callback is not None and not callable(callback):
        raise BadRequest(f"callback is {callback!r}; give a callable that takes one chunk of text")
    chunk_count = 0

    def on_chunk(chunk: str) -> object:
        nonlocal chunk_count
        chunk_count += 1
        if printing:
            print(chunk, end="", file=sys.stderr, flush=True)
        return callback(chunk) if callback is not None else None

    try:
        result = ask.backend.stream(ask.params(), on_chunk)
    finally:
        if printing and chunk_count:
            print(file=sys.stderr, flush=True)
    return {**_as_dict(result), "streamed": True, "chunk_count": chunk_count}


def _embed(ask: Ask) -> dict[str, Any]:
    """The vector of `text`, and with a list of texts all their vectors as `embeddings`."""
    text = ask.values["text"]
    if text is None:
        raise BadRequest("Missing required parameter: text")
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)) or not texts:
        raise BadRequest(f"text is {text!r:.80}; give a string or a non-empty list of strings")
    vectors = _vectors(ask, list(texts))
    embeddings = [[float(x) for x in vector] for vector in vectors.embeddings]
    answer: dict[str, Any] = {"embedding": embeddings[0], "dimensions": len(embeddings[0]), **_origin(vectors)}
    if not isinstance(text, str):
        answer["embeddings"] = embeddings
    return answer


def _vectors(ask: Ask, texts: list[str]) -> LlmEmbedResult:
    backend, options = ask.backend, {"normalize": ask.values["normalize"], "dimensions": ask.values["dimensions"]}
    if not isinstance(backend, RequestBackend):
        return LlmEmbedResult(backend.embed(texts, **options), model=type(backend).__name__)
    said = {"timeout_s": ask.timeout_s, "truncate": ask.more.get("truncate")}
    options |= {name: value for name, value in said.items() if value is not None}
    return backend.embeddings(texts, model=ask.model, **options, **ask.further)


def _tools(ask: Ask) -> dict[str, Any]:
    """Answer with the help of `tools`: run what is behind each tool the model calls, feed back what it gave, repeat."""
    known, given, n_rounds = ask.room.actions(), ask.values["tools"], ask.values["max_tool_rounds"]
    if not isinstance(given, list | tuple | None):
        raise BadRequest(f"tools is {given!r:.80}; give a list of {{name, description, parameters, action}}")
    if type(n_rounds) is not int or n_rounds < 0:
        raise BadRequest(f"max_tool_rounds is {n_rounds!r}; give a whole number of at least 0")
    tools = [_Tool.of(tool, i, known) for i, tool in enumerate(given or ())]
    by_name = {tool.name: tool for tool in tools}
    if len(by_name) < len(tools):
        raise BadRequest(f"tools has {len(tools)} entries of {len(by_name)} names; give each a name of its own")
    messages: list[Message] = list(ask.messages(chat=True) or ())
    asked = {"tools": [tool.schema for tool in tools], "tool_choice": ask.values["tool_choice"]} if tools else {}
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    answer: dict[str, Any] = {"content": "", "tool_calls": calls, "tool_results": results, "rounds": 0}
    while answer["rounds"] < n_rounds:
        result = ask.backend.call(ask.params(messages=messages, **asked))
        answer.update(_as_dict(result), tool_calls=calls)
        if result.finish_reason in ("length", "cancelled") and tools:
            return {**answer, "warning": f"The answer was cut ({result.finish_reason}); no tool of it was run"}
        if not result.tool_calls:
            return answer
        answer["rounds"] += 1
        messages.append(_as_message(result))
        for call in result.tool_calls:
            record, text = _run_tool(ToolCall(call), by_name, ask)
            calls.append(record)
            results.append({"tool_call_id": record["id"], "name": record["name"], "result": text})
            messages.append({"role": "tool", "tool_call_id": record["id"], "content": text})
        if asked.get("tool_choice") not in ("auto", "none"):
            asked["tool_choice"] = "auto"  # what was demanded was done, and the model may answer
    return {**answer, "warning": f"Max tool rounds ({n_rounds}) reached"}


def _as_message(result: LlmCallResult) -> Message:
    """The answer as what was said, for the next round; a local model also reads what it thought before it called."""
    message: dict[str, Any] = {
        "role": "assistant",
        "content": result.content or None,
        "tool_calls": [dict(call) for call in result.tool_calls],
    }
    if result.reasoning and result.backend == "local":
        message["reasoning_content"] = result.reasoning
    return message


@dataclass(frozen=True)
class _Tool:
    """A tool as the model sees it (`schema`, OpenAI's form) and what is behind it, None where there is nothing."""

    name: str
    schema: Mapping[str, Any]
    run: ActionFunction | None = None
    takes_state: bool = False  # as actions do

    @classmethod
    def of(cls, tool: Any, i: int, known: Mapping[str, ActionFunction]) -> _Tool:
        """The tool that `tools[i]` is: `{name, description, parameters, action}`, OpenAI's own form, or a function."""
        if callable(tool):
            if inspect.iscoroutinefunction(tool):
                raise BadRequest(f"tools[{i}] is {tool!r:.80}, which nobody would await here; give a plain function")
            schema = function_tool(tool)
            return cls(schema["function"]["name"], schema, tool)
        if not isinstance(tool, Mapping):
            raise BadRequest(f"tools[{i}] is {tool!r:.80}; give a mapping: name, description, parameters, action")
        function = _mapping(tool.get("function")) or tool
        name, action = function.get("name"), tool.get("action")
        if not isinstance(name, str) or not name:
            raise BadRequest(f"tools[{i}] has no name; give it one")
        if action is not None and not callable(action) and (not isinstance(action, str) or action not in known):
            raise BadRequest(f"tools[{i}].action is {action!r}, which is no known action; register it first")
        described = {
            **(function if function is not tool else {"description": str(tool.get("description") or "")}),
            "name": name,
            "parameters": _as_json_schema(_mapping(function.get("parameters"))),
        }
        run = known[action] if isinstance(action, str) else action
        return cls(name, {"type": "function", "function": described}, run, takes_state=isinstance(action, str))

    def call(self, arguments: Mapping[str, Any], state: Mapping[str, Any]) -> Any:
        """What the tool gives for these arguments. Raises BadRequest for arguments that it doesn't take."""
        check_arguments(self.name, self.schema["function"]["parameters"], arguments)
        if self.run is None:
            return {"note": f"Tool {self.name!r} called but no action mapped", "arguments": arguments}
        return self.run(state=state, **arguments) if self.takes_state else self.run(**arguments)


def _as_json_schema(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """JSON Schema for `parameters`, which is that already, or a mapping of names to `{type, description, required}`."""
    if parameters.get("type") == "object" and isinstance(parameters.get("properties", {}), Mapping):
        return parameters
    properties = {
        name: {"type": "string", **spec} if isinstance(spec, Mapping) else {"type": str(spec)}
        for name, spec in parameters.items()
    }
    required = [name for name, spec in properties.items() if spec.pop("required", False) is True]
    return {"type": "object", "properties": properties, "required": required}


def _run_tool(call: ToolCall, tools: Mapping[str, _Tool], ask: Ask) -> tuple[dict[str, Any], str]:
    """The record of one tool call, and what it gave as JSON. A tool that fails gives an error for the model to read."""
    record: dict[str, Any] = {"id": call.get("id"), "name": call.name, "arguments": {}}
    try:
        record["arguments"] = arguments = call.arguments
        tool = tools.get(call.name)
        if tool is None:
            raise BadRequest(f"there is no tool {call.name!r}; the tools are {', '.join(tools)}")
        result = tool.call(arguments, ask.state)
        return record, json.dumps(result, ensure_ascii=False, default=str)
    except Exception as exc:  # noqa: BLE001  a tool is anybody's code, and the model is to hear of its failure
        logger.warning("Tool %s failed: %s", call.name, exc)
        return record, json.dumps({"error": str(exc) or type(exc).__name__}, ensure_ascii=False)


@dataclass(frozen=True)
class Action:
    """One row: an action's short name, what it does, and its parameters after `state` with their defaults, in order."""

    name: str
    run: Callable[[Ask], dict[str, Any]]
    defaults: Mapping[str, Any]
    has_local_name: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Every name the action is registered under."""
        local = (f"llm.local.{self.name}",) if self.has_local_name else ()
        return (f"llm.{self.name}", f"actions.llm_{self.name}", *local)

    def bound_to(self, room: _Room) -> ActionFunction:
        """The function that an engine calls: `(state, *parameters, **more)`, and it never raises."""
        kinds = inspect.Parameter
        signature = inspect.Signature([
            kinds("state", kinds.POSITIONAL_OR_KEYWORD),
            *(kinds(name, kinds.POSITIONAL_OR_KEYWORD, default=value) for name, value in self.defaults.items()),
            kinds("more", kinds.VAR_KEYWORD),
        ])

        def action(*args: Any, **kwargs: Any) -> dict[str, Any]:
            try:
                given = dict(signature.bind(*args, **kwargs).arguments)
                state, more = _mapping(given.pop("state")), given.pop("more", {})
                return self.run(_ask(self, room, state, {**given, **more}))
            except LlmError as exc:
                logger.info("llm.%s failed: %s", self.name, exc)
                return _failure(exc)
            except Exception as exc:
                logger.exception("llm.%s failed", self.name)
                return _failure(exc)

        action.__name__ = action.__qualname__ = f"llm_{self.name}"
        action.__doc__ = self.run.__doc__
        action.__signature__ = signature  # type: ignore[attr-defined]  # what inspect.signature() shows
        return action


_CALL: Mapping[str, Any] = {
    "model": None,
    "messages": None,
    "prompt": None,
    "system": None,
    "temperature": 0.7,
    "max_tokens": 100,
    "stop": None,
    "max_retries": 0,
    "base_delay": 1.0,
    "max_delay": 60.0,
    "provider": "auto",
    "api_base": None,
    "timeout": 300,
    "backend": None,
}
_CHAT = {"messages": None, **{name: value for name, value in _CALL.items() if name != "messages"}}
_EMBED = {
    "text": None,
    "model": None,
    "normalize": True,
    "dimensions": None,
    "backend": None,
    "provider": "auto",
    "api_base": None,
}
_TOOLS = {
    "model": None,
    "messages": None,
    "tools": None,
    "tool_choice": "auto",
    "max_tool_rounds": 10,
    **{name: value for name, value in _CALL.items() if name not in ("model", "messages")},
}

ACTIONS = (
    Action("call", _call, _CALL, has_local_name=True),
    Action("chat", _chat, _CHAT, has_local_name=True),
    Action("stream", _stream, {**_CALL, "callback": None, "print": False}, has_local_name=True),
    Action("embed", _embed, _EMBED, has_local_name=True),
    Action("retry", _retry, {**_CALL, "max_retries": 3}),
    Action("tools", _tools, _TOOLS),
)
"""Every action, one row each."""


def register_actions(registry: MutableMapping[str, ActionFunction], engine: Any = None) -> None:
    """Put every action into `registry` under all its names.

    `engine` is asked for its settings each time an action runs, so nothing has to be set up yet. Backends, and with
    them loaded models, are kept for as long as `registry` is.
    """
    room = _Room(registry, engine)
    for row in ACTIONS:
        function = row.bound_to(room)
        registry.update(dict.fromkeys(row.names, function))


def _ask(action: Action, room: _Room, state: Mapping[str, Any], given: Mapping[str, Any]) -> Ask:
    """The call as it was meant: the node's words before settings.llm before the row's defaults."""
    said = {
        name: value
        for name, value in given.items()
        if name not in _OF_THE_ENGINE and (value is not None or name in _NONE_MEANS_OFF)
    }
    llm = room.llm_settings(state)
    settings = _with_node_settings(LlmSettings.from_mapping(llm), said, embeds=action.run is _embed)
    inherited = {name: getattr(settings, name) for name in ("temperature", "max_tokens") if llm.get(name) is not None}
    values = {name: said.get(name, inherited.get(name, default)) for name, default in action.defaults.items()}
    more = {name: value for name, value in said.items() if name not in action.defaults}
    return Ask(room, state, said, values, more, settings, settings.timeout if "timeout" in llm else None)


def _with_node_settings(settings: LlmSettings, said: Mapping[str, Any], *, embeds: bool) -> LlmSettings:
    changes = {name: said[name] for name in said if name in _SETTINGS_FIELDS - _CALL_FIELDS}
    provider = str(changes.get("provider", "auto")).strip().lower()
    if provider not in ("auto", "local"):
        changes.setdefault("backend", "api")  # who names an API wants that one, whatever settings.llm prefers
    changed = settings.replaced(**changes)
    if "model_path" not in said and _is_model_file(said.get("model"), changed):
        changed = changed.replaced(model_path=said["model"])
    path = changed.model_path
    if path == settings.model_path or path is None:
        return changed
    if not os.path.isfile(path):  # noqa: PTH113  as in models.py, whose search goes on with the settings' path
        logger.warning("model_path set but file not found: %s", path)
        return dataclasses.replace(changed, model_path=settings.model_path)
    return dataclasses.replace(changed, embedding_model_path=path) if embeds else changed


def _is_model_file(model: Any, settings: LlmSettings) -> bool:
    """Whether a `model` means a file to load here, and not a name that an API knows."""
    return isinstance(model, str) and model.lower().endswith(".gguf") and settings.backend != "api"


def _as_dict(result: LlmCallResult) -> dict[str, Any]:
    """What an action returns for a text."""
    answer: dict[str, Any] = {"content": result.content, **_origin(result), "finish_reason": result.finish_reason}
    if result.timings is not None:
        answer["timings"] = dataclasses.asdict(result.timings)
    if result.session_error is not None:
        answer["session_error"] = result.session_error
    if result.parsed is not None or result.parse_error is not None:
        answer["parsed"] = result.parsed
    if result.parse_error is not None:
        answer["parse_error"] = result.parse_error
    if result.reasoning is not None:
        answer["reasoning"] = result.reasoning
    if result.tool_calls:
        answer["tool_calls"] = [dict(call) for call in result.tool_calls]
    answer |= _logprobs_of(result)
    if result.completions:
        answer["completions"] = [
            {"content": c.content, "finish_reason": c.finish_reason, "seed": c.seed, **_logprobs_of(c)}
            for c in result.completions
        ]
    return answer


def _logprobs_of(text: LlmCallResult | Completion) -> dict[str, Any]:
    """The log-probabilities of a text, in the form of the OpenAI API."""
    if text.logprobs is None:
        return {}
    return {"logprobs": {"content": [token.as_dict() for token in text.logprobs]}}


def _origin(result: LlmCallResult | LlmEmbedResult) -> dict[str, Any]:
    """Who answered, why they did, and what it took."""
    usage = result.usage.as_dict() if result.usage else {}
    answer: dict[str, Any] = {
        "model": result.model,
        "backend": result.backend,
        "usage": usage,
        "tokens_used": usage.get("total_tokens", getattr(result, "tokens_used", None)),
    }
    provider = result.provider or ("local" if result.backend == "local" else None)
    if provider:
        answer["provider"] = provider
    if result.backend == "api":
        answer |= {"attempts": result.attempts, "total_delay": result.total_delay_s}
    if result.fallback_reason:
        answer["fallback_reason"] = result.fallback_reason
    return answer


def _failure(exc: Exception) -> dict[str, Any]:
    """What an action returns for an error, with what is known about the API's part in it."""
    failure: dict[str, Any] = {"error": str(exc) or type(exc).__name__, "success": False}
    causes = [cause for _, cause in exc.causes] if isinstance(exc, FallbackError) else [exc]
    for cause in causes:
        if isinstance(cause, ApiError):
            failure |= {"attempts": cause.attempts, "total_delay": cause.total_delay_s}
            if cause.status_code is not None:
                failure["status_code"] = cause.status_code
    return failure


def _has_system(messages: Sequence[Any]) -> bool:
    return any(isinstance(message, Mapping) and message.get("role") == "system" for message in messages)


def _mapping(value: Any) -> Mapping[str, Any]:
    """`value` where it is a mapping, else {}: an engine's attributes may be absent, or anything."""
    return value if isinstance(value, Mapping) else {}


def _version() -> str:
    try:
        return importlib.metadata.version("tea-llm")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "0+unknown"


__tea_actions__ = {
    "version": _version(),
    "description": "Language model calls, answered on this machine or by an OpenAI-compatible API",
    "actions": [name for row in ACTIONS for name in row.names],
}
"""What The Edge Agent shows about this package."""
