"""cyllama through `LLM`.

It has no setting for threads, so they are set on the context that it keeps; and none for flash attention. It refuses a
second caller, and forgets every prompt.
"""

from __future__ import annotations

import logging

from adapter import SAMPLING, SEED, Call, Chunks, Counts, InProcess, Request, serve


class Cyllama(InProcess):
    """A `LLM` with a context of fixed size, which it then keeps between calls."""

    at_once = False

    def __init__(self, request: Request) -> None:
        import cyllama

        super().__init__()
        logging.getLogger("cyllama").setLevel(logging.ERROR)  # else one line for each token that is half a character
        self._config = cyllama.GenerationConfig
        self._n_ctx = request.n_ctx
        self._llm = cyllama.LLM(request.model, config=self._settings(max_tokens=1))
        if request.n_threads is not None:
            context = self._llm._ensure_context(1, self._llm.config)
            context.set_n_threads(request.n_threads, request.n_threads)

    def _settings(self, **options: object) -> object:
        return self._config(n_ctx=self._n_ctx, n_batch=2048, seed=SEED, **options)

    def version(self) -> str:
        import cyllama

        return str(cyllama.__version__)

    def generate(self, call: Call, chunks: Chunks) -> Counts:
        sampling = SAMPLING if call.sampled else {"temperature": 0.0}
        config = self._settings(max_tokens=call.n_tokens, **sampling)
        if call.stream:
            for _ in self._llm(call.prompt, config=config, stream=True):
                chunks.arrived()
        else:
            self._llm(call.prompt, config=config)
        # A plain call counts its tokens by tokenizing the text again; the counts of the stream beneath it are exact.
        stats = self._llm._last_stream_stats
        return Counts(stats.prompt_tokens, stats.generated_tokens)


if __name__ == "__main__":
    serve(Cyllama, __doc__)
