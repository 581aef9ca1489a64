"""The request that llama-server and xllamacpp, which carries llama-server inside, both understand."""

from __future__ import annotations

from typing import Any

from adapter import SEED, Call, Counts

RAM_CACHE_MIB = 8192
"""The size that llama-server gives its cache in host memory, unless it is switched off."""

# Only the samplers that every subject runs: the server's own default chain has five more, all switched off.
_CHAIN = ["top_k", "top_p", "min_p", "temperature"]


def completion_body(call: Call, prompt_cache: bool) -> dict[str, Any]:
    """The body of a completion request, which may or may not use what was computed for an earlier prompt."""
    sampling: dict[str, Any] = call.sampling | ({"samplers": _CHAIN} if call.sampled else {})
    if call.schema is not None:
        sampling = {**sampling, "json_schema": call.schema}
    body = {"prompt": call.prompt, "stream": call.stream, "cache_prompt": prompt_cache, "seed": SEED, **sampling}
    return {**body, "n_predict": call.n_tokens, "max_tokens": call.n_tokens}


def counts_of(reply: dict[str, Any]) -> Counts:
    """The counts in the last message of a stream, or in the only one of a plain call."""
    timings = reply["timings"]
    return Counts(timings["prompt_n"] + timings["cache_n"], timings["predicted_n"])
