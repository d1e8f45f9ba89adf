# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The fused, chunked cross-entropy against a naive one over all logits: values, gradients, masks, padding, shards."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from nemo_ee.megatron.loss.linear_cross_entropy import linear_cross_entropy
from nemo_ee.megatron.loss.vocab_parallel import VocabularyShard

TOKENS, VOCABULARY, PADDED = 23, 13, 16
WIDTHS = {"one term": (7,), "two terms": (7, 3)}


def _case(widths: tuple[int, ...], seed: int = 0, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    inputs = [(scale * draw(TOKENS, width)).requires_grad_() for width in widths]
    # Padding rows are not zero: a row that took part would show.
    weights = [draw(PADDED, width).requires_grad_() for width in widths]
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    mask = torch.rand(TOKENS, generator=generator) * (torch.rand(TOKENS, generator=generator) > 0.3)
    return inputs, weights, labels, mask


def _whole() -> VocabularyShard:
    return VocabularyShard.of(vocab_size=VOCABULARY, padded_vocab_size=PADDED, rank=0, size=1, group=None)


def _naive(inputs, weights, labels, mask):
    logits = sum(x @ weight[:VOCABULARY].t() for x, weight in zip(inputs, weights, strict=True))
    return (cross_entropy(logits, labels, reduction="none") * mask).sum(), logits


def _gradients(inputs, weights, labels, mask, scale):
    loss, _ = _naive(inputs, weights, labels, mask)
    grads = torch.autograd.grad(scale * loss, [*inputs, *weights])
    return loss, grads[: len(inputs)], grads[len(inputs) :]


@pytest.mark.parametrize("rows_per_chunk", [1, 5, TOKENS, 1000])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_equals_the_naive_loss_and_its_gradients(widths: tuple[int, ...], rows_per_chunk: int) -> None:
    inputs, weights, labels, mask = _case(widths)
    loss, input_grads, weight_grads = _gradients(inputs, weights, labels, mask, 0.25)
    result = linear_cross_entropy(
        inputs, weights, labels, mask,
        vocabulary=_whole(), grad_scale=0.25, want_argmax=True, chunk_bytes=4 * PADDED * rows_per_chunk,
    )  # fmt: skip
    torch.testing.assert_close(result.sums.loss, loss.detach())
    torch.testing.assert_close(result.sums.weight, mask.sum())
    for ours, theirs in zip(result.input_grads, input_grads, strict=True):
        torch.testing.assert_close(ours, theirs)
    for weight, theirs in zip(weights, weight_grads, strict=True):
        torch.testing.assert_close(weight.grad, theirs)
        assert not weight.grad[VOCABULARY:].any(), "padding rows take no gradient"
    _, logits = _naive(inputs, weights, labels, mask)
    assert torch.equal(result.argmax, logits.argmax(-1))


def test_padding_rows_would_change_the_loss_if_they_counted() -> None:
    """Control: with every row valid the same inputs give another loss."""
    inputs, weights, labels, mask = _case((7,))
    everything = VocabularyShard.of(vocab_size=PADDED, padded_vocab_size=PADDED, rank=0, size=1, group=None)
    right = linear_cross_entropy(inputs, weights, labels, mask, vocabulary=_whole()).sums.loss
    wrong = linear_cross_entropy(inputs, weights, labels, mask, vocabulary=everything).sums.loss
    assert (wrong - right).abs() > 0.1


@pytest.mark.parametrize("rows_per_chunk", [1, 7])
def test_chunks_change_nothing(rows_per_chunk: int) -> None:
    """Rows of the softmax are independent: input gradients and tokens are bitwise the same, sums to rounding."""
    inputs, weights, labels, mask = _case((7, 3), seed=5)
    results, options = [], {"vocabulary": _whole(), "grad_scale": 1.0, "want_argmax": True}
    for chunk_bytes in (4 * PADDED * rows_per_chunk, 1, 1 << 20):
        for weight in weights:
            weight.grad = None
        result = linear_cross_entropy(inputs, weights, labels, mask, chunk_bytes=chunk_bytes, **options)
        results.append((result, [weight.grad.clone() for weight in weights]))
    (first, first_grads), *others = results
    for other, other_grads in others:
        torch.testing.assert_close(first.sums.loss, other.sums.loss, rtol=1e-6, atol=0)
        assert torch.equal(first.argmax, other.argmax)
        torch.testing.assert_close(first.input_grads, other.input_grads, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(first_grads, other_grads, rtol=1e-5, atol=1e-6)


def test_masked_positions_do_not_count_and_their_labels_are_not_read() -> None:
    inputs, weights, labels, mask = _case((7,))
    mask[:] = (torch.arange(TOKENS) % 4 == 0).float()
    vocabulary = _whole()
    result = linear_cross_entropy(inputs, weights, labels, mask, vocabulary=vocabulary, grad_scale=1.0)
    weight_grad, weights[0].grad = weights[0].grad, None
    kept = mask > 0
    alone = linear_cross_entropy(
        [inputs[0].detach()[kept].requires_grad_()],
        weights, labels[kept], mask[kept], vocabulary=vocabulary, grad_scale=1.0,
    )  # fmt: skip
    torch.testing.assert_close(result.sums.loss, alone.sums.loss)
    torch.testing.assert_close(weight_grad, weights[0].grad)
    assert not result.input_grads[0][~kept].any()
    for outside in (-100, -1, VOCABULARY, PADDED + 40):
        weights[0].grad = None
        odd = labels.masked_fill(~kept, outside)
        again = linear_cross_entropy(inputs, weights, odd, mask, vocabulary=vocabulary, grad_scale=1.0)
        assert torch.equal(again.sums.loss, result.sums.loss)
        assert torch.equal(weights[0].grad, weight_grad)


def test_without_grad_scale_nothing_is_added() -> None:
    inputs, weights, labels, mask = _case((7,))
    result = linear_cross_entropy(inputs, weights, labels, mask, vocabulary=_whole())
    assert result.input_grads == () and result.argmax is None
    assert weights[0].grad is None and inputs[0].grad is None


def test_only_what_requires_a_gradient_gets_one() -> None:
    inputs, weights, labels, mask = _case((7, 3))
    inputs[0].requires_grad_(False)
    weights[1].requires_grad_(False)
    result = linear_cross_entropy(inputs, weights, labels, mask, vocabulary=_whole(), grad_scale=1.0)
    assert result.input_grads[0] is None and result.input_grads[1] is not None
    assert weights[0].grad is not None and weights[1].grad is None


def test_gradients_add_up() -> None:
    inputs, weights, labels, mask = _case((7,))
    options = {"vocabulary": _whole(), "grad_scale": 1.0}
    linear_cross_entropy(inputs, weights, labels, mask, **options)
    once = weights[0].grad.clone()
    linear_cross_entropy(inputs, weights, labels, mask, **options)
    torch.testing.assert_close(weights[0].grad, 2 * once)


def test_huge_logits_stay_finite() -> None:
    """exp of a raw logit of 1e4 would overflow; padding rows are minus infinity and must not become NaN."""
    inputs, weights, labels, mask = _case((7,), scale=1e4)
    loss, input_grads, _ = _gradients(inputs, weights, labels, mask, 1.0)
    result = linear_cross_entropy(inputs, weights, labels, mask, vocabulary=_whole(), grad_scale=1.0)
    assert result.sums.loss.isfinite() and loss > 1e4
    torch.testing.assert_close(result.sums.loss, loss.detach())
    torch.testing.assert_close(result.input_grads[0], input_grads[0])


def test_an_empty_mask_gives_zero() -> None:
    inputs, weights, labels, _ = _case((7,))
    result = linear_cross_entropy(
        inputs, weights, torch.full_like(labels, -100), torch.zeros(TOKENS), vocabulary=_whole(), grad_scale=1.0
    )
    assert result.sums.loss == 0 and result.sums.weight == 0
    assert not weights[0].grad.any() and not result.input_grads[0].any()


def test_half_precision_products_with_fp32_softmax() -> None:
    """Autocast: products in bf16, softmax and loss in fp32, gradients in the weights' own dtype."""
    inputs, weights, labels, mask = _case((7,))
    result = linear_cross_entropy(
        inputs, weights, labels, mask, vocabulary=_whole(), grad_scale=1.0, dtype=torch.bfloat16
    )
    rounded = [[t.detach().bfloat16().float().requires_grad_() for t in ts] for ts in (inputs, weights)]
    loss, _, weight_grads = _gradients(*rounded, labels, mask, 1.0)
    assert result.sums.loss.dtype is torch.float32 and weights[0].grad.dtype is torch.float32
    torch.testing.assert_close(result.sums.loss, loss.detach(), rtol=2e-2, atol=0)
    torch.testing.assert_close(weights[0].grad, weight_grads[0], rtol=0.05, atol=0.05)


def test_shards_of_a_padded_vocabulary() -> None:
    """The last shard may hold padding only."""
    shard = [VocabularyShard.of(vocab_size=9, padded_vocab_size=16, rank=r, size=4, group=None) for r in range(4)]
    assert [(s.start, s.num_valid) for s in shard] == [(0, 4), (4, 4), (8, 1), (12, 0)]
    assert VocabularyShard.of(vocab_size=9, padded_vocab_size=16, rank=0, size=1, group="unused").group is None


def test_a_shard_of_padding_only_takes_part_without_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks played in one process: reductions of the second rank see the first one's numbers."""
    inputs, weights, labels, mask = _case((7,))
    seen: list[torch.Tensor] = []

    def record(self, values, op=None):
        seen.append(values.clone())
        return values

    monkeypatch.setattr(VocabularyShard, "reduce", record)
    empty = VocabularyShard(start=PADDED, num_valid=0, group=None)
    result = linear_cross_entropy(inputs, [torch.randn(4, 7)], labels, mask, vocabulary=empty)
    peak = seen[0]
    assert (peak == torch.finfo(torch.float32).min).all(), "padding never is the maximum over the shards"
    assert not result.sums.loss.isnan()
