"""Texts of a Context, alone and side by side."""

from __future__ import annotations

from collections.abc import Sequence

from tea_llm._llama import Context, Generation, Model, Sampler

__all__ = ["TOO_WIDE", "alone", "greedy", "together"]

TOO_WIDE: dict[str, object] = {
    "anyOf": [
        {"type": "object", "properties": {f"k{i}": {}}, "required": [f"k{i}"], "additionalProperties": False}
        for i in range(2500)
    ]
}
"""A schema that llguidance reads, and gives up on where a text has to follow it: it bounds the rules open at once."""


def greedy(context: Context, text: str, **options) -> Generation:
    model = context.model
    return Generation(context, Sampler(model, temperature=0), model.tokenize(text), **options)


def alone(model: Model, text: str, max_tokens: int) -> str:
    """What the model says where nobody else is there."""
    return greedy(Context(model, reuse=False), text, max_tokens=max_tokens).run() or ""


def together(context: Context, generations: Sequence[Generation]) -> list[str]:
    """The whole text of each, computed side by side."""
    texts = dict.fromkeys(generations, "")
    while running := [g for g in generations if not g.ended]:
        for generation, text in context.run(running):
            texts[generation] += text
    return [texts[g] for g in generations]
