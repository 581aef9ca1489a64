"""Tools: as a model is told of them, and as it calls them. The forms are those of the OpenAI API."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias

from .errors import BadRequest

__all__ = [
    "GrowingCalls",
    "Tool",
    "ToolCall",
    "check_arguments",
    "checked_choice",
    "checked_tools",
    "function_tool",
    "is_deeper",
]

Tool: TypeAlias = "Mapping[str, Any] | Callable[..., Any]"
"""`{"type": "function", "function": {name, description, parameters}}`, or a Python function that stands for that."""

_DEEPEST: Final = 100
"""How deep a schema may be nested; what reads it is recursive."""

_CHOICES: Final = ("auto", "none", "required")

_TYPES: Final[Mapping[Any, str]] = {
    str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null", None: "null",
    list: "array", dict: "object",
}  # fmt: skip

_IS_OF_TYPE: Final[Mapping[str, Callable[[Any], bool]]] = {
    "string": lambda v: isinstance(v, str),
    "integer": lambda v: isinstance(v, int | float) and not isinstance(v, bool) and v == v // 1,
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
}


class ToolCall(dict[str, Any]):
    """One call of a tool: `{"id", "type", "function": {"name", "arguments"}}`, the arguments as JSON text.

    It goes back into the messages of the next request as it is. `name` and `arguments` are what is to be done.
    """

    @property
    def name(self) -> str:
        """The tool's name."""
        return str(self["function"]["name"])

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments by their names, {} where there are none. Raises BadRequest for what is no JSON object."""
        text = self["function"]["arguments"]
        try:
            arguments = json.loads(text or "{}")
        except (ValueError, RecursionError) as exc:
            raise BadRequest(f"the arguments of {self.name} are no JSON ({exc}); give a JSON object") from exc
        if not isinstance(arguments, dict):
            raise BadRequest(f"the arguments of {self.name} are {text!r:.80}; give a JSON object")
        return arguments

    @property
    def is_whole(self) -> bool:
        """Whether its arguments are a JSON object to the end, as they aren't where a text was cut in their midst."""
        try:
            return bool(self["function"]["arguments"]) and self.arguments is not None
        except BadRequest:
            return False


class GrowingCalls:
    """Calls of tools that come in pieces, as in a stream."""

    def __init__(self) -> None:
        self._calls: list[dict[str, Any]] = []

    def add(self, piece: Mapping[str, Any]) -> Mapping[str, Any]:
        """Put a piece where it belongs: by its `index`, or after the last call where it has none. Gives it with index.

        Raises ValueError, TypeError or AttributeError for what is no piece of a call.
        """
        calls, function = self._calls, piece.get("function") or {}
        index = piece.get("index")
        if index is None:
            index = len(calls) if piece.get("id") or function.get("name") or not calls else len(calls) - 1
        if not 0 <= index <= len(calls):
            raise ValueError(f"tool call {index} follows {len(calls)} others")
        if index == len(calls):
            calls.append({"id": "", "type": "function", "name": "", "arguments": []})
        call, arguments = calls[index], function.get("arguments") or ""
        if not isinstance(arguments, str):  # some servers give the object itself
            arguments = json.dumps(arguments)
        call["id"] = call["id"] or piece.get("id") or ""
        call["type"] = piece.get("type") or call["type"]
        call["name"] = call["name"] or function.get("name") or ""
        call["arguments"].append(arguments)
        return {**piece, "index": index, "function": {**function, "arguments": arguments}}

    def calls(self, *, cut: bool) -> tuple[ToolCall, ...]:
        """The calls; of a text that was cut only those that are whole."""
        calls = [
            ToolCall(
                id=call["id"],
                type=call["type"],
                function={"name": call["name"], "arguments": "".join(call["arguments"])},
            )
            for call in self._calls
        ]
        return tuple(call for call in calls if call.is_whole or not cut)


def checked_tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    """`tools` as mappings. Raises BadRequest for what is neither one nor a function that can be described."""
    if tools is None:
        return ()
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Iterable):
        raise BadRequest(f"tools is {tools!r:.80}; give a list of functions, or of mappings in OpenAI's form")
    checked: list[Mapping[str, Any]] = []
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping) and not callable(tool):
            raise BadRequest(
                f"tools[{i}] is {tool!r:.80}; give {{'type': 'function', 'function': …}} or a Python function"
            )
        checked.append(tool if isinstance(tool, Mapping) else function_tool(tool))
        if is_deeper(checked[-1], _DEEPEST):
            raise BadRequest(f"tools[{i}] is nested deeper than {_DEEPEST} levels; give a flatter schema")
    return tuple(checked)


def checked_choice(choice: Any, tools: Sequence[Mapping[str, Any]]) -> str | Mapping[str, Any] | None:
    """`choice` with a tool's name in OpenAI's form. Raises BadRequest for the name of no tool, or what is no choice."""
    if choice is None or (isinstance(choice, str) and choice in _CHOICES):
        return choice
    name = choice
    if isinstance(choice, Mapping):
        function = choice.get("function")
        if not isinstance(function, Mapping):
            return choice  # some server's own; whoever answers knows it or refuses it
        name = function.get("name")
    names = [tool["function"].get("name") for tool in tools if isinstance(tool.get("function"), Mapping)]
    if not isinstance(name, str) or name not in names:
        known = ", ".join(repr(n) for n in (*_CHOICES, *names))
        raise BadRequest(f"tool_choice is {choice!r:.80}; choose one of {known}")
    return {"type": "function", "function": {"name": name}}


def check_arguments(name: str, parameters: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Nothing, for arguments that the JSON Schema `parameters` names. Raises BadRequest, for the model to read.

    Looked at are names, `required`, `enum` and the type of each argument. What is inside one is left to the tool, which
    knows better than any schema: a whole validator would be a dependency for its message alone.
    """
    properties = parameters.get("properties") or {}
    unknown = sorted(set(arguments) - set(properties))
    if unknown and not parameters.get("additionalProperties"):
        raise BadRequest(f"{name} has no parameter {unknown[0]!r}")
    for required in parameters.get("required") or ():
        if required not in arguments:
            raise BadRequest(f"{name} needs {required!r}, which is missing")
    for key, value in arguments.items():
        schema = properties.get(key)
        if not isinstance(schema, Mapping):
            continue
        kinds = schema.get("type")
        kinds = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []
        checks = [_IS_OF_TYPE[kind] for kind in kinds if kind in _IS_OF_TYPE]
        if checks and not any(is_of_type(value) for is_of_type in checks):
            raise BadRequest(f"{key!r} of {name} is {value!r:.80}; it has to be of type {' or '.join(kinds)}")
        if "enum" in schema and value not in schema["enum"]:
            raise BadRequest(f"{key!r} of {name} is {value!r:.80}; it has to be one of {schema['enum']!r:.200}")


def function_tool(function: Callable[..., Any]) -> dict[str, Any]:
    """A Python function in OpenAI's form: its name, the first paragraph of its docstring, its parameters' types.

    `Annotated[str, "words"]` describes a parameter. Raises BadRequest for a function that no model could call so.
    """
    import inspect  # only where a function is given

    name = getattr(function, "__name__", None)
    if not isinstance(name, str) or name == "<lambda>":
        raise BadRequest(f"{function!r:.80} has no name that a model could call; give a function made with def")
    try:
        signature = inspect.signature(function)
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception as exc:
        raise BadRequest(f"the parameters of {name} can't be read ({exc}); give its schema in OpenAI's form") from exc
    properties, required = {}, []
    for parameter in signature.parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise BadRequest(f"{name} takes {parameter}, which no model can give by name; give plain parameters")
        where = f"the parameter {parameter.name} of {name}"
        properties[parameter.name] = _schema(hints.get(parameter.name, Any), where)
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    words = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
    parameters = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": words, "parameters": parameters}}


def _schema(hint: Any, where: str) -> dict[str, Any]:
    """JSON Schema for a type hint."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        words = [note for note in arguments[1:] if isinstance(note, str)]
        return _schema(arguments[0], where) | ({"description": words[0]} if words else {})
    if hint is Any:
        return {}
    if hint in _TYPES:
        return {"type": _TYPES[hint]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(one, where) for one in arguments]}
    if origin is list:
        return {"type": "array", "items": _schema(arguments[0], where)}
    if origin is dict and arguments[0] is str:
        return {"type": "object", "additionalProperties": _schema(arguments[1], where)}
    raise BadRequest(
        f"{where} has the type {hint}, for which there is no JSON Schema here; use str, int, float, bool, list, dict, "
        "Literal and unions of them, or give the tool in OpenAI's form"
    )


def is_deeper(value: Any, levels: int) -> bool:
    """Whether mappings and lists are nested in more than `levels` levels."""
    layer = [value]
    for _ in range(levels):
        layer = [
            inner
            for outer in layer
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
            if isinstance(inner, Mapping | list | tuple)
        ]
        if not layer:
            return False
    return True
