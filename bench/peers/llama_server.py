"""llama-server, built from the vendored source, over HTTP on loopback: one slot, a connection for each call.

The client counts lines and parses only the last message, so that it takes as little as can be from the server's cores.
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import time

from adapter import Call, Chunks, Counts, Request, serve
from llama_service import completion_body, counts_of

_POLL_S = 0.002
_READY_WITHIN_S = 120


class LlamaServer:
    """A running llama-server without warm-up, log, user interface or prompt cache."""

    def __init__(self, request: Request) -> None:
        if request.server is None:
            raise SystemExit("the request names no server program; give the runner --reference-dir")
        self._program = request.server
        port = _free_port()
        options = f"--host 127.0.0.1 --port {port} -np 1 -c {request.n_ctx} --no-warmup --log-disable --no-ui -fit off"
        options += " --cache-ram 0 --ctx-checkpoints 0 --offline"
        if request.n_threads is not None:
            options += f" -t {request.n_threads} -tb {request.n_threads}"
        if request.flash_attn is not None:
            options += f" -fa {'on' if request.flash_attn else 'off'}"
        self.started: float | None = time.monotonic()
        self._process = subprocess.Popen([request.server, "-m", request.model, *options.split()])
        self.pid = self._process.pid
        self._http = http.client.HTTPConnection("127.0.0.1", port)
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _READY_WITHIN_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                self._http.request("GET", "/health")
                reply = self._http.getresponse()
                reply.read()
                if reply.status == 200:
                    return
            except OSError:
                self._http.close()
            time.sleep(_POLL_S)
        self.close()
        raise RuntimeError(f"llama-server (exit status {self._process.poll()}) was not ready in {_READY_WITHIN_S} s")

    def version(self) -> str:
        said = subprocess.run([self._program, "--version"], capture_output=True, text=True, check=True)
        return (said.stdout + said.stderr).split("\n", 1)[0]

    def generate(self, call: Call, chunks: Chunks) -> Counts:
        self._http.close()  # the server ends a connection after a stream without saying so
        body = json.dumps(completion_body(call))
        self._http.request("POST", "/completion", body, {"Content-Type": "application/json"})
        reply = self._http.getresponse()
        if reply.status != 200:
            raise RuntimeError(f"llama-server answered {reply.status}: {reply.read().decode(errors='replace')}")
        if not call.stream:
            return counts_of(json.loads(reply.read()))
        last = b""
        for line in reply:
            if line.startswith(b"data: {"):
                chunks.arrived()
                last = line
        return counts_of(json.loads(last[len(b"data: ") :]))

    def close(self) -> None:
        self._http.close()
        self._process.terminate()
        self._process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    serve(LlamaServer, __doc__)
