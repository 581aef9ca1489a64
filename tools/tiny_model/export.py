"""Write the trained model as GGUF: `python export.py OUT/tea-tiny.pt tea-tiny.gguf`."""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, TokenType
from model import TinyLlama
from train import load
from vocabulary import IM_END, IM_START, UNKNOWN, Vocabulary

__all__ = ["CHAT_TEMPLATE", "export"]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# llama.cpp's name of each of a block's matrices and norms, and ours
_BLOCK_TENSORS = {
    "attn_norm": "attention_norm", "attn_q": "attention.q", "attn_k": "attention.k", "attn_v": "attention.v",
    "attn_output": "attention.output", "ffn_norm": "norm", "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down",
}  # fmt: skip


def _add_metadata(writer: gguf.GGUFWriter, model: TinyLlama) -> None:
    shape = model.shape
    writer.add_name("tea-tiny")
    writer.add_author("the tea_llm authors")
    writer.add_version("1")
    writer.add_license("cc0-1.0")
    writer.add_description("A very small model that comes with tea_llm: capitals, greetings, stories for children.")
    writer.add_languages(["en"])
    writer.add_size_label(f"{round(sum(p.numel() for p in model.parameters()) / 1000)}K")
    writer.add_context_length(shape.n_context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.n_layers)
    writer.add_feed_forward_length(shape.n_hidden)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_heads)
    writer.add_rope_dimension_count(shape.width // shape.n_heads)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    special = {UNKNOWN: "<unk>", IM_START: "<|im_start|>", IM_END: "<|im_end|>"}
    n_bytes, n_pieces = 256, len(vocabulary.pieces)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*special.values(), *(f"<0x{byte:02X}>" for byte in range(n_bytes)), *vocabulary.pieces])
    writer.add_token_scores([0.0] * (len(special) + n_bytes) + [-1.0 - rank for rank in range(n_pieces)])
    writer.add_token_types(
        [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
        + [TokenType.BYTE] * n_bytes
        + [TokenType.NORMAL] * n_pieces
    )
    writer.add_unk_token_id(UNKNOWN)
    writer.add_bos_token_id(IM_START)
    writer.add_eos_token_id(IM_END)
    writer.add_eot_token_id(IM_END)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def export(model: TinyLlama, vocabulary: Vocabulary, path: Path) -> None:
    """Write `path`: matrices as q8_0, norms as f32. The same model gives the same bytes."""
    writer = gguf.GGUFWriter(path, "llama")
    _add_metadata(writer, model)
    _add_vocabulary(writer, vocabulary)

    def add(name: str, source: str) -> None:
        values: np.ndarray = weights[f"{source}.weight"].float().numpy()
        if values.ndim == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            q8 = GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, q8), raw_dtype=q8)

    weights = model.state_dict()
    add("token_embd", "embeddings")
    add("output_norm", "norm")
    for i in range(model.shape.n_layers):
        for name, source in _BLOCK_TENSORS.items():
            add(f"blk.{i}.{name}", f"blocks.{i}.{source}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("gguf", type=Path)
    args = parser.parse_args()
    export(*load(args.checkpoint), args.gguf)
    print(f"{args.gguf}: {args.gguf.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
