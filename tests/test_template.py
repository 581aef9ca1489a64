"""Templates: what a `{{ … }}` gives, and what it can't do."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tea_llm.errors import WorkflowError
from tea_llm.template import MAX_TEXT, check_condition, check_template, holds, render

SCOPE: dict[str, Any] = {
    "state": {"n": 3, "items": [1, 2], "user": {"name": "Ada"}, "flag": False, "json": '{"a": 1}'},
    "variables": {"greeting": "Hello"},
    "result": {"content": "hi"},
}


@pytest.mark.parametrize(
    ("template", "value"),
    [
        ("{{ state.n }}", 3),
        ("{{ state.n + 1 }}", 4),
        ("  {{ state.user }}\n", {"name": "Ada"}),
        ("{{- state.flag -}}", False),
        ("{{ result.content }}", "hi"),
        ("{{ result }}", {"content": "hi"}),
        ("{{ '}}' }}", "}}"),
        ("{{ state['items'][0] }}", 1),
        ("{{ state.json | fromjson }}", {"a": 1}),
    ],
)
def test_a_lone_expression_keeps_its_type(template: str, value: object) -> None:
    assert render(template, SCOPE) == value


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ variables.greeting }}, {{ state.user.name }}!", "Hello, Ada!"),
        ("{{ state.n }}{{ state.n }}", "33"),
        ("{% for i in state['items'] %}{{ i }};{% endfor %}", "1;2;"),
        ("{{ state.user | tojson }}.", '{"name": "Ada"}.'),
        ("{{ '<é>' | tojson }}.", '"<é>".'),
        ("no template at all", "no template at all"),
        ("kept: { } and { { x } }", "kept: { } and { { x } }"),
        ("ends with a newline {{ state.n }}\n", "ends with a newline 3\n"),
    ],
)
def test_mixed_text_gives_text(template: str, text: str) -> None:
    assert render(template, SCOPE) == text


def test_a_key_comes_before_a_method_of_the_mapping() -> None:
    assert render("{{ state.items }}", SCOPE) == [1, 2]
    assert render("{{ state.get('n') }}", SCOPE) == 3


def test_a_lone_missing_key_gives_none() -> None:
    assert render("{{ state.nope }}", SCOPE) is None
    assert render("{{ state.nope.deeper }}", SCOPE) is None


def test_a_missing_key_takes_its_default() -> None:
    assert render("{{ state.nope | default('x') }}", SCOPE) == "x"
    assert render("{{ state.nope.deeper | default(7) }}", SCOPE) == 7
    assert render("{{ state.nope or variables.greeting }}", SCOPE) == "Hello"


def test_a_missing_key_inside_text_prints_nothing_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tea_llm"):
        assert render("<{{ state.nope }}>", SCOPE) == "<>"
    assert "nope" in caplog.text


def test_mappings_and_lists_are_rendered_all_the_way_down() -> None:
    value = {"a": ["{{ state.n }}", {"b": "{{ variables.greeting }}!"}], "c": 1.5, "d": None}
    assert render(value, SCOPE) == {"a": [3, {"b": "Hello!"}], "c": 1.5, "d": None}


def test_what_a_template_gives_is_never_rendered_again() -> None:
    assert render("{{ state.text }}", {"state": {"text": "{{ 1 + 1 }}"}}) == "{{ 1 + 1 }}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ state.items.append(3) }}",
        "{{ state.pop('n') }}",
        "{{ cycler.__init__.__globals__ }}",
        "text {{ ().__class__.__bases__ }}",
    ],
)
def test_the_sandbox_refuses(template: str) -> None:
    with pytest.raises(WorkflowError, match=r"failed: access to"):
        render(template, SCOPE)
    assert SCOPE["state"]["items"] == [1, 2]


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 9 }}",
        "{{ [0] * 10 ** 9 }}",
        "{{ 10 ** 10000000 }}",
        "{% for i in range(9999) %}{% for j in range(9999) %}abc{% endfor %}{% endfor %}",
        f"{{{{ state.big }}}}{'x' * 10}",
    ],
)
def test_no_template_gives_more_than_the_bound(template: str) -> None:
    with pytest.raises(WorkflowError, match="more than"):
        render(template, {"state": {"big": "y" * MAX_TEXT}})


@pytest.mark.parametrize("template", ["{{ state. }}", "{{", "{% if x %}", "{{ 'x' | nofilter }}", "{{ }}"])
def test_a_template_that_does_not_parse_is_found_without_running_it(template: str) -> None:
    with pytest.raises(WorkflowError, match="doesn't parse"):
        check_template(template)


@pytest.mark.parametrize(
    ("condition", "truth"),
    [
        ("state.n > 2", True),
        ("{{ state.n > 5 }}", False),
        ("state['n'] == 3 and not state.flag", True),
        ("n", True),
        ("flag", False),
        ("!flag", True),
        ("nope", False),
        ("!nope", True),
        ("True", True),
        ("false", False),
        (True, True),
        (0, False),
        ("{% if state.n %}no{% endif %}", False),
        ("{% if state.n %}go{% endif %}", True),
        ("state.n in state['items']", False),
    ],
)
def test_a_condition_is(condition: object, truth: bool) -> None:
    assert holds(condition, SCOPE) is truth


def test_a_condition_that_does_not_parse_is_found_without_running_it() -> None:
    check_condition("state.n > 1")
    with pytest.raises(WorkflowError, match="doesn't parse"):
        check_condition("state.n >")


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ state.nope > 3 }}", "{{ state.n + 'a' }}", "{{ 'x' | fromjson }}"]
)
def test_a_template_that_fails_says_which_and_why(template: str) -> None:
    with pytest.raises(WorkflowError) as caught:
        render(template, SCOPE)
    assert template in str(caught.value)
