"""Model files: which one to load, and what a file says about itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .settings import LlmSettings

__all__ = ["get_model_info", "read_metadata", "resolve_model_path"]


def resolve_model_path(
    settings: Mapping[str, Any] | LlmSettings | None,
    cli_model_path: str | os.PathLike[str] | None = None,
    *,
    node_model_path: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    home: str | os.PathLike[str] | None = None,
) -> str | None:
    """The model file to load, or None. Skeleton: filled in next."""
    raise NotImplementedError


def get_model_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`n_ctx`, `chat_format` and `family` of a model file. Skeleton: filled in next."""
    raise NotImplementedError


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The key/values of a GGUF header; None for a file that is no GGUF. Skeleton: filled in next."""
    raise NotImplementedError
