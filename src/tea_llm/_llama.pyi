"""Types of the extension; src/_llama.pyx says what each name does. Checked by `python -m mypy.stubtest`."""

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, TypeAlias, TypedDict

from typing_extensions import disjoint_base

__all__ = [
    "Context",
    "Generation",
    "Loading",
    "Model",
    "Sampler",
    "devices",
    "llama_version",
    "supports_gpu_offload",
    "system_info",
]

_Pooling: TypeAlias = Literal["none", "mean", "cls", "last", "rank"]

class _Device(TypedDict):
    name: str
    description: str
    memory_free: int
    memory_total: int

def llama_version() -> str: ...
def system_info() -> str: ...
def supports_gpu_offload() -> bool: ...
def devices() -> list[_Device]: ...

@disjoint_base
class Loading:
    def __init__(self) -> None: ...
    @property
    def fraction(self) -> float: ...
    @property
    def cancelled(self) -> bool: ...
    def cancel(self) -> None: ...

@disjoint_base
class Model:
    def __init__(
        self,
        path: str | PathLike[str],
        *,
        n_gpu_layers: int = -1,
        use_mmap: bool = True,
        use_mlock: bool = False,
        vocab_only: bool = False,
        check_tensors: bool = False,
        loading: Loading | None = None,
        split_load: bool | None = None,
    ) -> None: ...
    @property
    def path(self) -> str: ...
    @property
    def n_vocab(self) -> int: ...
    @property
    def metadata(self) -> dict[str, str]: ...
    @property
    def description(self) -> str: ...
    @property
    def n_ctx_train(self) -> int: ...
    @property
    def n_embd(self) -> int: ...
    @property
    def n_layer(self) -> int: ...
    @property
    def n_head_kv(self) -> int: ...
    @property
    def n_params(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def has_encoder(self) -> bool: ...
    @property
    def has_decoder(self) -> bool: ...
    @property
    def chat_template(self) -> str | None: ...
    def render_chat(self, messages: Iterable[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str: ...
    @property
    def bos(self) -> int: ...
    @property
    def eos(self) -> int: ...
    @property
    def eot(self) -> int: ...
    @property
    def add_bos(self) -> bool: ...
    def is_eog(self, token: int) -> bool: ...
    def is_control(self, token: int) -> bool: ...
    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]: ...
    def detokenize(
        self, tokens: Sequence[int], *, remove_special: bool = False, unparse_special: bool = False
    ) -> str: ...
    def piece(self, token: int, *, special: bool = False) -> bytes: ...

@disjoint_base
class Context:
    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int = 0,
        n_batch: int = 512,
        n_ubatch: int = 0,
        n_seq_max: int = 1,
        n_threads: int = 1,
        embeddings: bool = False,
        pooling: str | None = None,
        flash_attn: bool | None = None,
        kv_f32: bool = False,
    ) -> None: ...
    @property
    def model(self) -> Model: ...
    @property
    def n_ctx(self) -> int: ...
    @property
    def n_batch(self) -> int: ...
    @property
    def n_seq_max(self) -> int: ...
    @property
    def n_threads(self) -> int: ...
    @property
    def embeddings(self) -> bool: ...
    @property
    def closed(self) -> bool: ...
    @property
    def poisoned(self) -> bool: ...
    @property
    def pooling(self) -> _Pooling | None: ...
    def close(self) -> None: ...
    def cancel(self) -> None: ...
    def embed(self, texts: Sequence[Sequence[int]], *, normalize: bool = True) -> memoryview[float]: ...

@disjoint_base
class Sampler:
    def __init__(
        self,
        model: Model,
        *,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        top_n_sigma: float = -1.0,
        xtc_probability: float = 0.0,
        xtc_threshold: float = 0.1,
        dry_multiplier: float = 0.0,
        dry_base: float = 1.75,
        dry_allowed_length: int = 2,
        dry_penalty_last_n: int = 64,
        dry_sequence_breakers: Iterable[str] = ("\n", ":", '"', "*"),
        repeat_penalty: float = 1.0,
        repeat_last_n: int = 64,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        mirostat: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        logit_bias: Mapping[int, float] | None = None,
        grammar: str | None = None,
        seed: int | None = None,
    ) -> None: ...
    @property
    def model(self) -> Model: ...
    @property
    def seed(self) -> int: ...
    def reset(self) -> None: ...

@disjoint_base
class Generation:
    def __init__(
        self,
        context: Context,
        sampler: Sampler,
        prompt: Sequence[int],
        *,
        max_tokens: int | None = None,
        stop: Iterable[str] = (),
    ) -> None: ...
    @property
    def context(self) -> Context: ...
    @property
    def sampler(self) -> Sampler: ...
    @property
    def n_generated(self) -> int: ...
    @property
    def finish_reason(self) -> Literal["stop", "length", "cancelled"] | None: ...
    @property
    def n_prompt(self) -> int: ...
    @property
    def prompt_s(self) -> float: ...
    @property
    def generation_s(self) -> float: ...
    def cancel(self) -> None: ...
    def run(self, *, stream: bool = False) -> str | None: ...
