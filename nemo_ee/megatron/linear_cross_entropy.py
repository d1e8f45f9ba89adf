# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of an output projection, chunk by chunk, over a vocabulary-parallel weight.

    loss_i = log sum_v exp(z_iv) - z_i,label(i)        z = sum_t x_t W_t^T  (terms t)
    d loss_i / d z_iv = softmax(z_i)_v - [v = label(i)]

Forward and backward are fused: the gradients for the inputs and the weights are formed while a chunk's logits exist,
so the memory beyond inputs, weights and their gradients is one chunk of logits, whatever the number of tokens or the
size of the vocabulary. Softmax and loss are in fp32.

Shapes: n tokens, m input width of a term, v padded vocabulary. May import: torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce
from torch.nn.functional import linear

DEFAULT_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class VocabularyShard:
    """Which part of the vocabulary this rank's weight rows are.

    Attributes:
        start: first token id of the shard.
        num_valid: rows that are tokens; the rest is padding and takes no part in the softmax.
        group: tensor-parallel group, None when it has one rank.
    """

    start: int
    num_valid: int
    group: ProcessGroup | None

    @classmethod
    def of(
        cls, *, vocab_size: int, padded_vocab_size: int, rank: int, size: int, group: ProcessGroup | None
    ) -> VocabularyShard:
        """Shard `rank` of `size` equal shards of a padded vocabulary."""
        rows = padded_vocab_size // size
        start = rank * rows
        return cls(start, max(0, min(rows, vocab_size - start)), group if size > 1 else None)

    def reduce(self, values: Tensor, op: ReduceOp = ReduceOp.SUM) -> Tensor:
        """All-reduce `values` over the vocabulary shards in place."""
        if self.group is not None:
            all_reduce(values, op=op, group=self.group)
        return values


@dataclass(frozen=True)
class LinearCrossEntropy:
    """Result of `linear_cross_entropy`.

    Attributes:
        loss_sum: sum of mask * loss, fp32 scalar.
        count: sum of mask, fp32 scalar.
        input_grads: d(grad_scale * loss_sum)/d(input) of every term that requires it, this rank's part of the
            vocabulary only; empty when no gradient was asked for.
        argmax: [n] token id with the highest logit over the whole vocabulary, None unless asked for.
    """

    loss_sum: Tensor
    count: Tensor
    input_grads: tuple[Tensor | None, ...]
    argmax: Tensor | None


@torch.no_grad()
def linear_cross_entropy(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    labels: Tensor,
    mask: Tensor,
    *,
    vocabulary: VocabularyShard,
    grad_scale: float | None = None,
    want_argmax: bool = False,
    dtype: torch.dtype | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> LinearCrossEntropy:
    """Masked cross-entropy sum and, fused, its gradients. Every rank of the tensor-parallel group must call it.

    Args:
        inputs: terms' inputs, each [n, m_t]; the same on every tensor-parallel rank.
        weights: terms' weights, each [v/tp, m_t]. Gradients of those that require them are added to `.main_grad`
            where there is one (Megatron's gradient buffers), else to `.grad`.
        labels: [n] int64 token ids; read only where `mask` is not zero.
        mask: [n] float weights of the tokens.
        vocabulary: this rank's part of the vocabulary.
        grad_scale: factor on the gradients; None computes the loss only.
        want_argmax: also return the most likely token.
        dtype: dtype of the matrix products (autocast); default that of the inputs.
        chunk_bytes: size of one chunk of fp32 logits.
    """
    num_tokens, rows = inputs[0].shape[0], weights[0].shape[0]
    dtype = dtype or inputs[0].dtype
    chunk = max(1, min(num_tokens, chunk_bytes // (4 * rows)))
    mask = mask.float()
    cast = [weight.detach().to(dtype) for weight in weights]
    wanted = grad_scale is not None
    input_grads = [torch.zeros_like(x) if wanted and x.requires_grad else None for x in inputs]
    loss_sum = torch.zeros((), dtype=torch.float32, device=mask.device)
    argmax = torch.empty(num_tokens, dtype=torch.long, device=mask.device) if want_argmax else None
    for start in range(0, num_tokens, chunk):
        part = slice(start, min(start + chunk, num_tokens))
        logits = _chunk_logits(inputs, cast, part, dtype, vocabulary)
        peak = vocabulary.reduce(logits.amax(dim=-1), ReduceOp.MAX)  # [c]
        if argmax is not None:
            argmax[part] = _argmax(logits, peak, vocabulary)
        logits.sub_(peak.unsqueeze(-1))
        local = labels[part] - vocabulary.start
        here = (local >= 0) & (local < vocabulary.num_valid)
        local = local.clamp(0, rows - 1).unsqueeze(-1)
        target = logits.gather(-1, local).squeeze(-1).masked_fill(~here, 0.0)
        logits.exp_()
        total, target = vocabulary.reduce(torch.stack((logits.sum(dim=-1), target)))  # [c] each
        loss_sum += ((total.log() - target) * mask[part]).sum()
        if not wanted:
            continue
        factor = mask[part] * grad_scale
        logits.mul_((factor / total).unsqueeze(-1))
        logits.scatter_add_(-1, local, -(factor * here).unsqueeze(-1))
        _add_gradients(logits.to(dtype), inputs, weights, cast, input_grads, part)
    return LinearCrossEntropy(loss_sum, mask.sum(), tuple(input_grads) if wanted else (), argmax)


def _chunk_logits(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], part: slice, dtype: torch.dtype, vocabulary: VocabularyShard
) -> Tensor:
    """[c, v/tp] fp32 logits of the tokens in `part`; padded rows are minus infinity (finite, so that 0 * it is 0)."""
    logits = linear(inputs[0][part].to(dtype), weights[0])
    for x, weight in zip(inputs[1:], weights[1:], strict=True):
        logits = logits + linear(x[part].to(dtype), weight)
    logits = logits.float()
    logits[:, vocabulary.num_valid :] = torch.finfo(torch.float32).min
    return logits


def _argmax(logits: Tensor, peak: Tensor, vocabulary: VocabularyShard) -> Tensor:
    """[c] id of the largest logit over all shards; the smallest id wins a tie, as `torch.argmax` over the whole
    does."""
    local = logits.argmax(dim=-1)
    best = logits.gather(-1, local.unsqueeze(-1)).squeeze(-1)
    candidate = torch.where(best == peak, local + vocabulary.start, torch.iinfo(torch.long).max)
    return vocabulary.reduce(candidate, ReduceOp.MIN)


def _add_gradients(
    grad: Tensor,
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    cast: Sequence[Tensor],
    input_grads: list[Tensor | None],
    part: slice,
) -> None:
    """Products of one chunk's logit gradients [c, v/tp] with the weights and the inputs."""
    for index, (x, weight) in enumerate(zip(inputs, weights, strict=True)):
        if input_grads[index] is not None:
            input_grads[index][part] = grad @ cast[index]
        if weight.requires_grad:
            if weight.grad is None and not hasattr(weight, "main_grad"):
                weight.grad = torch.zeros_like(weight)
            total = getattr(weight, "main_grad", weight.grad)
            if total.dtype == grad.dtype:
                total.addmm_(grad.t(), x[part].to(grad.dtype))
            else:
                total += grad.t() @ x[part].to(grad.dtype)
