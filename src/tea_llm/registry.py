"""The engines of this process: each model file and set of options is loaded once, and shared."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .engine import Engine, EngineOptions
from .ticket import fall_silent

__all__ = ["open_engine", "release_engine"]

_engines: dict[tuple[Any, ...], Engine] = {}
_ever_opened: weakref.WeakSet[Engine] = weakref.WeakSet()  # some of them still being freed
_expiries: dict[Engine, threading.Timer] = {}  # of those that nobody uses and that are kept for a while
_lock = threading.RLock()  # reentrant: a backend can be collected, and so released, in the middle of anything
_load_lock = threading.Lock()  # one load at a time, during which other engines are shared and released


def open_engine(
    path: str, options: EngineOptions, on_progress: Callable[[float], object] | None = None
) -> Engine:
    """The engine of a model file: the one that is loaded already if path and options are the same, else a new one.

    A file that was replaced on disk is another file. Give it back with `release_engine`. Raises what `Engine` raises.
    """
    key = (os.getpid(), *_identity(path), options)
    if engine := _shared(key):
        return engine
    with _load_lock:
        if engine := _shared(key):  # loaded while this thread waited
            return engine
        engine = Engine(path, options, on_progress)
        with _lock:
            engine.n_users = 1
            _engines[key] = engine
            _ever_opened.add(engine)
        return engine


def _shared(key: tuple[Any, ...]) -> Engine | None:
    """The engine that is loaded already, with one more user."""
    with _lock:
        engine = _engines.get(key)
        if engine is not None:
            engine.n_users += 1
            if expiry := _expiries.pop(engine, None):
                expiry.cancel()  # else each use would leave a thread that waits for `keep_alive_s`
        return engine if key in _engines else None  # its last backend may have been collected in between


def release_engine(engine: Engine, keep_alive_s: float = 0, *, wait: bool = False) -> None:
    """Give an engine back. After its last user it stays loaded for `keep_alive_s`, and is freed then.

    With `wait` and nothing to keep it alive, it is freed when this returns; without, its own thread frees it.
    """
    expiry = None
    with _lock:
        engine.n_users -= 1
        if engine.n_users > 0:
            return
        if keep_alive_s > 0:
            expiry = _expiries[engine] = threading.Timer(keep_alive_s, _expire, (engine,))
        else:
            _forget(engine)
    if expiry is None:
        engine.close(wait=wait)
    else:
        expiry.daemon = True
        expiry.start()


def _expire(engine: Engine) -> None:
    """Free an engine that nobody has asked for since this timer began."""
    with _lock:
        if _expiries.get(engine) is not threading.current_thread():
            return
        del _expiries[engine]
        _forget(engine)
    engine.close()


def _forget(engine: Engine) -> None:
    for key in [key for key, value in _engines.items() if value is engine]:
        del _engines[key]


def _identity(path: str) -> tuple[Any, ...]:
    try:
        real = os.path.realpath(path)
        found = Path(real).stat()
    except (OSError, ValueError):
        return (path,)  # Model says what is wrong with it
    return (real, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _forget_all() -> None:
    """In a child process after fork(): the engines' threads stayed with the parent, and so may have the locks."""
    global _lock, _load_lock
    _lock, _load_lock = threading.RLock(), threading.Lock()
    _engines.clear()
    _expiries.clear()
    _ever_opened.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


@atexit.register
def _close_all() -> None:
    # The engines' threads must be gone before the interpreter is: one that comes back from C then would be killed.
    fall_silent()  # a daemon that woke up now would print a traceback: its model is closed
    for engine in list(_ever_opened):
        engine.close()
