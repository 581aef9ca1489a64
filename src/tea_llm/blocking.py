"""Coroutines without an event loop: code written once, for callers that wait in a thread and for asyncio."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar, cast

__all__ = ["next_blocking", "run_blocking"]

_T = TypeVar("_T")


def run_blocking(work: Coroutine[Any, Any, _T]) -> _T:
    """What `work` returns. All that it awaits blocks instead of suspending, so one step ends it."""
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, None)  # a loop that happens to run in this thread would close generators at its end
    try:
        work.send(None)
    except StopIteration as done:
        return cast(_T, done.value)
    finally:
        sys.set_asyncgen_hooks(*hooks)
    raise AssertionError("blocking work waited for an event loop")


def next_blocking(items: AsyncIterator[_T]) -> _T:
    """`__next__` for an iterator that has only `__anext__`, under the same condition."""
    try:
        return run_blocking(cast("Coroutine[Any, Any, _T]", items.__anext__()))
    except StopAsyncIteration:
        raise StopIteration from None
