"""The `{{ … }}` of a workflow: sandboxed Jinja2 that keeps the type of a lone expression."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

from jinja2 import ChainableUndefined, Template, TemplateError
from jinja2.environment import TemplateExpression
from jinja2.exceptions import SecurityError
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import WorkflowError

__all__ = ["MAX_TEXT", "check_condition", "check_template", "holds", "is_template", "render"]

logger = logging.getLogger("tea_llm")

MAX_TEXT = 16 * 1024 * 1024
"""The longest text, in characters, that one template may give."""

_MAX_POWER_BITS = 1 << 20
_FALSE_WORDS = frozenset({"", "false", "0", "no", "none"})


class _Missing(ChainableUndefined):
    """A key that isn't there: false, usable with `default()`, and said in the log when it prints as nothing."""

    def __str__(self) -> str:
        logger.warning("A template printed nothing: %s", self._undefined_message)
        return ""


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja2 where `state.items` is the key `items`, and where no template can fill the memory."""

    intercepted_binops: ClassVar[frozenset[str]] = frozenset({"*", "**"})  # type: ignore[misc]  # jinja2 types it per instance

    def getattr(self, obj: Any, attribute: str) -> Any:
        """The key `attribute` of a mapping, else what Jinja2 finds."""
        if isinstance(obj, Mapping) and attribute in obj:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Nothing: what the sandbox forbids is an error at once, not a missing key."""
        raise SecurityError(f"access to {attribute!r} of {type(obj).__name__!r} is not allowed in a template")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`left * right` or `left ** right`, unless the result would be too large."""
        if operator == "*":
            _check_repeat(left, right)
            _check_repeat(right, left)
        elif isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _MAX_POWER_BITS:
            raise SecurityError(f"{operator} gives a number of more than {_MAX_POWER_BITS} bits")
        return super().call_binop(context, operator, left, right)


def _check_repeat(sequence: Any, count: Any) -> None:
    if isinstance(sequence, (str, bytes, list, tuple)) and isinstance(count, int) and len(sequence) * count > MAX_TEXT:
        raise SecurityError(f"* gives more than {MAX_TEXT} items")


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, default=str)


_ENVIRONMENT = _Environment(undefined=_Missing, autoescape=False, keep_trailing_newline=True)
_ENVIRONMENT.filters.update(tojson=_to_json, json=_to_json, fromjson=json.loads)  # Jinja2's own tojson escapes for HTML


def is_template(value: Any) -> bool:
    """Whether a value is a text with a template in it."""
    return isinstance(value, str) and any(mark in value for mark in ("{{", "{%", "{#"))


def check_template(text: str) -> None:
    """Nothing, for a text whose templates parse. Raises WorkflowError with Jinja2's words otherwise."""
    if is_template(text):
        _compiled(text)


def check_condition(text: str) -> None:
    """Nothing, for a condition that parses. Raises WorkflowError with Jinja2's words otherwise."""
    check_template(_as_template(text))


def render(value: Any, scope: Mapping[str, Any]) -> Any:
    """`value` with the templates in all its strings filled in from `scope`, mappings and lists included.

    A string that is one lone `{{ expression }}` gives the expression's own value, None where a key is missing.
    Raises WorkflowError for a template that doesn't parse, fails, or gives more than `MAX_TEXT` characters.
    """
    if isinstance(value, str):
        return _render_text(value, scope) if is_template(value) else value
    if isinstance(value, Mapping):
        return {render(key, scope): render(item, scope) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [render(item, scope) for item in value]
    return value


def holds(condition: Any, scope: Mapping[str, Any]) -> bool:
    """Whether a condition is true: an expression with or without `{{ }}`, a key of the state, or `!key`.

    A value that is no string, such as YAML's `true`, stands for itself.
    """
    if not isinstance(condition, str):
        return bool(condition)
    value = render(_as_template(condition), scope)
    return value.strip().lower() not in _FALSE_WORDS if isinstance(value, str) else bool(value)


def _as_template(condition: str) -> str:
    text = condition.strip()
    if is_template(text):
        return text
    bare = text.removeprefix("!").strip()
    if bare.isidentifier() and bare.lower() not in {"true", "false", "none"}:
        text = f"not state[{bare!r}]" if text.startswith("!") else f"state[{bare!r}]"
    return "{{ " + text + " }}"


def _render_text(text: str, scope: Mapping[str, Any]) -> Any:
    compiled = _compiled(text)
    try:
        value = compiled(**scope) if isinstance(compiled, TemplateExpression) else _bounded_text(compiled, scope)
    except TemplateError as exc:
        raise WorkflowError(f"Template {_shown(text)} failed: {exc.message or type(exc).__name__}") from exc
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as exc:
        raise WorkflowError(f"Template {_shown(text)} failed: {type(exc).__name__}: {exc}") from exc
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise WorkflowError(f"Template {_shown(text)} gave {len(value)} characters; at most {MAX_TEXT} are allowed")
    return value


def _bounded_text(template: Template, scope: Mapping[str, Any]) -> str:
    pieces: list[str] = []
    length = 0
    for piece in template.generate(**scope):
        length += len(piece)
        if length > MAX_TEXT:
            raise SecurityError(f"it gives more than {MAX_TEXT} characters")
        pieces.append(piece)
    return "".join(pieces)


@lru_cache(maxsize=1024)
def _compiled(text: str) -> Template | TemplateExpression:
    try:
        expression = _lone_expression(text)
        if expression is not None:
            return _ENVIRONMENT.compile_expression(expression)
        return _ENVIRONMENT.from_string(text)
    except TemplateError as exc:
        raise WorkflowError(f"Template {_shown(text)} doesn't parse: {exc.message}") from exc


def _lone_expression(text: str) -> str | None:
    """What stands between the braces when `text` is one `{{ … }}` and white space around it, else None."""
    tokens = list(_ENVIRONMENT.lex(text.strip()))
    kinds = [kind for _, kind, _ in tokens]
    alone = kinds[0] == "variable_begin" and kinds[-1] == "variable_end" and kinds.count("variable_begin") == 1
    return "".join(value for _, _, value in tokens[1:-1]) if alone else None


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "…")
