# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The pipeline schedule of exit tuning: hidden states go forward, nothing ever comes back.

    per microbatch and stage:   receive -> run this stage's layers -> send at once -> the exits' work

The backbone is frozen, so no gradient crosses a stage boundary, and a stage that has sent its microbatch on owes
nobody anything: its exits' forward, loss and backward overlap with the next stages' layers. Megatron's own
forward-only schedule would send only after the exits' work.

Sends are asynchronous and at most `max_in_flight` of them are outstanding; the bound holds across steps, so a stage
can start the next global batch while the stages behind it still work on this one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work, get_group_rank, irecv, isend


class StageLink:
    """The two ends of a pipeline stage: where hidden states come from and where they go.

    On gloo a transfer that fails or times out raises a RuntimeError that names stage and rank at its other end;
    under NCCL, where waiting only orders streams, its watchdog ends the process.

    Args:
        group: pipeline-parallel group; None for a pipeline of one stage.
        previous_rank: global rank of the stage before, None on the first stage.
        next_rank: global rank of the stage behind, None on the last stage.
        max_in_flight: sent microbatches whose transfer may be outstanding, at least 1.
    """

    def __init__(
        self, group: ProcessGroup | None, previous_rank: int | None, next_rank: int | None, *, max_in_flight: int = 2
    ) -> None:
        if max_in_flight < 1:
            raise ValueError(
                f"max_in_flight={max_in_flight}: at least one microbatch must be in flight; use 2 or more"
            )
        self.group, self.previous_rank, self.next_rank = group, previous_rank, next_rank
        self.max_in_flight = max_in_flight
        self._sent: deque[tuple[Work, Tensor]] = deque()

    def expect(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Work, Tensor] | None:
        """Post the receive of one hidden state; None on the first stage."""
        if self.previous_rank is None:
            return None
        buffer = torch.empty(shape, dtype=dtype, device=device)
        with self._talking_to(self.previous_rank):
            return irecv(buffer, src=self.previous_rank, group=self.group), buffer

    def receive(self, pending: tuple[Work, Tensor]) -> Tensor:
        """Wait for the hidden state that `expect` posted."""
        with self._talking_to(self.previous_rank):
            pending[0].wait()
        return pending[1]

    def send(self, hidden: Tensor) -> None:
        """Start sending; waits only when `max_in_flight` earlier sends are outstanding. Nothing on the last stage."""
        if self.next_rank is None:
            return
        self._wait_for_sends(self.max_in_flight - 1)
        hidden = hidden.contiguous()
        # The tensor is kept until its transfer is done: a tap on the stage's last layer shares its memory.
        with self._talking_to(self.next_rank):
            self._sent.append((isend(hidden, dst=self.next_rank, group=self.group), hidden))

    def drain(self) -> None:
        """Wait for every outstanding send (before validation, saving and at the end)."""
        self._wait_for_sends(0)

    def _wait_for_sends(self, allowed: int) -> None:
        while len(self._sent) > allowed:
            work, hidden = self._sent.popleft()  # the tensor lives until its transfer is done
            with self._talking_to(self.next_rank):
                work.wait()
            del hidden

    def _talking_to(self, rank: int | None) -> AbstractContextManager[None]:
        does = "sends hidden states to" if rank == self.next_rank else "waits for hidden states of"
        return talking_to(self.group, rank, does)


@contextmanager
def talking_to(group: ProcessGroup | None, rank: int | None, does: str) -> Iterator[None]:
    """Say who was at the other end when a transfer of a pipeline's group fails.

    Args:
        group: the transfer's group, whose ranks are the stages in order.
        rank: global rank at the other end.
        does: what this stage does, up to the other stage's name.
    """
    try:
        yield
    except RuntimeError as error:
        us = torch.distributed.get_rank()
        raise RuntimeError(
            f"pipeline stage {get_group_rank(group, us)} (rank {us}) {does} stage "
            f"{get_group_rank(group, rank)} (rank {rank}), which has ended, is stuck or cannot be reached; "
            f"look at the end of rank {rank}'s own output. The same command resumes from the last checkpoint"
        ) from error


def run_stage(
    link: StageLink,
    *,
    num_microbatches: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    forward: Callable[[int, Tensor | None], Tensor],
    work: Callable[[int], None],
    delay: int = 0,
) -> None:
    """Run one global batch through this stage. Every rank of the pipeline calls it with the same microbatch count.

    Args:
        link: this stage's ends.
        num_microbatches: microbatches of the step.
        shape, dtype, device: of the hidden states between stages, [s, b, h] ([s/tp, b, h] with sequence parallelism).
        forward: (microbatch index, received hidden state or None on the first stage) -> hidden state to send on.
        work: called with the microbatch index after the send has started: the exits' forward, loss and backward.
        delay: microbatches whose work is held back while later ones run their layers, because it needs something that
            a later stage sends back (see `teacher_channel`).
    """
    held: deque[int] = deque()
    pending = link.expect(shape, dtype, device)
    for index in range(num_microbatches):
        received = None
        if pending is not None:
            received = link.receive(pending)
            # The next receive is posted before this microbatch's layers run, so that the transfer overlaps with them.
            pending = link.expect(shape, dtype, device) if index + 1 < num_microbatches else None
        link.send(forward(index, received))
        held.append(index)
        if len(held) > delay:
            work(held.popleft())
    while held:
        work(held.popleft())
