# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Simulated pipelines against times worked out by hand."""

from __future__ import annotations

import pytest

from nemo_ee.planning.operation_trace import Compute, Transfer
from nemo_ee.planning.pipeline_simulation import Speeds, StageTimes, stage_times, step_seconds

SPEEDS = Speeds(tflops=1.0, tensor_link_gb_s=10.0, data_link_gb_s=1.0)


def test_a_stage_alone_takes_the_sum_of_its_parts() -> None:
    stage = StageTimes(layers=2.0, exits=3.0, update=0.5, transfer=9.0)
    for decoupled in (True, False):
        assert step_seconds([stage], 4, decoupled=decoupled) == pytest.approx(4 * 5.0 + 0.5)


def test_decoupled_stages_are_as_fast_as_the_slowest() -> None:
    stages = [StageTimes(1.0, 1.0, 0.0, 0.0), StageTimes(1.0, 4.0, 0.0, 0.0), StageTimes(1.0, 0.0, 0.0, 0.0)]
    assert step_seconds(stages, 2, decoupled=True) == pytest.approx(2 * 5.0)


def test_drained_stages_wait_for_the_first_microbatch_in_every_step() -> None:
    """Microbatch 1 is at stage 3 after 2 s of layers and 1 s on the way; 2 x 3 s of work there end at 9."""
    stages = [StageTimes(1.0, 1.0, 0.0, 0.5), StageTimes(1.0, 1.0, 0.0, 0.5), StageTimes(1.0, 2.0, 0.0, 0.0)]
    assert step_seconds(stages, 2, decoupled=False) == pytest.approx(9.0)
    assert step_seconds(stages, 2, decoupled=True) == pytest.approx(6.0)


def test_events_become_times() -> None:
    gigabyte = 10**9
    microbatch = [
        Compute(2e12),
        Transfer("allreduce_", 2, gigabyte, 1),  # 2 * 1/2 * 1 GB at 10 GB/s
        Transfer("send", 4, gigabyte, 2),
        Compute(1e12),
    ]
    update = [Transfer("allreduce_", 4, gigabyte, 8), Transfer("allreduce_", 1, gigabyte, 0)]  # 2 * 3/4 GB at 1 GB/s
    found = stage_times(microbatch, update, SPEEDS)
    assert found == StageTimes(pytest.approx(2.1), pytest.approx(1.0), pytest.approx(1.5), pytest.approx(0.1))
    far = [*microbatch[:2], Transfer("send", 4, gigabyte, 8), microbatch[3]]
    assert stage_times(far, update, SPEEDS).transfer == pytest.approx(1.0), "the next stage is on another node"


def test_a_group_within_a_node_uses_the_fast_link() -> None:
    inside, outside = (Transfer("allreduce_", 8, 10**9, stride) for stride in (1, 2))
    assert SPEEDS.seconds(outside) == pytest.approx(10 * SPEEDS.seconds(inside))
