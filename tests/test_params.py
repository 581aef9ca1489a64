"""What a request may hold: CONTRACT section 1."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tea_llm import BadRequest, LlmCallParams
from tea_llm.params import UNSET


def test_a_request_holds_what_it_was_given() -> None:
    messages = [{"role": "user", "content": "Hello"}]
    params = LlmCallParams("Once", 50, 0.5, ["\n", "END"], messages=messages)
    assert (params.prompt, params.max_tokens, params.temperature) == ("Once", 50, 0.5)
    assert params.stop == ["\n", "END"]
    assert params.messages == messages


def test_the_defaults_are_the_contracts() -> None:
    params = LlmCallParams("Once")
    assert (params.max_tokens, params.temperature, params.stop, params.messages) == (100, 0.7, None, None)
    assert params.given() == {}


def test_a_request_does_not_change_when_its_lists_do() -> None:
    stop, messages = ["a"], [{"role": "user", "content": "Hello"}]
    params = LlmCallParams("Once", stop=stop, messages=messages)
    stop.append("b")
    messages.clear()
    assert params.stops == ("a",)
    assert params.messages == [{"role": "user", "content": "Hello"}]
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.prompt = "Twice"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("stop", "stops"), [(None, ()), ([], ()), ("x", ("x",)), (("x", "y"), ("x", "y")), (iter(["x"]), ("x",))]
)
def test_stop_is_a_string_or_some_strings(stop: Any, stops: tuple[str, ...]) -> None:
    params = LlmCallParams("Once", stop=stop)
    assert params.stops == stops
    assert params.stops == stops  # and again: nothing was used up


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", None),
        ("prompt", b"x"),
        ("max_tokens", "50"),
        ("max_tokens", True),
        ("max_tokens", -1),
        ("temperature", float("nan")),
        ("temperature", None),
        ("stop", 3),
        ("stop", {"a": 1}),
        ("stop", b"x"),
        ("stop", [3]),
        ("stop", [""]),
        ("messages", 3),
        ("messages", []),
        ("messages", "Hello"),
        ("messages", [3]),
        ("model", 3),
        ("model", ["a"]),
        ("grammar", 3),
        ("truncate", "yes"),
        ("chat_template", ""),
        ("chat_template_name", 3),
        ("template_kwargs", ["enable_thinking"]),
        ("extra", None),
        ("extra", 3),
        ("dry_sequence_breakers", 3),
        ("dry_sequence_breakers", "abc"),
        ("dry_sequence_breakers", [3]),
        ("logit_bias", 3),
        ("logit_bias", [[1, 2.0]]),
        ("logit_bias", {None: 1}),
        ("logit_bias", {1.5: 1}),
        ("logit_bias", {True: 1}),
        ("logit_bias", {1: "a"}),
        ("logit_bias", {1: float("nan")}),
        ("timeout_s", "3"),
        ("timeout_s", -1),
        ("timeout_s", float("inf")),
        ("timeout_s", 1e10),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(BadRequest, match=name):
        LlmCallParams(**{"prompt": "Once", name: value})


@pytest.mark.parametrize("name", ["dry_sequence_breakers", "logit_bias"])
def test_none_switches_a_table_off(name: str) -> None:
    params = LlmCallParams("Once", **{name: None})
    assert params.given() == {name: None}
    assert LlmCallParams("Once", **{name: UNSET}).given() == {}
