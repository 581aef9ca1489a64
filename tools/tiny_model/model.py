"""The network: llama.cpp's "llama" architecture in PyTorch, small."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Shape", "TinyLlama"]


@dataclass(frozen=True)
class Shape:
    """The sizes of a model; the matrix of embeddings is also the output's."""

    n_vocab: int = 1536
    n_context: int = 512
    n_layers: int = 4
    width: int = 128
    n_heads: int = 4
    n_hidden: int = 256
    rope_base: float = 10000.0
    epsilon: float = 1e-5


class _Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.n_heads = shape.n_heads
        self.q, self.k, self.v, self.output = (nn.Linear(shape.width, shape.width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None, rope: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (layer(x).view(batch, length, self.n_heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(
            _rotated(q, rope), _rotated(k, rope), v, attn_mask=mask, is_causal=mask is None
        )
        mixed: Tensor = self.output(y.transpose(1, 2).reshape(batch, length, width))
        return mixed


def _rotated(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """`x` turned by position, in neighbouring pairs as llama.cpp's "llama" does (LLAMA_ROPE_TYPE_NORM)."""
    cos, sin = rope
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


class _Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.width, shape.epsilon)
        self.attention = _Attention(shape)
        self.norm = nn.RMSNorm(shape.width, shape.epsilon)
        self.gate = nn.Linear(shape.width, shape.n_hidden, bias=False)
        self.up = nn.Linear(shape.width, shape.n_hidden, bias=False)
        self.down = nn.Linear(shape.n_hidden, shape.width, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask, rope)
        y = self.norm(x)
        z: Tensor = x + self.down(functional.silu(self.gate(y)) * self.up(y))
        return z


class TinyLlama(nn.Module):
    """Hidden states of shape (batch, length, width) for tokens; `logits` gives scores for the next token."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embeddings = nn.Embedding(shape.n_vocab, shape.width)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.n_layers))
        self.norm = nn.RMSNorm(shape.width, shape.epsilon)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                deep = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(weight, std=0.04 / (2 * shape.n_layers) ** 0.5 if deep else 0.04)
        head = shape.width // shape.n_heads
        turns = torch.outer(torch.arange(shape.n_context), shape.rope_base ** (-torch.arange(0, head, 2) / head))
        self.register_buffer("cos", turns.cos(), persistent=False)
        self.register_buffer("sin", turns.sin(), persistent=False)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` of shape (batch, 1, length, length) says who sees whom; None: each token sees those before it."""
        n = tokens.shape[1]
        rope = (self.get_buffer("cos")[:n], self.get_buffer("sin")[:n])
        x = self.embeddings(tokens)
        for block in self.blocks:
            x = block(x, mask, rope)
        y: Tensor = self.norm(x)
        return y

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of shape (…, n_vocab)."""
        return functional.linear(hidden, self.embeddings.weight)

    @torch.inference_mode()
    def greedy(self, tokens: list[int], end: int, max_tokens: int) -> list[int]:
        """The likeliest continuation, without the `end` token."""
        said: list[int] = []
        while len(said) < max_tokens and len(tokens) + len(said) < self.shape.n_context:
            hidden = self(torch.tensor([tokens + said]))
            token = int(self.logits(hidden[0, -1]).argmax())
            if token == end:
                break
            said.append(token)
        return said
