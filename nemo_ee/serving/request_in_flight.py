# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A running request, between the event loop and the model's thread."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator

from nemo_ee.serving.errors import ApiError
from nemo_ee.serving.metrics import Metrics
from nemo_ee.serving.protocol import ApiRequest
from nemo_ee.serving.scheduler import QueueFull, Scheduler, Stopped, Update, Work
from nemo_ee.serving.served_model import Prepared, ServedModel
from nemo_ee.serving.text_stream import TextStream


class Deliveries:
    """Updates of all requests on their way into an event loop, which wakes up once for those of a step.

    Every wake-up makes the model's thread write to a socket and then share the interpreter with the loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._waiting, self._called = loop, deque(), False

    def put(self, request: RequestInFlight, index: int, update: Update) -> None:
        """Deliver an update of a request's answer. Called in the model's thread."""
        self._waiting.append((request, index, update))
        if not self._called:
            self._called = True
            try:
                self._loop.call_soon_threadsafe(self._hand_out)
            except RuntimeError:  # The event loop is closed: nobody reads updates any more.
                pass

    def _hand_out(self) -> None:
        self._called = False  # first, so that an update behind the last one read here makes a call of its own
        while self._waiting:
            request, index, update = self._waiting.popleft()
            request.receive(index, update)


class RequestInFlight:
    """The sequences of one request, queued by the constructor. The caller must call `cancel` in the end.

    Made and used in the event loop.

    Args:
        call, prepared: the request.
        model: the served model, for the text of tokens.
        scheduler: runs the sequences.
        deliveries: brings their updates.
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
        deliveries: Deliveries,
        metrics: Metrics,
        started: float,
        deadline: float,
    ) -> None:
        self._scheduler, self._metrics, self._started = scheduler, metrics, started
        self._updates: deque[tuple[int, Update]] = deque()
        self._late = False
        self._waiter: asyncio.Future | None = None  # of the reader, while there is nothing to read
        self._works = [
            Work(
                request,
                TextStream(model.decoder(call), request.prompt, call.stops, request.stop_tokens),
                lambda update, index=index: deliveries.put(self, index, update),
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
        # One timer for all updates: asyncio.wait_for makes a task and a timer for each.
        self._alarm = asyncio.get_running_loop().call_later(deadline - time.monotonic(), self._ring)

    def receive(self, index: int, update: Update) -> None:
        """Take an update of an answer. Called in the event loop."""
        self._updates.append((index, update))
        self._wake()

    def _ring(self) -> None:
        self._late = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _next(self) -> tuple[int, Update]:
        while not self._updates and not self._late:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._late:
            message = "the answer took longer than this server allows; request fewer tokens"
            raise ApiError(504, message, code="timeout")
        return self._updates.popleft()

    def cancel(self) -> None:
        """End the sequences that still run."""
        self._alarm.cancel()
        self._scheduler.cancel(self._works)

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """(number of the answer, update of it), until all have ended.

        Raises:
            ApiError: 504 the deadline has passed, 500 decoding failed.
        """
        left, waited = len(self._works), True
        while left:
            index, update = await self._next()
            if update.error is not None:
                raise update.error
            if waited and update.pieces:
                self._metrics.first_token.observe(time.monotonic() - self._started)
                waited = False
            left -= update.finish_reason is not None
            yield index, update
