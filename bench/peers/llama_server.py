"""llama-server, built from the vendored source, over HTTP on loopback: a slot for each call at a time, and for each
call a connection.

The client counts lines and parses only the last message, so that it takes as little as can be from the server's cores.
Features: `kv-unified` (one KV cache for all slots), `ram-cache`, `cache-reuse` (shifts what matches further on), and
`small-batch` (a quarter of the prompt tokens between two steps of the texts that are being written).
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import time
from contextlib import closing, suppress

from adapter import Call, Chunks, Counts, Request, serve
from llama_service import RAM_CACHE_MIB, completion_body, counts_of

_FEATURES = {
    "kv-unified": ("-no-kvu", "-kvu"),
    "ram-cache": ("--cache-ram 0", f"--cache-ram {RAM_CACHE_MIB}"),
    "cache-reuse": ("--cache-reuse 0", "--cache-reuse 32"),
    "small-batch": ("", "-b 512"),
}
"""The options for each feature, without it and with it."""

_POLL_S = 0.002
_READY_WITHIN_S = 120


class LlamaServer:
    """A running llama-server without warm-up, log and user interface; it keeps prompts only if the request says so."""

    at_once = True

    def __init__(self, request: Request) -> None:
        if request.server is None:
            raise SystemExit("the request names no server program; give the runner --reference-dir")
        self._program = request.server
        self._prompt_cache = request.prompt_cache
        self._port = _free_port()
        n_slots = request.n_parallel or 1
        options = f"--host 127.0.0.1 --port {self._port} -np {n_slots} -c {request.n_ctx * n_slots}"
        options += " --no-warmup --log-disable --no-ui -fit off --ctx-checkpoints 0 --offline"
        for feature, (without, with_it) in _FEATURES.items():
            options += f" {with_it if feature in request.features else without}"
        if request.n_threads is not None:
            options += f" -t {request.n_threads} -tb {request.n_threads}"
        if request.flash_attn is not None:
            options += f" -fa {'on' if request.flash_attn else 'off'}"
        self.started: float | None = time.monotonic()
        self._process = subprocess.Popen([request.server, "-m", request.model, *options.split()])
        self.pid = self._process.pid
        self._wait_until_ready()

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._port)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _READY_WITHIN_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with suppress(OSError), closing(self._connection()) as connection:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            time.sleep(_POLL_S)
        self.close()
        raise RuntimeError(f"llama-server (exit status {self._process.poll()}) was not ready in {_READY_WITHIN_S} s")

    def version(self) -> str:
        said = subprocess.run([self._program, "--version"], capture_output=True, text=True, check=True)
        return (said.stdout + said.stderr).split("\n", 1)[0]

    def generate(self, call: Call, chunks: Chunks) -> Counts:
        body = json.dumps(completion_body(call, self._prompt_cache))
        with closing(self._connection()) as connection:  # a new one: the server ends it after a stream
            connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
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
        self._process.terminate()
        self._process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    serve(LlamaServer, __doc__)
