"""Teach the model: `python train.py OUT` writes OUT/tea-tiny.pt, the weights with their vocabulary.

Documents are packed into rows of `n_context` tokens; a token sees only its own document. One thread, fixed seeds: the
same machine gives the same file.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from data import SPOKEN, Document, documents
from model import Shape, TinyLlama
from torch import Tensor
from torch.nn import functional
from vocabulary import IM_END, IM_START, Vocabulary, learn

__all__ = ["load", "prompt_tokens", "train"]

_VOCABULARY_SEED, _TRAINING_SEED, _WEIGHTS_SEED = 1, 2, 3
_N_VOCABULARY_DOCUMENTS = 20_000
_N_ROWS = 4
_PEAK_RATE = 3e-3
_N_WARMUP = 200


def encoded(document: Document, vocabulary: Vocabulary) -> tuple[list[int], list[bool]]:
    """The tokens of a document, and for each whether the model is to learn to say it."""
    tokens: list[int] = []
    learned: list[bool] = []

    def add(more: list[int], learn_it: bool) -> None:
        tokens.extend(more)
        learned.extend([learn_it] * len(more))

    for role, text in document:
        spoken = role in SPOKEN
        framed = role is not None and role != "continuation"
        if framed:
            add([IM_START, *vocabulary.encode(f"{role}\n")], False)
        add(vocabulary.encode(text), spoken)
        if framed or spoken:
            add([IM_END], spoken)
        if framed:
            add(vocabulary.encode("\n"), False)
    return tokens, learned


def prompt_tokens(messages: tuple[tuple[str, str], ...], vocabulary: Vocabulary) -> list[int]:
    """The tokens of a chat up to where the assistant speaks."""
    tokens, _ = encoded(list(messages), vocabulary)
    return [*tokens, IM_START, *vocabulary.encode("assistant\n")]


def _rows(vocabulary: Vocabulary, length: int) -> Iterator[tuple[list[int], list[bool], list[int]]]:
    """Rows of `length`: tokens, whether each is learned, and which document each belongs to."""
    tokens: list[int] = []
    learned: list[bool] = []
    owners: list[int] = []
    for n, document in enumerate(documents(_TRAINING_SEED)):
        more, more_learned = encoded(document, vocabulary)
        if len(more) > length:
            continue
        if len(tokens) + len(more) > length:
            pad = length - len(tokens)
            yield tokens + [0] * pad, learned + [False] * pad, owners + [-1] * pad
            tokens, learned, owners = [], [], []
        tokens += more
        learned += more_learned
        owners += [n] * len(more)


def _batches(vocabulary: Vocabulary, length: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, what is learned, and the mask."""
    rows = _rows(vocabulary, length)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    while True:
        tokens, learned, owners = (torch.tensor(x) for x in zip(*itertools.islice(rows, _N_ROWS), strict=True))
        yield tokens, learned, (owners[:, :, None] == owners[:, None, :])[:, None] & causal


def train(n_steps: int, shape: Shape) -> tuple[TinyLlama, Vocabulary]:
    """A model taught for `n_steps`, and its vocabulary. Prints the loss as it goes."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(_WEIGHTS_SEED)
    texts = (text for d in itertools.islice(documents(_VOCABULARY_SEED), _N_VOCABULARY_DOCUMENTS) for _, text in d)
    vocabulary = learn(itertools.chain(texts, ["system", "user", "assistant"]), shape.n_vocab)
    model = TinyLlama(shape)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights, {len(vocabulary)} tokens", file=sys.stderr)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=_PEAK_RATE, betas=(0.9, 0.98),
    )  # fmt: skip
    started = time.monotonic()
    for step, (tokens, learned, mask) in enumerate(itertools.islice(_batches(vocabulary, shape.n_context), n_steps)):
        rate = _PEAK_RATE * min((step + 1) / _N_WARMUP, 0.02 + 0.98 * (1 + math.cos(math.pi * step / n_steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model(tokens, mask)
            logits = model.logits(hidden[:, :-1][learned[:, 1:]])
        loss = functional.cross_entropy(logits.float(), tokens[:, 1:][learned[:, 1:]])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == n_steps - 1:
            elapsed_s = time.monotonic() - started
            print(f"step {step:5} loss {loss.item():.4f} {elapsed_s:6.0f} s", file=sys.stderr, flush=True)
    return model.eval(), vocabulary


def load(path: Path) -> tuple[TinyLlama, Vocabulary]:
    """The model and vocabulary that `python train.py` wrote."""
    saved = torch.load(path, weights_only=True)
    model = TinyLlama(Shape(**saved["shape"]))
    model.load_state_dict(saved["weights"])
    return model.eval(), Vocabulary(saved["pieces"])


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    shape = Shape()
    model, vocabulary = train(args.steps, shape)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.save(
        {"weights": model.state_dict(), "shape": vars(shape), "pieces": vocabulary.pieces}, args.out / "tea-tiny.pt"
    )


if __name__ == "__main__":
    main()
