"""`settings.llm`: its keys, the environment behind them, and the API they point to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ApiEndpoint", "LlmSettings", "missing_credentials", "resolve_api"]


@dataclass(frozen=True)
class LlmSettings:
    """The keys of `settings.llm`, checked and expanded."""

    backend: str = "api"
    fallback: tuple[str, ...] = ("api",)
    model_path: str | None = None
    embedding_model_path: str | None = None
    n_ctx: int | None = None
    n_batch: int | None = None
    n_threads: int | None = None
    n_gpu_layers: int | None = None
    chat_format: str | None = None
    pooling: str | None = None
    n_parallel: int | None = None
    model: str | None = None
    embedding_model: str | None = None
    provider: str = "auto"
    api_base: str | None = None
    api_key: str | None = field(default=None, repr=False)
    deployment: str | None = None
    timeout: float | None = 300.0
    temperature: float | None = None
    max_tokens: int | None = None
    max_retries: int = 0

    @classmethod
    def from_mapping(
        cls, llm: Mapping[str, Any] | None, *, where: str = "settings.llm", line_of: Mapping[str, int] | None = None
    ) -> LlmSettings:
        """The settings that a YAML mapping says. Skeleton: filled in next."""
        raise NotImplementedError

    def replaced(self, **changes: Any) -> LlmSettings:
        """These settings with some keys changed, checked as in `from_mapping`. Skeleton: filled in next."""
        raise NotImplementedError


@dataclass(frozen=True)
class ApiEndpoint:
    """Where requests go, and with which key."""

    provider: str
    base_url: str
    api_key: str | None = field(default=None, repr=False)
    deployment: str | None = None
    api_version: str | None = None


def resolve_api(settings: LlmSettings, env: Mapping[str, str] | None = None) -> ApiEndpoint:
    """The endpoint that the settings and then the environment name. Skeleton: filled in next."""
    raise NotImplementedError


def missing_credentials(endpoint: ApiEndpoint, env: Mapping[str, str] | None = None) -> str | None:
    """What `endpoint` lacks to be asked, in one sentence; None when nothing. Skeleton: filled in next."""
    raise NotImplementedError
