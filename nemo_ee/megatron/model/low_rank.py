# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Low-rank updates (LoRA, arXiv 2106.09685) of Megatron's tensor-parallel linears and of the output projection.

y = W x + B A x with W frozen, A: [r, in], B: [out, r]. B starts at zero, so the update starts at zero.

    column-parallel W (rows sharded):     A replicated, B sharded like W's rows
    row-parallel W (columns sharded):     A sharded like W's columns, B replicated
"""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear


def new_parameter(rows: int, columns: int, *, config: TransformerConfig, sharded_axis: int | None) -> Parameter:
    """An uninitialised parameter with Megatron's tensor-parallel attributes set.

    Args:
        rows, columns: the local shape.
        config: gives dtype (`params_dtype`).
        sharded_axis: axis sharded over the tensor-parallel group; None for a replicated parameter, whose gradient is
            summed over that group when sequence parallelism gives each rank only a part of the sequence.
    """
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
    parameter = Parameter(torch.zeros(rows, columns, dtype=config.params_dtype, device=device))
    if sharded_axis is None:
        parameter.sequence_parallel = config.sequence_parallel
    else:
        tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, sharded_axis, 1)
    return parameter


def spread_over_tensor_parallel(hidden: Tensor, config: TransformerConfig) -> Tensor:
    """Input of a vocabulary- or row-sharded product: the whole sequence on every rank, gradients summed back.

    Args:
        hidden: [s, b, n], or [s/tp, b, n] under sequence parallelism.

    Returns:
        [s, b, n] on every tensor-parallel rank.
    """
    if config.sequence_parallel:
        return tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    return tensor_parallel.copy_to_tensor_model_parallel_region(hidden)


class LowRankLinear(MegatronModule):
    """A frozen tensor-parallel linear of Megatron's plus a trained low-rank update; same call, same checkpoint keys.

    Args:
        base: the linear; its parameters are frozen.
        rank: r.
        config: transformer config.
        gated: the rows of `base` are [gate; up] of a gated MLP, sharded each for itself.
    """

    def __init__(
        self,
        base: ColumnParallelLinear | RowParallelLinear,
        *,
        rank: int,
        config: TransformerConfig,
        gated: bool = False,
    ) -> None:
        super().__init__(config=config)
        self.base = base.requires_grad_(False)
        self.by_column = isinstance(base, ColumnParallelLinear)
        self.gated = gated
        rows, columns = base.weight.shape
        self.low_rank_a = new_parameter(rank, columns, config=config, sharded_axis=None if self.by_column else 1)
        self.low_rank_b = new_parameter(rows, rank, config=config, sharded_axis=0 if self.by_column else None)

    def forward(self, hidden: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Same contract as the wrapped linear: returns (output, bias or None)."""
        output, bias = self.base(hidden, *args, **kwargs)
        update = linear(hidden, self.low_rank_a)
        if self.by_column:
            update = spread_over_tensor_parallel(update, self.config)
        elif self.config.sequence_parallel:
            update = tensor_parallel.reduce_scatter_to_sequence_parallel_region(update)
        else:
            update = tensor_parallel.reduce_from_tensor_model_parallel_region(update)
        return output + linear(update, self.low_rank_b), bias

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + B A, this rank's shard: the whole inner dimension r lies on every rank."""
        return self.base.weight + self.low_rank_b @ self.low_rank_a

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The base's keys unchanged, and `low_rank_a`, `low_rank_b` beside them."""
        sharded = self.base.sharded_state_dict(prefix, sharded_offsets, metadata)
        own = {"low_rank_a": self.low_rank_a, "low_rank_b": self.low_rank_b}
        axes = {"low_rank_b": 0} if self.by_column else {"low_rank_a": 1}
        own = make_sharded_tensors_for_checkpoint(own, prefix, axes, sharded_offsets)
        if self.gated:
            key = f"{prefix}low_rank_b"
            own[key] = apply_swiglu_sharded_factory(own[key], sharded_offsets)
        return {**sharded, **own}


def add_low_rank_updates(module: MegatronModule, *, rank: int, config: TransformerConfig) -> None:
    """Wrap every tensor-parallel linear inside `module` (an MLP or a transformer layer on the local spec)."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (ColumnParallelLinear, RowParallelLinear)) and not isinstance(parent, LowRankLinear):
                gated = name == "linear_fc1" and config.gated_linear_unit
                setattr(parent, name, LowRankLinear(child, rank=rank, config=config, gated=gated))
