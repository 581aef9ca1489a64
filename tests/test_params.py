"""What a request may hold: CONTRACT section 1."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tea_llm import BadRequest, LlmCallParams
from tea_llm.params import UNSET, sampler_order


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
        ("samplers", 3),
        ("samplers", [3]),
        ("samplers", ["top_q"]),
        ("samplers", "kq"),
        ("samplers", ["top_k", "top-k"]),
        ("n", 0),
        ("n", 10**9),
        ("n", None),
        ("n", True),
        ("logprobs", 1),
        ("top_logprobs", 21),
        ("top_logprobs", 3),
        ("ignore_eos", 1),
        ("suffix", 3),
        ("input_extra", [{"text": "a"}]),
        ("input_extra", [3]),
        ("input_extra", [{"filename": "a"}]),
        ("min_keep", -1),
        ("adaptive_decay", 1.0),
        ("dynatemp_range", float("nan")),
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


@pytest.mark.parametrize(
    ("samplers", "order"),
    [
        (None, None),
        ([], ()),
        ("", ()),
        ("edskypmxt", ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")),
        (["Top-K", "minp", "nucleus", "typical_p", "temp", "adaptive-p"],
         ("top_k", "min_p", "top_p", "typ_p", "temperature", "adaptive_p")),
    ],
)  # fmt: skip
def test_samplers_have_llama_cpps_names_and_letters(samplers: Any, order: Any) -> None:
    assert sampler_order(LlmCallParams("x", samplers=samplers).samplers) == order


def test_an_unknown_sampler_names_the_nearest() -> None:
    with pytest.raises(BadRequest, match="did you mean 'temperature'"):
        LlmCallParams("x", samplers=["temprature"])


def test_fields_that_exclude_each_other_are_refused() -> None:
    for more in (
        {"suffix": "b", "messages": [{"role": "user", "content": "a"}]},
        {"n": 2, "session": "file"},
        {"input_extra": [{"text": "a"}]},
    ):
        with pytest.raises(BadRequest):
            LlmCallParams("a", **more)


@pytest.mark.parametrize("name", ["dry_sequence_breakers", "logit_bias"])
def test_none_switches_a_table_off(name: str) -> None:
    params = LlmCallParams("Once", **{name: None})
    assert params.given() == {name: None}
    assert LlmCallParams("Once", **{name: UNSET}).given() == {}
