"""Writes the benchmark's model: Qwen2.5-0.5B's shape and vocabulary, Q4_0, random weights. It knows nothing.

    python bench/make_model.py --vocab-dir vendor/llama.cpp/models qwen-0.5b.gguf

Speed depends on shapes and types, not on what the weights say, so blocks are filled with random bytes instead of being
quantised, which takes seconds. The tied embedding is Q8_0, as llama-quantize would make it (its rows are no multiple of
256, so not Q6_K). The same seed writes the same file. Needs the packages `gguf` and `numpy`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

LAYERS, WIDTH, HEADS, KV_HEADS, FEED_FORWARD, CONTEXT = 24, 896, 14, 2, 4864, 32768
VOCABULARY = "ggml-vocab-qwen2.gguf"
BLOCK = 32  # weights in a block of Q4_0 and Q8_0


class Weights:
    """Random tensors from one stream of numbers."""

    def __init__(self, seed: int) -> None:
        import numpy

        self._np = numpy
        self._rng = numpy.random.Generator(numpy.random.PCG64(seed))

    def vector(self, size: int, mean: float) -> Any:
        """`size` float32 numbers near `mean`."""
        return (mean + 0.05 * (self._rng.random(size, dtype=self._np.float32) - 0.5)).astype(self._np.float32)

    def blocks(self, rows: int, columns: int, std: float, *, n_bytes: int, levels: float) -> Any:
        """A matrix of blocks: an f16 scale each, with a random sign, and `n_bytes` of random quants.

        `levels` is the standard deviation of a quant before it is scaled.
        """
        np = self._np
        n = rows * columns // BLOCK
        blocks = np.empty((n, 2 + n_bytes), np.uint8)
        signs = self._rng.choice(np.array([-1.0, 1.0], np.float32), n)  # cancel the mean of -0.5 that quants have
        blocks[:, :2] = (signs * np.float32(std / levels)).astype("<f2").view(np.uint8).reshape(n, 2)
        blocks[:, 2:] = np.frombuffer(self._rng.bytes(n * n_bytes), np.uint8).reshape(n, n_bytes)
        return blocks.reshape(rows, -1)

    def q4_0(self, rows: int, columns: int, std: float) -> Any:
        """A Q4_0 matrix: quants uniform in -8..7."""
        return self.blocks(rows, columns, std, n_bytes=16, levels=4.64)

    def q8_0(self, rows: int, columns: int, std: float) -> Any:
        """A Q8_0 matrix: quants uniform in -128..127."""
        return self.blocks(rows, columns, std, n_bytes=32, levels=73.9)


def write_model(target: Path, vocabulary: Path, seed: int) -> None:
    """Write the 0.5B model to `target`, with the tokenizer of the `vocabulary` file."""
    import gguf

    writer = gguf.GGUFWriter(target, "qwen2")
    writer.add_name("random-qwen2.5-0.5b")
    writer.add_description(f"random weights (seed {seed}) in the shape of Qwen2.5-0.5B: for benchmarks, knows nothing")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    n_vocab = _copy_tokenizer(writer, gguf.GGUFReader(vocabulary))
    writer.add_vocab_size(n_vocab)

    weights = Weights(seed)
    kv_width = WIDTH // HEADS * KV_HEADS
    residual = (2 * LAYERS) ** -0.5  # keeps the residual stream from growing layer by layer

    def q4_0(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        tensor = weights.q4_0(rows, columns, gain * columns**-0.5)
        writer.add_tensor(name, tensor, raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    writer.add_tensor(
        "token_embd.weight", weights.q8_0(n_vocab, WIDTH, WIDTH**-0.5), raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("output_norm.weight", weights.vector(WIDTH, 2.0))
    for i in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", weights.vector(WIDTH, 1.0))
        for name, rows in (("attn_q", WIDTH), ("attn_k", kv_width), ("attn_v", kv_width)):
            q4_0(f"blk.{i}.{name}.weight", rows, WIDTH)
            writer.add_tensor(f"blk.{i}.{name}.bias", weights.vector(rows, 0.0))
        q4_0(f"blk.{i}.attn_output.weight", WIDTH, WIDTH, residual)
        q4_0(f"blk.{i}.ffn_gate.weight", FEED_FORWARD, WIDTH)
        q4_0(f"blk.{i}.ffn_up.weight", FEED_FORWARD, WIDTH)
        q4_0(f"blk.{i}.ffn_down.weight", WIDTH, FEED_FORWARD, residual)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_tokenizer(writer: Any, vocabulary: Any) -> int:
    """Copy every `tokenizer.*` key; returns how many tokens there are."""
    from gguf import GGUFValueType

    n_tokens = 0
    for key, entry in vocabulary.fields.items():
        if key.startswith("tokenizer."):
            value = entry.contents()
            is_array = entry.types[0] == GGUFValueType.ARRAY
            writer.add_key_value(key, value, entry.types[0], entry.types[-1] if is_array else None)
            if key == "tokenizer.ggml.tokens":
                n_tokens = len(value)
    return n_tokens


def endless_copy(source: Path, target: Path, n_ctx: int) -> None:
    """Copy a TinyStories model so that every subject generates as many tokens as it is asked for.

    The copy says that it was trained for `n_ctx` tokens: some subjects refuse to go beyond that. And its BOS is token
    0, which it never generates: it ends a story with token 1, its old BOS, where tea_llm stops and the peers go on.
    """
    from gguf import GGUFReader

    shutil.copyfile(source, target)
    reader = GGUFReader(target, "r+")
    architecture = reader.fields["general.architecture"].contents()
    for key, value in ((f"{architecture}.context_length", n_ctx), ("tokenizer.ggml.bos_token_id", 0)):
        entry = reader.fields[key]
        entry.parts[entry.data[0]][0] = value
    reader.data.flush()


def main() -> int:
    """Write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="the file to write (about 360 MB)")
    parser.add_argument(
        "--vocab-dir", type=Path, required=True, help=f"where {VOCABULARY} lies: models/ of llama.cpp's source"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the weights (default: %(default)s)")
    args = parser.parse_args()
    vocabulary = args.vocab_dir / VOCABULARY
    if not vocabulary.exists():
        parser.error(f"{vocabulary} does not exist; give models/ of the source that bench/reference.py unpacks")
    write_model(args.target, vocabulary, args.seed)
    print(f"{args.target}: {args.target.stat().st_size:,} bytes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
