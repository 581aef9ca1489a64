"""Measure the GGUF in llama.cpp itself: `python evaluate.py tea-tiny.gguf [--checkpoint FILE] [--card FILE]`.

Prints a table. Each number is a share of held-out prompts at temperature 0, answered by llama.cpp's own server
(`pip install xllamacpp`). With the checkpoint, also: perplexity, and whether llama.cpp and PyTorch agree on tokens and
answers. With a card, the table there is replaced.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from data import Question, held_out, held_out_stories
from model import TinyLlama
from stories import story
from torch.nn import functional
from train import encoded, load, prompt_tokens
from vocabulary import IM_END, Vocabulary

_SEED = 7_000_002
_N_STORIES = 100
_MAX_TOKENS = 300
_TABLE = re.compile(r"(<!-- measured -->\n).*(<!-- end -->)", re.DOTALL)
_ODD_TEXTS = [
    "", " ", "  two  spaces ", "\n\n", "tab\tand\r\nline", "Bogotá, Chișinău, São Tomé", "日本語 emoji 🎈!", "a_b__c",
    "<|im_end|", "x" * 300, "UPPER lower 1234567", "\u00a0\u2003", "don't \"quote\" (this)", "\x00\x01", "▁ ▁▁a",
]  # fmt: skip


class LlamaServer:
    """llama.cpp's server on a GGUF, on a port of loopback that it chooses."""

    def __init__(self, path: Path) -> None:
        import xllamacpp  # type: ignore[import-untyped]

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.use_jinja = 512, 1, True
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.port = 0
        params.verbosity = -1
        self._server = xllamacpp.Server(params)

    def ask(self, path: str, **body: Any) -> Any:
        """What the server answers to a POST."""
        request = urllib.request.Request(
            f"{self._server.listening_address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def answer(self, question: Question) -> tuple[str, str]:
        """The greedy answer and why it ended."""
        reply = self.ask("/v1/chat/completions", messages=_dicts(question), temperature=0, max_tokens=_MAX_TOKENS)
        return reply["choices"][0]["message"]["content"], reply["choices"][0]["finish_reason"]

    def tokens(self, text: str) -> list[int]:
        """The tokens of `text`, special ones included."""
        tokens: list[int] = self.ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        return tokens


def _dicts(question: Question) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in question.messages]


def _share(good: Iterable[bool]) -> str:
    results = list(good)
    return f"{100 * sum(results) / len(results):.1f} % of {len(results)}"


def measure_questions(server: LlamaServer, questions: list[Question]) -> list[tuple[str, str, str]]:
    """Rows of the table; prints what was wrong."""
    right: dict[str, list[bool]] = defaultdict(list)
    for question in questions:
        answer, _ = server.answer(question)
        right[question.skill].append(answer == question.answer)
        if answer != question.answer:
            print(f"  {question.skill}: {question.messages[-1][1]!r} -> {answer!r}, not {question.answer!r}")
    return [(skill, "exact match", _share(results)) for skill, results in right.items()]


def measure_stories(server: LlamaServer, asked: list[tuple[Question, str]]) -> list[tuple[str, str, str]]:
    """Rows of the table: does a story end, is it about the one asked for, are its words ours?"""
    rng = random.Random(_SEED)
    known = {word for _ in range(5000) for word in re.findall(r"[\w']+", story(rng).text)}
    checks: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for question, name in asked:
        text, finish = server.answer(question)
        words = Counter(re.findall(r"[\w']+", text))
        checks[question.skill, "ends by itself"].append(finish == "stop")
        checks[question.skill, "is about the one asked for"].append(words[name] >= 2)
        checks[question.skill, "has only words that a story of ours has"].append(words.keys() <= known)
    return [(skill, check, _share(results)) for (skill, check), results in checks.items()]


@torch.inference_mode()
def perplexity(model: TinyLlama, vocabulary: Vocabulary, asked: list[tuple[Question, str]]) -> float:
    """Per token, of the stories that would answer."""
    total, n = 0.0, 0
    for question, _ in asked:
        tokens, learned = encoded([*question.messages, ("assistant", question.answer)], vocabulary)
        chosen = torch.tensor(learned[1:])
        scores = model.logits(model(torch.tensor([tokens]))[0, :-1])[chosen]
        total += float(functional.cross_entropy(scores, torch.tensor(tokens[1:])[chosen], reduction="sum"))
        n += int(chosen.sum())
    return math.exp(total / n)


def agreement(
    server: LlamaServer, model: TinyLlama, vocabulary: Vocabulary, questions: list[Question]
) -> list[tuple[str, str, str]]:
    """Rows of the table: llama.cpp against PyTorch, on prompts and on odd texts."""
    same_tokens = [server.tokens(text) == vocabulary.encode(text) for text in _ODD_TEXTS]
    same_answers = []
    for question in questions:
        prompt = prompt_tokens(question.messages, vocabulary)
        framed = server.ask("/apply-template", messages=_dicts(question))["prompt"]
        same_tokens.append(server.tokens(framed) == prompt)
        said = vocabulary.decode(model.greedy(prompt, IM_END, _MAX_TOKENS))
        same_answers.append(said == server.answer(question)[0])
    return [
        ("llama.cpp and PyTorch agree", "on tokens", _share(same_tokens)),
        ("llama.cpp and PyTorch agree", "on whole answers (q8_0 against f32)", _share(same_answers)),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--card", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    server = LlamaServer(args.gguf)
    questions, asked = held_out(_SEED), held_out_stories(_SEED, _N_STORIES)
    rows = measure_questions(server, questions) + measure_stories(server, asked)
    if args.checkpoint:
        model, vocabulary = load(args.checkpoint)
        rows.append(("stories", "perplexity per token (PyTorch)", f"{perplexity(model, vocabulary, asked):.2f}"))
        sample = random.Random(_SEED).sample(questions, 300) + [question for question, _ in asked[:20]]
        rows += agreement(server, model, vocabulary, sample)
    lines = [("what", "measure", "result"), ("---", "---", "---"), *rows]
    table = "".join(f"| {a} | {b} | {c} |\n" for a, b, c in lines)
    print(table)
    if args.card:
        card = args.card.read_text(encoding="utf-8")
        args.card.write_text(_TABLE.sub(lambda m: m[1] + table + m[2], card), encoding="utf-8")


if __name__ == "__main__":
    main()
