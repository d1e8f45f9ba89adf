# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Gradient reduction, norm and clipping for one optimizer (an exit's, or the backbone's)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

_BUCKET_BYTES = 512 * 2**20  # bytes of gradients copied for one collective


def mean_scale(counted: Tensor, nominal: float) -> Tensor:
    """Factor that turns gradients scaled by 1/nominal into those of a mean over the summed weights; 0 without
    weight."""
    weight = counted[0]
    return torch.where(weight > 0, nominal / weight, torch.zeros_like(weight))


def scale_down(parameters: Iterable[Tensor], max_norm: float, norm: float) -> None:
    """Scale `.grad` in place so that a total norm of `norm` becomes at most `max_norm`; 0 scales nothing.

    torch's, because Megatron's makes a copy of every gradient where Apex and Transformer Engine are absent.
    """
    if max_norm > 0 and norm > max_norm:
        clip_grads_with_norm_(parameters, max_norm, torch.tensor(norm))


def sees_part_of_sequence(parameter: Parameter) -> bool:
    """Whether a replicated parameter's gradient on this rank is only a part of the sum over tensor parallelism."""
    partial = getattr(parameter, "sequence_parallel", False) or getattr(parameter, "sees_part_of_heads", False)
    return partial and parallel_state.get_tensor_model_parallel_world_size() > 1


def all_reduce_flat(tensors: list[Tensor], group: ProcessGroup) -> None:
    """Sum over the group in place, many tensors in one collective: as many as make up `_BUCKET_BYTES`."""
    bucket: list[Tensor] = []
    size = 0
    for index, tensor in enumerate(tensors):
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
        if size < _BUCKET_BYTES and index + 1 < len(tensors):
            continue
        if len(bucket) == 1 and tensor.is_contiguous():  # an output weight is often a bucket of its own
            torch.distributed.all_reduce(tensor, group=group)
        else:
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            torch.distributed.all_reduce(flat, group=group)
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))
        bucket, size = [], 0


def counted_once(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients this rank contributes to the global norm. A parameter that several ranks hold (replicated over
    tensor parallelism, or shared between stages) counts on one of them only."""
    return [
        p.grad
        for p in parameters
        if p.grad is not None and param_is_not_tensor_parallel_duplicate(p) and param_is_not_shared(p)
    ]


@torch.no_grad()
def gradient_norms(entries: Sequence[tuple[Sequence[Tensor], ProcessGroup]]) -> list[float]:
    """Norm of each entry's gradients over the ranks that hold a part of it.

    One reduction for each group and one copy to the host, however many entries there are. Every rank of an entry's
    group must call it, with the entries of that group in the same order.

    Args:
        entries: (this rank's gradients, fp32, each element on one rank only; the ranks that hold a part).
    """
    if not entries:
        return []
    squares = [get_total_norm(list(gradients)).float().square() if gradients else None for gradients, _ in entries]
    device = next((gradients[0].device for gradients, _ in entries if gradients), None)
    members: dict[ProcessGroup, list[int]] = {}
    for index, (_, group) in enumerate(entries):
        members.setdefault(group, []).append(index)
    order, sums = [], []
    for group, indices in members.items():
        zero = torch.zeros((), device=device or _device_of(group))
        total = torch.stack([zero if squares[index] is None else squares[index] for index in indices])
        if group.size() > 1:
            torch.distributed.all_reduce(total, group=group)
        order, sums = [*order, *indices], [*sums, total]
    norms = torch.cat(sums).sqrt().tolist()
    return [norm for _, norm in sorted(zip(order, norms, strict=True))]


def _device_of(group: ProcessGroup) -> str:
    """The device on which a group reduces. This rank may hold no gradient to take it from."""
    return "cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu"
