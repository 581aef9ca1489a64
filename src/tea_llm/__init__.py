"""Use a language model on this machine, and an OpenAI-compatible API when it can't answer.

Importing this module has no effects: each name is loaded from its room when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .actions import __tea_actions__, register_actions
    from .api import ApiLlmBackend
    from .backend import BackendPool, LlmBackend, create_llm_backend
    from .chat import format_chat_prompt
    from .errors import (
        ApiConnectionError,
        ApiError,
        ApiResponseError,
        ApiStatusError,
        ApiTimeout,
        BadRequest,
        Cancelled,
        ContextOverflow,
        DeadlineExceeded,
        EngineBusy,
        EngineClosed,
        EngineError,
        EngineFault,
        ExtensionMissing,
        FallbackError,
        GrammarError,
        LlmError,
        ModelError,
        ModelLoadError,
        ModelNotFound,
        OutOfMemory,
        SessionError,
        SettingsError,
        StreamError,
        WorkflowError,
    )
    from .local import LocalLlmBackend
    from .models import get_model_info, resolve_model_path
    from .params import (
        Completion,
        Delta,
        LlmCallParams,
        LlmCallResult,
        LlmEmbedResult,
        Timings,
        TokenLogprob,
        TopLogprob,
        Usage,
    )
    from .stream import TextStream
    from .tools import ToolCall
    from .workflow import run_workflow

_ROOMS = {
    "actions": ("__tea_actions__", "register_actions"),
    "api": ("ApiLlmBackend",),
    "backend": ("BackendPool", "LlmBackend", "create_llm_backend"),
    "chat": ("format_chat_prompt",),
    "errors": (
        "ApiConnectionError", "ApiError", "ApiResponseError", "ApiStatusError", "ApiTimeout", "BadRequest", "Cancelled",
        "ContextOverflow", "DeadlineExceeded", "EngineBusy", "EngineClosed", "EngineError", "EngineFault",
        "ExtensionMissing", "FallbackError", "GrammarError", "LlmError", "ModelError", "ModelLoadError",
        "ModelNotFound", "OutOfMemory", "SessionError", "SettingsError", "StreamError", "WorkflowError",
    ),
    "local": ("LocalLlmBackend",),
    "models": ("get_model_info", "resolve_model_path"),
    "params": (
        "Completion", "Delta", "LlmCallParams", "LlmCallResult", "LlmEmbedResult", "Timings", "TokenLogprob",
        "TopLogprob", "Usage",
    ),
    "stream": ("TextStream",),
    "tools": ("ToolCall",),
    "workflow": ("run_workflow",),
}  # fmt: skip
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "ApiConnectionError", "ApiError", "ApiLlmBackend", "ApiResponseError", "ApiStatusError", "ApiTimeout",
    "BackendPool", "BadRequest", "Cancelled", "Completion", "ContextOverflow", "DeadlineExceeded", "Delta",
    "EngineBusy", "EngineClosed", "EngineError", "EngineFault", "ExtensionMissing", "FallbackError", "GrammarError",
    "LlmBackend", "LlmCallParams", "LlmCallResult", "LlmEmbedResult", "LlmError", "LocalLlmBackend", "ModelError",
    "ModelLoadError", "ModelNotFound", "OutOfMemory", "SessionError", "SettingsError", "StreamError", "TextStream",
    "Timings", "TokenLogprob", "ToolCall", "TopLogprob", "Usage", "WorkflowError",
    "__tea_actions__",
    "create_llm_backend", "format_chat_prompt", "get_model_info", "register_actions", "resolve_model_path",
    "run_workflow",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_ROOM_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
