# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Times of a pipeline from what each of its stages computes and sends: no machine is involved, only stated speeds.

Stage i works off microbatch after microbatch: receive, layers, send, exits. With decoupled stages it goes on to the
next step's microbatches at once; drained, all stages wait for the slowest at the end of every step, as a schedule with
one optimizer for the whole model does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_ee.planning.operation_trace import Compute, Transfer

_STEPS = 6  # simulated; the time of the last ones counts
_RING = {"allreduce_": 2.0, "allreduce_coalesced_": 2.0}  # passes over the data; others pass once
_POINT_TO_POINT = ("send", "recv_")


@dataclass(frozen=True)
class Speeds:
    """Stated speeds of a machine.

    Attributes:
        tflops: of matrix products, as they are reached.
        tensor_link_gb_s, data_link_gb_s: per GPU and direction inside a node and between nodes, 1e9 bytes.
        node: GPUs of a node.
    """

    tflops: float
    tensor_link_gb_s: float
    data_link_gb_s: float
    node: int = 8

    def seconds(self, event: Compute | Transfer) -> float:
        """Time of one event. A transfer between two stages costs the sender nothing: the receiver waits for it."""
        if isinstance(event, Compute):
            return event.flops / (self.tflops * 1e12)
        if event.ranks < 2 or event.kind in _POINT_TO_POINT:
            return 0.0
        passes = _RING.get(event.kind, 1.0) * (event.ranks - 1) / event.ranks
        return passes * event.bytes / self.link(event.stride * (event.ranks - 1))

    def link(self, distance: int) -> float:
        """Bytes per second between ranks that are this far apart."""
        return 1e9 * (self.tensor_link_gb_s if distance < self.node else self.data_link_gb_s)


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one microbatch up to its sending, of the rest of it, of the end of a step, and of a transfer."""

    layers: float
    exits: float
    update: float
    transfer: float


def stage_times(
    microbatch: Sequence[Compute | Transfer], update: Sequence[Compute | Transfer], speeds: Speeds
) -> StageTimes:
    """The times of a stage, without a teacher, whose way back is not simulated.

    Args:
        microbatch: events of one microbatch.
        update: events of the rest of a step: gradients over data parallelism, norms.
        speeds: of the machine.
    """
    sent = [index for index, event in enumerate(microbatch) if isinstance(event, Transfer) and event.kind == "send"]
    split = sent[0] if sent else len(microbatch)
    layers, exits = (sum(map(speeds.seconds, part)) for part in (microbatch[:split], microbatch[split:]))
    transfer = microbatch[split].bytes / speeds.link(microbatch[split].stride) if sent else 0.0
    return StageTimes(layers, exits, sum(map(speeds.seconds, update)), transfer)


def step_seconds(stages: Sequence[StageTimes], microbatches: int, *, decoupled: bool) -> float:
    """Seconds of a step once the pipeline runs."""
    free, ends = [0.0] * len(stages), []
    for _ in range(_STEPS):
        if not decoupled:
            free = [max(free)] * len(stages)
        for _ in range(microbatches):
            arrived = 0.0
            for index, stage in enumerate(stages):
                done = max(free[index], arrived) + stage.layers
                arrived, free[index] = done + stage.transfer, done + stage.exits
        free = [time + stage.update for time, stage in zip(free, stages, strict=True)]
        ends.append(max(free))
    return (ends[-1] - ends[1]) / (len(ends) - 2)
