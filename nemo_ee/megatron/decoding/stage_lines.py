# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Messages between the stages of a decoding pipeline: commands from the first stage, tensors between any two.

A command is a few whole numbers in host memory and is sent over a gloo group of its own, so that no device waits for
it. Hidden states and logits are sent over Megatron's pipeline group. Every stage receives its commands in the order in
which they were sent and posts its transfers in that order, so the two ends of a transfer always match. Under tensor
parallelism rank t of each stage talks to ranks t of the other stages; all ranks of a stage get the same commands.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from enum import IntEnum
from itertools import groupby
from typing import NamedTuple

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import ProcessGroup, Work, irecv, isend

from nemo_ee.generation.decoding_model import TokenPositions

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

    On gloo a transfer that fails or times out raises a RuntimeError that names the stage at its other end; under NCCL,
    where waiting only orders streams, its watchdog ends the process.

    Args:
        timeout: longest time to wait for an answer.

    Attributes:
        stage, num_stages: number of this stage, from 0, and of all stages.
        is_broken: a transfer has failed; later ones fail too.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.is_broken = False
        self._tensors = parallel_state.get_pipeline_model_parallel_group()
        self._ranks = torch.distributed.get_process_group_ranks(self._tensors)
        self.stage, self.num_stages = parallel_state.get_pipeline_model_parallel_rank(), len(self._ranks)
        self._commands = _new_gloo_group(self._ranks, timeout)
        self._sent: deque[tuple[int, Work, Tensor]] = deque()
        self._next = self._expect_command() if self.stage else None

    def command(self, stage: int, command: Command) -> None:
        """Send a command to a later stage, without waiting for it."""
        op, cache, first, second, numbers = command
        message = [op, cache, first, second, len(numbers), *numbers]
        message += [0] * (_MESSAGE_SIZE - len(message))
        self._isend(stage, torch.tensor(message[:_MESSAGE_SIZE]), self._commands)
        if len(message) > _MESSAGE_SIZE:
            self._isend(stage, torch.tensor(message[_MESSAGE_SIZE:]), self._commands)

    def next_command(self) -> Command:
        """Wait for a command of the first stage."""
        message, work = self._next
        with self._talking_to(0, "waits for a command of"):
            work.wait(_NO_LIMIT)
            op, cache, first, second, count, *numbers = message.tolist()
            rest = count - len(numbers)
            if rest > 0:
                more = torch.empty(rest, dtype=torch.long)
                irecv(more, src=self._ranks[0], group=self._commands).wait()
                numbers += more.tolist()
        if op != Op.CLOSE:
            # Posted before this command is executed, so that the next one arrives meanwhile.
            self._next = self._expect_command()
        return Command(Op(op), cache, first, second, numbers[:count])

    def _expect_command(self) -> tuple[Tensor, Work]:
        message = torch.empty(_MESSAGE_SIZE, dtype=torch.long)
        return message, irecv(message, src=self._ranks[0], group=self._commands)

    def send(self, stage: int, tensor: Tensor) -> None:
        """Start sending a tensor; its memory must not be changed afterwards."""
        self._isend(stage, tensor.contiguous(), self._tensors)

    def receive(self, stage: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Wait for a tensor that the other stage sends."""
        buffer = torch.empty(shape, dtype=dtype, device=device)
        with self._talking_to(stage, "waits for a tensor of"):
            irecv(buffer, src=self._ranks[stage], group=self._tensors).wait()
        return buffer

    def drain(self) -> None:
        """Wait for everything that was sent."""
        self._wait_for_sends(0)

    def _isend(self, stage: int, tensor: Tensor, group: ProcessGroup) -> None:
        self._wait_for_sends(_MAX_OUTSTANDING - 1)
        with self._talking_to(stage, "sends to"):
            # The tensor is kept until its transfer is done.
            self._sent.append((stage, isend(tensor, dst=self._ranks[stage], group=group), tensor))

    def _wait_for_sends(self, allowed: int) -> None:
        while len(self._sent) > allowed:
            stage, work, _ = self._sent.popleft()
            with self._talking_to(stage, "sends to"):
                work.wait()

    @contextmanager
    def _talking_to(self, stage: int, does: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.is_broken = True
            us, them = self._ranks[self.stage], self._ranks[stage]
            raise RuntimeError(
                f"decoding: pipeline stage {self.stage} (rank {us}) {does} stage {stage} (rank {them}), which has "
                f"ended, is stuck or cannot be reached; look at the end of rank {them}'s own output"
            ) from error


def _new_gloo_group(ranks: Sequence[int], timeout: timedelta) -> ProcessGroup:
    """A gloo group of this rank's pipeline. Every rank of the world must call it."""
    pipelines: list[Sequence[int]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(pipelines, list(ranks))
    unique = sorted({tuple(own) for own in pipelines})
    return torch.distributed.new_subgroups_by_enumeration(
        [list(own) for own in unique], timeout=timeout, backend="gloo"
    )[0]


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
