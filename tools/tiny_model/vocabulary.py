"""The vocabulary: learned from text by byte-pair encoding, applied just as llama.cpp applies its "llama" kind (SPM).

llama.cpp (src/llama-vocab.cpp, llm_tokenizer_spm) joins, over and over, the two neighbours whose union is the piece
with the highest score, the leftmost of equals; what is no piece in the end is spelled in bytes. A piece's score here is
minus its rank, and no piece crosses the border of a `_CHUNK`, so a text can be encoded chunk by chunk.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import pairwise

__all__ = ["IM_END", "IM_START", "N_SPECIAL", "UNKNOWN", "Vocabulary", "learn"]

UNKNOWN, IM_START, IM_END = range(3)
N_SPECIAL = 3
N_BYTES = 256
_SPACE = "\u2581"
_CHUNK = re.compile(rf"{_SPACE}?(?:[^\W\d_]+|[^{_SPACE}\n])|{_SPACE}|\n")


class Vocabulary:
    """Text to tokens and back. Tokens are: `N_SPECIAL` special ones, 256 bytes, then the pieces by rank."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces
        self._rank = {piece: rank for rank, piece in enumerate(pieces)}
        self._encode_chunk = cache(self._encode_chunk_once)

    def __len__(self) -> int:
        return N_SPECIAL + N_BYTES + len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`; what looks like a special token in it is text."""
        return [token for chunk in _CHUNK.findall(text.replace(" ", _SPACE)) for token in self._encode_chunk(chunk)]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`, without the special ones."""
        first = N_SPECIAL + N_BYTES
        data = b"".join(
            bytes([t - N_SPECIAL]) if t < first else self.pieces[t - first].encode() for t in tokens if t >= N_SPECIAL
        )
        return data.decode(errors="replace").replace(_SPACE, " ")

    def _encode_chunk_once(self, chunk: str) -> list[int]:
        parts = _joined(list(chunk), self._rank)
        tokens: list[int] = []
        for part in parts:
            rank = self._rank.get(part)
            if rank is None:
                tokens += [N_SPECIAL + byte for byte in part.encode()]
            else:
                tokens.append(N_SPECIAL + N_BYTES + rank)
        return tokens


def _joined(parts: list[str], rank: dict[str, int]) -> list[str]:
    while True:
        found = [(rank[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in rank]
        if not found:
            return parts
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def learn(texts: Iterable[str], size: int) -> Vocabulary:
    """A vocabulary of `size` tokens: every character of `texts`, and the pairs that occur most often."""
    counts = Counter(chunk for text in texts for chunk in _CHUNK.findall(text.replace(" ", _SPACE)) if chunk != "\n")
    characters = Counter[str]()
    for chunk, n in counts.items():
        for character in chunk:
            characters[character] += n
    words = {chunk: list(chunk) for chunk in counts}
    pieces: list[str] = []
    n_pieces = size - N_SPECIAL - N_BYTES - len(characters)
    while len(pieces) < n_pieces:
        pairs = Counter[str]()
        for chunk, parts in words.items():
            for a, b in pairwise(parts):
                pairs[a + b] += counts[chunk]
        piece = max(pairs, key=lambda pair: (pairs[pair], pair))
        pieces.append(piece)
        for parts in words.values():
            i = 0
            while i < len(parts) - 1:
                if parts[i] + parts[i + 1] == piece:
                    parts[i : i + 2] = [piece]
                i += 1
    pieces += sorted(characters, key=lambda c: (-characters[c], c))
    return Vocabulary(pieces)
