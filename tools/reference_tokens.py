"""Write tests/reference_tokens.json: what llama.cpp itself draws, through llama-cpp-python's ctypes binding.

    python tools/reference_tokens.py stories260K-f32.gguf > tests/reference_tokens.json

Needs the llama-cpp-python that vendor/llama.cpp.lock names, which is built from the llama.cpp we build. Each case is
written twice on purpose: as the options of our Sampler, and as the chain of llama.cpp's samplers that they stand for.
"""

from __future__ import annotations

import ctypes
import json
import sys

import llama_cpp as llama
import numpy as np

PROMPT = "Once upon a time, Lily and Lily and Lily"
N_TOKENS = 32
SEED = 42
GRAMMAR = 'root ::= " and" (" Tom" | " Ben") (" saw" | " ran") [a-z ]* "."'
BREAKERS = ["\n", ":", '"', "*"]

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
DRAW = [("temp", 1.0), ("dist", SEED)]

CASES = {
    "nothing but a draw": (OFF, DRAW),
    "greedy": ({"temperature": 0.0}, [("greedy",)]),
    "temperature": ({**OFF, "temperature": 1.5}, [("temp", 1.5), ("dist", SEED)]),
    "seed": ({**OFF, "seed": 7}, [("temp", 1.0), ("dist", 7)]),
    "top_k": ({**OFF, "top_k": 5}, [("top_k", 5), *DRAW]),
    "top_p": ({**OFF, "top_p": 0.6}, [("top_p", 0.6, 1), *DRAW]),
    "min_p": ({**OFF, "min_p": 0.2}, [("min_p", 0.2, 1), *DRAW]),
    "typical": ({**OFF, "typical_p": 0.3}, [("typical", 0.3, 1), *DRAW]),
    "top_n_sigma": ({**OFF, "top_n_sigma": 1.0}, [("top_n_sigma", 1.0), *DRAW]),
    "top_n_sigma and top_k": (
        {**OFF, "top_n_sigma": 3.0, "top_k": 4, "temperature": 2.0},
        [("top_n_sigma", 3.0), ("top_k", 4), ("temp", 2.0), ("dist", SEED)],
    ),
    "xtc": (
        {**OFF, "xtc_probability": 0.5, "xtc_threshold": 0.05, "top_k": 20},
        [("top_k", 20), ("xtc", 0.5, 0.05, 1, SEED), *DRAW],
    ),
    "repeat_penalty": ({"temperature": 0.0, "repeat_penalty": 1.3}, [("penalties", 64, 1.3, 0.0, 0.0), ("greedy",)]),
    "repeat_last_n": (
        {"temperature": 0.0, "repeat_penalty": 1.3, "repeat_last_n": 4},
        [("penalties", 4, 1.3, 0.0, 0.0), ("greedy",)],
    ),
    "frequency_penalty": ({**OFF, "frequency_penalty": 0.9}, [("penalties", 64, 1.0, 0.9, 0.0), *DRAW]),
    "presence_penalty": ({**OFF, "presence_penalty": 1.5}, [("penalties", 64, 1.0, 0.0, 1.5), *DRAW]),
    "dry": (
        {"temperature": 0.0, "dry_multiplier": 2.0, "dry_allowed_length": 1},
        [("dry", 2.0, 1.75, 1, 64), ("greedy",)],
    ),
    "mirostat 1": (
        {**OFF, "temperature": 0.9, "mirostat": 1, "mirostat_tau": 3.0, "mirostat_eta": 0.2},
        [("temp", 0.9), ("mirostat", SEED, 3.0, 0.2)],
    ),
    "mirostat 2": (
        {**OFF, "temperature": 0.9, "mirostat": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.2},
        [("temp", 0.9), ("mirostat_v2", SEED, 3.0, 0.2)],
    ),
    "logit_bias": (
        {"temperature": 0.0, "logit_bias": {265: -100.0, 410: 3.0}},
        [("logit_bias", {265: -100.0, 410: 3.0}), ("greedy",)],
    ),
    # As llama.cpp's common_sampler_sample: a token is drawn without the grammar, and again with it if it refuses that.
    "grammar": ({**OFF, "grammar": GRAMMAR}, [("grammar", GRAMMAR), *DRAW]),
    "grammar, greedy": ({"temperature": 0.0, "grammar": GRAMMAR}, [("grammar", GRAMMAR), ("greedy",)]),
    "our defaults": ({}, [("top_k", 40), ("top_p", 0.95, 1), ("min_p", 0.05, 1), ("temp", 0.8), ("dist", SEED)]),
    "dynatemp": (
        {**OFF, "top_k": 40, "temperature": 0.9, "dynatemp_range": 0.6, "dynatemp_exponent": 2.0},
        [("top_k", 40), ("temp_ext", 0.9, 0.6, 2.0), ("dist", SEED)],
    ),
    "adaptive_p": (
        {**OFF, "min_p": 0.01, "adaptive_target": 0.3, "adaptive_decay": 0.8},
        [("min_p", 0.01, 1), ("temp", 1.0), ("adaptive_p", 0.3, 0.8, SEED)],
    ),
    "min_keep": ({**OFF, "top_p": 0.1, "min_p": 0.9, "min_keep": 4}, [("top_p", 0.1, 4), ("min_p", 0.9, 4), *DRAW]),
    "infill": (
        {**OFF, "samplers": ["top_k", "top_p", "infill"], "top_k": 40, "top_p": 0.99},
        [("top_k", 40), ("top_p", 0.99, 1), ("infill",), *DRAW],
    ),
    "samplers in another order": (
        {"samplers": ["temperature", "min_p", "penalties", "top_p"], "temperature": 3.0, "min_p": 0.1, "top_p": 0.7,
         "repeat_penalty": 1.5},
        [("temp", 3.0), ("min_p", 0.1, 1), ("penalties", 64, 1.5, 0.0, 0.0), ("top_p", 0.7, 1), ("dist", SEED)],
    ),
    "samplers that begin with the mass": (
        {"samplers": ["top_p", "min_p", "temperature"], "top_p": 0.8, "min_p": 0.02, "temperature": 1.7},
        [("top_p", 0.8, 1), ("min_p", 0.02, 1), ("temp", 1.7), ("dist", SEED)],
    ),
    "no samplers": ({"samplers": [], "seed": 8}, [("dist", 8)]),
    "all at once": (
        {
            "temperature": 1.4, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95, "top_n_sigma": 4.0,
            "xtc_probability": 0.3, "xtc_threshold": 0.2, "dry_multiplier": 0.8, "dry_penalty_last_n": 32,
            "repeat_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.1, "logit_bias": {265: -1.0},
        },
        [
            ("logit_bias", {265: -1.0}), ("penalties", 64, 1.1, 0.2, 0.1), ("dry", 0.8, 1.75, 2, 32),
            ("top_n_sigma", 4.0), ("top_k", 30), ("typical", 0.95, 1), ("top_p", 0.9, 1), ("min_p", 0.01, 1),
            ("xtc", 0.3, 0.2, 1, SEED), ("temp", 1.4), ("dist", SEED),
        ],
    ),
}  # fmt: skip
WITH_LOGPROBS = ("temperature", "all at once")
N_TOP = 5
LOOKBACK = ("penalties", "dry")  # they also look at the prompt


def _sampler(vocab, name, *args):
    n_vocab = llama.llama_vocab_n_tokens(vocab)
    if name == "dry":
        breakers = (ctypes.c_char_p * len(BREAKERS))(*(b.encode() for b in BREAKERS))
        return llama.llama_sampler_init_dry(vocab, *args, breakers, len(BREAKERS))
    if name == "grammar":
        return llama.llama_sampler_init_grammar(vocab, args[0].encode(), b"root")
    if name == "penalties":
        return llama.llama_sampler_init_penalties(n_vocab, *args)
    if name == "infill":
        return llama.llama_sampler_init_infill(vocab)
    if name == "mirostat":
        return llama.llama_sampler_init_mirostat(n_vocab, *args, 100)
    if name == "logit_bias":
        biases = (llama.llama_logit_bias * len(args[0]))(*args[0].items())
        return llama.llama_sampler_init_logit_bias(n_vocab, len(args[0]), biases)
    return getattr(llama, f"llama_sampler_init_{name}")(*args)


def _drawn(ctx, vocab, *samplers):
    logits, n = llama.llama_get_logits_ith(ctx, -1), llama.llama_vocab_n_tokens(vocab)
    candidates = (llama.llama_token_data * n)(*((i, logits[i], 0.0) for i in range(n)))
    array = llama.llama_token_data_array(candidates, n, -1, False)
    for sampler in reversed(samplers):
        llama.llama_sampler_apply(sampler, ctypes.byref(array))
    return array.data[array.selected].id


def _allows(grammar, token):
    one = (llama.llama_token_data * 1)((token, 1.0, 0.0))
    llama.llama_sampler_apply(grammar, ctypes.byref(llama.llama_token_data_array(one, 1, -1, False)))
    return one[0].logit > float("-inf")


def _tokens(model, vocab, prompt, chain):
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 512, 1, 1
    params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED  # src/attention.cpp rounds otherwise than ggml's
    ctx = llama.llama_init_from_model(model, params)
    samplers = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    grammar = None
    for name, *args in chain:
        sampler = _sampler(vocab, name, *args)
        if name == "grammar":
            grammar = sampler
            continue
        llama.llama_sampler_chain_add(samplers, sampler)
        if name in LOOKBACK:
            for token in prompt:
                llama.llama_sampler_accept(sampler, token)
    drawn: list[int] = []
    told = []
    batch = (llama.llama_token * len(prompt))(*prompt)
    while len(drawn) < N_TOKENS:
        if llama.llama_decode(ctx, llama.llama_batch_get_one(batch, len(batch))):
            sys.exit("llama_decode failed")
        logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(ctx, -1), (llama.llama_vocab_n_tokens(vocab),))
        told.append(_log_softmax(logits))
        token = _drawn(ctx, vocab, samplers)
        if grammar is not None and not _allows(grammar, token):
            token = _drawn(ctx, vocab, samplers, grammar)
        for accepting in filter(None, (grammar, samplers)):
            llama.llama_sampler_accept(accepting, token)
        if token == llama.llama_vocab_bos(vocab) or llama.llama_vocab_is_eog(vocab, token):
            break
        drawn.append(token)
        batch = (llama.llama_token * 1)(token)
    llama.llama_sampler_free(samplers)
    llama.llama_free(ctx)
    return drawn, told


def _log_softmax(logits):
    logits = logits.astype(np.float64)
    above = logits - logits.max()
    return above - np.log(np.exp(above).sum())


def _rows(tokens, told):
    """Of each token its own log-probability, and the likeliest tokens in its place with theirs."""
    rows = []
    for token, logprobs in zip(tokens, told, strict=False):
        top = [(int(t), round(float(logprobs[t]), 7)) for t in np.argsort(-logprobs, kind="stable")[:N_TOP]]
        rows.append([round(float(logprobs[token]), 7), top])
    return rows


def main(path: str) -> None:
    """Print the JSON for the model at `path`."""
    llama.llama_backend_init()
    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, None)
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    vocab = llama.llama_model_get_vocab(model)
    text = PROMPT.encode()
    buffer = (llama.llama_token * 256)()
    prompt = buffer[: llama.llama_tokenize(vocab, text, len(text), buffer, 256, True, False)]
    cases = {}
    for name, (options, chain) in CASES.items():
        tokens, told = _tokens(model, vocab, prompt, chain)
        cases[name] = {"options": {"seed": SEED, **options}, "tokens": tokens}
        if name in WITH_LOGPROBS:
            cases[name]["logprobs"] = _rows(tokens, told)
    rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
    print(f'{{\n  "made_by": "tools/reference_tokens.py, llama-cpp-python {llama.__version__}",')
    print(f'  "model": "stories260K-f32.gguf",\n  "prompt": {json.dumps(PROMPT)},\n  "n_tokens": {N_TOKENS},')
    print(f'  "cases": {{\n{rows}\n  }}\n}}')


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
