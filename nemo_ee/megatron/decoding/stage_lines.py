# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Messages between the stages of a decoding pipeline: commands from the first stage, tensors between any two.

A command is a few whole numbers in host memory and is sent over a gloo group of its own, so that no device waits for
it. Hidden states and logits are sent over Megatron's pipeline group. Every stage receives its commands in the order in
which they were sent and posts its transfers in that order, so the two ends of a transfer always match. Under tensor
parallelism rank t of each stage exchanges messages with ranks t of the other stages; all ranks of a stage get the same
commands.
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

from nemo_ee.generation.decoding_model import TokenPositions
from nemo_ee.megatron.pipeline.transport import PostedReceive, Transport, new_pipeline_group

# Whole numbers in a command's first message; the rest follows in a second one.
_MESSAGE_SIZE = 32
# Sends that may be outstanding: a stage runs at most this far ahead of the ones behind it.
_MAX_OUTSTANDING = 32
# A stage waits for its next command without a limit, because the first stage may be idle.
_NO_LIMIT = timedelta(days=3650)
FINAL_EXIT = -1


class Op(IntEnum):
    """Kind of a command. The comments say what `first`, `second` and `numbers` of the `Command` mean."""

    NEW_CACHE = 0  # `first` sequences of `second` positions; numbers: the active exits
    DROP_CACHE = 1
    TRUNCATE = 2  # keep the first `second` positions of sequence `first`
    RUN = 3  # half layers (first, second]; numbers: positions
    WRITE_EXIT_KV = 4  # exit first; numbers: positions
    EXIT_LOGITS = 5  # exit first, or FINAL_EXIT; numbers: positions. Answers with logits
    CLOSE = 6


class Command(NamedTuple):
    """A command to one stage; exits are numbered in the order of the whole model."""

    op: Op
    cache: int = 0
    first: int = 0
    second: int = 0
    numbers: Sequence[int] = ()


class StageLines:
    """One stage's connection to the others. Every rank of the world must make one at the same time.

    Args:
        timeout: longest time to wait for an answer.

    Attributes:
        stage, num_stages: number of this stage, from 0, and of all stages.
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
        """Send a command to a later stage, without waiting for it."""
        op, cache, first, second, numbers = command
        message = [op, cache, first, second, len(numbers), *numbers]
        message += [0] * (_MESSAGE_SIZE - len(message))
        self._commands.send(stage, torch.tensor(message[:_MESSAGE_SIZE]))
        if len(message) > _MESSAGE_SIZE:
            self._commands.send(stage, torch.tensor(message[_MESSAGE_SIZE:]))

    def next_command(self) -> Command:
        """Wait for a command of the first stage."""
        op, cache, first, second, count, *numbers = self._next.wait(_NO_LIMIT).tolist()
        rest = count - len(numbers)
        if rest > 0:
            numbers += self._expect_command(rest).wait().tolist()
        if op != Op.CLOSE:
            # Posted before this command is executed, so that the next one arrives meanwhile.
            self._next = self._expect_command(_MESSAGE_SIZE)
        return Command(Op(op), cache, first, second, numbers[:count])

    def _expect_command(self, size: int) -> PostedReceive:
        return self._commands.expect(0, (size,), torch.long, "cpu")

    def send(self, stage: int, tensor: Tensor) -> None:
        """Start sending a tensor; its memory must not be changed afterwards."""
        self._tensors.send(stage, tensor)

    def receive(self, stage: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Wait for a tensor that the other stage sends."""
        return self._tensors.expect(stage, shape, dtype, device).wait()

    def drain(self) -> None:
        """Wait for everything that was sent."""
        self._commands.drain()
        self._tensors.drain()


def encode_positions(positions: TokenPositions) -> list[int]:
    """Positions as runs, flat: sequence, first position, last position + 1 of each."""
    numbers: list[int] = []
    for group in positions.groups:
        if isinstance(group.positions, range):
            numbers += (group.sequence, group.positions.start, group.positions.stop)
            continue
        for _, run in groupby(enumerate(group.positions), key=lambda pair: pair[1] - pair[0]):
            own = [position for _, position in run]
            numbers += (group.sequence, own[0], own[-1] + 1)
    return numbers


def decode_positions(numbers: Sequence[int], device: torch.device) -> TokenPositions:
    """The inverse of `encode_positions`."""
    positions: dict[int, range | list[int]] = {}
    for sequence, first, end in zip(*[iter(numbers)] * 3, strict=True):
        own = range(first, end)
        positions[sequence] = [*positions[sequence], *own] if sequence in positions else own
    return TokenPositions.of(positions, device)
