"""Models whose answers are known: each token is followed by the one that a script says, or by chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

__all__ = ["TEMPLATE", "write_reciting"]

TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\nYou can call these functions:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
{{- '\\n</tools>\\nThis is a call:\\n<tool_call>\\n{"name": "…", "arguments": {}}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- if message.reasoning_content %}{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}
{%- elif messages[-1].role == 'tool' %}{{- '<|again|>' }}{%- endif %}
{%- endif %}
"""
"""In the way of Hermes and Qwen 3. It ends with another token after a tool's result, so that the script can go on."""

_CONTROL = ("<|im_start|>", "<|im_end|>", "<|again|>", "<tool_call>", "</tool_call>")
_TAGS = ("<think>", "</think>", "\n\n")


def write_reciting(path: Path, answers: Mapping[str, Sequence[str]] | None, template: str = TEMPLATE) -> Path:
    """A model that says, after the token of each key, the pieces of its answer, and ends. None: it says anything.

    A piece is a token, and so no other piece may be the same.
    """
    gguf = pytest.importorskip("gguf", reason="gguf writes the reciting models")
    np = pytest.importorskip("numpy")
    pieces = list(dict.fromkeys(piece for answer in (answers or {}).values() for piece in answer))
    words = [piece for piece in [*_TAGS, *pieces] if piece not in _CONTROL and piece != "\n"]
    letters = [] if answers else [chr(c) for c in range(32, 127)]
    tokens = ["<unk>", "<s>", "</s>", *_CONTROL, *(f"<0x{b:02X}>" for b in range(256)), *dict.fromkeys(words + letters)]
    kinds = [2, 3, 3] + [3] * len(_CONTROL) + [6] * 256
    kinds += [4] * (len(tokens) - len(kinds))  # user-defined: found in any text, before it is taken apart
    n_vocab = -(-len(tokens) // 32) * 32
    kinds += [5] * (n_vocab - len(tokens))
    tokens += [f"<unused{i}>" for i in range(n_vocab - len(tokens))]
    number = {token: i for i, token in enumerate(tokens)} | {"\n": tokens.index("<0x0A>")}
    end = number["<|im_end|>"]
    output = np.zeros((n_vocab, n_vocab), np.float32)
    if answers is None:
        output[:] = np.random.Generator(np.random.PCG64(1)).standard_normal((n_vocab, n_vocab)) * 4
        output[number["<unk>"]] = -100
    for start, answer in (answers or {}).items():
        for before, after in zip([start, *answer], [*answer, "<|im_end|>"], strict=True):
            output[number[after], number[before]] = 20
    output[end, ~output.any(axis=0)] = 20
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(n_vocab)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_rope_dimension_count(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * n_vocab)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(template)
    writer.add_tensor("token_embd.weight", np.eye(n_vocab, dtype=np.float32) * n_vocab**-0.5)
    writer.add_tensor("output.weight", output * n_vocab**-0.5)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(n_vocab, np.float32))
    for name, rows, columns in (
        ("attn_q", 32, n_vocab), ("attn_k", 32, n_vocab), ("attn_v", 32, n_vocab), ("attn_output", n_vocab, 32),
        ("ffn_gate", 32, n_vocab), ("ffn_up", 32, n_vocab), ("ffn_down", n_vocab, 32),
    ):  # fmt: skip
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((rows, columns), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
