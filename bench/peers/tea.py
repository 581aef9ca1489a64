"""tea_llm through its public API."""

from __future__ import annotations

from adapter import SEED, Call, Chunks, Counts, InProcess, Request, serve


class Tea(InProcess):
    """A `LocalLlmBackend` with the request's context, threads and calls at a time; None leaves a number to tea_llm."""

    def __init__(self, request: Request) -> None:
        from tea_llm import LlmCallParams, LocalLlmBackend

        super().__init__()
        self._params = LlmCallParams
        at_a_time = {} if request.n_parallel is None else {"n_parallel": request.n_parallel}
        self._backend = LocalLlmBackend(request.model, n_ctx=request.n_ctx, n_threads=request.n_threads, **at_a_time)

    def version(self) -> str:
        from importlib.metadata import version

        return version("tea_llm")

    def generate(self, call: Call, chunks: Chunks) -> Counts:
        params = self._params(
            prompt=call.prompt, max_tokens=call.n_tokens, seed=SEED, schema=call.schema, **call.sampling
        )
        result = self._backend.generate(params, (lambda _text: chunks.arrived()) if call.stream else None)
        if result.usage is None:
            raise RuntimeError("the result has no usage; the tokens can't be counted")
        return Counts(result.usage.prompt_tokens, result.usage.completion_tokens)

    def close(self) -> None:
        self._backend.close()


if __name__ == "__main__":
    serve(Tea, __doc__)
