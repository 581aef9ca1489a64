"""`settings.llm`: its keys, the environment behind them, and the API they point to.

A new key is one field of `LlmSettings` and its row in docs/settings.md; a test holds the two together.
The environment is read when a function is called, never on import.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from .errors import SettingsError

__all__ = ["ApiEndpoint", "LlmSettings", "expand_path", "home_directory", "missing_credentials", "resolve_api"]

_Check: TypeAlias = Callable[[Any], Any]
"""Gives the value as it is kept, or raises _AdviceError with what to write instead."""

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


class _AdviceError(Exception):
    """A value that a key can't take; the text is the advice."""


def _one_of(*names: str) -> _Check:
    advice = f"choose {', '.join(map(repr, names[:-1]))} or {names[-1]!r}"

    def check(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            raise _AdviceError(f"{advice}: one name, no list")
        if value not in names:
            raise _AdviceError(advice)
        return str(value)

    return check


def _some_of(*names: str) -> _Check:
    advice = f"choose {', '.join(map(repr, names[:-1]))} or {names[-1]!r}, or a list of them, each once"

    def check(value: Any) -> tuple[str, ...]:
        chosen = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if not chosen or any(name not in names for name in chosen) or len(set(chosen)) < len(chosen):
            raise _AdviceError(advice)
        return chosen

    return check


def _number(low: float, high: float = sys.float_info.max, *, whole: bool = False, above: bool = False) -> _Check:
    high = min(high, 2**31 - 1) if whole else high  # a C int; NaN and the infinities are outside too
    kind = "a whole number" if whole else "a number"
    advice = f"give {kind} {'above' if above else 'of at least'} {low:g}"

    def check(value: Any) -> float:
        if isinstance(value, str):  # "4096", as a template that renders {{ env.N_CTX }} gives it
            try:
                value = int(value) if whole else float(value)
            except ValueError:
                raise _AdviceError(advice) from None
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise _AdviceError(advice)
        if not low <= value <= high or (above and value == low):
            raise _AdviceError(advice)
        return int(value) if whole else float(value)

    return check


def _whole(low: int) -> _Check:
    return _number(low, whole=True)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _AdviceError("give a text")
    return value.strip()


def _template(value: Any) -> str:
    if not isinstance(value, str):
        raise _AdviceError("give the template's text; for a file there is chat_template_file")
    return value


def _name(value: Any) -> str:
    return _text(value).lower()


def _path(value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)) or not isinstance(path := os.fspath(value), str):
        raise _AdviceError("give the path of a file")
    return path


def _json_mapping(value: Any) -> str:
    """A mapping as JSON, as settings are compared and hashed."""
    try:
        mapping = json.loads(value) if isinstance(value, str) else value
        if isinstance(mapping, Mapping):
            return json.dumps(dict(mapping), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as exc:
        raise _AdviceError(f"give a mapping that can be written as JSON ({exc})") from None
    raise _AdviceError("give a mapping")


def _address(value: Any) -> str:
    if not isinstance(value, str) or not _is_http(value.strip()):
        raise _AdviceError("give an address that starts with http:// or https://")
    return value.strip()


def _is_http(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:  # brackets that hold no IPv6 address
        return False


def home_directory(env: Mapping[str, str] | None = None) -> str:
    """The user's home: `HOME` of `env`, else what the system says."""
    return (os.environ if env is None else env).get("HOME") or str(Path.home())


def expand_path(
    path: str | os.PathLike[str],
    env: Mapping[str, str] | None = None,
    home: str | os.PathLike[str] | None = None,
) -> str:
    """`path` with `~`, `$VAR` and `${VAR}` filled in; a variable that is not set stays as it is written."""
    values = os.environ if env is None else env
    text = _VARIABLE.sub(lambda m: values.get(m[1] or m[2], m[0]), os.fspath(path))
    if text == "~" or text.startswith(("~/", "~" + os.sep)):
        return os.fspath(home or home_directory(env)) + text[1:]
    return text


def _expand_secret(value: str) -> str | None:
    """`value` with `$VAR` and `${VAR}` filled in; None when one of them is not set, or nothing is left."""
    if any((m[1] or m[2]) not in os.environ for m in _VARIABLE.finditer(value)):
        return None
    return _VARIABLE.sub(lambda m: os.environ[m[1] or m[2]], value).strip() or None


def _key(
    default: Any,
    doc: str,
    check: _Check,
    *,
    env: str = "",
    expand: Callable[[str], str | None] | None = None,
    null_is_off: bool = False,
    secret: bool = False,
) -> Any:
    metadata = {"doc": doc, "check": check, "env": env, "expand": expand, "null_is_off": null_is_off, "secret": secret}
    return field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True)
class LlmSettings:
    """The keys of `settings.llm`, each checked. The docs of the keys are in their metadata and in docs/settings.md.

    Made directly, paths and `api_key` are taken as they are; `from_mapping` and `replaced` expand them.
    `provider="local"` is another way to write `backend="local"`, and is kept as that.

    Raises SettingsError for a value that can't be used, naming the key.
    """

    backend: str = _key(
        "api",
        "Who answers: `local`, `api`, or `auto` (local when a model is found, else api)",
        _one_of("local", "api", "auto"),
    )
    fallback: tuple[str, ...] = _key(
        ("api",),
        "What to do when the local model can't be used: `api`, `error` (raise), or a list tried in order",
        _some_of("api", "error"),
    )
    model_path: str | None = _key(
        None,
        "The GGUF file to load; the search order is below",
        _path,
        env="`TEA_MODEL_PATH`",
        expand=expand_path,
    )
    embedding_model_path: str | None = _key(
        None,
        "The GGUF file for embeddings; unset: the same model as for text",
        _path,
        expand=expand_path,
    )
    n_ctx: int | None = _key(
        None,
        "Context length in tokens; unset or 0: what the model was trained for, as far as memory goes",
        _whole(0),
    )
    n_batch: int | None = _key(None, "Tokens decoded at once while a prompt is read", _whole(1))
    n_threads: int | None = _key(None, "CPU threads; unset: by the machine and the model's size", _whole(1))
    n_gpu_layers: int | None = _key(None, "Layers to put on the GPU; -1: all, 0: none", _whole(-1))
    chat_format: str | None = _key(
        None,
        "Prompt format for a model without a template of its own: `chatml` or `gemma`",
        _text,
    )
    chat_template: str | None = _key(
        None, "A chat template (Jinja) for a local model, in place of the file's own", _template
    )
    chat_template_file: str | None = _key(
        None, "The file of such a template; `chat_template` beats it", _path, expand=expand_path
    )
    chat_template_name: str | None = _key(
        None, "Which of the model file's templates, where it has several, such as `tool_use`; unset: as llama.cpp does",
        _text,
    )  # fmt: skip
    template_kwargs: str | None = _key(
        None,
        "A mapping of what else a local model's template gets, such as `enable_thinking: false`; a call's own beat it",
        _json_mapping,
    )
    pooling: str | None = _key(
        None,
        "How token vectors become one: `mean`, `cls`, `last`, `rank` or `none`; unset: as the model says",
        _one_of("mean", "cls", "last", "rank", "none"),
    )
    n_parallel: int | None = _key(
        None, "Requests computed at the same time, others wait; unset: up to 16, as far as memory goes", _whole(1)
    )
    cache_ram_mib: int | None = _key(
        None,
        "MiB of memory for prompts that had to leave the KV cache, to be found again; unset: as much as that has",
        _whole(0),
    )
    keep_alive: float = _key(
        0.0, "Seconds that a model stays loaded after its last user; 0: freed at once", _number(0, 1e9)
    )
    queue_timeout: float | None = _key(
        None,
        "Seconds that a request waits for its turn on a busy model; unset: as long as it may take",
        _number(0, 1e9),
    )
    speculative: str | None = _key(
        None,
        "What guesses the next tokens, for the model to check at once: `draft` (the model at `draft_model_path`), "
        "`mtp` (the model's own MTP layers), `ngram` (what the text said before) or `off`; unset: `draft` where there "
        "is a path",
        _one_of("off", "draft", "mtp", "ngram"),
    )
    draft_model_path: str | None = _key(
        None, "The GGUF file of a smaller model with the same vocabulary, which guesses", _path, expand=expand_path
    )
    n_draft: int | None = _key(None, "Tokens guessed at once; unset: 3", _whole(1))
    model: str | None = _key(None, "Model name that the API is asked for", _text)
    embedding_model: str | None = _key(None, "Model name that the API is asked for embeddings", _text)
    provider: str = _key(
        "auto",
        "Which API: `auto`, `openai`, `azure`, `ollama`, or another name together with `api_base`; "
        "`local` means `backend: local`",
        _name,
    )
    api_base: str | None = _key(
        None,
        "Address of the API; also written `api_url` or `base_url`",
        _address,
        env="`OPENAI_BASE_URL`, `OLLAMA_API_BASE`, `AZURE_OPENAI_ENDPOINT`",
    )
    api_key: str | None = _key(
        None,
        "Key of the API; a variable that is not set means no key",
        _text,
        env="`OPENAI_API_KEY`, `AZURE_OPENAI_API_KEY`",
        expand=_expand_secret,
        secret=True,
    )
    deployment: str | None = _key(None, "Azure's deployment name", _text, env="`AZURE_OPENAI_DEPLOYMENT`")
    timeout: float | None = _key(
        300.0,
        "Seconds for one call; null: no limit",
        _number(0, 1e9, above=True),  # thirty years; clocks overflow not far above
        null_is_off=True,
    )
    temperature: float | None = _key(None, "Randomness where a call sets none; 0 is greedy", _number(0))
    max_tokens: int | None = _key(None, "Tokens to generate where a call says nothing", _whole(0))
    max_retries: int = _key(0, "How often a request that failed in passing is sent again", _whole(0))

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value is not None or (f.default is not None and not f.metadata["null_is_off"]):
                object.__setattr__(self, f.name, _checked(f, value, f"LlmSettings.{f.name}"))
        if self.provider == "local":
            object.__setattr__(self, "backend", "local")
            object.__setattr__(self, "provider", "auto")

    @classmethod
    def of(cls, settings: Mapping[str, Any] | LlmSettings | None) -> LlmSettings:
        """The settings in `{"llm": {…}}`, or themselves. Raises as `from_mapping` does."""
        if isinstance(settings, LlmSettings):
            return settings
        if settings is not None and not isinstance(settings, Mapping):
            raise SettingsError(f"the settings are {settings!r:.60}; give a mapping, {{'llm': {{…}}}}")
        return cls.from_mapping((settings or {}).get("llm"))

    @classmethod
    def from_mapping(
        cls, llm: Mapping[str, Any] | None, *, where: str = "settings.llm", line_of: Mapping[str, int] | None = None
    ) -> LlmSettings:
        """The settings that `llm` gives, as YAML or a dict writes them: aliases resolved, variables filled in.

        A key that is null or empty is as good as left out; only `timeout: null` means something, no limit.
        `line_of` gives the line of each key for messages. Raises SettingsError for an unknown key or a bad value.
        """
        if llm is None:
            return cls()
        if not isinstance(llm, Mapping):
            raise SettingsError(f"{where} is a {type(llm).__name__}; give a mapping of keys to values")
        return cls(**_read(llm, where, line_of or {}))

    def replaced(self, **changes: Any) -> LlmSettings:
        """These settings with some keys changed, read as in `from_mapping`; None puts a key back to its default."""
        return dataclasses.replace(self, **_read(changes, "llm", {}))


_FIELDS: Mapping[str, dataclasses.Field[Any]] = {f.name: f for f in dataclasses.fields(LlmSettings)}
_ALIASES = {"api_url": "api_base", "base_url": "api_base"}


def _read(llm: Mapping[str, Any], where: str, line_of: Mapping[str, int]) -> dict[str, Any]:
    """Values by field name, checked and expanded; errors say the place."""
    values: dict[str, Any] = {}
    spelled: dict[str, str] = {}  # field name → the key it was first written as
    for key, value in llm.items():
        place = f"{where}.{key}" + (f" (line {line_of[key]})" if key in line_of else "")
        name = _ALIASES.get(key, key)
        if name not in _FIELDS:
            raise SettingsError(f"{place} is not a setting; {_nearest(key)}")
        f = _FIELDS[name]
        read = _value(f, value, place)
        if name in spelled and read != values[name]:
            raise SettingsError(f"{place} and {where}.{spelled[name]} say different things; keep one of them")
        values[name] = read
        spelled.setdefault(name, key)
    return values


def _value(f: dataclasses.Field[Any], value: Any, place: str) -> Any:
    if value is None and f.metadata["null_is_off"]:
        return None
    if value is None or (isinstance(value, str) and not value.strip()):
        return f.default
    checked = _checked(f, value, place)
    expand = f.metadata["expand"]
    return expand(checked) if expand else checked


def _checked(f: dataclasses.Field[Any], value: Any, place: str) -> Any:
    try:
        return f.metadata["check"](value)
    except _AdviceError as exc:
        found = f"a {type(value).__name__}" if f.metadata["secret"] else repr(value)
        raise SettingsError(f"{place} is {found}; {exc}") from None


def _nearest(key: Any) -> str:
    import difflib  # only a mistake needs it

    known = [*_FIELDS, *_ALIASES]
    if near := difflib.get_close_matches(str(key).lower(), known, n=1, cutoff=0.5):
        return f"did you mean {near[0]!r}?"
    return f"choose one of {', '.join(known)}"


@dataclass(frozen=True)
class ApiEndpoint:
    """Where requests go and with which key. `base_url` has no slash at its end, and is "" if there is none."""

    provider: str
    base_url: str
    api_key: str | None = field(default=None, repr=False)
    deployment: str | None = None
    api_version: str | None = None


@dataclass(frozen=True)
class _Provider:
    """Where an API is found, and the variables that say so."""

    address: str
    address_variable: str
    key_variable: str | None


_PROVIDERS = {
    "openai": _Provider("https://api.openai.com/v1", "OPENAI_BASE_URL", "OPENAI_API_KEY"),
    "azure": _Provider("", "AZURE_OPENAI_ENDPOINT", "AZURE_OPENAI_API_KEY"),
    "ollama": _Provider("http://localhost:11434", "OLLAMA_API_BASE", None),
}
_OTHER = _Provider("", "OPENAI_BASE_URL", "OPENAI_API_KEY")

_AZURE_API_VERSION = "2024-10-21"  # the data plane's general availability release; OPENAI_API_VERSION names another


def resolve_api(settings: LlmSettings, env: Mapping[str, str] | None = None) -> ApiEndpoint:
    """The API to ask: explicit settings first, then the environment, then the provider's own address.

    `provider: auto` is OpenAI's way of speaking at `api_base` where that is set; else the environment chooses
    (CONTRACT §2). A key that is missing is None here, see `missing_credentials`. Raises SettingsError for a
    variable that holds no http address.
    """
    variables = os.environ if env is None else env

    def variable(name: str | None) -> str | None:
        return (variables.get(name) or "").strip() or None if name else None

    name = settings.provider if settings.provider != "auto" else _auto_provider(settings, variable)
    provider = _PROVIDERS.get(name, _OTHER)
    found = variable(provider.address_variable)
    if found and not settings.api_base and not _is_http(found):
        raise SettingsError(f"{provider.address_variable} is {found!r}; start it with http:// or https://")
    base_url = (settings.api_base or found or provider.address).rstrip("/")
    if name == "ollama" and not base_url.endswith("/v1"):
        base_url += "/v1"
    # OpenAI's key is not sent to an address that belongs to somebody else by name.
    key_variable = None if provider is _OTHER and settings.api_base else provider.key_variable
    azure = name == "azure"
    return ApiEndpoint(
        provider=name,
        base_url=base_url,
        api_key=settings.api_key or variable(key_variable),
        deployment=settings.deployment or (variable("AZURE_OPENAI_DEPLOYMENT") if azure else None),
        api_version=(variable("OPENAI_API_VERSION") or _AZURE_API_VERSION) if azure else None,
    )


def _auto_provider(settings: LlmSettings, variable: Callable[[str], str | None]) -> str:
    if settings.api_base:
        return "openai"
    if variable("OLLAMA_API_BASE"):
        return "ollama"
    if variable("AZURE_OPENAI_API_KEY") and variable("AZURE_OPENAI_ENDPOINT"):
        return "azure"
    return "openai"


def missing_credentials(endpoint: ApiEndpoint, env: Mapping[str, str] | None = None) -> str | None:
    """What `endpoint` lacks to be asked, in one sentence; None when nothing is known to be missing.

    OpenAI at its own address and Azure need a key; Ollama, loopback and other addresses may do without.
    """
    variables = os.environ if env is None else env

    def without(name: str) -> str:
        return f"{name} is {'empty' if name in variables else 'not set'}"

    provider = _PROVIDERS.get(endpoint.provider, _OTHER)
    if not endpoint.base_url:
        return (
            f"No address for the API provider {endpoint.provider!r}: {without(provider.address_variable)} "
            f"and llm.api_base is empty; set one of them."
        )
    if endpoint.api_key or provider.key_variable is None or not _needs_key(endpoint):
        return None
    return (
        f"No key for the API at {endpoint.base_url}: {without(provider.key_variable)} and llm.api_key is empty "
        f"or names a variable that is not set; set one of them, or llm.api_base for a server of your own."
    )


def _needs_key(endpoint: ApiEndpoint) -> bool:
    host = urlsplit(endpoint.base_url).hostname or ""
    if endpoint.provider == "azure":
        return not _is_loopback(host)
    return host == "openai.com" or host.endswith(".openai.com")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
