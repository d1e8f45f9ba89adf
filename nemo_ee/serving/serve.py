# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Load a model and serve it until SIGINT or SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket

import torch
import uvicorn

from nemo_ee.export.export_certificates import certificates_of
from nemo_ee.runtime.loader import load_model, load_tokenizer
from nemo_ee.runtime.model import RuntimeModel
from nemo_ee.serving.http_server import Server
from nemo_ee.serving.metrics import Metrics
from nemo_ee.serving.scheduler import Scheduler
from nemo_ee.serving.served_model import ServedModel
from nemo_ee.serving.settings import ServerSettings
from nemo_ee.text.special_tokens import end_of_text_of
from nemo_ee.text.tokenizer_json import JsonTokenizer

_LOG = logging.getLogger(__name__)
_FAREWELL_SECONDS = 5  # seconds to end the running step and to send an error to answers that did not end in time


def make_server(settings: ServerSettings) -> Server:
    """Load the served model.

    Raises:
        ValueError: the directory is not a model that runs here, or the settings do not fit it.
    """
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    if torch.device(settings.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={settings.device}, but there is no CUDA device here; use device=cpu")
    without_transformers = JsonTokenizer.reads(settings.path)
    tokenizer = JsonTokenizer(settings.path) if without_transformers else load_tokenizer(settings.path)
    if settings.chat_template is not None:
        tokenizer.chat_template = settings.chat_template
    model = load_model(settings.path, device=settings.device, dtype=settings.dtype)
    end = end_of_text_of(settings.path, tokenizer.eos_token_id, vocab_size=model.vocab_size)
    if end.differs:
        _LOG.warning("%s: %s", settings.path, end.differs)
    served = ServedModel(
        settings.name,
        model,
        tokenizer,
        settings.default,
        end,
        settings.max_length,
        settings.limits.max_new_tokens,
        certificates_of(settings.path),
        precision_of(model),
        settings.engine(model),
    )
    metrics = Metrics(model.exits, model.num_layers)
    scheduler = Scheduler(
        lambda: served.start_session(settings.num_slots), settings.max_queue, metrics, settings.prompt_share
    )
    return Server(served, scheduler, metrics, settings)


def precision_of(model: RuntimeModel) -> str:
    """The precision of this model in the words of certificates: `32`, `bf16`, or a word that no certificate has."""
    if model.dtype == torch.float32 and model.config.dtype != "float32":
        return f"32 on weights rounded to {model.config.dtype} (export with dtype=float32)"
    return {torch.float32: "32", torch.bfloat16: "bf16"}.get(model.dtype, str(model.dtype))


def serve(settings: ServerSettings) -> None:
    """Serve; returns after a graceful end. Call it from the main thread: it takes over SIGINT and SIGTERM."""
    server = make_server(settings)
    model = server.model.model
    exits = ", ".join(f"{point.name} ({point.layer})" for point in model.exits) or "none"
    _LOG.info("serving %s: %d layers, exits %s", settings.name, model.num_layers, exits)
    # After its own graceful end uvicorn sends the signal again; this process has then nothing left to do.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    web_server(server, settings.port, log_level="info").run()


class WebServer(uvicorn.Server):
    """uvicorn, which sends an error to running answers before it cuts them off.

    Args:
        config: uvicorn's.
        server: the served application.
    """

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server = server

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End gracefully: answers have `shutdown_timeout` to end; the others get an error."""
        telling = asyncio.create_task(self._tell())
        try:
            await super().shutdown(sockets)
        finally:
            telling.cancel()

    async def _tell(self) -> None:
        await asyncio.sleep(self._server.settings.shutdown_timeout)
        await asyncio.to_thread(self._server.scheduler.stop)


def web_server(server: Server, port: int, log_level: str) -> WebServer:
    """The web server of a `Server`.

    Args:
        port: 0 = a free one.
        log_level: uvicorn's.
    """
    settings = server.settings
    config = uvicorn.Config(
        server.app(),
        host=settings.host,
        port=port,
        log_config=None,  # uvicorn's closes every handler of the process; `commands.console` shows its messages
        log_level=log_level,
        access_log=False,
        server_header=False,
        limit_concurrency=settings.max_connections,
        timeout_graceful_shutdown=math.ceil(settings.shutdown_timeout) + _FAREWELL_SECONDS,
        ws="none",
    )
    return WebServer(config, server)
