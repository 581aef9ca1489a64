"""llama-cpp-python through `Llama.create_completion`; flash attention is off unless the request says otherwise.

A second caller of one `Llama` crashes the process. It always uses again what the call before has in common with a call.
The feature `ram-cache` gives it a `LlamaRAMCache`.
"""

from __future__ import annotations

import json

from adapter import SEED, Call, Chunks, Counts, InProcess, Request, serve


class LlamaCppPython(InProcess):
    """A `Llama`; its prompt batch is llama.cpp's own default of 2,048, not its 512."""

    at_once = False

    def __init__(self, request: Request) -> None:
        import llama_cpp

        super().__init__()
        self._llama = llama_cpp.Llama(
            request.model,
            n_ctx=request.n_ctx,
            n_batch=2048,
            n_ubatch=512,
            n_threads=request.n_threads,
            n_threads_batch=request.n_threads,
            flash_attn=bool(request.flash_attn),
            no_perf=True,
            verbose=False,
        )
        self._grammar = llama_cpp.LlamaGrammar.from_json_schema
        if "ram-cache" in request.features:
            self._llama.set_cache(llama_cpp.LlamaRAMCache())

    def version(self) -> str:
        import llama_cpp

        return str(llama_cpp.__version__)

    def generate(self, call: Call, chunks: Chunks) -> Counts:
        options = {"max_tokens": call.n_tokens, "seed": SEED, "repeat_penalty": 1.0, **call.sampling}
        if call.schema is not None:
            options["grammar"] = self._grammar(json.dumps(call.schema))
        if not call.stream:
            usage = self._llama.create_completion(call.prompt, **options)["usage"]
            return Counts(usage["prompt_tokens"], usage["completion_tokens"])
        for _ in self._llama.create_completion(call.prompt, stream=True, **options):
            chunks.arrived()
        # A stream carries no usage. The context holds the prompt and all that was generated but the last token.
        prompt_tokens = len(self._llama.tokenize(call.prompt.encode(), special=True))
        return Counts(prompt_tokens, self._llama.n_tokens - prompt_tokens + 1)


if __name__ == "__main__":
    serve(LlamaCppPython, __doc__)
