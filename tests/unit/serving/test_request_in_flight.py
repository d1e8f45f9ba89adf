# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Updates on their way from the model's thread to the event loop: none lost, in order, one wake-up for a step."""

from __future__ import annotations

import asyncio
import threading

from nemo_ee.serving.request_in_flight import Deliveries
from nemo_ee.serving.scheduler import Update


class _Reader:
    """Collects what arrives, in place of a request."""

    def __init__(self) -> None:
        self.got: list[tuple[int, Update]] = []

    def receive(self, index: int, update: Update) -> None:
        self.got.append((index, update))


class _CountingLoop:
    """An event loop that counts its wake-ups."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self.calls = loop, 0

    def call_soon_threadsafe(self, call) -> None:
        self.calls += 1
        self._loop.call_soon_threadsafe(call)


def test_one_wake_up_for_all_updates_that_wait() -> None:
    async def run() -> tuple[int, list, list]:
        loop = _CountingLoop(asyncio.get_running_loop())
        deliveries, first, second = Deliveries(loop), _Reader(), _Reader()
        for index in range(8):  # the loop does not run in between
            deliveries.put((first, second)[index % 2], index, Update())
        await asyncio.sleep(0)
        calls = loop.calls
        deliveries.put(first, 8, Update())  # control: the next step wakes it again
        await asyncio.sleep(0)
        assert loop.calls == calls + 1
        return calls, [index for index, _ in first.got], [index for index, _ in second.got]

    assert asyncio.run(run()) == (1, [0, 2, 4, 6, 8], [1, 3, 5, 7])


def test_no_update_is_lost_while_the_loop_reads() -> None:
    number = 20_000

    async def run() -> list[int]:
        deliveries, reader = Deliveries(asyncio.get_running_loop()), _Reader()
        thread = threading.Thread(target=lambda: [deliveries.put(reader, i, Update()) for i in range(number)])
        thread.start()
        while thread.is_alive() or len(reader.got) < number:
            await asyncio.sleep(0)
        return [index for index, _ in reader.got]

    async def limited() -> list[int]:
        return await asyncio.wait_for(run(), 60)

    assert asyncio.run(limited()) == list(range(number))


def test_a_closed_loop_reads_nothing_and_raises_nothing() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    Deliveries(loop).put(_Reader(), 0, Update())
