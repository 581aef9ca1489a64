"""Serve a GGUF with llama.cpp's own server on a free port of loopback; print the address; end with standard input.

A process of its own: xllamacpp's threads don't survive a fork, which other tests do.
"""

from __future__ import annotations

import os
import sys

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_batch, params.n_parallel = map(int, sys.argv[2:5])
params.port = 0
params.embedding = True
params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
params.warmup = False
params.verbosity = 0

server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
os._exit(0)  # its destructor would wait for connections to time out
