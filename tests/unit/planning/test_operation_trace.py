# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A trace of operations against counts by hand, and against torch's own counter of FLOPs."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from nemo_ee.planning.operation_trace import Compute, OperationTrace, Transfer


def test_products_are_counted_as_torch_counts_them() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4, bias=False))
    x = torch.randn(5, 8)

    def step() -> None:
        model(x).sum().backward()

    with FlopCounterMode(display=False) as counter:
        step()
    with OperationTrace(dry=False) as trace:
        step()
    assert trace.flops == counter.get_total_flops() > 0
    with OperationTrace(dry=False) as other:
        torch.randn(5, 9) @ torch.randn(9, 4)
    assert other.flops == 2 * 5 * 9 * 4 != trace.flops, "control"


@pytest.mark.parametrize(("causal", "share"), [(True, 0.5), (False, 1.0)])
def test_attention_counts_the_part_of_the_square_that_is_needed(causal: bool, share: float) -> None:
    batch, heads, length, width = 2, 3, 32, 8
    query, key, value = torch.randn(3, batch, heads, length, width, requires_grad=True).unbind()
    with OperationTrace(dry=False) as trace:
        scaled_dot_product_attention(query, key, value, is_causal=causal)
    forward = share * 2 * (2 * batch * heads * length * length * width)
    assert trace.flops == forward
    with OperationTrace(dry=False) as trace:
        scaled_dot_product_attention(query, key, value, is_causal=causal).sum().backward()
    assert trace.flops == forward * (1 + 2.5)


def test_memory_is_what_lives_at_the_peak() -> None:
    kept = []
    with OperationTrace(dry=False) as trace:
        kept.append(torch.zeros(1000))
        trace.reset()
        temporary = torch.zeros(500, dtype=torch.float64)
        view = temporary[:10]  # no memory of its own
        del temporary, view
        torch.zeros(10)
    assert trace.live == 4000 and trace.peak == 4000 + 4000
    assert trace.bytes_at_peak({"kept": kept}) == {"kept": 4000, "temporary": 4000}
    assert trace.bytes_at_peak({"others": [torch.zeros(3)]}) == {"others": 0, "temporary": 8000}, "control"


@pytest.fixture
def group() -> None:
    """Process groups of this process alone; without Megatron-core, which not every environment of this test has."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


@pytest.mark.usefixtures("group")
def test_transfers_have_their_kind_and_size() -> None:
    with OperationTrace(dry=False) as trace:
        torch.ones(4, 4) @ torch.ones(4, 4)
        torch.distributed.all_reduce(torch.ones(6, dtype=torch.float64))
        torch.distributed.broadcast(torch.ones(3, dtype=torch.bfloat16), src=0)
    assert trace.events == [Compute(128.0), Transfer("allreduce_", 1, 48, 0), Transfer("broadcast_", 1, 6, 0)]
