"""What an answer has to be, from the ways that a caller may say it; and what an answer in JSON holds.

A JSON schema, a regular expression and a list of choices are enforced by llguidance, a GBNF grammar by llama.cpp.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .errors import BadRequest
from .params import LlmCallParams, LlmCallResult
from .tools import is_deeper

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = ["Constraint", "constraint_of", "json_schema_of", "wants_json", "with_parsed"]

_SPACE = r"( |\n[ \t]{0,20})"  # between the parts of a JSON text, once at most: a model could go on with it for ever

_MAX_NESTING = 100  # of a schema

_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords that hold schemas by names of the caller's, which may be those of keywords."""


@dataclass(frozen=True)
class Constraint:
    """What a text has to be: the arguments of `_llama.Grammar`."""

    kind: Literal["gbnf", "json_schema", "regex"]
    source: str
    triggers: tuple[tuple[str, str | int], ...] = ()
    prefix: str | None = None
    markup: tuple[str, ...] = ()  # texts of the control tokens that may be in it


def constraint_of(params: LlmCallParams) -> Constraint | None:
    """What the answer to `params` has to be; None: anything.

    Raises BadRequest for a schema that can't be read, GrammarError (later) for what can't be enforced.
    """
    schema = json_schema_of(params)
    if schema is not None:
        strict = params.strict and _said_strict(params.response_format)
        guidance = {"whitespace_pattern": _SPACE} if strict else {"whitespace_pattern": _SPACE, "lenient": True}
        if schema is True:
            schema = {}
        elif schema is False:
            raise BadRequest("the schema is False, which no answer fulfils; give one that allows something")
        if is_deeper(schema, _MAX_NESTING):
            raise BadRequest(f"the schema is nested more than {_MAX_NESTING} deep; name its parts in $defs")
        return Constraint("json_schema", _as_json({"x-guidance": guidance, **_prepared(schema, strict)}))
    if params.regex is not None:
        return Constraint("regex", _in_rust(params.regex))
    if params.choices is not None:
        return Constraint("regex", "|".join(map(_literal, params.choices)))
    return None if params.grammar is None else Constraint("gbnf", params.grammar)


def wants_json(params: LlmCallParams) -> bool:
    """Whether the answer has to be JSON."""
    return params.schema is not None or (params.response_format or {}).get("type", "text") != "text"


def json_schema_of(params: LlmCallParams) -> Any:
    """The JSON schema that the answer has to fulfil, from `schema` or `response_format`; None: there is none."""
    if isinstance(params.schema, Mapping):
        return dict(params.schema)
    if isinstance(params.schema, bool):
        return params.schema
    if params.schema is not None:
        return _closed(_adapter(params.schema).json_schema())
    match params.response_format or {}:
        case {"type": "json_schema", "json_schema": {"schema": Mapping() | bool() as schema}}:
            return dict(schema) if isinstance(schema, Mapping) else schema
        case {"type": "json_object", "schema": Mapping() as schema}:  # llama-server's way
            return dict(schema)
        case {"type": "json_object"}:
            return {"type": "object"}
        case {"type": "text"}:
            return None
    if not params.response_format:
        return None
    raise BadRequest(
        f"response_format is {params.response_format!r:.80}; give {{'type': 'json_object'}}, or {{'type': "
        "'json_schema', 'json_schema': {'schema': …}}, or only the schema, as schema"
    )


def with_parsed(params: LlmCallParams, result: LlmCallResult, *, cut_by_stop: bool = False) -> LlmCallResult:
    """The result with what its JSON holds as `parsed`, or why there is nothing as `parse_error`, if JSON was wanted."""
    if not wants_json(params):
        return result
    if result.finish_reason != "stop":
        why = f"the answer is not complete: it ended with {result.finish_reason!r}"
        return dataclasses.replace(result, parse_error=why)
    if cut_by_stop:  # even if what is left is JSON: of 123 the 12 may be
        return dataclasses.replace(result, parse_error="the answer is not complete: a stop string ended it")
    try:
        if params.schema is None or isinstance(params.schema, Mapping | bool):
            parsed: Any = json.loads(result.content)
        else:
            parsed = _adapter(params.schema).validate_json(result.content)
    except (ValueError, RecursionError) as exc:  # pydantic's ValidationError too
        return dataclasses.replace(result, parse_error=f"the answer is not what was asked for: {exc}")
    return dataclasses.replace(result, parsed=parsed)


def _said_strict(response_format: Mapping[str, Any] | None) -> bool:
    inner = (response_format or {}).get("json_schema")
    return not (isinstance(inner, Mapping) and inner.get("strict") is False)


def _literal(text: str) -> str:
    """A regular expression for this text and no other."""
    return re.sub(r"[\\.+*?()|\[\]{}^$#&\-~]", r"\\\g<0>", text).replace("\0", r"\x00")


def _adapter(of: Any) -> TypeAdapter[Any]:
    """What pydantic knows of a type: its JSON schema, and how an instance is made of JSON."""
    try:
        import pydantic
    except ImportError as exc:
        raise BadRequest(
            f"schema is {of!r:.80}, which needs pydantic to be read; pip install pydantic, or give a JSON schema"
        ) from exc
    remedy = "give a model, a dataclass or a JSON schema"
    if inspect.isroutine(of):  # pydantic would read its arguments
        raise BadRequest(f"schema is {of!r:.80}, a function; {remedy}")
    try:
        return pydantic.TypeAdapter(of)
    except pydantic.errors.PydanticUserError as exc:
        raise BadRequest(f"schema is {of!r:.80}, which pydantic can't read: {exc}; {remedy}") from exc


def _closed(schema: Any) -> Any:
    """The schema of a type, with no properties but the type's own."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _by_name(key, value, _closed) for key, value in schema.items()}
    return {"additionalProperties": False, **closed} if isinstance(closed.get("properties"), dict) else closed


def _by_name(key: str, value: Any, of: Callable[[Any], Any]) -> Any:
    """What `of` makes of a keyword's value: of each schema in it, where it holds them by their names."""
    if key in _OF_NAMES and isinstance(value, Mapping):
        return {name: of(part) for name, part in value.items()}
    return of(value)


def _prepared(schema: Any, strict: bool) -> Any:
    """The schema in what of its language llguidance reads otherwise than the standard.

    Raises BadRequest, if `strict`, for what validators don't agree about.
    """
    if isinstance(schema, list | tuple):
        return [_prepared(part, strict) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    prepared = {}
    for key, value in schema.items():
        if key in ("const", "enum", "default", "examples"):
            prepared[key] = value
        elif key == "pattern" and isinstance(value, str):
            prepared[key] = _in_rust(value)
        elif key == "patternProperties" and isinstance(value, Mapping):
            prepared[key] = {_in_rust(pattern): _prepared(part, strict) for pattern, part in value.items()}
        elif key == "multipleOf" and isinstance(value, float) and not value.is_integer() and strict:
            raise BadRequest(
                f"the schema has multipleOf: {value}, and validators that compute in floating point take many "
                "multiples of a fraction for none; leave it out, or set strict: false to have decimal multiples"
            )
        else:
            prepared[key] = _by_name(key, value, lambda part: _prepared(part, strict))
    if schema.get("format") in ("time", "date-time"):  # llguidance has a leap second in each minute
        prepared = {"allOf": [prepared, {"pattern": "^[^:]*:[^:]*:[0-5]"}]}
    return prepared


def _in_rust(pattern: str) -> str:
    """A regular expression whose \\d, \\w, \\D and \\W are ASCII, as in ECMAScript; in Rust they mean all scripts."""
    in_class, out = False, []
    for piece in re.findall(r"\\.|[^\\]|\\$", pattern, re.DOTALL):
        inner = {"\\d": "0-9", "\\w": "A-Za-z0-9_", "\\D": "[^0-9]", "\\W": "[^A-Za-z0-9_]"}.get(piece)
        if piece in "[]":
            in_class = piece == "["
        out.append(piece if inner is None else inner if in_class else f"[{inner}]")
    return "".join(out)


def _as_json(schema: Mapping[str, Any]) -> str:
    """The schema as JSON. Raises BadRequest for what JSON can't hold."""
    try:
        return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as exc:
        raise BadRequest(f"the schema can't be written as JSON: {exc}; keep it to texts, numbers and mappings") from exc
