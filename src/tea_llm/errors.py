"""The error tree. Every class is also the builtin that a caller would already catch.

    LlmError
    ├── SettingsError (ValueError)            a settings key or value
    ├── BadRequest (ValueError)               an argument of one call; never retried, never a reason to fall back
    │   ├── ContextOverflow                   prompt + max_tokens do not fit; falls back only where asked
    │   ├── GrammarError                      a grammar llama.cpp can't parse
    │   └── SessionError                      a session file that can't be used
    ├── ModelError                            a model that can't be used; a reason to fall back
    │   ├── ModelNotFound (FileNotFoundError)
    │   ├── ModelLoadError (RuntimeError)
    │   └── ExtensionMissing (ImportError)    tea_llm was built without llama.cpp
    ├── OutOfMemory (MemoryError)
    ├── EngineError (RuntimeError)            llama.cpp failed while it computed
    │   ├── EngineFault                       an assert or a C++ exception inside llama.cpp
    │   ├── EngineBusy (TimeoutError)         no turn within `queue_timeout`, or too many requests wait
    │   └── EngineClosed                      used after close() or after fork()
    ├── StreamError (RuntimeError)            a TextStream read twice, by two at once, or asked too early for its result
    ├── Cancelled
    ├── DeadlineExceeded (TimeoutError)
    ├── ApiError                              the API didn't give an answer
    │   ├── ApiConnectionError (ConnectionError)
    │   ├── ApiTimeout (TimeoutError)
    │   ├── ApiStatusError                    an HTTP status of 400 and above
    │   └── ApiResponseError                  an answer that isn't one: not JSON, cut, an error object in a stream
    ├── FallbackError                         every backend of the chain failed; holds each cause
    └── WorkflowError (RuntimeError)          a workflow that can't run, or a node that failed

A message says what was tried, what was found and what to do; the library's own words follow.
"""

from __future__ import annotations

__all__ = [
    "ApiConnectionError",
    "ApiError",
    "ApiResponseError",
    "ApiStatusError",
    "ApiTimeout",
    "BadRequest",
    "Cancelled",
    "ContextOverflow",
    "DeadlineExceeded",
    "EngineBusy",
    "EngineClosed",
    "EngineError",
    "EngineFault",
    "ExtensionMissing",
    "FallbackError",
    "GrammarError",
    "LlmError",
    "ModelError",
    "ModelLoadError",
    "ModelNotFound",
    "OutOfMemory",
    "SessionError",
    "SettingsError",
    "StreamError",
    "WorkflowError",
]


class LlmError(Exception):
    """Anything that tea_llm raises on purpose."""


class SettingsError(LlmError, ValueError):
    """A key or value in the settings that can't be used."""


class BadRequest(LlmError, ValueError):
    """An argument of one call that no backend could answer."""


class ContextOverflow(BadRequest):
    """The prompt and what is to be generated are longer than the context, counted in tokens."""

    def __init__(self, message: str, *, n_prompt: int = 0, n_ctx: int = 0) -> None:
        super().__init__(message)
        self.n_prompt = n_prompt
        self.n_ctx = n_ctx


class GrammarError(BadRequest):
    """A grammar that llama.cpp can't parse."""


class SessionError(BadRequest):
    """A session file that can't be read, is damaged, or belongs to another model; or one that can't be written."""


class ModelError(LlmError):
    """A local model that can't be used."""


class ModelNotFound(ModelError, FileNotFoundError):
    """No model file at the path, or none anywhere in the search."""


class ModelLoadError(ModelError, RuntimeError):
    """The file is there and llama.cpp refused it; llama.cpp's last words are in the message."""


class ExtensionMissing(ModelError, ImportError):
    """tea_llm was built without llama.cpp, so it can only use the API."""


class OutOfMemory(LlmError, MemoryError):
    """llama.cpp could not allocate what the model or its context needs."""


class EngineError(LlmError, RuntimeError):
    """llama.cpp failed while it computed."""


class EngineFault(EngineError):
    """An assert or a C++ exception inside llama.cpp; its context is not used again."""


class EngineBusy(EngineError, TimeoutError):
    """The model computes for others: no turn within `queue_timeout`, or too many requests wait already."""


class EngineClosed(EngineError):
    """A model, context or backend used after `close()`, or in a child process after `fork()`."""


class StreamError(LlmError, RuntimeError):
    """A TextStream that is read twice, or by two at once, or has no result (yet)."""


class Cancelled(LlmError):
    """The caller gave up before the answer was complete."""


class DeadlineExceeded(LlmError, TimeoutError):
    """`timeout` passed before the answer was complete."""


class ApiError(LlmError):
    """The API gave no answer. `attempts` counts requests sent, `total_delay_s` the seconds waited between them."""

    def __init__(
        self,
        message: str,
        *,
        status_code: int | None = None,
        attempts: int = 1,
        total_delay_s: float = 0.0,
        partial: str = "",
    ) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.attempts = attempts
        self.total_delay_s = total_delay_s
        self.partial = partial  # text received before the fault; "" if none


class ApiConnectionError(ApiError, ConnectionError):
    """No connection, or one that broke."""


class ApiTimeout(ApiError, TimeoutError):
    """The server did not answer in time."""


class ApiStatusError(ApiError):
    """The server answered with `status_code` 400 or above."""


class ApiResponseError(ApiError):
    """The server's answer could not be read; `partial` holds the text received so far."""


class FallbackError(LlmError):
    """Every backend of the chain failed. `causes` has one (backend name, error) pair for each, in order."""

    def __init__(self, message: str, causes: tuple[tuple[str, LlmError], ...]) -> None:
        super().__init__(message)
        self.causes = causes


class WorkflowError(LlmError, RuntimeError):
    """A workflow file that can't run, or a node that failed; `node` is its name, or None for the file."""

    def __init__(self, message: str, *, node: str | None = None) -> None:
        super().__init__(message)
        self.node = node
