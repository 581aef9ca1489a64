"""What choosing a token costs: seconds per token of several samplers, on the same model, in turns.

    python bench/samplers.py --model build/qwen-0.5b.gguf

`plain` has llama.cpp's samplers do everything, on the candidate array of the whole vocabulary (`shortcuts=False`). The
same tokens come out; tests/test_sampling.py compares them.
"""

from __future__ import annotations

import argparse
import statistics
import time

SAMPLERS = {
    "greedy": {"temperature": 0},
    "default chain": {},
    "repeat_penalty": {"repeat_penalty": 1.1},
    "all penalties and DRY": {"repeat_penalty": 1.1, "frequency_penalty": 0.1, "dry_multiplier": 0.8},
    "top_k 0": {"top_k": 0},
    "top_k 0, min_p only": {"top_k": 0, "top_p": 1.0},
    "top_k 0, top_p only": {"top_k": 0, "min_p": 0.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    from tea_llm._llama import Context, Generation, Model, Sampler  # --help is there without it

    model = Model(options.model)
    context = Context(model, n_ctx=1024, n_threads=options.threads)
    prompt = model.tokenize("The quick brown fox jumps over the lazy dog.")

    def ms_per_token(logprobs: int | None = None, **sampling: object) -> float:
        sampler = Sampler(model, seed=1, ignore_eos=True, **sampling)  # type: ignore[arg-type]
        text = Generation(context, sampler, prompt, max_tokens=options.tokens, logprobs=logprobs)
        text.run()
        return text.generation_s * 1e3 / (text.n_generated - 1)

    ways = {f"{name}{tail}": {**sampling, **more} for name, sampling in SAMPLERS.items()
            for tail, more in (("", {}), (", plain", {"shortcuts": False}))}  # fmt: skip
    ways |= {f"greedy, logprobs with {n} others": {"temperature": 0, "logprobs": n} for n in (0, 20)}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    began = time.monotonic()
    for _ in range(options.rounds):
        for name, way in ways.items():
            taken[name].append(ms_per_token(**way))
    for name, times in taken.items():
        print(f"{name:40} {statistics.median(times):7.3f} ms a token (least {min(times):.3f})")
    print(f"{options.rounds} rounds of {options.tokens} tokens, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
