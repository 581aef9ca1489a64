"""Model files: which one to load, and what a file says about itself. Reads headers only, and no network."""

from __future__ import annotations

import io
import itertools
import logging
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ModelLoadError, ModelNotFound, SettingsError
from .settings import LlmSettings, expand_path, home_directory

__all__ = [
    "LongArray",
    "get_model_info",
    "model_digest",
    "open_regular",
    "packaged_model",
    "read_metadata",
    "resolve_model_path",
]

logger = logging.getLogger("tea_llm")


# Which file (CONTRACT §3)

_PREFERRED_FILES = (
    "gemma-3-1b-it-Q8_0.gguf",
    "microsoft_Phi-4-mini-instruct-Q3_K_S.gguf",
    "gemma-3n-E4B-it-Q4_K_M.gguf",
)


def resolve_model_path(
    settings: Mapping[str, Any] | LlmSettings | None,
    cli_model_path: str | os.PathLike[str] | None = None,
    *,
    node_model_path: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    home: str | os.PathLike[str] | None = None,
) -> str | None:
    """The first model file that exists, or None.

    Looks at `--gguf`, `TEA_MODEL_PATH`, the node's `model_path`, `settings.llm.model_path`, then into
    `$APPDIR/usr/share/models` and `~/.cache/tea/models`. A path that is set but has no file is a warning, and the
    search goes on; so is finding nothing. `settings` is `{"llm": {…}}` or an `LlmSettings`.
    """
    variables = os.environ if env is None else env
    named = (
        ("--gguf", cli_model_path),
        ("TEA_MODEL_PATH", variables.get("TEA_MODEL_PATH")),
        ("model_path", node_model_path),
        ("llm.model_path", _settings_path(settings)),
    )
    for name, path in named:
        if not path:
            continue
        _check_path(path)
        expanded = expand_path(path, env, home)
        if os.path.isfile(expanded):  # noqa: PTH113  Path.is_file raises where this says False (3.11: EACCES, NUL)
            return expanded
        logger.warning("%s set but file not found: %s", name, expanded)
    directories = [Path(home or home_directory(env), ".cache", "tea", "models")]
    if appdir := variables.get("APPDIR"):
        directories.insert(0, Path(appdir, "usr", "share", "models"))
    for directory in directories:
        if found := _model_in(directory):
            return str(found)
    logger.warning("No local model found. Set TEA_MODEL_PATH or configure llm.model_path.")
    return None


def _check_path(path: Any) -> None:
    """Raise SettingsError for what is no path in text."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise SettingsError(f"the path of a model is {path!r:.60}; give the path of a file")


def packaged_model() -> str:
    """The small model that comes with the package (`model: tiny`)."""
    return str(Path(__file__).parent / "data" / "tea-tiny.gguf")


def _settings_path(settings: Mapping[str, Any] | LlmSettings | None) -> str | os.PathLike[str] | None:
    if isinstance(settings, LlmSettings):
        return settings.model_path
    llm = (settings or {}).get("llm") or {}
    if not isinstance(llm, Mapping):
        raise SettingsError(f"settings.llm is a {type(llm).__name__}; give a mapping of keys to values")
    path = llm.get("model_path")
    if path is not None and not isinstance(path, (str, os.PathLike)):
        raise SettingsError(f"settings.llm.model_path is {path!r}; give the path of a file")
    return path


def _model_in(directory: Path) -> Path | None:
    """The preferred model of a directory, else its only one."""
    try:
        models = sorted(p for p in directory.glob("*.gguf") if p.is_file() and not p.name.startswith("."))
    except OSError:
        return None
    by_name = {model.name: model for model in models}
    for name in _PREFERRED_FILES:
        if name in by_name:
            return by_name[name]
    if len(models) > 1:
        logger.warning(
            "%d models in %s and none is preferred: %s. Set TEA_MODEL_PATH or llm.model_path to one of them.",
            len(models), directory, ", ".join(by_name),
        )  # fmt: skip
        return None
    return models[0] if models else None


# What a file is (CONTRACT §5)


@dataclass(frozen=True)
class _NamedModel:
    """What is known about a model by its file name alone."""

    name: str  # a regular expression, compiled when first asked for
    n_ctx: int
    chat_format: str | None
    family: str


_NAMED_MODELS = (
    _NamedModel(r"gemma[-_]?3[-_]1b", 8192, "gemma", "gemma"),
    _NamedModel(r"gemma", 32768, "gemma", "gemma"),
    _NamedModel(r"(?<![a-z])phi(?![a-z])", 128000, "chatml", "phi"),  # dolphin is no phi
    _NamedModel(r"tinyllama|stories", 2048, None, "tinyllama"),
    _NamedModel(r"", 4096, None, "unknown"),
)

_FAMILIES = ("gemma", "phi")
"""Architectures that start so are of that family: gemma2, gemma3n and gemma-embedding; phi2, phi3 and phimoe."""


def get_model_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`n_ctx`, `chat_format` and `family` of a model file, each from its metadata, or from its name where that is mute.

    `n_ctx` is the context length that the model was trained for. `chat_format` is the format of `format_chat_prompt`
    that its chat template writes, None for any other template. `family` is "gemma" or "phi" for their architectures,
    else the architecture itself ("llama", "qwen2", "bert"). A file that is missing, damaged or no GGUF says nothing.
    """
    _check_path(path)
    by_name = next(row for row in _NAMED_MODELS if re.search(row.name, Path(path).name.lower()))
    try:
        metadata = read_metadata(path) or {}
    except ModelNotFound:
        metadata = {}
    except ModelLoadError as exc:
        logger.warning("%s Taking what the file name tells.", exc)
        metadata = {}
    architecture = metadata.get("general.architecture")
    n_ctx = metadata.get(f"{architecture}.context_length")
    template = metadata.get("tokenizer.chat_template")
    return {
        "n_ctx": n_ctx if type(n_ctx) is int and n_ctx > 0 else by_name.n_ctx,
        "chat_format": _format_of(template) if isinstance(template, str) and template else by_name.chat_format,
        "family": _family_of(architecture) if isinstance(architecture, str) and architecture else by_name.family,
    }


def _family_of(architecture: str) -> str:
    return next((family for family in _FAMILIES if architecture.startswith(family)), architecture)


def _format_of(template: str) -> str | None:
    """As llama.cpp tells templates apart (src/llama-chat.cpp, llm_chat_detect_template)."""
    if "<|im_start|>" in template:
        return None if "<|im_sep|>" in template or "<end_of_utterance>" in template else "chatml"
    return "gemma" if "<start_of_turn>" in template else None


# The GGUF header (ggml/include/gguf.h)

_HEADER_LIMIT_BYTES = 128 << 20  # ten times the largest vocabulary in use; bounds memory and time on a hostile file
_KEYS_LIMIT = 1 << 16
_SHORT_ARRAY = 64  # elements; a longer array is skipped and only described
_FIRST_READ_BYTES = 1 << 20  # most headers without a vocabulary, and no time to speak of
_SAMPLE_BYTES = 4096  # of each tensor, to tell models of one shape apart


@dataclass(frozen=True)
class LongArray:
    """An array of a header that was skipped: what it holds, and how many."""

    element_type: str
    count: int


class _DamagedError(Exception):
    """What is wrong with a header."""


_STRING, _ARRAY = 8, 9
_SCALARS = {
    number: (name, struct.Struct("<" + code))
    for number, name, code in (
        (0, "uint8", "B"), (1, "int8", "b"), (2, "uint16", "H"), (3, "int16", "h"), (4, "uint32", "I"),
        (5, "int32", "i"), (6, "float32", "f"), (7, "bool", "?"), (10, "uint64", "Q"),
        (11, "int64", "q"), (12, "float64", "d"),
    )
}  # fmt: skip
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The keys and values of a GGUF header (version 2 or 3), or None for a file that is no GGUF.

    Arrays of more than 64 elements are `LongArray`s. No length in the file is trusted beyond the file's own size.
    Raises ModelNotFound for a missing file; ModelLoadError for one that can't be read, isn't a regular file, is
    damaged, or is of another version.
    """
    _check_path(path)
    with _opened(path) as file:
        return _Header(file).metadata()


def model_digest(path: str | os.PathLike[str]) -> str:
    """What tells a GGUF file from any other: SHA-256 of its size, its header, and a sample of each tensor.

    Of a model in several files, all are read. Raises as `read_metadata` does.
    """
    import hashlib  # only sessions need it

    digest = hashlib.sha256()
    metadata = read_metadata(path) or {}
    for part in _parts_of(os.fspath(path), metadata):
        with _opened(part) as file:
            n_bytes = os.fstat(file.fileno()).st_size
            header, offsets = _Header(file).whole()
            digest.update(_U64.pack(n_bytes) + header)
            for begin, end in itertools.pairwise([*sorted(offsets), n_bytes]):
                file.seek((begin + end) // 2)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _parts_of(path: str, metadata: Mapping[str, Any]) -> list[str]:
    """The files of a model, as llama.cpp names them (llama.h, llama_split_path)."""
    n_parts = metadata.get("split.count")
    if not isinstance(n_parts, int) or not path.endswith(first := f"-00001-of-{n_parts:05d}.gguf"):
        return [path]
    return [f"{path.removesuffix(first)}-{i:05d}-of-{n_parts:05d}.gguf" for i in range(1, n_parts + 1)]


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[io.FileIO]:
    """The open file; what goes wrong with it becomes a ModelError."""
    shown = os.fspath(path)
    try:
        with open_regular(path) as file:
            yield file
    except FileNotFoundError as exc:
        raise ModelNotFound(f"Model file not found: {shown}.") from exc
    except _DamagedError as exc:
        raise ModelLoadError(f"The GGUF header of {shown} can't be used: {exc}.") from exc
    except (OSError, ValueError) as exc:  # ValueError: a path with a NUL in it
        raise ModelLoadError(f"{shown} can't be read: {exc}.") from exc


def open_regular(path: str | os.PathLike[str]) -> io.FileIO:
    """The open file, unless it is a directory, a FIFO, a device: opening or reading those could wait for ever."""
    file = io.FileIO(path, opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("not a regular file")
    return file


class _Header:
    """A cursor over the header, which is read in growing pieces as far as it is needed."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._data = bytearray()
        self._at = 0

    def metadata(self) -> dict[str, Any] | None:
        """All keys and values; None where the file doesn't begin as a GGUF does."""
        if self._size < 4 or self._take(4) != b"GGUF":
            return None
        version = self._number(_U32)
        if version not in (2, 3):
            swapped = " (a big-endian file)" if version and version & 0xFFFF == 0 else ""
            raise _DamagedError(f"it is of version {version}{swapped}; versions 2 and 3 are known")
        self._n_tensors: int = self._number(_U64)
        n_keys = self._number(_U64)
        if n_keys > _KEYS_LIMIT:
            raise _DamagedError(f"it claims {n_keys} keys")
        found: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self._string()
            if key in found:
                raise _DamagedError(f"key {key!r} is there twice")
            found[key] = self._value(self._number(_U32))
        return found

    def whole(self) -> tuple[bytes, list[int]]:
        """Its bytes, and where in the file each tensor begins."""
        alignment = (self.metadata() or {}).get("general.alignment", 32)
        offsets = []
        for _ in range(self._n_tensors):
            self._string()
            self._take(_U64.size * self._number(_U32) + _U32.size)  # dimensions and type
            offsets.append(self._number(_U64))
        data_at = self._at + -self._at % alignment
        return bytes(self._data[: self._at]), [data_at + offset for offset in offsets]

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(self._number(_U32), self._number(_U64))
        if kind not in _SCALARS:
            raise _DamagedError(f"byte {self._at} names type {kind}, which GGUF does not have")
        return self._number(_SCALARS[kind][1])

    def _array(self, kind: int, count: int) -> list[Any] | LongArray:
        if kind == _STRING:
            if count <= _SHORT_ARRAY:
                return [self._string() for _ in range(count)]
            self._skip_strings(count)
            return LongArray("string", count)
        if kind not in _SCALARS:  # llama.cpp refuses arrays of arrays too
            raise _DamagedError(f"byte {self._at} begins an array of type {kind}")
        name, layout = _SCALARS[kind]
        data = self._take(layout.size * count)
        if count <= _SHORT_ARRAY:
            return [value for (value,) in layout.iter_unpack(data)]
        return LongArray(name, count)

    def _string(self) -> str:
        return self._take(self._number(_U64)).decode("utf-8", "replace")

    def _number(self, layout: struct.Struct) -> Any:
        return layout.unpack(self._take(layout.size))[0]

    def _take(self, n_bytes: int) -> bytes:
        begin, self._at = self._at, self._at + n_bytes
        self._reach(self._at)
        return bytes(self._data[begin : self._at])

    def _skip_strings(self, count: int) -> None:
        """Step over `count` strings. A vocabulary has 150,000 of them: this loop is most of the reader's time."""
        strings, at, data, length_at = iter(range(count)), self._at, self._data, _U64.unpack_from
        more = True
        while more:
            try:
                for _ in strings:
                    at += 8 + length_at(data, at)[0]
                more = False
            except (struct.error, OverflowError):  # the data read so far ends here, or a length is past any file
                self._reach(at + 8)
                at += 8 + length_at(data, at)[0]
        self._reach(at)
        self._at = at

    def _reach(self, end: int) -> None:
        """Have the first `end` bytes in `_data`."""
        if end > self._size:
            raise _DamagedError(f"it needs {end} bytes and the file has {self._size}")
        if end > _HEADER_LIMIT_BYTES:
            raise _DamagedError(f"it is longer than {_HEADER_LIMIT_BYTES} bytes")
        goal = min(max(end, 2 * len(self._data), _FIRST_READ_BYTES), self._size, _HEADER_LIMIT_BYTES)
        while end > len(self._data):
            piece = self._file.read(goal - len(self._data))
            if not piece:
                raise _DamagedError(f"the file ends at byte {len(self._data)}")  # cut while we read
            self._data += piece
