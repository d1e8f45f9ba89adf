# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What the stages of a decoding pipeline tell each other: commands from the first one, tensors between any two.

Commands are a few whole numbers in host memory and go over a gloo group of their own, so that no device waits for
them; hidden states and logits go over Megatron's pipeline group. Every stage reads its commands in the order in which
they were given and posts its transfers in that order, so that the two ends of each transfer always meet. Under tensor
parallelism rank t of each stage talks to ranks t of the others: all ranks of a stage get the same commands.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from enum import IntEnum
from itertools import groupby
from typing import NamedTuple

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_ee.generation.items import Items
from nemo_ee.megatron.pipeline.transport import PostedReceive, Transport, new_pipeline_group

# Whole numbers in a command's first message; what has no room follows in a second one.
_MESSAGE_SIZE = 32
# Sends that may be outstanding: a stage runs at most this far ahead of the ones behind it.
_MAX_OUTSTANDING = 32
# A stage waits for its next command as long as the first one has nothing to do.
_NO_LIMIT = timedelta(days=3650)
FINAL_EXIT = -1


class Op(IntEnum):
    """What a stage is to do. `first`, `second` and `numbers` are those of its `Command`."""

    NEW_CACHE = 0  # first sequences of second positions; numbers: the active exits
    DROP_CACHE = 1
    TRUNCATE = 2  # sequence first to its first `second` positions
    RUN = 3  # half layers (first, second]; numbers: items
    OBSERVE = 4  # exit first; numbers: items
    ASK = 5  # exit first, or FINAL_EXIT; numbers: items. Answers with logits
    CLOSE = 6


class Command(NamedTuple):
    """An order to one stage; exits are numbers in the order of the whole model."""

    op: Op
    cache: int = 0
    first: int = 0
    second: int = 0
    numbers: Sequence[int] = ()


class StageLines:
    """One stage's ends of the lines. Every rank of the world must make one at the same time.

    Args:
        timeout: how long an answer may take.

    Attributes:
        stage, num_stages: this one, from 0, and how many there are.
    """

    def __init__(self, timeout: timedelta) -> None:
        options = {"max_outstanding": _MAX_OUTSTANDING, "task": "decoding: "}
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        self._tensors = Transport(pipeline, carries="tensors", **options)
        own = new_pipeline_group(timeout=timeout, backend="gloo")
        self._commands = Transport(own, carries="commands", **options)
        self.stage, self.num_stages = self._tensors.stage, self._tensors.num_stages
        self._next = self._expect_command(_MESSAGE_SIZE) if self.stage else None

    @property
    def is_broken(self) -> bool:
        """Whether a transfer has failed; later ones fail too."""
        return self._tensors.is_broken or self._commands.is_broken

    def command(self, stage: int, command: Command) -> None:
        """Give an order to a later stage, without waiting for it."""
        op, cache, first, second, numbers = command
        message = [op, cache, first, second, len(numbers), *numbers]
        message += [0] * (_MESSAGE_SIZE - len(message))
        self._commands.send(stage, torch.tensor(message[:_MESSAGE_SIZE]))
        if len(message) > _MESSAGE_SIZE:
            self._commands.send(stage, torch.tensor(message[_MESSAGE_SIZE:]))

    def next_command(self) -> Command:
        """Wait for an order of the first stage."""
        op, cache, first, second, count, *numbers = self._next.wait(_NO_LIMIT).tolist()
        rest = count - len(numbers)
        if rest > 0:
            numbers += self._expect_command(rest).wait().tolist()
        if op != Op.CLOSE:
            # Posted before this one is carried out, so that the next one comes in meanwhile.
            self._next = self._expect_command(_MESSAGE_SIZE)
        return Command(Op(op), cache, first, second, numbers[:count])

    def _expect_command(self, size: int) -> PostedReceive:
        return self._commands.expect(0, (size,), torch.long, "cpu")

    def send(self, stage: int, tensor: Tensor) -> None:
        """Start sending a tensor; its memory must not be written to again."""
        self._tensors.send(stage, tensor)

    def receive(self, stage: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Wait for a tensor that the other stage sends."""
        return self._tensors.expect(stage, shape, dtype, device).wait()

    def drain(self) -> None:
        """Wait for everything that was sent."""
        self._commands.drain()
        self._tensors.drain()


def numbers_of(items: Items) -> list[int]:
    """Items as runs: (sequence, first position, last position + 1) each, flat."""
    numbers: list[int] = []
    for group in items.groups:
        if isinstance(group.positions, range):
            numbers += (group.sequence, group.positions.start, group.positions.stop)
            continue
        for _, run in groupby(enumerate(group.positions), key=lambda pair: pair[1] - pair[0]):
            own = [position for _, position in run]
            numbers += (group.sequence, own[0], own[-1] + 1)
    return numbers


def items_of(numbers: Sequence[int], device: torch.device) -> Items:
    """The items behind `numbers_of`."""
    positions: dict[int, range | list[int]] = {}
    for sequence, first, end in zip(*[iter(numbers)] * 3, strict=True):
        own = range(first, end)
        positions[sequence] = [*positions[sequence], *own] if sequence in positions else own
    return Items.of(positions, device)
