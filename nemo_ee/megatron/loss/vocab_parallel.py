# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Logits over a vocabulary-parallel weight, a chunk of tokens at a time.

Shapes: n tokens, c tokens of a chunk, m input width of a term, v padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_gather, all_reduce, get_world_size
from torch.nn.functional import linear

_CPU_CHUNK_BYTES = 64 * 2**20
_CACHED_CHUNK_BYTES = 16 * 2**20  # stay in the last-level cache
_TOKENS_OF_CACHED_CHUNK = 512  # at least
_GPU_SHARE = 256  # of a GPU's memory, for one chunk
_ROWS_OF_MIXED_PRODUCTS = 8192


@dataclass(frozen=True)
class VocabularyShard:
    """The part of the vocabulary that this rank's weight rows hold.

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

    def gather(self, values: Tensor) -> Tensor:
        """[..., k] of every shard side by side: [..., tp * k]."""
        if self.group is None:
            return values
        parts = [torch.empty_like(values) for _ in range(get_world_size(self.group))]
        all_gather(parts, values.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)

    def local_ids(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of token ids in this shard, clamped into it, and a mask of those that are in it; both of ids' shape."""
        local = ids - self.start
        return local.clamp(0, max(0, self.num_valid - 1)), (local >= 0) & (local < self.num_valid)


def output_weight_key(tied: bool) -> str:
    """Canonical key of the backbone's output weight, which a tied model stores as its embedding."""
    return "embedding.word_embeddings.weight" if tied else "output_layer.weight"


def chunk_bytes_on(device: torch.device, rows: int, *, buffers: int = 1) -> int:
    """Size of one chunk of fp32 logits where no other is set: 1/256 of a GPU's memory; on the CPU 16 MiB where these
    hold 512 tokens or more, else 64 MiB.

    On the CPU a chunk is read and written about eight times between its products, which is faster in the cache, but
    for each chunk the weight's gradients are read and written once. An exit's work on 2,048 tokens, AMD EPYC with
    32 MiB of cache: 4,096 rows of 256 numbers 194 ms with 16 MiB, 207 ms with 64; 32,000 rows 627 and 591 ms.

    On a GPU a chunk costs a few dozen kernel launches, so it must be large to keep the device busy. Tensor-parallel
    ranks reduce chunk by chunk, so their chunks must be equal. The power of two below is the same for GPUs of one
    kind, and a tensor-parallel group must consist of one kind.

    Args:
        device: where the loss is computed.
        rows: v/tp.
        buffers: as for `tokens_of_a_chunk`.
    """
    if device.type != "cuda":
        cached = tokens_of_a_chunk(rows, _CACHED_CHUNK_BYTES, buffers=buffers) >= _TOKENS_OF_CACHED_CHUNK
        return _CACHED_CHUNK_BYTES if cached else _CPU_CHUNK_BYTES
    share = torch.cuda.get_device_properties(device).total_memory // _GPU_SHARE
    return 1 << (share.bit_length() - 1)


def tokens_of_a_chunk(rows: int, chunk_bytes: int, *, buffers: int = 1) -> int:
    """Tokens whose fp32 logits, `buffers` times over, take about `chunk_bytes`; at least one."""
    return max(1, chunk_bytes // (4 * rows * buffers))


def token_chunks(num_tokens: int, rows: int, chunk_bytes: int, *, buffers: int = 1) -> Iterator[slice]:
    """Slices of as many tokens as `tokens_of_a_chunk` says; none of no tokens."""
    size = tokens_of_a_chunk(rows, chunk_bytes, buffers=buffers)
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def num_buffers(dtype: torch.dtype) -> int:
    """fp32 buffers of a chunk's size that its logits take, and two of half that size where products are in half
    precision: the products, and the gradient in their dtype."""
    return 1 + (dtype is not torch.float32)


def chunk_logits(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    part: slice,
    dtype: torch.dtype,
    vocabulary: VocabularyShard,
    memory: Tensor | None = None,
) -> Tensor:
    """[c, v/tp] fp32 logits of the tokens in `part`; padded rows hold the lowest finite number, so 0 * it is 0.

    `memory`, [at least c, v/tp] of `dtype`, is overwritten with the products: chunk after chunk in the same place, no
    two of them alive at once, and no fresh pages to touch for each.
    """
    x = inputs[0][part].to(dtype)
    first = weights[0]
    logits = linear(x, first) if memory is None else torch.mm(x, first.t(), out=memory[: x.shape[0]])
    for x, weight in zip(inputs[1:], weights[1:], strict=True):
        logits.addmm_(x[part].to(dtype), weight.t())
    logits = logits.float()
    logits[:, vocabulary.num_valid :] = torch.finfo(torch.float32).min
    return logits


def label_and_total(logits: Tensor, labels: Tensor, vocabulary: VocabularyShard) -> tuple[Tensor, Tensor, Tensor]:
    """What a chunk's label losses follow from. With logits less the largest one, ln p = the label's - ln total.

    Args:
        logits: [c, v/tp], overwritten with exp(logits - the largest of the whole vocabulary).
        labels: [c] token ids.

    Returns:
        [c] each: the largest logit; the label's, less that; the sum of the exponentials over the whole vocabulary.
    """
    peak = vocabulary.reduce(logits.amax(dim=-1), ReduceOp.MAX)
    logits.sub_(peak.unsqueeze(-1))
    rows, here = vocabulary.local_ids(labels)
    label = logits.gather(-1, rows.unsqueeze(-1)).squeeze(-1).masked_fill(~here, 0.0)
    label, total = vocabulary.reduce(torch.stack((label, logits.exp_().sum(dim=-1)))).unbind()  # one reduction
    return peak, label, total


def argmax_over_shards(logits: Tensor, peak: Tensor, vocabulary: VocabularyShard) -> Tensor:
    """[c] id of the largest logit over all shards, whose value is `peak` [c]; the smallest id wins a tie, as
    `torch.argmax` over the whole does."""
    local = logits.argmax(dim=-1)
    best = logits.gather(-1, local.unsqueeze(-1)).squeeze(-1)
    candidate = torch.where(best == peak, local + vocabulary.start, torch.iinfo(torch.long).max)
    return vocabulary.reduce(candidate, ReduceOp.MIN)


def add_gradients(
    grad: Tensor,
    inputs: Sequence[Tensor],
    cast: Sequence[Tensor],
    input_grads: Sequence[Tensor | None],
    weight_grads: Sequence[Tensor | None],
    part: slice,
) -> None:
    """Products of one chunk's logit gradients [c, v/tp] with the weights and the inputs, into the given tensors.

    Args:
        grad: gradients of the logits of the tokens in `part`.
        inputs, cast: the terms' inputs [n, m_t] and weights [v/tp, m_t], the latter in the dtype of `grad`.
        input_grads: rows `part` are set; None where no gradient is wanted.
        weight_grads: added to; None where no gradient is wanted.
    """
    for x, weight, input_grad, weight_grad in zip(inputs, cast, input_grads, weight_grads, strict=True):
        if input_grad is not None:
            input_grad[part] = grad @ weight
        if weight_grad is None:
            continue
        if weight_grad.dtype == grad.dtype:
            weight_grad.addmm_(grad.t(), x[part].to(grad.dtype))
        else:  # a product of the weight's whole size in the other dtype would be larger than the chunk
            rows = x[part].to(grad.dtype)
            for start in range(0, weight_grad.shape[0], _ROWS_OF_MIXED_PRODUCTS):
                block = slice(start, start + _ROWS_OF_MIXED_PRODUCTS)
                weight_grad[block] += grad[:, block].t() @ rows
