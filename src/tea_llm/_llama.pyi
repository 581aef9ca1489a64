"""Types of the extension; src/_llama.pyx says what each name does. Checked by `python -m mypy.stubtest`."""

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, TypeAlias, TypedDict

from typing_extensions import disjoint_base

from tea_llm.errors import LlmError

__all__ = [
    "ChatParser",
    "ChatPrompt",
    "Context",
    "Generation",
    "Grammar",
    "Loading",
    "Model",
    "Sampler",
    "devices",
    "llama_version",
    "state_layout",
    "supports_gpu_offload",
    "system_info",
]

_Pooling: TypeAlias = Literal["none", "mean", "cls", "last", "rank"]

_ReasoningFormat: TypeAlias = Literal["none", "auto", "deepseek", "deepseek-legacy"]

class _Device(TypedDict):
    name: str
    description: str
    memory_free: int
    memory_total: int

def llama_version() -> str: ...
def state_layout() -> str: ...
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
        load_mtp: bool = False,
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
    def shares_prefixes(self) -> bool: ...
    @property
    def is_recurrent(self) -> bool: ...
    @property
    def n_mtp_layer(self) -> int: ...
    @property
    def chat_template(self) -> str | None: ...
    def apply_chat_template(
        self,
        messages: Iterable[Mapping[str, Any]],
        *,
        tools: Iterable[Mapping[str, Any]] | None = None,
        tool_choice: str = "auto",
        parallel_tool_calls: bool | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        enable_thinking: bool | None = None,
        json_schema: Mapping[str, Any] | bool | None = None,
        add_generation_prompt: bool = True,
        reasoning_format: _ReasoningFormat = "auto",
        template: str | None = None,
        variant: str | None = None,
    ) -> ChatPrompt: ...
    @property
    def bos(self) -> int: ...
    @property
    def eos(self) -> int: ...
    @property
    def eot(self) -> int: ...
    @property
    def add_bos(self) -> bool: ...
    def is_eog(self, token: int) -> bool: ...
    def fim_token(self, part: str) -> int | None: ...
    def is_control(self, token: int) -> bool: ...
    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]: ...
    def tokenize_parts(self, parts: Iterable[tuple[str, bool]]) -> list[int]: ...
    def detokenize(
        self, tokens: Sequence[int], *, remove_special: bool = False, unparse_special: bool = False
    ) -> str: ...
    def piece(self, token: int, *, special: bool = False) -> bytes: ...

@disjoint_base
class ChatPrompt:
    @property
    def model(self) -> Model: ...
    @property
    def text(self) -> str: ...
    def tokenize(self) -> list[int]: ...
    def parser(self) -> ChatParser: ...
    @property
    def generation_prompt(self) -> str: ...
    @property
    def grammar(self) -> str: ...
    @property
    def grammar_lazy(self) -> bool: ...
    @property
    def grammar_triggers(self) -> list[tuple[Literal["token", "word", "pattern", "pattern_full"], str, int]]: ...
    @property
    def preserved_tokens(self) -> list[str]: ...
    @property
    def stops(self) -> list[str]: ...
    @property
    def supports_thinking(self) -> bool: ...
    @property
    def thinking_start_tag(self) -> str: ...
    @property
    def thinking_end_tags(self) -> list[str]: ...
    @property
    def reasoning_format(self) -> _ReasoningFormat: ...

@disjoint_base
class ChatParser:
    def __init__(self, prompt: ChatPrompt) -> None: ...
    @property
    def is_plain(self) -> bool: ...
    @property
    def reads_calls(self) -> bool: ...
    def read(
        self, piece: str, *, end: Literal["whole", "cut"] | None = None
    ) -> tuple[str, str, list[tuple[int, str, str, str]]]: ...
    @property
    def unread(self) -> str: ...

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
        reuse: bool = True,
        n_kept_max: int = 2147483648,
        n_host_max: int = 0,
        fill_fours: bool = False,
        draft: Model | Literal["mtp", "ngram"] | None = None,
        n_draft: int = 3,
        n_draft_rows: int = 0,
    ) -> None: ...
    @property
    def model(self) -> Model: ...
    @property
    def draft_model(self) -> Model | None: ...
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
    @property
    def n_kept(self) -> int: ...
    @property
    def n_host_bytes(self) -> int: ...
    def cancel(self) -> None: ...
    def wake(self) -> None: ...
    def run(self, generations: Iterable[Generation]) -> list[tuple[Generation, str]]: ...
    def embed(self, texts: Sequence[Sequence[int]], *, normalize: bool = True) -> memoryview[float]: ...

@disjoint_base
class Grammar:
    def __init__(
        self,
        model: Model,
        kind: str,
        source: str,
        *,
        triggers: Iterable[tuple[str, str | int]] = (),
        prefix: str | None = None,
        markup: Sequence[int] = (),
    ) -> None: ...
    @property
    def model(self) -> Model: ...
    @property
    def kind(self) -> str: ...

@disjoint_base
class Sampler:
    def __init__(
        self,
        model: Model,
        *,
        samplers: Iterable[str] | None = None,
        temperature: float = 0.8,
        dynatemp_range: float = 0.0,
        dynatemp_exponent: float = 1.0,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        min_keep: int = 0,
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
        adaptive_target: float = -1.0,
        adaptive_decay: float = 0.9,
        mirostat: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        logit_bias: Mapping[int, float] | None = None,
        ignore_eos: bool = False,
        grammar: Grammar | str | None = None,
        thinking: tuple[str, Sequence[str], str, int | None] | None = None,
        seed: int | None = None,
        shortcuts: bool = True,
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
        stream: bool = False,
        n_ctx: int | None = None,
        known: tuple[Sequence[int], bytes] | None = None,
        save: bool = False,
        markup: Sequence[int] = (),
        logprobs: int | None = None,
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
    def ended(self) -> bool: ...
    @property
    def error(self) -> LlmError | None: ...
    @property
    def n_prompt(self) -> int: ...
    @property
    def n_cached(self) -> int: ...
    @property
    def n_drafted(self) -> int: ...
    @property
    def n_accepted(self) -> int: ...
    @property
    def queue_s(self) -> float: ...
    @property
    def prompt_s(self) -> float: ...
    @property
    def generation_s(self) -> float: ...
    def cancel(self) -> None: ...
    def take_logprobs(self) -> bytes: ...
    def take_state(self) -> tuple[list[int], bytes] | None: ...
    def run(self, *, stream: bool = False) -> str | None: ...
