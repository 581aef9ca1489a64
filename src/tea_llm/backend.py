"""What a backend is, which there are, and who answers when one can't."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Any, TypeVar, overload

from .errors import BadRequest
from .params import ChunkCallback, LlmCallParams, LlmCallResult, LlmEmbedResult, Message

__all__ = ["LlmBackend", "RequestBackend"]

logger = logging.getLogger("tea_llm")

_Self = TypeVar("_Self", bound="LlmBackend")


class LlmBackend(ABC):
    """A language model that can be asked. A context manager: leaving it closes it.

    A backend of your own implements the abstract methods; its async twins then run them in a thread.
    Errors are `LlmError`s; `BadRequest` means that no backend could answer.
    """

    @abstractmethod
    def call(self, params: LlmCallParams) -> LlmCallResult:
        """Continue `params.prompt`, or answer `params.messages`."""

    @abstractmethod
    def chat(self, messages: Sequence[Message], **options: Any) -> LlmCallResult:
        """Answer `messages`; `options` are fields of `LlmCallParams`."""

    @abstractmethod
    def embed(self, text: str | Sequence[str], **options: Any) -> Any:
        """The vector of a text, or a list of vectors of a list of texts."""

    @abstractmethod
    def stream(self, params: LlmCallParams, callback: ChunkCallback) -> LlmCallResult:
        """As `call`, handing each chunk of text to `callback` as soon as it is there."""

    @abstractmethod
    def is_available(self) -> bool:
        """Whether a call could be answered now, as far as can be told without making one."""

    def stream_chat(self, messages: Sequence[Message], callback: ChunkCallback, **options: Any) -> LlmCallResult:
        """As `chat`, handing each chunk of text to `callback` as soon as it is there."""
        return self.stream(LlmCallParams(messages=messages, **options), callback)

    def close(self) -> None:
        """Give back what the backend holds. Closing twice is fine; a call after that raises EngineClosed."""
        return None

    async def acall(self, params: LlmCallParams) -> LlmCallResult:
        """`call` for asyncio."""
        return await asyncio.to_thread(self.call, params)

    async def achat(self, messages: Sequence[Message], **options: Any) -> LlmCallResult:
        """`chat` for asyncio."""
        return await asyncio.to_thread(self.chat, messages, **options)

    async def aembed(self, text: str | Sequence[str], **options: Any) -> Any:
        """`embed` for asyncio."""
        return await asyncio.to_thread(self.embed, text, **options)

    async def astream(self, params: LlmCallParams, callback: ChunkCallback) -> LlmCallResult:
        """`stream` for asyncio; `callback` may be a coroutine function."""
        return await asyncio.to_thread(self.stream, params, callback)

    async def astream_chat(self, messages: Sequence[Message], callback: ChunkCallback, **options: Any) -> LlmCallResult:
        """`stream_chat` for asyncio; `callback` may be a coroutine function."""
        return await self.astream(LlmCallParams(messages=messages, **options), callback)

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class RequestBackend(LlmBackend):
    """A backend with one way in for text and one for vectors, each sync and async; all else follows from them."""

    @abstractmethod
    def generate(self, params: LlmCallParams, on_chunk: ChunkCallback | None = None) -> LlmCallResult:
        """Answer `params`; with `on_chunk`, hand out each chunk of text as soon as it is there."""

    @abstractmethod
    async def agenerate(self, params: LlmCallParams, on_chunk: ChunkCallback | None = None) -> LlmCallResult:
        """`generate` for asyncio; `on_chunk` may be a coroutine function."""

    @abstractmethod
    def embeddings(
        self, texts: Sequence[str], *, model: str | None = None, normalize: bool = True, dimensions: int | None = None,
        as_numpy: bool = False, **options: Any,
    ) -> LlmEmbedResult:
        """One vector per text. `dimensions` cuts each vector (Matryoshka) before it is normalised."""

    @abstractmethod
    async def aembeddings(self, texts: Sequence[str], **options: Any) -> LlmEmbedResult:
        """`embeddings` for asyncio, same options."""

    def call(self, params: LlmCallParams) -> LlmCallResult:
        return self.generate(params)

    def chat(self, messages: Sequence[Message], **options: Any) -> LlmCallResult:
        return self.generate(LlmCallParams(messages=messages, **options))

    def stream(self, params: LlmCallParams, callback: ChunkCallback) -> LlmCallResult:
        return self.generate(params, callback)

    def embed(self, text: str | Sequence[str], **options: Any) -> Any:
        vectors = self.embeddings(_as_texts(text), **options).embeddings
        return vectors[0] if isinstance(text, str) else vectors

    async def acall(self, params: LlmCallParams) -> LlmCallResult:
        return await self.agenerate(params)

    async def achat(self, messages: Sequence[Message], **options: Any) -> LlmCallResult:
        return await self.agenerate(LlmCallParams(messages=messages, **options))

    async def astream(self, params: LlmCallParams, callback: ChunkCallback) -> LlmCallResult:
        return await self.agenerate(params, callback)

    async def aembed(self, text: str | Sequence[str], **options: Any) -> Any:
        vectors = (await self.aembeddings(_as_texts(text), **options)).embeddings
        return vectors[0] if isinstance(text, str) else vectors


def _as_texts(text: str | Sequence[str]) -> list[str]:
    texts = [text] if isinstance(text, str) else list(text)
    for i, t in enumerate(texts):
        if not isinstance(t, str):
            raise BadRequest(f"text[{i}] is {type(t).__name__}; embed takes a str or a list of str")
    return texts
