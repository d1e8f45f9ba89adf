# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The label loss of `linear_cross_entropy`, chunked and vocabulary-parallel, as a node of an autograd graph.

    forward     p_i = max_v z_iv,   Z_i = sum_v exp(z_iv - p_i),   loss = sum_i m_i (log Z_i + p_i - z_i,label(i))
    backward    d loss / d z_iv = m_i (exp(z_iv - p_i) / Z_i - [v = label(i)]), then the products with inputs, weights

Between the two only inputs, weights, p and Z ([n] fp32 each) are kept: the backward pass makes the logits again,
chunk by chunk, and forms the weight gradients there. That is what joint training needs, where other microbatches'
forward passes lie between a microbatch's forward and backward pass.

Shapes: n tokens, m input width of a term, v padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_ee.megatron.loss.vocab_parallel import (
    VocabularyShard,
    add_gradients,
    chunk_bytes_on,
    chunk_logits,
    label_and_total,
    num_buffers,
    token_chunks,
)


def differentiable_cross_entropy(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    labels: Tensor,
    mask: Tensor,
    *,
    vocabulary: VocabularyShard,
    dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Masked cross-entropy sum, differentiable in inputs and weights. Softmax and loss in fp32.

    Every rank of the tensor-parallel group must call it, and run its backward pass, in the same order.

    Args:
        inputs: terms' inputs, each [n, m_t]; the same on every tensor-parallel rank. Their gradients are those of
            this rank's part of the vocabulary only; `spread_over_tensor_parallel` in front sums them.
        weights: terms' weights, each [v/tp, m_t].
        labels: [n] int64 token ids; read only where `mask` is not zero.
        mask: [n] float weights of the tokens.
        vocabulary: this rank's part of the vocabulary.
        dtype: dtype of the matrix products (autocast); default that of the inputs.
        chunk_bytes: size of one chunk of fp32 logits; None: see `chunk_bytes_on`.

    Returns:
        fp32 scalar, sum of mask * loss, the same on every tensor-parallel rank.
    """
    dtype = dtype or inputs[0].dtype
    chunk_bytes = chunk_bytes or chunk_bytes_on(mask.device, weights[0].shape[0], buffers=num_buffers(dtype))
    return _LinearCrossEntropy.apply(
        vocabulary, dtype, chunk_bytes, labels, mask.float(), len(inputs), *inputs, *weights
    )


class _LinearCrossEntropy(torch.autograd.Function):
    """See `differentiable_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        vocabulary: VocabularyShard,
        dtype: torch.dtype,
        chunk_bytes: int,
        labels: Tensor,
        mask: Tensor,
        num_terms: int,
        *terms: Tensor,
    ) -> Tensor:
        inputs, weights = terms[:num_terms], terms[num_terms:]
        cast = [weight.to(dtype) for weight in weights]
        peak, total = torch.empty_like(mask), torch.empty_like(mask)
        loss_sum = torch.zeros((), dtype=torch.float32, device=mask.device)
        for part in token_chunks(len(mask), weights[0].shape[0], chunk_bytes, buffers=num_buffers(dtype)):
            logits = chunk_logits(inputs, cast, part, dtype, vocabulary)
            peak[part], label, total[part] = label_and_total(logits, labels[part], vocabulary)
            loss_sum += ((total[part].log() - label) * mask[part]).sum()
        ctx.save_for_backward(labels, mask, peak, total, *terms)
        ctx.vocabulary, ctx.dtype, ctx.chunk_bytes, ctx.num_terms = vocabulary, dtype, chunk_bytes, num_terms
        return loss_sum

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple:
        labels, mask, peak, total, *terms = ctx.saved_tensors
        inputs, weights = terms[: ctx.num_terms], terms[ctx.num_terms :]
        cast = [weight.to(ctx.dtype) for weight in weights]
        wanted = ctx.needs_input_grad[-len(terms) :]
        grads = [torch.zeros_like(term) if want else None for term, want in zip(terms, wanted, strict=True)]
        factor = mask * grad_loss
        for part in token_chunks(len(mask), weights[0].shape[0], ctx.chunk_bytes, buffers=num_buffers(ctx.dtype)):
            logits = chunk_logits(inputs, cast, part, ctx.dtype, ctx.vocabulary)
            rows, here = ctx.vocabulary.local_ids(labels[part])
            logits.sub_(peak[part].unsqueeze(-1)).exp_().mul_((factor[part] / total[part]).unsqueeze(-1))
            logits.scatter_add_(-1, rows.unsqueeze(-1), -(factor[part] * here).unsqueeze(-1))
            add_gradients(logits.to(ctx.dtype), inputs, cast, grads[: ctx.num_terms], grads[ctx.num_terms :], part)
        return (None,) * 6 + tuple(grads)
