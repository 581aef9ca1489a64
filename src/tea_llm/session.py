"""Session files: what a model has computed of a text, so that another process need not compute it again.

A file is a head (`_HEAD`), the origin as JSON, the tokens as int32 and the state, all little-endian. The head holds the
sizes of the others and a SHA-256 of everything else. A state reaches llama.cpp only when all of it is as it was written
and it comes from the same model, llama.cpp and layout: llama.cpp's reader is not made for anything else.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from .errors import SessionError
from .models import open_regular

__all__ = ["Origin", "Session", "SessionFile"]

_MAGIC = b"\x93tea_kv\n"
_VERSION = 1
_HEAD = struct.Struct("<8sIIQQ32s")  # magic, version, bytes of origin, tokens, bytes of state, SHA-256
_TOKEN_BYTES = 4


@dataclass(frozen=True)
class Origin:
    """Where a state can be used again: `model` is its digest (models.model_digest), `model_name` is for messages."""

    model: str
    model_name: str
    llama_cpp: str
    layout: str


@dataclass(frozen=True)
class Session:
    """The tokens of a text that are computed, and llama.cpp's state of a sequence that holds them.

    `path` is the file it was read from.
    """

    tokens: Sequence[int]
    state: bytes
    path: str = field(default="", compare=False)

    def refused(self, found: str) -> SessionError:
        """The error for a session that is intact, and can't be used all the same."""
        return _refused(self.path, found)


@dataclass(frozen=True)
class SessionFile:
    """Where a session is kept, and what it has to come from. Any number of threads and processes may share a file:
    each reads what one of them has written whole, and the last to write stays.
    """

    path: str
    origin: Origin

    def read(self) -> Session | None:
        """What the file holds, None where there is no file.

        Raises SessionError for one that can't be read, is damaged, or is of another origin.
        """
        n_bytes = 0
        try:
            with open_regular(self.path) as file:
                n_bytes = os.fstat(file.fileno()).st_size
                return self._checked(file, n_bytes)
        except FileNotFoundError:
            return None
        except SessionError:
            raise
        except MemoryError as exc:
            raise self._refused(f"it does not fit into memory, {n_bytes} bytes") from exc
        except (OSError, ValueError, TypeError) as exc:  # also what a file says in bad faith
            raise self._refused(f"it can't be read: {_reason(exc)}") from exc

    def write(self, session: Session) -> None:
        """Put a session in the place of the file, whole or not at all; folders on the way are made.

        Raises SessionError where it can't be written; what was there before stays.
        """
        target = Path(os.path.realpath(self.path))  # a link stays one
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _replace(target, self._parts(session))
        except (OSError, ValueError) as exc:  # ValueError: a path with a NUL in it
            raise SessionError(
                f"the session could not be saved to {self.path}: {_reason(exc)}; make room there or name another file"
            ) from exc

    def _parts(self, session: Session) -> tuple[bytes, ...]:
        import json

        origin = json.dumps(asdict(self.origin)).encode()
        tokens = struct.pack(f"<{len(session.tokens)}i", *session.tokens)
        head = (_MAGIC, _VERSION, len(origin), len(session.tokens), len(session.state))
        checksum = _checksum(_HEAD.pack(*head, b""), origin, tokens, session.state)
        return _HEAD.pack(*head, checksum), origin, tokens, session.state

    def _checked(self, file: IO[bytes], n_bytes: int) -> Session:
        """The session in an open file, once everything is known to be right."""
        import json

        head = _read(file, _HEAD.size)
        if head[: len(_MAGIC)] != _MAGIC[: len(head)] or not head:
            raise self._refused("it is no session file")
        if len(head) < _HEAD.size:
            raise self._refused(f"it ends after {n_bytes} bytes")
        magic, version, n_origin, n_tokens, n_state, checksum = _HEAD.unpack(head)
        if version != _VERSION:
            raise self._refused(f"it is of version {version}, and version {_VERSION} is known")
        n_told = _HEAD.size + n_origin + n_tokens * _TOKEN_BYTES + n_state
        if n_told != n_bytes:
            raise self._refused(f"it has {n_bytes} bytes and says {n_told}")
        origin, tokens, state = (_read(file, n) for n in (n_origin, n_tokens * _TOKEN_BYTES, n_state))
        if _checksum(_HEAD.pack(magic, version, n_origin, n_tokens, n_state, b""), origin, tokens, state) != checksum:
            raise self._refused("it is damaged: its checksum is of something else")
        self._check_origin(Origin(**json.loads(origin)))
        return Session(struct.unpack(f"<{n_tokens}i", tokens), state, self.path)

    def _check_origin(self, found: Origin) -> None:
        wanted = self.origin
        if found.model != wanted.model:
            raise self._refused(f"it was saved with {found.model_name}, another model than {wanted.model_name}")
        if found.llama_cpp != wanted.llama_cpp:
            raise self._refused(f"it was saved by llama.cpp {found.llama_cpp}, and this is {wanted.llama_cpp}")
        if found.layout != wanted.layout:
            raise self._refused(f"its layout is ({found.layout}), and here it is ({wanted.layout})")

    def _refused(self, found: str) -> SessionError:
        return _refused(self.path, found)


def _refused(path: str, found: str) -> SessionError:
    return SessionError(f"the session {path} can't be used: {found}; delete it or name another file")


def _replace(target: Path, parts: Sequence[bytes]) -> None:
    """Put a file of `parts` in the place of `target`: whoever opens it sees the old or the new one, and both whole.

    It is readable by its owner alone, as a conversation should be.
    """
    import tempfile

    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".tea_llm-", suffix=".part")
    part_file = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        part_file.replace(target)
    except BaseException:
        with suppress(OSError):
            part_file.unlink()
        raise


def _read(file: IO[bytes], n_bytes: int) -> bytes:
    """The next bytes, fewer at the file's end: a raw file gives at most 2 GiB at once."""
    pieces = []
    while n_bytes and (piece := file.read(n_bytes)):
        pieces.append(piece)
        n_bytes -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _checksum(*parts: bytes) -> bytes:
    import hashlib

    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def _reason(exc: Exception) -> str:
    """What the system says, without the path, which the message has already."""
    return (isinstance(exc, OSError) and exc.strerror) or str(exc)
