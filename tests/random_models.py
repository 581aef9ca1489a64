"""Tiny models that the shared ones don't cover: other architectures with random weights, other context lengths."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

__all__ = ["N_VOCAB", "with_trained_context", "write_random"]

_N_NO_WORD = 259  # control tokens and bytes
N_VOCAB = _N_NO_WORD + 93  # and two-letter words
_N_EMBD, _N_LAYER = 32, 2
_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,)}
"""Types that gguf doesn't write, and where in a block their F16 scales are (ggml-common.h)."""
_WITH_MTP = ("glm4moe", "qwen35")
_Shapes = list[tuple[str, tuple[int, ...]]]


def with_trained_context(model: Path, n_ctx: int, copy: Path) -> Path:
    """A copy of a model that says it was trained for `n_ctx` tokens."""
    data = bytearray(model.read_bytes())
    key = b"llama.context_length"
    at = data.index(key) + len(key) + 4  # behind the value's type
    data[at : at + 4] = n_ctx.to_bytes(4, "little")
    copy.write_bytes(data)
    return copy


def write_random(
    arch: str, path: Path, *, n_ctx: int = 1024, n_window: int = 16, n_embd: int = _N_EMBD,
    quantised: str | None = None, template: str | None = None, infill: Sequence[str] = (),
) -> Path:  # fmt: skip
    """A model of `arch`, tiny and always the same.

    "gpt2" (learned positions), "gemma2" (sliding window, on every other layer), "mamba" (recurrent), and two that bring
    their own draft layer (MTP): "glm4moe" (attention only), "qwen35" (a recurrent layer, then attention). `quantised`:
    the type of what batches are multiplied with, as "Q4_0"; K types want an `n_embd` of 256. `template`: its chat
    template. `infill`: the parts of an infill prompt that it has tokens for, "pre", "suf", "mid", "rep", "sep".
    """
    gguf = pytest.importorskip("gguf", reason="gguf writes the random models")
    np = pytest.importorskip("numpy")
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(len(_layers(arch, n_embd)))
    writer.add_feed_forward_length(2 * n_embd)
    writer.add_head_count(0 if arch == "mamba" else 2)
    writer.add_layer_norm_eps(1e-5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    words = [f"{a}{b}" for a in "aeiou" for b in "bcdfghklmnprstvwxyz"][: N_VOCAB - _N_NO_WORD]
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words])
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(words))
    for i, part in enumerate(infill):
        writer.add_uint32(f"tokenizer.ggml.fim_{part}_token_id", N_VOCAB - 1 - i)
    if template is not None:
        writer.add_chat_template(template)
    if arch == "gemma2":
        writer.add_sliding_window(n_window)
        writer.add_key_length(n_embd // 2)
        writer.add_value_length(n_embd // 2)
    if arch == "mamba":
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_inner_size(2 * n_embd)
        writer.add_ssm_state_size(8)
        writer.add_ssm_time_step_rank(4)
    if arch == "glm4moe":
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
        writer.add_expert_shared_count(1)
        writer.add_expert_feed_forward_length(n_embd)
    if arch == "qwen35":
        writer.add_rope_dimension_sections([3, 3, 2, 0])
        writer.add_full_attention_interval(_N_LAYER)
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_inner_size(n_embd)
        writer.add_ssm_state_size(n_embd // 2)
        writer.add_ssm_time_step_rank(2)
        writer.add_ssm_group_count(2)
    if arch in _WITH_MTP:
        writer.add_nextn_predict_layers(1)
    for name, shape in _tensors(arch, n_embd, n_ctx):
        seed = name.replace(f"blk.{_N_LAYER}.", f"blk.{_N_LAYER - 1}.")  # a draft layer is a copy of the last one
        random = np.random.Generator(np.random.PCG64(zlib.crc32(seed.encode())))
        values = random.standard_normal(shape, dtype=np.float32) * shape[-1] ** -0.5
        if "norm.weight" in name:
            values = 1 + values
        if name.endswith("ssm_a"):
            values = -np.abs(values)  # a state that fades
        if arch in _WITH_MTP and name == "token_embd.weight":
            values *= 2 * n_embd**0.5  # a token says much about the next one: the draft layer is right now and then
        if name == "output.weight":
            values[:_N_NO_WORD] = 0  # answers are words, and end nowhere
        if name.endswith("eh_proj.weight"):
            values[:, :n_embd] = 2 * np.eye(n_embd)  # the token, as the first layer sees it, and noise
        if quantised and len(shape) == 2 and "position" not in name:
            kind = gguf.GGMLQuantizationType[quantised]
            if quantised in _SCALES:
                blocks = _random_blocks(gguf, random, kind, shape)
            else:
                blocks = gguf.quants.quantize(values, kind)
            writer.add_tensor(name, blocks, raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _random_blocks(gguf: Any, random: Any, kind: Any, shape: tuple[int, ...]) -> Any:
    """Weights of any bits, with scales that make them as large as those of the other types."""
    n_values, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (*shape[:-1], shape[-1] // n_values, n_bytes), dtype="uint8")

    def scaled(scale: float) -> Any:
        for at in _SCALES[kind.name]:
            blocks[..., at : at + 2] = memoryview(struct.pack("<e", scale))
        return blocks.reshape(*shape[:-1], -1)

    return scaled(shape[-1] ** -0.5 / gguf.quants.dequantize(scaled(1), kind).std())


def _tensors(arch: str, n_embd: int, n_ctx: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, as llama.cpp's src/models/<arch>.cpp wants them; numpy counts dimensions the other way."""
    e = n_embd
    yield "token_embd.weight", (N_VOCAB, e)
    yield "output_norm.weight", (e,)
    if arch == "gpt2":
        yield "position_embd.weight", (n_ctx, e)
        yield "output_norm.bias", (e,)
    if arch in _WITH_MTP:
        yield "output.weight", (N_VOCAB, e)  # with token_embd here, every token would be followed by itself
    for layer, tensors in enumerate(_layers(arch, n_embd)):
        for name, shape in tensors:
            yield f"blk.{layer}.{name}", shape


def _layers(arch: str, n_embd: int) -> list[_Shapes]:
    """The tensors of each layer; a draft layer (MTP) comes last."""
    e, ff = n_embd, 2 * n_embd
    dense: _Shapes = [("ffn_gate.weight", (ff, e)), ("ffn_up.weight", (ff, e)), ("ffn_down.weight", (e, ff))]
    norms: _Shapes = [("attn_norm.weight", (e,)), ("post_attention_norm.weight", (e,))]
    nextn: _Shapes = [
        ("nextn.eh_proj.weight", (e, 2 * e)), ("nextn.enorm.weight", (e,)), ("nextn.hnorm.weight", (e,)),
    ]  # fmt: skip
    kinds: dict[str, _Shapes] = {
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
            *dense,
        ],
        "mamba": [
            ("attn_norm.weight", (e,)), ("ssm_in.weight", (4 * e, e)),
            ("ssm_conv1d.weight", (2 * e, 4)), ("ssm_conv1d.bias", (2 * e,)),
            ("ssm_x.weight", (4 + 2 * 8, 2 * e)), ("ssm_dt.weight", (2 * e, 4)), ("ssm_dt.bias", (2 * e,)),
            ("ssm_a", (2 * e, 8)), ("ssm_d", (2 * e,)), ("ssm_out.weight", (e, 2 * e)),
        ],
        "glm4moe": [
            *norms,
            *((f"{name}.weight", (e, e)) for name in ("attn_q", "attn_k", "attn_v", "attn_output")),
            ("ffn_gate_inp.weight", (4, e)), ("exp_probs_b.bias", (4,)),
            *((f"ffn_{name}_exps.weight", (4, e, e)) for name in ("gate", "up", "down")),
            *((f"ffn_{name}_shexp.weight", (e, e)) for name in ("gate", "up", "down")),
        ],
        "qwen35": [
            *norms,
            ("attn_q.weight", (2 * e, e)),  # the upper half of each head is a gate
            *((f"{name}.weight", (e, e)) for name in ("attn_k", "attn_v", "attn_output")),
            ("attn_q_norm.weight", (e // 2,)), ("attn_k_norm.weight", (e // 2,)),
            *dense,
        ],
        "qwen35 recurrent": [
            *norms,
            ("attn_qkv.weight", (3 * e, e)), ("attn_gate.weight", (e, e)), ("ssm_conv1d.weight", (3 * e, 4)),
            ("ssm_dt.bias", (2,)), ("ssm_a", (2,)), ("ssm_beta.weight", (2, e)), ("ssm_alpha.weight", (2, e)),
            ("ssm_norm.weight", (e // 2,)), ("ssm_out.weight", (e, e)),
            *dense,
        ],
    }  # fmt: skip
    layers = [kinds[arch]] * _N_LAYER
    if arch == "qwen35":
        layers[0] = kinds["qwen35 recurrent"]
    return [*layers, kinds[arch] + nextn] if arch in _WITH_MTP else layers
