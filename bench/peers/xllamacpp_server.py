"""xllamacpp through `Server.handle_completions`: llama-server inside the process, a slot for each call at a time.

Features: `kv-unified` and `ram-cache`, as in llama_server.py.
"""

from __future__ import annotations

from typing import Any

from adapter import Call, Chunks, Counts, InProcess, Request, serve
from llama_service import RAM_CACHE_MIB, completion_body, counts_of


class Xllamacpp(InProcess):
    """A `Server` without warm-up, log and user interface; it keeps prompts only if the request says so."""

    def __init__(self, request: Request) -> None:
        import xllamacpp

        super().__init__()
        params = xllamacpp.CommonParams()
        params.model.path = request.model
        params.n_parallel = request.n_parallel or 1
        params.n_ctx = request.n_ctx * params.n_parallel
        params.kv_unified = "kv-unified" in request.features
        params.warmup = False
        params.fit_params = False
        params.cache_ram_mib = RAM_CACHE_MIB if "ram-cache" in request.features else 0
        params.n_ctx_checkpoints = 0
        params.ui = False
        params.verbosity = -1
        if request.n_threads is not None:
            params.cpuparams.n_threads = request.n_threads
            params.cpuparams_batch.n_threads = request.n_threads
        if request.flash_attn is not None:
            kind = xllamacpp.llama_flash_attn_type
            on, off = kind.LLAMA_FLASH_ATTN_TYPE_ENABLED, kind.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.flash_attn_type = on if request.flash_attn else off
        self._prompt_cache = request.prompt_cache
        self._server = xllamacpp.Server(params)

    def version(self) -> str:
        import xllamacpp

        return str(xllamacpp.__version__)

    def generate(self, call: Call, chunks: Chunks) -> Counts:
        body = completion_body(call, self._prompt_cache)
        if not call.stream:
            return counts_of(self._server.handle_completions(body))
        last: dict[str, Any] = {}

        def on_chunk(message: dict[str, Any]) -> None:
            nonlocal last
            chunks.arrived()
            last = message

        self._server.handle_completions(body, on_chunk)
        return counts_of(last)


if __name__ == "__main__":
    serve(Xllamacpp, __doc__)
