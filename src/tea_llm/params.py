"""What flows between the rooms: the request, the result, the embedding."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from enum import Enum
from typing import Any, Final, Literal, TypeAlias, TypedDict

from .errors import BadRequest
from .tools import Tool, ToolCall, checked_choice, checked_tools

__all__ = [
    "UNSET",
    "AudioPart",
    "BackendName",
    "ChunkCallback",
    "Completion",
    "ContentPart",
    "Delta",
    "ImagePart",
    "LlmCallParams",
    "LlmCallResult",
    "LlmEmbedResult",
    "Message",
    "TextPart",
    "Timings",
    "TokenLogprob",
    "TopLogprob",
    "Unset",
    "Usage",
    "check_timeout_s",
    "sampler_order",
]

Message: TypeAlias = Mapping[str, Any]
"""One chat message: `role` and `content` (a text, or a list of `ContentPart`), as the OpenAI API spells them."""


class TextPart(TypedDict):
    """A part of a message's content that any backend reads."""

    type: Literal["text"]
    text: str


class ImagePart(TypedDict):
    """An image, by its address or as a `data:` URL. An API may read it; a local model refuses it."""

    type: Literal["image_url"]
    image_url: Mapping[str, Any]


class AudioPart(TypedDict):
    """Sound. An API may read it; a local model refuses it."""

    type: Literal["input_audio"]
    input_audio: Mapping[str, Any]


ContentPart: TypeAlias = TextPart | ImagePart | AudioPart
"""A part of a message's content."""

ChunkCallback: TypeAlias = Callable[[str], object]
"""Called with each chunk of text. Returning False ends the generation; any other value goes on."""

BackendName: TypeAlias = Literal["local", "api"]


class Unset(Enum):
    """The type of `UNSET`: "not said", where None means "off"."""

    UNSET = "unset"

    def __repr__(self) -> str:
        return "UNSET"

    def __bool__(self) -> bool:
        return False


UNSET: Final = Unset.UNSET

_Float: TypeAlias = "float | Unset | None"
_Int: TypeAlias = "int | Unset | None"


def _field(low: float, high: float, what: str, default: Any = UNSET) -> Any:
    return field(default=default, metadata={"low": low, "high": high, "what": what})


_INF = math.inf
_LONGEST_WAIT_S = 1e9  # thirty years; clocks and locks overflow not far above


@dataclass(frozen=True)
class LlmCallParams:
    """One request for text: a `prompt` to continue or `messages` to answer (they win), and how to sample.

    A sampling field that is not set takes the default of the model or server that answers; None switches it off.
    Names and ranges are llama.cpp's (`llama.h`, `llama_sampler_init_*`).

    At most one of these says what the answer has to be: `response_format` ("json_object" or "json_schema", as in the
    OpenAI API), `schema` (a JSON schema, draft 2020-12; or a pydantic model, a dataclass or another type that pydantic
    reads), `regex` (for the whole answer, in Rust's syntax), `choices` (texts, of which it is one) or `grammar` (GBNF).
    With a schema the result has `parsed`. A keyword that can't be enforced is an error, unless `strict` is False: then
    it is ignored.

    `chat_template` (Jinja) writes the prompt for `messages` in place of the model's own; `chat_template_name` takes
    another one of the model's file. `template_kwargs` are what the template gets besides messages and tools, such as
    `enable_thinking`; they go to an API as `chat_template_kwargs`, where the two before have no meaning.

    A model that answers `messages` may call `tools`: functions in OpenAI's form, or Python functions, which are put
    into that form and not run. `tool_choice` is `auto`, `none`, `required`, a tool's name, or OpenAI's mapping for one.
    `reasoning` switches the thinking before the answer on or off, where the model has such a switch.

    `samplers` is the order of the samplers, by llama.cpp's names or as one text of its letters; what isn't named is not
    used. None is llama.cpp's own order. With `logprobs` the result says how likely the model, before any sampler, found
    each token, and which `top_logprobs` it found likeliest in its place. `n` asks for several texts, as `completions`;
    a given `seed` is the first one's, and the next ones count on from it.

    `suffix` is what the text is to lead to, behind `prompt`, for models made for infill; `input_extra` are other files
    that such a model sees, each a mapping with a `text` and a `filename`.

    `session` names a file in which a local model keeps what it has computed of the text; a later call with it, in any
    process, computes only what its prompt has beyond that. An API ignores it.

    Raises BadRequest for a value outside its range, naming the field.
    """

    prompt: str
    max_tokens: int | None = _field(
        0, 2**31 - 1, "tokens to generate; None: until the model ends or the context is full", 100
    )
    temperature: float = _field(0, _INF, "0 is greedy", 0.7)
    stop: Sequence[str] | str | None = None
    _: KW_ONLY
    messages: Sequence[Message] | None = None
    model: str | None = None
    seed: _Int = _field(0, 2**32 - 2, "unset: random, and reported in the result's timings")
    samplers: Sequence[str] | str | Unset | None = UNSET
    dynatemp_range: _Float = _field(0, _INF, "the temperature varies by so much, with the entropy; 0: off")
    dynatemp_exponent: _Float = _field(0, _INF, "how the entropy says the temperature")
    top_k: _Int = _field(0, 2**31 - 1, "keep the k likeliest tokens; 0: all")
    top_p: _Float = _field(0, 1, "keep the likeliest tokens that together reach p")
    min_p: _Float = _field(0, 1, "keep tokens at least p times as likely as the likeliest")
    min_keep: _Int = _field(0, 2**31 - 1, "typical_p, top_p, min_p and XTC leave so many tokens at least")
    typical_p: _Float = _field(0, 1, "locally typical sampling")
    top_n_sigma: _Float = _field(-1, _INF, "keep logits within n standard deviations of the best; 0 or less: off")
    xtc_probability: _Float = _field(0, 1, "chance that XTC drops the likeliest tokens")
    xtc_threshold: _Float = _field(0, 1, "XTC drops tokens likelier than this, all but the last")
    dry_multiplier: _Float = _field(0, _INF, "DRY penalty of repeated sequences; 0: off")
    dry_base: _Float = _field(1, _INF, "base of the DRY penalty")
    dry_allowed_length: _Int = _field(0, 2**31 - 1, "repeats up to this length are free")
    dry_penalty_last_n: _Int = _field(-1, 2**31 - 1, "tokens DRY looks back; -1: the context, 0: off")
    dry_sequence_breakers: Sequence[str] | Unset = UNSET
    repeat_penalty: _Float = _field(1e-6, _INF, "1: off")
    repeat_last_n: _Int = _field(-1, 2**31 - 1, "tokens the penalties look back; -1: the context, 0: off")
    frequency_penalty: _Float = _field(-_INF, _INF, "0: off")
    presence_penalty: _Float = _field(-_INF, _INF, "0: off")
    adaptive_target: _Float = _field(-1, 1, "adaptive-p draws tokens about so likely; below 0: off")
    adaptive_decay: _Float = _field(0, 0.99, "how long adaptive-p remembers: 1 / (1 - decay) tokens")
    mirostat: _Int = _field(0, 2, "1 or 2: that version, in place of the other truncations; 0: off")
    mirostat_tau: _Float = _field(0, _INF, "target entropy")
    mirostat_eta: _Float = _field(0, _INF, "learning rate")
    logit_bias: Mapping[int | str, float] | Unset = UNSET
    ignore_eos: bool | Unset | None = UNSET
    n: int = _field(1, 128, "texts to write", 1)
    logprobs: bool = False
    top_logprobs: int | None = _field(0, 20, "alternatives to each token, with logprobs", None)
    suffix: str | None = None
    input_extra: Sequence[Mapping[str, str]] = ()
    response_format: Mapping[str, Any] | None = None
    schema: Any = None
    regex: str | None = None
    choices: Sequence[str] | None = None
    grammar: str | None = None
    strict: bool = True
    chat_template: str | None = None
    chat_template_name: str | None = None
    template_kwargs: Mapping[str, Any] | None = None
    truncate: bool = False
    tools: Sequence[Tool] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: bool | None = None
    reasoning_budget: int | None = _field(0, 2**31 - 1, "tokens of thinking; None: no limit", None)
    session: str | os.PathLike[str] | None = None
    priority: int = _field(-(2**31), 2**31 - 1, "requests of a higher one come first where several wait for a model", 0)
    timeout_s: float | None = _field(0, _LONGEST_WAIT_S, "seconds for the whole call; None: no limit", None)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise BadRequest(f"prompt is {type(self.prompt).__name__}; give a str, or messages=[…] for a chat")
        for name in _ONCE_EXTRA if isinstance(self.extra, Mapping) else ():
            is_unsaid = getattr(self, name) == type(self).__dataclass_fields__[name].default
            if is_unsaid and self.extra.get(name) is not None:
                object.__setattr__(self, name, self.extra[name])
        for f in dataclasses.fields(self):
            if "low" in f.metadata:
                _check_range(f, getattr(self, f.name))
        for name, what, is_one in _KINDS:
            if not is_one(value := getattr(self, name)):
                raise BadRequest(f"{name} is {value!r:.80}; give {what}")
        forms = [name for name in _FORMS if getattr(self, name) is not None]
        if len(forms) > 1:
            raise BadRequest(f"{' and '.join(forms)} both say what the answer has to be; give one of them")
        sampler_order(self.samplers)
        if self.top_logprobs and not self.logprobs:
            raise BadRequest(f"top_logprobs is {self.top_logprobs} without logprobs; set logprobs: true")
        if self.n is None:
            raise BadRequest("n is None; give the number of texts to write")
        if self.n > 1 and self.session is not None:
            raise BadRequest(f"n is {self.n}, and a session holds one text; leave one of the two out")
        if self.suffix is not None and self.messages is not None:
            raise BadRequest("suffix is set, and messages are answered, not completed; give a prompt in their place")
        if self.input_extra and self.suffix is None:
            raise BadRequest('input_extra is set without suffix; give one, "" where nothing follows the text')
        object.__setattr__(self, "stop", _checked_stop(self.stop))
        if self.messages is not None:
            object.__setattr__(self, "messages", _checked_messages(self.messages))
        tools = checked_tools(self.tools)
        object.__setattr__(self, "tools", tools or None)
        object.__setattr__(self, "tool_choice", checked_choice(self.tool_choice, tools))

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, () if none."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def given(self) -> dict[str, Any]:
        """The sampling fields that were set, by name; those that were not are left out."""
        return {
            f.name: value
            for f in dataclasses.fields(self)
            if f.default is UNSET and (value := getattr(self, f.name)) is not UNSET
        }


def check_timeout_s(timeout_s: Any) -> None:
    """Raise BadRequest for what is neither None nor a number of seconds that can be waited."""
    _check_range(LlmCallParams.__dataclass_fields__["timeout_s"], timeout_s)


def _is_text_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and all(type(v) is str for v in value)


def _is_path(value: Any) -> bool:
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    return isinstance(path, str) and path != "" and "\0" not in path


def _is_files(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, (str, bytes))
        and all(
            isinstance(file, Mapping)
            and set(file) <= {"text", "filename"}
            and isinstance(file.get("text"), str)
            and isinstance(file.get("filename", ""), str)
            for file in value
        )
    )


def _is_bias(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        type(token) in (int, str) and type(bias) in (int, float) and not math.isnan(bias)
        for token, bias in value.items()
    )


_KINDS: Final[tuple[tuple[str, str, Callable[[Any], bool]], ...]] = (
    ("model", "a name, or None", lambda v: v is None or isinstance(v, str)),
    ("response_format", "a mapping with a type, or None", lambda v: v is None or isinstance(v, Mapping)),
    ("schema", "a JSON schema or a type", lambda v: v in (True, False) or not isinstance(v, (str, float, int, list))),
    ("regex", "a regular expression, or None", lambda v: v is None or isinstance(v, str)),
    ("choices", "a list of texts, at least one", lambda v: v is None or (_is_text_list(v) and len(v) > 0)),
    ("logprobs", "True or False", lambda v: isinstance(v, bool)),
    ("ignore_eos", "True or False", lambda v: v is None or v is UNSET or isinstance(v, bool)),
    ("suffix", "a text, or None", lambda v: v is None or isinstance(v, str)),
    ("input_extra", "a list of {text, filename}", _is_files),
    ("grammar", "a text in GBNF, or None", lambda v: v is None or isinstance(v, str)),
    ("strict", "True or False", lambda v: isinstance(v, bool)),
    ("chat_template", "a Jinja template, or None", lambda v: v is None or (isinstance(v, str) and v != "")),
    ("chat_template_name", "a name, or None", lambda v: v is None or (isinstance(v, str) and v != "")),
    ("template_kwargs", "a mapping, or None", lambda v: v is None or isinstance(v, Mapping)),
    ("truncate", "True or False", lambda v: isinstance(v, bool)),
    ("session", "the path of a file, or None", lambda v: v is None or _is_path(v)),
    ("parallel_tool_calls", "True, False or None", lambda v: v is None or isinstance(v, bool)),
    ("reasoning", "True, False or None", lambda v: v is None or isinstance(v, bool)),
    ("extra", "a mapping of further API parameters", lambda v: isinstance(v, Mapping)),
    ("dry_sequence_breakers", "a list of str", lambda v: v is None or v is UNSET or _is_text_list(v)),
    ("logit_bias", "a mapping of token ids to numbers", lambda v: v is None or v is UNSET or _is_bias(v)),
)
"""The fields that hold no number: what each is to hold, and whether a value is that."""

_FORMS: Final = ("response_format", "schema", "regex", "choices", "grammar")
"""The fields that say what the answer has to be."""


_ONCE_EXTRA: Final = ("response_format", "n", "logprobs", "top_logprobs")
"""Fields that used to be parameters of an API among others, and may still be said so."""

_SAMPLERS: Final[Mapping[str, str]] = {
    "penalties": "e",
    "dry": "d",
    "top_n_sigma": "s",
    "top_k": "k",
    "typ_p": "y",
    "top_p": "p",
    "min_p": "m",
    "xtc": "x",
    "temperature": "t",
    "infill": "i",
    "adaptive_p": "a",
}
"""llama.cpp's samplers in its order, and the letter of each (common/sampling.cpp)."""

_SAMPLER_NAMES: Final[Mapping[str, str]] = {
    **{name.replace("_", mark): name for name in _SAMPLERS for mark in ("", "-", "_")},
    "nucleus": "top_p",
    "temp": "temperature",
    "typ": "typ_p",
    "typical_p": "typ_p",
}
"""Every name that llama.cpp takes, and our field's."""


def sampler_order(samplers: Any) -> tuple[str, ...] | None:
    """The samplers by llama.cpp's main names, for a list of any of its names or one text of its letters; None: its own.

    Raises BadRequest for what is none, naming the nearest.
    """
    if samplers is None or samplers is UNSET:
        return None
    if isinstance(samplers, str):
        names = {letter: name for name, letter in _SAMPLERS.items()}
        if unknown := next((letter for letter in samplers if letter not in names), ""):
            letters = ", ".join(f"{letter} {name}" for letter, name in names.items())
            raise BadRequest(f"samplers is {samplers!r:.80}, and {unknown!r} is no sampler's letter ({letters}); give "
                             "these, or a list of names")  # fmt: skip
        order = tuple(names[letter] for letter in samplers)
    elif not _is_text_list(samplers):
        raise BadRequest(f"samplers is {samplers!r:.80}; give a list of names, or one text of their letters")
    else:
        if unknown := next((name for name in samplers if name.lower() not in _SAMPLER_NAMES), ""):
            near = difflib.get_close_matches(unknown.lower(), _SAMPLER_NAMES, 1)
            meant = f"did you mean {_SAMPLER_NAMES[near[0]]!r}? " if near else ""
            raise BadRequest(f"samplers has {unknown!r:.80}; {meant}They are {', '.join(_SAMPLERS)}")
        order = tuple(_SAMPLER_NAMES[name.lower()] for name in samplers)
    for i, name in enumerate(order):
        if name in order[:i]:
            raise BadRequest(f"samplers has {name!r} twice; leave one out")
    return order


def _check_range(f: dataclasses.Field[Any], value: Any) -> None:
    if value is UNSET or (value is None and f.name != "temperature"):
        return
    low, high, what = f.metadata["low"], f.metadata["high"], f.metadata["what"]
    whole = "int" in str(f.type).lower()
    if isinstance(value, bool) or not isinstance(value, (int,) if whole else (int, float)):
        raise BadRequest(f"{f.name} is {value!r}; give {'a whole number' if whole else 'a number'} ({what})")
    if not math.isfinite(value) or not low <= value <= high:
        bounds = f"of at least {low:g}" if high in (_INF, 2**31 - 1) else f"from {low:g} to {high:g}"
        if low == -_INF:
            bounds = "that is finite"
        raise BadRequest(f"{f.name} is {value!r}; give a number {bounds} ({what})")


def _checked_stop(stop: Any) -> str | list[str] | tuple[str, ...] | None:
    """`stop` as it was given, but for a copy of a list. Raises BadRequest for what holds no stop strings."""
    if stop is None:
        return None
    if isinstance(stop, (bytes, Mapping)) or not isinstance(stop, Iterable):
        raise BadRequest(f"stop is {stop!r:.80}; give a str or a list of str")
    kept = stop if isinstance(stop, str) else _copied(stop)
    for s in [kept] if isinstance(kept, str) else kept:
        if not isinstance(s, str) or not s:
            raise BadRequest(f"stop holds {s!r}; each stop string must be a non-empty str")
    return kept


def _copied(items: Iterable[Any]) -> list[Any] | tuple[Any, ...]:
    """A list for a list, so that a field equals what it was given; a tuple for anything else."""
    return list(items) if isinstance(items, list) else tuple(items)


def _checked_messages(messages: Any) -> Sequence[Message]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise BadRequest(f"messages is {messages!r:.80}; give a non-empty list of {{'role': …, 'content': …}}")
    kept: Sequence[Message] = _copied(messages)
    if not kept:
        raise BadRequest("messages must be a non-empty list of {'role': …, 'content': …}")
    for i, message in enumerate(kept):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadRequest(f"messages[{i}] is {message!r}; each message is a mapping with a 'role' and a 'content'")
    return kept


@dataclass(frozen=True)
class Usage:
    """Tokens of one call."""

    prompt_tokens: int
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens

    def as_dict(self) -> dict[str, int]:
        """The three counts under the OpenAI API's names."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.total_tokens,
        }


@dataclass(frozen=True)
class Timings:
    """Where the time of one local call went, in seconds; `seed` is the one that was used.

    `queue_s` is the wait for a turn, `prompt_s` from there to the first token, `first_token_s` both. `cached_tokens` of
    the prompt were known from earlier texts. Of `draft_tokens` that were guessed, `accepted_tokens` are in the answer.
    """

    queue_s: float = 0.0
    prompt_s: float = 0.0
    generation_s: float = 0.0
    first_token_s: float | None = None
    cached_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    seed: int | None = None


@dataclass(frozen=True)
class Delta:
    """What one step of an answer adds: text of it, of the thinking before it, pieces of tool calls.

    A piece of a call has the form of OpenAI's streams: `index`, and where it is first heard of `id`, `type` and the
    whole name; `function["arguments"]` is the next part of the JSON text.
    """

    content: str = ""
    reasoning: str = ""
    tool_calls: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class TopLogprob:
    """A token that could stand in a place, and how likely the model found it there: log(p), base e.

    `token` is its text; `bytes` say it exactly, where it isn't made of whole characters.
    """

    token: str
    bytes: bytes
    logprob: float

    def as_dict(self) -> dict[str, Any]:
        """The form of the OpenAI API."""
        return {"token": self.token, "bytes": list(self.bytes), "logprob": self.logprob}


@dataclass(frozen=True)
class TokenLogprob(TopLogprob):
    """A token of a text, with the likeliest in its place, likeliest first; it need not be among them."""

    top_logprobs: Sequence[TopLogprob] = ()

    def as_dict(self) -> dict[str, Any]:
        """The form of the OpenAI API."""
        return super().as_dict() | {"top_logprobs": [top.as_dict() for top in self.top_logprobs]}


@dataclass(frozen=True)
class Completion:
    """One of several texts, with what belongs to it as in `LlmCallResult`.

    `seed` is the one that it was drawn by, None where an API doesn't say.
    """

    content: str
    finish_reason: str | None = None
    _: KW_ONLY
    reasoning: str | None = None
    tool_calls: Sequence[ToolCall] = ()
    logprobs: Sequence[TokenLogprob] | None = None
    seed: int | None = None


@dataclass(frozen=True)
class LlmCallResult:
    """The text, and who wrote it. `finish_reason`: `stop`, `length`, `tool_calls`, `content_filter` or `cancelled`.

    `reasoning` is the thinking before the answer, None if there is none. Of a text that was cut (`length`,
    `cancelled`), `tool_calls` has only those calls that are whole.

    `session_error` says why the session could not be saved, None if it was or if there is none. `parsed` is what an
    answer in JSON holds, where a `response_format` or a `schema` asked for one: an instance of `schema` where that is a
    type. `parse_error` says why it holds nothing: the answer was cut, or a server didn't keep to the schema.

    `completions` are all texts where `n` asked for several; `content` and all that belongs to a text is the first's,
    and `usage` counts the prompt once. `logprobs`, where they were asked for, has all that the model wrote: thinking
    and calls too, and after a cancel perhaps a few tokens more than were handed out.
    """

    content: str
    model: str
    tokens_used: int | None = None
    finish_reason: str | None = None
    _: KW_ONLY
    usage: Usage | None = None
    backend: BackendName | None = None
    fallback_reason: str | None = None
    timings: Timings | None = None
    session_error: str | None = None
    parsed: Any = None
    parse_error: str | None = None
    tool_calls: Sequence[ToolCall] = ()
    reasoning: str | None = None
    logprobs: Sequence[TokenLogprob] | None = None
    completions: Sequence[Completion] = ()
    provider: str | None = None
    attempts: int = 1
    total_delay_s: float = 0.0


@dataclass(frozen=True)
class LlmEmbedResult:
    """One vector per text, in the order asked; `embeddings` has shape (n_texts, dimensions)."""

    embeddings: Any  # list[list[float]], or a numpy float32 array where asked for
    model: str
    _: KW_ONLY
    usage: Usage | None = None
    backend: BackendName | None = None
    fallback_reason: str | None = None
    provider: str | None = None
    attempts: int = 1
    total_delay_s: float = 0.0
