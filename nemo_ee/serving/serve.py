# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Load a model and serve it until told to stop (SIGINT or SIGTERM).

May import: torch, uvicorn, nemo_ee.runtime, nemo_ee.serving.
"""

from __future__ import annotations

import logging
import signal

import torch
import uvicorn

from nemo_ee.runtime.loader import load_model, load_tokenizer
from nemo_ee.runtime.model import RuntimeModel
from nemo_ee.serving.certified import certificates_of
from nemo_ee.serving.http_server import Server
from nemo_ee.serving.metrics import Metrics
from nemo_ee.serving.scheduler import Scheduler
from nemo_ee.serving.served_model import ServedModel, stop_tokens_of
from nemo_ee.serving.settings import ServerSettings

_LOG = logging.getLogger(__name__)


def make_server(settings: ServerSettings) -> Server:
    """Load what is served.

    Raises:
        ValueError: the directory is not a model that runs here, or the settings do not fit it.
    """
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    if torch.device(settings.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={settings.device}, but there is no CUDA device here; use device=cpu")
    tokenizer = load_tokenizer(settings.path)
    if settings.chat_template is not None:
        tokenizer.chat_template = settings.chat_template
    model = load_model(settings.path, device=settings.device, dtype=settings.dtype)
    stops = frozenset(one for one in stop_tokens_of(settings.path, tokenizer) if 0 <= one < model.vocab_size)
    served = ServedModel(
        settings.name,
        model,
        tokenizer,
        settings.default,
        stops,
        settings.max_length,
        settings.http.limits.max_new_tokens,
        certificates_of(settings.path),
        precision_of(model),
    )
    metrics = Metrics(model.exits, model.num_layers)
    scheduler = Scheduler(lambda: served.start_session(settings.num_slots), settings.max_queue, metrics)
    return Server(served, scheduler, metrics, settings.http)


def precision_of(model: RuntimeModel) -> str:
    """What certificates call the way this model computes: `32`, `bf16`, or a word that none of them has."""
    if model.dtype == torch.float32 and model.config.dtype != "float32":
        return f"32 on weights rounded to {model.config.dtype} (export with dtype=float32)"
    return {torch.float32: "32", torch.bfloat16: "bf16"}.get(model.dtype, str(model.dtype))


def serve(settings: ServerSettings) -> None:
    """Serve; returns after a graceful end. Call it from the main thread: it takes over SIGINT and SIGTERM."""
    server = make_server(settings)
    http = settings.http
    model = server.model.model
    exits = ", ".join(f"{point.name} ({point.layer})" for point in model.exits) or "none"
    _LOG.info("serving %s: %d layers, exits %s", settings.name, model.num_layers, exits)
    # After its own graceful end uvicorn hands the signal on; this process has then done what it was told to.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    uvicorn.run(
        server.app(),
        host=http.host,
        port=http.port,
        log_level="info",
        access_log=False,
        server_header=False,
        limit_concurrency=http.max_connections,
        timeout_graceful_shutdown=max(1, round(http.shutdown_timeout)),
        ws="none",
    )
