# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A running request, between the event loop and the model's thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from nemo_ee.serving.errors import ApiError
from nemo_ee.serving.metrics import Metrics
from nemo_ee.serving.protocol import ApiRequest
from nemo_ee.serving.scheduler import QueueFull, Scheduler, Stopped, Update, Work
from nemo_ee.serving.served_model import Prepared, ServedModel
from nemo_ee.serving.text_stream import TextStream


class RequestInFlight:
    """The sequences of one request, queued by the constructor. The caller must call `cancel` in the end.

    Made and used in the event loop.

    Args:
        call, prepared: the request.
        model: the served model, for the text of tokens.
        scheduler: runs the sequences.
        metrics: gets the time of the first token.
        deadline: on `time.monotonic()`, in seconds.

    Raises:
        ApiError: 429 the queue is full, 503 the server is stopping.
    """

    def __init__(
        self,
        call: ApiRequest,
        prepared: Prepared,
        model: ServedModel,
        scheduler: Scheduler,
        metrics: Metrics,
        started: float,
        deadline: float,
    ) -> None:
        self._scheduler, self._metrics, self._started, self._deadline = scheduler, metrics, started, deadline
        self._loop, self._updates = asyncio.get_running_loop(), asyncio.Queue()
        self._works = [
            Work(
                request,
                TextStream(model.decoder(call), request.prompt, call.stops, request.stop_tokens),
                lambda update, index=index: self._deliver(index, update),
            )
            for index, request in enumerate(prepared.requests)
        ]
        try:
            scheduler.submit(self._works)
        except QueueFull:
            message = "too many requests are waiting; try again later"
            raise ApiError(429, message, code="rate_limit_exceeded") from None
        except Stopped:
            raise ApiError(503, "the server is stopping; try again later") from None

    def _deliver(self, index: int, update: Update) -> None:
        try:
            self._loop.call_soon_threadsafe(self._updates.put_nowait, (index, update))
        except RuntimeError:  # The event loop is closed: nobody reads updates any more.
            pass

    def cancel(self) -> None:
        """End the sequences that still run."""
        self._scheduler.cancel(self._works)

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """(number of the answer, update of it), until all have ended.

        Raises:
            ApiError: 504 the deadline has passed, 500 decoding failed.
        """
        left, waited = len(self._works), True
        while left:
            try:
                index, update = await asyncio.wait_for(self._updates.get(), self._deadline - time.monotonic())
            except asyncio.TimeoutError:
                message = "the answer took longer than this server allows; request fewer tokens"
                raise ApiError(504, message, code="timeout") from None
            if update.error is not None:
                raise update.error
            if waited and update.pieces:
                self._metrics.first_token.observe(time.monotonic() - self._started)
                waited = False
            left -= update.finish_reason is not None
            yield index, update
