# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""An exit's loss straight from its output projection, chunk by chunk, over a vocabulary-parallel weight.

    z = sum_t x_t W_t^T                                 terms t
    CE_i = ln sum_v exp(z_iv) - z_i,label(i)            loss_i = a CE_i + b T^2 KL(q_i || p_i)    (see exits.objective)
    d loss_i / d z_iv = a (p_iv - [v = label(i)]) + b T (p^T_iv - q_iv)      p^T = softmax(z / T)

Forward and backward are fused: the gradients for the inputs and the weights are formed while a chunk's logits exist,
so the memory beyond inputs, weights and their gradients is one chunk, whatever the number of tokens or the size of the
vocabulary. Softmax, loss and everything reported are in fp32.

Shapes: n tokens, c of a chunk, m input width of a term, v padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from nemo_ee.exits.objective import CROSS_ENTROPY, Objective
from nemo_ee.megatron.loss.teacher import Teacher, TeacherChunk
from nemo_ee.megatron.loss.vocab_parallel import (
    VocabularyShard,
    add_gradients,
    argmax_over_shards,
    chunk_bytes_on,
    chunk_logits,
    num_buffers,
    token_chunks,
)
from nemo_ee.megatron.loss.weight_casts import WeightCasts


@dataclass(frozen=True)
class TokenSums:
    """Sums over tokens, fp32 scalars each.

    Attributes:
        loss: weight * loss of the objective, weight = mask, times the token weight if there is one.
        weight: the weights.
        cross_entropy: mask * label cross-entropy.
        kl: mask * KL(q || p) at the objective's temperature, 0 without a teacher.
        confidence: mask * largest probability.
        entropy: mask * entropy in nats, 0 without `want_entropy`.
        tokens: mask.
    """

    loss: Tensor
    weight: Tensor
    cross_entropy: Tensor
    kl: Tensor
    confidence: Tensor
    entropy: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class LinearCrossEntropy:
    """Result of `linear_cross_entropy`.

    Attributes:
        sums: loss, weights and metrics.
        input_grads: d(grad_scale * sums.loss)/d(input) of every term that requires it, this rank's part of the
            vocabulary only; empty without `grad_scale`. Token weights count as constants.
        argmax: [n] token id with the highest logit over the whole vocabulary, None without `want_argmax`.
    """

    sums: TokenSums
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
    objective: Objective = CROSS_ENTROPY,
    teacher: Teacher | None = None,
    grad_scale: float | None = None,
    want_argmax: bool = False,
    want_entropy: bool = False,
    dtype: torch.dtype | None = None,
    casts: WeightCasts | None = None,
    chunk_bytes: int | None = None,
) -> LinearCrossEntropy:
    """Masked loss sums and, fused, their gradients. Every rank of the tensor-parallel group must call it.

    Args:
        inputs: terms' inputs, each [n, m_t]; the same on every tensor-parallel rank.
        weights: terms' weights, each [v/tp, m_t]. Gradients of those that require them are added to `main_grad` where
            a weight has one, else to `grad`.
        labels: [n] int64 token ids; read only where `mask` is not zero.
        mask: [n] float weights of the tokens.
        vocabulary: this rank's part of the vocabulary.
        objective: the exit's objective.
        teacher: the final exit, needed by objectives that have one; with others only its divergence is reported.
        grad_scale: factor on the gradients; None computes the sums only.
        want_argmax, want_entropy: also return the most likely token, the entropy.
        dtype: dtype of the matrix products (autocast); default that of the inputs.
        casts: weights that were cast before in this step; None: none.
        chunk_bytes: size of one chunk of fp32 logits, all buffers of its size together; None: see `chunk_bytes_on`.
    """
    assert teacher is not None or not objective.has_teacher, "the objective needs a teacher"
    num_tokens, rows = inputs[0].shape[0], weights[0].shape[0]
    dtype = dtype or inputs[0].dtype
    mask = mask.float()
    cast = (casts or WeightCasts()).of(weights, dtype)
    wanted = grad_scale is not None
    input_grads = [torch.zeros_like(x) if wanted and x.requires_grad else None for x in inputs]
    weight_grads = [gradient_of(weight) if wanted and weight.requires_grad else None for weight in weights]
    argmax = torch.empty(num_tokens, dtype=torch.long, device=mask.device) if want_argmax else None
    buffers = buffers_of_a_chunk(objective, teacher, dtype) + want_entropy
    sums = torch.zeros(len(fields(TokenSums)), dtype=torch.float32, device=mask.device)
    memory, chunk_bytes = None, chunk_bytes or chunk_bytes_on(mask.device, rows, buffers=buffers)
    for part in token_chunks(num_tokens, rows, chunk_bytes, buffers=buffers):
        if memory is None:  # of the first chunk's size, the largest
            memory = torch.empty(part.stop - part.start, rows, dtype=dtype, device=mask.device)
        logits = chunk_logits(inputs, cast, part, dtype, vocabulary, memory)
        peak = vocabulary.reduce(logits.amax(dim=-1), ReduceOp.MAX)  # [c]
        if argmax is not None:
            argmax[part] = argmax_over_shards(logits, peak, vocabulary)
        logits.sub_(peak.unsqueeze(-1))
        chunk = _Chunk(logits, labels[part], mask[part], vocabulary, objective)
        if teacher is not None:
            chunk.compare(teacher.chunk(part, vocabulary))
        chunk.normalise(want_entropy=want_entropy)
        sums += chunk.sums()
        if wanted:
            add_gradients(chunk.gradient(grad_scale).to(dtype), inputs, cast, input_grads, weight_grads, part)
    return LinearCrossEntropy(TokenSums(*sums.unbind()), tuple(input_grads) if wanted else (), argmax)


def buffers_of_a_chunk(objective: Objective, teacher: Teacher | None, dtype: torch.dtype) -> int:
    """Buffers of the size of a chunk's fp32 logits that are alive at once, the logits among them.

    A softened distribution takes the place of the difference that the comparison with a full teacher leaves behind.
    """
    softened = teacher is not None and objective.temperature != 1.0
    return num_buffers(dtype) + max(softened, 0 if teacher is None else teacher.num_buffers)


@dataclass
class _Chunk:
    """The numbers of one chunk, [c] each unless said otherwise, worked out in place on its logits.

    Call `compare` (with a teacher only), `normalise`, `sums`, `gradient` in this order; each overwrites what it reads.
    """

    logits: Tensor  # [c, v/tp] shifted so that the largest over the whole vocabulary is 0; later exp of it
    labels: Tensor
    mask: Tensor
    vocabulary: VocabularyShard
    objective: Objective
    teacher: TeacherChunk | None = None
    excess: Tensor | None = None  # the teacher's, see `TeacherChunk`
    softened: Tensor | None = None  # [c, v/tp] exp(shifted logits / T), where T is not 1
    entropy: Tensor | None = None
    total: Tensor = field(init=False)  # sum of exp(shifted logits): the largest probability is 1 / total
    target: Tensor = field(init=False)  # the label's shifted logit
    soft_total: Tensor | None = None

    def compare(self, teacher: TeacherChunk) -> None:
        """Compute the part of the divergence that needs the logits."""
        self.teacher, self.excess = teacher, teacher.excess(self.logits, self.objective.temperature)
        if self.objective.temperature != 1.0:
            self.softened = (self.logits / self.objective.temperature).exp_()

    def normalise(self, *, want_entropy: bool) -> None:
        """Exponentials and their sums over the whole vocabulary, one reduction for all of them."""
        self.rows, self.here = self.vocabulary.local_ids(self.labels)
        self.rows = self.rows.unsqueeze(-1)
        target = self.logits.gather(-1, self.rows).squeeze(-1).masked_fill(~self.here, 0.0)
        self.logits.exp_()
        parts = [self.logits.sum(dim=-1), target]
        if self.teacher is not None:
            parts.append(self.excess)
        if self.softened is not None:
            parts.append(self.softened.sum(dim=-1))
        self.total, self.target, *rest = self.vocabulary.reduce(torch.stack(parts)).unbind()
        if self.teacher is not None:
            self.excess = rest[0]
            self.soft_total = rest[1] if self.softened is not None else self.total
        if want_entropy:  # of p, whose largest is 1 / total: no term overflows
            terms = self.logits / self.total.unsqueeze(-1)
            self.entropy = self.vocabulary.reduce(torch.special.entr(terms, out=terms).sum(dim=-1))

    def sums(self) -> Tensor:
        """Masked sums in the order of `TokenSums`; fixes the tokens' weights for `gradient`."""
        objective, mask = self.objective, self.mask
        cross_entropy = self.total.log() - self.target
        confidence = self.total.reciprocal()
        self.weight = mask * confidence if objective.by_confidence else mask
        loss, kl = objective.label_weight * cross_entropy, torch.zeros_like(cross_entropy)
        if self.teacher is not None:
            # Logarithms in fp64: fp32 ones of a large vocabulary are as coarse as the divergence of a good exit.
            kl = (self.excess - self.teacher.log_total + self.soft_total.double().log()).float()
            loss = loss + objective.teacher_weight * objective.temperature**2 * kl
        entropy = torch.zeros_like(kl) if self.entropy is None else self.entropy
        reported = [values * mask for values in (cross_entropy, kl, confidence, entropy)]
        return torch.stack([values.sum() for values in (loss * self.weight, self.weight, *reported, mask)])

    def gradient(self, grad_scale: float) -> Tensor:
        """[c, v/tp] gradient of grad_scale * weighted loss for the logits, in the logits' own memory."""
        objective, factor = self.objective, self.weight * grad_scale
        label, teacher = objective.label_weight, objective.teacher_weight * objective.temperature
        on_p = label if self.softened is not None else label + teacher
        grad = self.logits.mul_((on_p * factor / self.total).unsqueeze(-1))
        if self.teacher is not None and teacher:
            if self.softened is not None:
                grad.addcmul_(self.softened, (teacher * factor / self.soft_total).unsqueeze(-1))
            self.teacher.subtract_from(grad, teacher * factor)
        if label:
            grad.scatter_add_(-1, self.rows, -(label * factor * self.here).unsqueeze(-1))
        return grad


def gradient_of(parameter: Tensor) -> Tensor:
    """The tensor a parameter's gradients are added to: `main_grad` where an optimizer keeps one, else `grad`."""
    main = getattr(parameter, "main_grad", None)
    if main is not None:
        return main
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
