# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Losses attached to hidden states: gradients add up, and a schedule may free what it has sent."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor

from nemo_ee.megatron.pipeline.joint_forward import attach_loss, recomputed_ranges


def _stage(attach) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input, output after a norm-like use of it by a loss, incoming gradient)."""
    generator = torch.Generator().manual_seed(0)
    received = torch.randn(5, 2, 3, generator=generator, requires_grad=True)
    hidden = received * 2.0
    loss = (hidden.pow(2) * 0.5).sum()  # keeps `hidden` for its backward pass, as a norm does
    return received, attach(hidden, loss), torch.randn(5, 2, 3, generator=generator)


def test_the_loss_s_gradient_joins_the_incoming_one() -> None:
    received, output, gradient = _stage(attach_loss)
    assert torch.equal(output, received * 2.0)
    output.backward(gradient)
    torch.testing.assert_close(received.grad, 2.0 * (gradient + 2.0 * received.detach()))


def test_a_sent_output_may_be_freed() -> None:
    """As Megatron's schedule does: the output is emptied after sending, then its backward runs."""
    received, output, gradient = _stage(attach_loss)
    deallocate_output_tensor(output, deallocate_pipeline_outputs=True)
    assert output.numel() == 1
    custom_backward(output, gradient)
    torch.testing.assert_close(received.grad, 2.0 * (gradient + 2.0 * received.detach()))


def test_freeing_the_tapped_tensor_itself_breaks_the_loss() -> None:
    """Control: without a tensor of its own the exit's graph loses the state that it needs."""
    received, output, _ = _stage(lambda hidden, loss: hidden)
    loss = output.pow(2).sum()
    deallocate_output_tensor(output, deallocate_pipeline_outputs=True)
    loss.backward()
    assert not torch.allclose(received.grad, 8.0 * received.detach()), "it sees one number in place of the state"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((None, None, None), [(0, 5, False)]),
        (("selective", None, None), [(0, 5, False)]),
        (("full", "uniform", 2), [(0, 2, True), (2, 4, True), (4, 5, True)]),
        (("full", "uniform", 9), [(0, 5, True)]),
        (("full", "block", 2), [(0, 1, True), (1, 2, True), (2, 5, False)]),
        (("full", "block", 5), [(index, index + 1, True) for index in range(5)]),
        (("full", "block", 9), [(index, index + 1, True) for index in range(5)]),
    ],
)
def test_ranges_that_are_recomputed(settings: tuple, expected: list[tuple[int, int, bool]]) -> None:
    names = ("recompute_granularity", "recompute_method", "recompute_num_layers")
    assert recomputed_ranges(SimpleNamespace(**dict(zip(names, settings, strict=True))), 5) == expected
