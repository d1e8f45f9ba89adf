# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The differentiable chunked cross-entropy against autograd through all logits (rtol 1e-5, fp32)."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from nemo_ee.megatron.loss.differentiable_cross_entropy import differentiable_cross_entropy
from nemo_ee.megatron.loss.linear_cross_entropy import linear_cross_entropy
from nemo_ee.megatron.loss.vocab_parallel import VocabularyShard

TOKENS, VOCABULARY, PADDED = 23, 13, 16
WHOLE = VocabularyShard.of(vocab_size=VOCABULARY, padded_vocab_size=PADDED, rank=0, size=1, group=None)


def _case(widths: tuple[int, ...], scale: float = 1.0):
    generator = torch.Generator().manual_seed(11)
    inputs = [(scale * torch.randn(TOKENS, width, generator=generator)).requires_grad_() for width in widths]
    weights = [torch.randn(PADDED, width, generator=generator).requires_grad_() for width in widths]
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    mask = torch.rand(TOKENS, generator=generator) * (torch.rand(TOKENS, generator=generator) > 0.3)
    return inputs, weights, labels, mask


def _naive(inputs, weights, labels, mask) -> torch.Tensor:
    logits = sum(x @ weight[:VOCABULARY].t() for x, weight in zip(inputs, weights, strict=True))
    return (cross_entropy(logits, labels, reduction="none") * mask).sum()


@pytest.mark.parametrize("rows_per_chunk", [1, 5, 1000])
@pytest.mark.parametrize("widths", [(7,), (7, 3)], ids=["one term", "two terms"])
def test_loss_and_gradients_inside_a_larger_graph(widths: tuple[int, ...], rows_per_chunk: int) -> None:
    """The loss is scaled, the inputs come out of other operations, one weight is used twice."""
    inputs, weights, labels, mask = _case(widths)

    def graph(loss_of) -> torch.Tensor:
        return 0.25 * loss_of([x.tanh() for x in inputs]) + 3.0 * loss_of([x * x for x in inputs])

    ours = graph(
        lambda xs: differentiable_cross_entropy(
            xs, weights, labels, mask, vocabulary=WHOLE, chunk_bytes=4 * PADDED * rows_per_chunk
        )
    )
    theirs = graph(lambda xs: _naive(xs, weights, labels, mask))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    wanted = torch.autograd.grad(theirs, [*inputs, *weights])
    for found, expected in zip(torch.autograd.grad(ours, [*inputs, *weights]), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_wrong_label_is_noticed() -> None:
    """Control: one label changed moves loss and gradients by far more than the tolerance."""
    inputs, weights, labels, mask = _case((7,))
    mask[0] = 1.0
    right = differentiable_cross_entropy(inputs, weights, labels, mask, vocabulary=WHOLE)
    (gradient,) = torch.autograd.grad(right, inputs)
    labels[0] = (labels[0] + 1) % VOCABULARY
    wrong = differentiable_cross_entropy(inputs, weights, labels, mask, vocabulary=WHOLE)
    assert (right - wrong).abs() > 1e-2
    assert (gradient - torch.autograd.grad(wrong, inputs)[0]).abs().max() > 1e-2


def test_equals_the_fused_one_bitwise() -> None:
    """Frozen-backbone tuning and joint training see the same loss and the same gradients."""
    inputs, weights, labels, mask = _case((7, 3))
    loss = differentiable_cross_entropy(inputs, weights, labels, mask, vocabulary=WHOLE)
    gradients = torch.autograd.grad(loss, [*inputs, *weights])
    fused = linear_cross_entropy(inputs, weights, labels, mask, vocabulary=WHOLE, grad_scale=1.0)
    assert torch.equal(loss, fused.sums.loss)
    for ours, theirs in zip(gradients, [*fused.input_grads, *(w.grad for w in weights)], strict=True):
        assert torch.equal(ours, theirs)


def test_only_what_requires_a_gradient_gets_one() -> None:
    inputs, weights, labels, mask = _case((7, 3))
    inputs[0].requires_grad_(False)
    weights[1].requires_grad_(False)
    differentiable_cross_entropy(inputs, weights, labels, mask, vocabulary=WHOLE).backward()
    assert inputs[0].grad is None and weights[1].grad is None
    assert inputs[1].grad is not None and weights[0].grad is not None


def test_masked_labels_are_not_read_and_huge_logits_stay_finite() -> None:
    inputs, weights, labels, mask = _case((7,), scale=1e4)
    odd = labels.masked_fill(mask == 0, -100)
    loss = differentiable_cross_entropy(inputs, weights, odd, mask, vocabulary=WHOLE)
    loss.backward()
    torch.testing.assert_close(loss, _naive(inputs, weights, labels, mask))
    assert inputs[0].grad.isfinite().all() and weights[0].grad.isfinite().all()
    assert not inputs[0].grad[mask == 0].any() and not weights[0].grad[VOCABULARY:].any()


def test_only_inputs_weights_and_two_numbers_a_token_are_kept() -> None:
    """Nothing of the size of the logits lives between forward and backward."""
    inputs, weights, labels, mask = _case((7,))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        differentiable_cross_entropy(inputs, weights, labels, mask, vocabulary=WHOLE)
    assert sorted(kept) == sorted([TOKENS] * 4 + [TOKENS * 7, PADDED * 7])


def test_half_precision_products_keep_gradients_in_the_weights_dtype() -> None:
    inputs, weights, labels, mask = _case((7,))
    loss = differentiable_cross_entropy(inputs, weights, labels, mask, vocabulary=WHOLE, dtype=torch.bfloat16)
    loss.backward()
    assert loss.dtype is weights[0].grad.dtype is inputs[0].grad.dtype is torch.float32
    torch.testing.assert_close(loss, _naive(inputs, weights, labels, mask), rtol=2e-2, atol=0)
