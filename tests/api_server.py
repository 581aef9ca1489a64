"""A small HTTP server on loopback that gives scripted answers, faults among them, and keeps what it was asked."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["ApiServer", "Reply", "Seen", "chat", "delta", "failure", "json_reply", "sse", "stream"]


@dataclass(frozen=True)
class Reply:
    """One scripted answer: its body in pieces, each written and flushed by itself."""

    pieces: Sequence[bytes] = ()
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "application/json"
    wait_s: float = 0.0  # before the first byte
    pause_s: float = 0.0  # before each piece
    cut: bool = False  # break the connection instead of ending the body
    hang_up: bool = False  # break the connection instead of answering


@dataclass(frozen=True)
class Seen:
    """One request as it came."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any


def json_reply(reply: Any, **how: Any) -> Reply:
    """`reply` as JSON."""
    return Reply([json.dumps(reply).encode()], **how)


def chat(text: str | None = "Hi.", **choice: Any) -> Reply:
    """A whole chat completion; `choice` may hold finish_reason and tool_calls."""
    message = {"role": "assistant", "content": text}
    if "tool_calls" in choice:
        message["tool_calls"] = choice.pop("tool_calls")
    return json_reply(
        {
            "model": "served-1",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"} | choice],
            "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        }
    )


def failure(status: int, words: str = "no", **headers: str) -> Reply:
    """An error as OpenAI writes it."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return json_reply({"error": {"message": words}}, status=status, headers=names)


def delta(text: str | None = None, finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
    """One event's object of a chat stream."""
    message = more | ({} if text is None else {"content": text})
    return {"model": "served-1", "choices": [{"index": 0, "delta": message, "finish_reason": finish_reason}]}


def sse(*objects: Any, done: bool = True) -> bytes:
    """The objects as a server-sent event stream."""
    events = [json.dumps(o, ensure_ascii=False) for o in objects] + ["[DONE]"] * done
    return "".join(f"data: {event}\n\n" for event in events).encode()


def stream(*pieces: bytes, **how: Any) -> Reply:
    """An event stream in these pieces."""
    return Reply(pieces, content_type="text/event-stream", **how)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ApiServer

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        raw = self.rfile.read(length)
        self.server.seen.append(Seen(self.command, self.path, dict(self.headers), json.loads(raw) if raw else None))
        self._answer(self.server.next_reply())

    def do_GET(self) -> None:
        self.do_POST()

    def _answer(self, reply: Reply) -> None:
        time.sleep(reply.wait_s)
        if reply.hang_up:
            self.close_connection = True
            return
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.content_type)
        self.send_header("Transfer-Encoding", "chunked")
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        for piece in reply.pieces:
            time.sleep(reply.pause_s)
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            self.wfile.flush()
        if reply.cut:
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


class ApiServer(ThreadingHTTPServer):
    """Answers `replies` in order, the last one again and again. A context manager."""

    daemon_threads = True
    request_queue_size = 100  # connections that wait to be accepted; with the usual 5 some are reset

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seen: list[Seen] = []
        self.replies: list[Reply] = [chat()]
        self.n_connections = 0
        self.n_closed = 0
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        """`http://host:port`."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def base(self) -> str:
        """The address with /v1."""
        return f"{self.address}/v1"

    def next_reply(self) -> Reply:
        """The reply whose turn it is."""
        with self._lock:
            return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]

    def get_request(self) -> tuple[Any, Any]:
        """One more connection."""
        self.n_connections += 1
        return super().get_request()

    def close_request(self, request: Any) -> None:
        """One less."""
        super().close_request(request)
        self.n_closed += 1

    def all_closed(self) -> bool:
        """Whether every connection ends within two seconds."""
        ends_at = time.monotonic() + 2
        while self.n_closed < self.n_connections and time.monotonic() < ends_at:
            time.sleep(0.01)
        return self.n_closed == self.n_connections

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing when the client left early, as some tests do."""
        if not isinstance(sys.exception(), (BrokenPipeError, ConnectionResetError)):
            super().handle_error(request, client_address)

    def __enter__(self) -> ApiServer:
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()
