"""Calls of tools as families of models write them, by what their makers say of their formats.

The templates are llama.cpp's own, which ci/fetch-vocabs puts into build/templates.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("tea_llm._llama", reason="tea_llm was built without llama.cpp")
from tea_llm._llama import ChatParser, Grammar, Model
from tea_llm.answer import call_constraint

TEMPLATES = Path(__file__).parents[1] / "build" / "templates"

USER = [{"role": "user", "content": "How is the weather in Rome?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
ARGUMENTS = {"city": 'Rome "é"', "days": 2}
JSON = json.dumps(ARGUMENTS, ensure_ascii=False)
IN_TAGS = f'<tool_call>\n{{"name": "weather", "arguments": {JSON}}}\n</tool_call>'

FAMILIES = {  # template: what the model says to call `weather`, and what it says before
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": (IN_TAGS, "Yes. ", None),
    "Qwen-Qwen2.5-7B-Instruct": (IN_TAGS, "Yes. ", None),
    "Qwen-Qwen3-0.6B": (IN_TAGS, "Yes. ", "<think>\nHm.\n</think>\n\n"),
    "ibm-granite-granite-4.0": (IN_TAGS, "Yes. ", None),
    "Qwen3-Coder": (
        '<tool_call>\n<function=weather>\n<parameter=city>\nRome "é"\n</parameter>\n<parameter=days>\n2\n</parameter>\n'
        "</function>\n</tool_call>",
        "Yes. ",
        None,
    ),
    "meta-llama-Llama-3.1-8B-Instruct": (f'{{"name": "weather", "parameters": {JSON}}}', "", None),
    "meta-llama-Llama-3.2-3B-Instruct": (f'{{"name": "weather", "parameters": {JSON}}}', "", None),
    "mistralai-Mistral-Nemo-Instruct-2407": (
        f'[TOOL_CALLS][{{"name": "weather", "arguments": {JSON}, "id": "a1B2c3D4e"}}]', "", None,
    ),
    "mistralai-Ministral-3-14B-Reasoning-2512": (f"[TOOL_CALLS]weather[ARGS]{JSON}", "", "[THINK]Hm.[/THINK]"),
    "meetkai-functionary-medium-v3.1": (f"<function=weather>{JSON}</function>", "", None),
    "meetkai-functionary-medium-v3.2": (f"weather\n{JSON}", "", None),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": (
        f'<|START_ACTION|>[\n    {{"tool_call_id": "0", "tool_name": "weather", "parameters": {JSON}}}\n]'
        "<|END_ACTION|>",
        "",
        "<|START_THINKING|>Hm.<|END_THINKING|>",
    ),
    "deepseek-ai-DeepSeek-V3.1": (
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{JSON}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        "Hm.</think>",
    ),
    "llama-cpp-deepseek-r1": (
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{JSON}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        "Hm.</think>",
    ),
    "openai-gpt-oss-120b": (
        f"<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{JSON}",
        "",
        "<|channel|>analysis<|message|>Hm.<|end|>",
    ),
    "google-gemma-4-31B-it": ('<|tool_call>call:weather{city:<|"|>Rome "é"<|"|>,days:2}<tool_call|>', "", None),
    "fireworks-ai-llama-3-firefunction-v2": (f' functools[{{"name": "weather", "arguments": {JSON}}}]', "", None),
    "GLM-4.6": (
        '\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome "é"</arg_value>\n<arg_key>days</arg_key>\n'
        "<arg_value>2</arg_value>\n</tool_call>",
        "",
        "\n<think>Hm.</think>",
    ),
    "moonshotai-Kimi-K2": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        f"{JSON}<|tool_call_end|><|tool_calls_section_end|>",
        "Yes. ",
        None,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(shared_models: Path) -> Model:
    return Model(shared_models / "scripted-f16.gguf", vocab_only=True)


def _template(name: str) -> str:
    path = TEMPLATES / f"{name}.jinja"
    if not path.exists():
        pytest.skip("llama.cpp's templates are not there; run ci/fetch-vocabs")
    return path.read_text(encoding="utf-8")


def _read(parser: ChatParser, text: str, size: int, end: str) -> tuple[str, str, list[tuple[str, str]]]:
    content = reasoning = ""
    calls: dict[int, tuple[str, str]] = {}
    for i in range(0, len(text), size):
        if size < len(text):
            time.sleep(0.0005)  # so that it looks
        news = parser.read(text[i : i + size], end=end if i + size >= len(text) else None)
        content, reasoning = content + news[0], reasoning + news[1]
        for index, _, name, arguments in news[2]:
            before = calls.get(index, ("", ""))
            calls[index] = (before[0] + name, before[1] + arguments)
    return content, reasoning, list(calls.values())


@pytest.mark.parametrize("size", [1, 5, 10_000])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_call_is_read_as_its_family_writes_it(model: Model, name: str, size: int) -> None:
    call, talk, thought = FAMILIES[name]
    prompt = model.apply_chat_template(USER, tools=[WEATHER], template=_template(name))
    parser = ChatParser(prompt)
    assert parser.reads_calls
    content, reasoning, calls = _read(parser, (thought or "") + talk + call, size, "whole")
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [("weather", ARGUMENTS)]
    assert (content, reasoning.strip()) == (talk, "Hm." if thought else "")
    assert parser.unread == ""


@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_grammar_of_a_call_can_be_used(model: Model, name: str, choice: str) -> None:
    """Also where the tokenizer puts a space after a control token, which the grammar has not."""
    chat = model.apply_chat_template(USER, tools=[WEATHER], tool_choice=choice, template=_template(name))
    constraint = call_constraint(chat)
    if constraint is None:
        assert choice == "auto"
        assert name.startswith("meta-llama")  # nothing marks a call there
        return
    words = [("word", value) for kind, value in constraint.triggers if kind == "word"]
    assert Grammar(model, "gbnf", constraint.source, triggers=words, prefix=constraint.prefix)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_call_that_is_cut_anywhere_is_not_whole_and_no_content(model: Model, name: str) -> None:
    call, talk, thought = FAMILIES[name]
    prompt = model.apply_chat_template(USER, tools=[WEATHER], template=_template(name))
    text = (thought or "") + talk + call
    for n in range(len(text)):
        content, reasoning, calls = _read(ChatParser(prompt), text[:n], 10_000, "cut")
        assert talk.startswith(content), text[:n]
        assert (thought or "").lstrip().find(reasoning.strip()) >= 0
        for tool, arguments in calls:
            assert tool == "weather"
            with suppress(json.JSONDecodeError):
                assert json.loads(arguments) == ARGUMENTS, text[:n]
