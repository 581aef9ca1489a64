"""Tiny models that the shared ones don't cover: other architectures with random weights, other context lengths."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

__all__ = ["N_VOCAB", "with_trained_context", "write_random"]

N_VOCAB = 259 + 93  # control tokens, bytes and two-letter words
_N_EMBD, _N_FF, _N_LAYER = 32, 64, 2


def with_trained_context(model: Path, n_ctx: int, copy: Path) -> Path:
    """A copy of a model that says it was trained for `n_ctx` tokens."""
    data = bytearray(model.read_bytes())
    key = b"llama.context_length"
    at = data.index(key) + len(key) + 4  # behind the value's type
    data[at : at + 4] = n_ctx.to_bytes(4, "little")
    copy.write_bytes(data)
    return copy


def write_random(arch: str, path: Path, *, n_ctx: int = 1024, n_window: int = 16) -> Path:
    """A model of `arch`: "gpt2" (learned positions), "gemma2" (sliding window, on every other layer), "mamba"."""
    gguf = pytest.importorskip("gguf", reason="gguf writes the random models")
    np = pytest.importorskip("numpy")
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(_N_EMBD)
    writer.add_block_count(_N_LAYER)
    writer.add_feed_forward_length(_N_FF)
    writer.add_head_count(0 if arch == "mamba" else 2)
    writer.add_layer_norm_eps(1e-5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    words = [f"{a}{b}" for a in "aeiou" for b in "bcdfghklmnprstvwxyz"][: N_VOCAB - 259]
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words])
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(words))
    if arch == "gemma2":
        writer.add_sliding_window(n_window)
        writer.add_key_length(_N_EMBD // 2)
        writer.add_value_length(_N_EMBD // 2)
    if arch == "mamba":
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_inner_size(2 * _N_EMBD)
        writer.add_ssm_state_size(8)
        writer.add_ssm_time_step_rank(4)
    for name, shape in _tensors(arch, n_ctx):
        random = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
        values = random.standard_normal(shape, dtype=np.float32) * shape[-1] ** -0.5
        if "norm.weight" in name:
            values = 1 + values
        if name.endswith("ssm_a"):
            values = -np.abs(values)  # a state that fades
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(arch: str, n_ctx: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, as llama.cpp's src/models/<arch>.cpp wants them; numpy counts dimensions the other way."""
    e, ff = _N_EMBD, _N_FF
    yield "token_embd.weight", (N_VOCAB, e)
    yield "output_norm.weight", (e,)
    if arch == "gpt2":
        yield "position_embd.weight", (n_ctx, e)
        yield "output_norm.bias", (e,)
    layers: dict[str, list[tuple[str, Any]]] = {
        "gpt2": [
            *((f"{norm}.{part}", (e,)) for norm in ("attn_norm", "ffn_norm") for part in ("weight", "bias")),
            ("attn_qkv.weight", (3 * e, e)), ("attn_qkv.bias", (3 * e,)),
            ("attn_output.weight", (e, e)), ("attn_output.bias", (e,)),
            ("ffn_up.weight", (ff, e)), ("ffn_up.bias", (ff,)),
            ("ffn_down.weight", (e, ff)), ("ffn_down.bias", (e,)),
        ],
        "gemma2": [
            *((f"{norm}.weight", (e,)) for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")),
            *((f"{name}.weight", (e, e)) for name in ("attn_q", "attn_k", "attn_v", "attn_output")),
            ("ffn_gate.weight", (ff, e)), ("ffn_up.weight", (ff, e)), ("ffn_down.weight", (e, ff)),
        ],
        "mamba": [
            ("attn_norm.weight", (e,)), ("ssm_in.weight", (4 * e, e)),
            ("ssm_conv1d.weight", (2 * e, 4)), ("ssm_conv1d.bias", (2 * e,)),
            ("ssm_x.weight", (4 + 2 * 8, 2 * e)), ("ssm_dt.weight", (2 * e, 4)), ("ssm_dt.bias", (2 * e,)),
            ("ssm_a", (2 * e, 8)), ("ssm_d", (2 * e,)), ("ssm_out.weight", (e, 2 * e)),
        ],
    }  # fmt: skip
    for layer in range(_N_LAYER):
        for name, shape in layers[arch]:
            yield f"blk.{layer}.{name}", shape
