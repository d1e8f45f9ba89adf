# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Point-to-point transfers between the stages of one pipeline, used by tuning, teachers and decoding.

Sends are asynchronous. At most `max_outstanding` of them are outstanding; the bound holds across steps, so a stage can
start its next global batch while the stages behind it still work on this one.

On gloo a transfer that fails or times out raises a RuntimeError that names stage and rank at its other end. Under
NCCL, where waiting only orders streams, its watchdog ends the process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import ProcessGroup, Work, get_process_group_ranks, irecv, isend

_LIMIT_OF_THE_GROUP = timedelta(0)  # torch's value for "the group's own time-out"


class Transport:
    """One stage's sends and receives over one process group.

    Transfers between two stages must be posted in the same order at both ends.

    Args:
        group: ranks of one pipeline, in the order of its stages.
        carries: name of the sent data, for messages.
        max_outstanding: sends that may be outstanding, at least 1.
        task: start of the message of a failed transfer.
        way_out: end of that message.

    Attributes:
        stage, num_stages: number of this stage, from 0, and of all stages.
        is_broken: a transfer has failed; later ones fail too.
    """

    def __init__(
        self, group: ProcessGroup, *, carries: str, max_outstanding: int, task: str = "", way_out: str = ""
    ) -> None:
        assert max_outstanding >= 1, "a send is outstanding while it runs"
        self._group, self._ranks = group, get_process_group_ranks(group)
        self.stage, self.num_stages = group.rank(), len(self._ranks)
        self.is_broken = False
        self._carries, self._task, self._way_out = carries, task, way_out
        self._max_outstanding = max_outstanding
        self._sent: deque[tuple[int, Work, Tensor]] = deque()

    def expect(
        self, stage: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
    ) -> PostedReceive:
        """Post the receive of a tensor that another stage sends."""
        buffer = torch.empty(shape, dtype=dtype, device=device)
        with self.transfer("waits for", stage, "of"):
            return PostedReceive(self, stage, irecv(buffer, src=self._ranks[stage], group=self._group), buffer)

    def send(self, stage: int, tensor: Tensor) -> None:
        """Start sending a tensor, whose memory must not be changed afterwards.

        Waits only while `max_outstanding` earlier sends are outstanding.
        """
        self._wait_for_sends(self._max_outstanding - 1)
        tensor = tensor.contiguous()
        with self.transfer("sends", stage, "to"):
            work = isend(tensor, dst=self._ranks[stage], group=self._group)
        self._sent.append((stage, work, tensor))  # the tensor lives until its transfer is done

    def drain(self) -> None:
        """Wait for every outstanding send."""
        self._wait_for_sends(0)

    def _wait_for_sends(self, allowed: int) -> None:
        while len(self._sent) > allowed:
            stage, work, tensor = self._sent.popleft()
            with self.transfer("sends", stage, "to"):
                work.wait()
            del tensor

    @contextmanager
    def transfer(self, does: str, stage: int, preposition: str) -> Iterator[None]:
        """Name both ends in the error of a transfer that fails inside."""
        try:
            yield
        except RuntimeError as error:
            self.is_broken = True
            us, them = self._ranks[self.stage], self._ranks[stage]
            raise RuntimeError(
                f"{self._task}pipeline stage {self.stage} (rank {us}) {does} {self._carries} {preposition} stage "
                f"{stage} (rank {them}), which has ended, is stuck or cannot be reached; look at the end of rank "
                f"{them}'s own output{self._way_out}"
            ) from error


@dataclass(frozen=True)
class PostedReceive:
    """A receive that is under way. Made by `Transport.expect`."""

    transport: Transport
    stage: int
    work: Work
    buffer: Tensor

    def wait(self, limit: timedelta = _LIMIT_OF_THE_GROUP) -> Tensor:
        """The tensor, once it is there. `limit` takes the place of the group's time-out."""
        with self.transport.transfer("waits for", self.stage, "of"):
            self.work.wait(limit)
        return self.buffer


def new_pipeline_group(
    stages: Sequence[int] | None = None, *, timeout: timedelta | None = None, backend: str | None = None
) -> ProcessGroup | None:
    """A further group of ranks of this rank's pipeline. Every rank of the world must call it.

    Args:
        stages: the stages in it; None: all.
        timeout: time-out of its transfers; None: torch's.
        backend: None: torch's default one.

    Returns:
        The group; None on other stages.
    """
    ours = get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    world, size = torch.distributed.get_world_size(), len(ours)
    # Megatron's default order. A dry run is in it, and its backend carries nothing.
    pipelines: list[Sequence[int]] = [range(first, world, world // size) for first in range(world // size)]
    if torch.distributed.get_backend() != "fake":
        pipelines = [[]] * world
        torch.distributed.all_gather_object(pipelines, ours)
    members = [
        [pipeline[stage] for stage in (range(len(pipeline)) if stages is None else stages)]
        for pipeline in sorted({tuple(ranks) for ranks in pipelines})  # every rank makes all groups, in one order
    ]
    return torch.distributed.new_subgroups_by_enumeration(members, timeout=timeout, backend=backend)[0]
