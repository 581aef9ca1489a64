"""Conversations, and what llama.cpp's own server makes of them with each template of llama.cpp's `models/templates`.

    python -m tests.golden_prompts path/to/llama-server build/templates

asks a server built from the llama.cpp that vendor/llama.cpp.lock names, and writes golden_prompts.json: for each
template and case the digest of the prompt that POST /apply-template gives, or "refused".
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from .random_models import write_random

__all__ = ["CASES", "GOLDEN", "digest", "write_model"]

GOLDEN = Path(__file__).with_suffix(".json")

_SYSTEM = {"role": "system", "content": "You are a careful assistant."}
_ASK = {"role": "user", "content": "What is the weather in Paris and in Rome? "}
_WHY = {"role": "user", "content": "Why?"}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a \"place\" now",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Name of the city"},
                    "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "now", "description": "The time", "parameters": {"type": "object", "properties": {}}},
    },
]




def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _call(number: int, city: str) -> dict[str, Any]:
    arguments = json.dumps({"city": city, "unit": "celsius"})
    return {"id": f"call{number:05}", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def _answer(number: int, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call{number:05}", "name": "get_weather", "content": text}


_CALLED = [
    _SYSTEM,
    _ASK,
    {"role": "assistant", "content": "", "tool_calls": [_call(1, "Paris")]},
    _answer(1, '{"temperature": 21.5}'),
    {"role": "assistant", "content": "It is warm in Paris.", "tool_calls": [_call(2, "Rome"), _call(3, "Romé")]},
    _answer(2, "sunny"),
    _answer(3, "unknown city"),
]

CASES: Mapping[str, Mapping[str, Any]] = {
    "question": {"messages": [_ASK]},
    "system": {"messages": [_SYSTEM, _ASK]},
    "turns": {"messages": [_SYSTEM, _ASK, {"role": "assistant", "content": "\nI can't know.\n"}, _WHY]},
    "thought": {
        "messages": [_ASK, {"role": "assistant", "content": "Warm.", "reasoning_content": "Spring."}, _WHY],
    },
    "parts": {"messages": [{"role": "user", "content": [_part("Look"), _part("here")]}]},
    "begun": {"messages": [_ASK, {"role": "assistant", "content": "It is"}]},
    "no answer yet": {"messages": [_SYSTEM, _ASK], "add_generation_prompt": False},
    "tools": {"messages": [_SYSTEM, _ASK], "tools": _TOOLS},
    "tools without system": {"messages": [_ASK], "tools": _TOOLS, "parallel_tool_calls": True},
    "called": {"messages": _CALLED, "tools": _TOOLS},
    "called, without tools": {"messages": _CALLED},
    "answered": {"messages": [*_CALLED, {"role": "assistant", "content": "Sunny."}, _ASK], "tools": _TOOLS},
    "thinking": {"messages": [_SYSTEM, _ASK], "chat_template_kwargs": {"enable_thinking": True}},
    "not thinking": {"messages": [_SYSTEM, _ASK], "chat_template_kwargs": {"enable_thinking": False}},
    "not thinking, with tools": {
        "messages": [_ASK], "tools": _TOOLS, "chat_template_kwargs": {"enable_thinking": False},
    },
}  # fmt: skip
"""Fields of a chat completion request, by what is special about it."""

_DATES = re.compile(
    r"\d{4}-\d{2}-\d{2}|\d{1,2} [A-Z][a-z]{2,8},? \d{4}|[A-Z][a-z]{2,8} \d{1,2},? \d{4}"
    r"|\b[A-Z][a-z]+day\b|\d{2}:\d{2}(:\d{2})?"
)


def digest(prompt: str) -> str:
    """What is compared of a prompt: all but the day on which it was written."""
    return hashlib.sha256(_DATES.sub("DATE", prompt).encode()).hexdigest()[:16]


def write_model(path: Path, template: str) -> Path:
    """A tiny model with that chat template, whose vocabulary begins each text with BOS."""
    return write_random("gpt2", path, template=template)


def _asked(server: str, model: Path) -> dict[str, str]:
    with subprocess.Popen(
        [server, "-m", model, "--port", "18765", "--jinja", "-c", "256", "-np", "1", "--no-warmup", "-t", "1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process, httpx.Client(base_url="http://127.0.0.1:18765") as client:  # fmt: skip
        try:
            for _ in range(200):
                try:
                    if client.get("/health").is_success:
                        break
                except httpx.TransportError:
                    if process.poll() is not None:
                        return dict.fromkeys(CASES, "refused")
                time.sleep(0.05)
            answers = {name: client.post("/apply-template", json=case) for name, case in CASES.items()}
            return {name: digest(a.json()["prompt"]) if a.is_success else "refused" for name, a in answers.items()}
        finally:
            process.terminate()


def main() -> None:
    """Write the golden file."""
    server, templates = sys.argv[1:]
    golden = {}
    with tempfile.TemporaryDirectory() as folder:
        for template in sorted(Path(templates).glob("*.jinja")):
            model = write_model(Path(folder) / "model.gguf", template.read_text())
            golden[template.stem] = _asked(server, model)
            print(template.stem, golden[template.stem])
    GOLDEN.write_text(json.dumps(golden, indent=0, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
