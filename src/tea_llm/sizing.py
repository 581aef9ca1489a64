"""How much a model gets: context length, cells of the KV cache, requests at once, threads."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import _llama

__all__ = ["fit_cells", "fit_n_ctx", "fit_n_kept", "fit_n_parallel", "fit_threads", "fours_pay", "kv_bytes_per_token"]

logger = logging.getLogger("tea_llm")

_SMALL_MODEL_BYTES = 8 << 20  # below it the threads of a layer wait for each other longer than they compute

_REPACKED = {"2", "10", "14", "15", "25", "38"}  # Q4_0, Q2_K, Q4_K_S, Q4_K_M, IQ4_NL, MXFP4 (llama.h, llama_ftype)

_N_PARALLEL = 16  # requests at once where nobody says how many, and memory holds them
_CELLS_OF_A_REQUEST = 256  # fewer for each, and requests would push each other out
_N_KEPT = 32  # texts that ended and may be found again; llama.cpp has a row of logits for each
_SPARE_CELLS_BYTES = 32 << 20  # for more cells than one request may use, where nobody says how many requests


def fit_n_ctx(models: Sequence[_llama.Model], asked: int | None) -> int:
    """The smallest of what was asked, what the model was trained for, and what half the free memory holds.

    `models`: the one that answers, then the one that guesses for it, if there is one. Says so when it cuts: a WARNING
    for what was asked, INFO for a default.
    """
    trained = models[0].n_ctx_train or 4096
    n_ctx, why = min(asked or trained, trained), f"the model was trained for {trained}"
    held, free = _cells_that_fit(models)
    if n_ctx > held:
        n_ctx, why = held, f"free memory is {free >> 20} MiB"
    if asked and n_ctx < asked:
        logger.warning("n_ctx cut from %d to %d: %s", asked, n_ctx, why)
    elif n_ctx < trained and not asked:
        logger.info("n_ctx is %d of the %d trained for: %s", n_ctx, trained, why)
    return n_ctx


def fit_cells(models: Sequence[_llama.Model], n_ctx: int, n_parallel: int | None) -> int:
    """Cells of the KV cache: `n_ctx` for each of the requests that were asked for, as far as memory holds them.

    With fewer, requests that grow long wait for each other. Where nobody said how many requests, a small share of
    memory goes to more than one.
    """
    n_bytes = sum(map(kv_bytes_per_token, models))
    if not n_bytes:
        return n_ctx
    spare, _ = _cells_that_fit(models) if n_parallel else (_SPARE_CELLS_BYTES // n_bytes, 0)
    return max(min(n_ctx * (n_parallel or _N_PARALLEL), spare), n_ctx)


def fit_n_parallel(n_cells: int, asked: int | None) -> int:
    """Requests computed at once: as many as asked, else up to 16, as far as the KV cache has cells for them."""
    return asked or max(min(n_cells // _CELLS_OF_A_REQUEST, _N_PARALLEL), 1)


def fit_n_kept(model: _llama.Model, n_cells: int) -> int:
    """Ended texts that keep a sequence of the KV cache beside those being computed: what it has cells for."""
    return min(_N_KEPT, n_cells // _CELLS_OF_A_REQUEST + 1) if model.shares_prefixes else 0


def fit_threads(asked: int | None, model_bytes: int) -> int:
    """Threads that pay for a model of this size: one for a tiny one, else one per physical core this process may use.

    More than there are CPUs is cut, with a WARNING: ggml's threads spin while they wait for each other, so that one
    without a CPU of its own holds up all others (measured: 2 CPUs, 4 threads, a hundredth of the speed).
    """
    cpus = _usable_cpus()
    if asked and asked > len(cpus):
        logger.warning("n_threads cut from %d to %d: this process may use no more CPUs", asked, len(cpus))
    if asked:
        return min(asked, len(cpus))
    if model_bytes < _SMALL_MODEL_BYTES:
        return 1
    return len({_core_of(cpu) for cpu in cpus})


def fours_pay(model: _llama.Model) -> bool:
    """Whether a CPU multiplies this model's weights with four rows of a batch at once, and with fewer one by one."""
    return model.shares_prefixes and model.metadata.get("general.file_type") in _REPACKED


def kv_bytes_per_token(model: _llama.Model) -> int:
    """Size of one token's keys and values in F16, or 0 where the file does not tell the shape."""
    return 2 * 2 * model.n_layer * model.n_head_kv * _head_size(model)


def _cells_that_fit(models: Sequence[_llama.Model]) -> tuple[int, int]:
    """How many cells half the free memory holds, and how many bytes are free."""
    n_bytes, free = sum(map(kv_bytes_per_token, models)), _free_memory_bytes()
    if not n_bytes or not free:
        return 2**31, 0
    return max(free // 2 // n_bytes // 256 * 256, 256), free


def _head_size(model: _llama.Model) -> int:
    """Length of one attention head's keys, or 0 where the file does not tell."""
    metadata = model.metadata
    arch = metadata.get("general.architecture", "")
    length = metadata.get(f"{arch}.attention.key_length", "")
    if length.isdecimal():
        return int(length)
    n_head = metadata.get(f"{arch}.attention.head_count", "")
    return model.n_embd // int(n_head) if n_head.isdecimal() and n_head != "0" else 0


def _free_memory_bytes() -> int | None:
    """Memory that can be taken without swapping, or None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def _usable_cpus() -> set[int]:
    try:
        return os.sched_getaffinity(0)
    except AttributeError:  # not on macOS and Windows
        return set(range(os.cpu_count() or 1))


def _core_of(cpu: int) -> str:
    """What names the physical core of a CPU: its siblings, or itself where the system does not tell."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings").read_text()
    except OSError:
        return str(cpu)
