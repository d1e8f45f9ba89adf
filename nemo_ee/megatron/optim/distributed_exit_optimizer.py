# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""An exit's optimizer on Megatron-core's own classes: fp32 main weights, and state shared out over data parallelism.

    main weights   NeMo's `megatron_amp_O2`: bf16 parameters, gradients summed over microbatches and ranks in fp32
                   buffers (`parameter.main_grad`), an fp32 copy that is stepped and then rounded back
    sharded        NeMo's `mcore_distributed_optim` (ZeRO stage 1, arXiv 1910.02054): gradients are reduce-scattered,
                   each data-parallel rank steps 1/DP of the elements, weights are gathered

One `DistributedDataParallel` and one Megatron optimizer per exit, so an exit's norm goes over its tensor- and
data-parallel ranks only. Megatron saves such state by group index and flat ranges; here it is saved as whole
parameters, each by one data-parallel rank, under the keys of an unsharded optimizer: any layout and either kind loads.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from nemo_ee.megatron.model.exit_head import ExitHead
from nemo_ee.megatron.optim.exit_gradients import (
    all_reduce_flat,
    counted_once,
    mean_scale,
    scale_down,
    sees_part_of_sequence,
)
from nemo_ee.megatron.optim.exit_optimizers import ExitOptimizer, tensor_state

MAIN_WEIGHT = "fp32_param"  # name of the fp32 copy in checkpoints, Megatron's own
_ADAM_STATE = ("exp_avg", "exp_avg_sq")  # a rank that steps no element of a parameter needs the names too


class MegatronExitOptimizer(ExitOptimizer):
    """An exit whose gradients live in Megatron's buffers.

    Args:
        head: the exit, whose trainable parameters are all fp32 or all bf16. With `sharded` their storage moves into
            one contiguous buffer.
        parameters: trainable parameters by their key in the exit's sharded state dict.
        optimizer: torch's or a fused Adam over these parameters; it ends up stepping fp32 copies or shards of them.
        sharded: share the optimizer state out over data parallelism. Needs the Adam that Megatron-core itself picks.
    """

    def __init__(
        self,
        head: ExitHead,
        parameters: dict[str, Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        sharded: bool,
    ) -> None:
        dtypes = {parameter.dtype for parameter in parameters.values()}
        assert len(dtypes) == 1, f"exit {head.exit.name} mixes {dtypes}; Megatron keeps one buffer for each"
        (dtype,) = dtypes
        self.sharded, self.has_main_weights = sharded, dtype is not torch.float32
        # The sum over data parallelism is divided by the tokens afterwards, so Megatron must not make a mean of it.
        config = copy.copy(head.config)
        config.calculate_per_token_loss = True
        buffers = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=sharded)
        self.ddp = DistributedDataParallel(config, buffers, head)
        options = OptimizerConfig(
            optimizer="adam",
            bf16=self.has_main_weights,
            params_dtype=dtype,
            use_distributed_optimizer=sharded,
            clip_grad=0.0,
        )
        self.megatron = _distributed(optimizer, options, self.ddp) if sharded else _half(optimizer, options)
        super().__init__(head.exit.name, parameters, self.megatron.optimizer)

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        """Zero the gradient buffers."""
        self.ddp.zero_grad_buffer()
        self.megatron.zero_grad(set_to_none=set_to_none)

    def reduce_gradients(self, counted: Tensor, *, nominal: float) -> None:
        """As `ExitOptimizer.reduce_gradients`; with `sharded` a rank's sums are right for the part it steps only."""
        split = [p.main_grad for p in self.parameters.values() if sees_part_of_sequence(p)]
        if split:
            all_reduce_flat(split, group=parallel_state.get_tensor_model_parallel_group())
        torch.distributed.all_reduce(counted, group=parallel_state.get_data_parallel_group())
        self.ddp.finish_grad_sync()
        self.ddp.scale_gradients(mean_scale(counted, nominal))

    def holders(self) -> ProcessGroup:
        """With `sharded` data-parallel ranks hold parts too."""
        if self.sharded:
            return parallel_state.get_tensor_and_data_parallel_group()
        return super().holders()

    @torch.no_grad()
    def gradients_counted_once(self) -> list[Tensor]:
        """Gradients of the main weights or of this rank's shards, which are made here."""
        self.megatron.prepare_grads()
        return counted_once(self.megatron.get_parameters())

    @torch.no_grad()
    def scale_gradients(self, max_norm: float, norm: float) -> None:
        """As `ExitOptimizer.scale_gradients`, of the main weights or shards."""
        scale_down(self.megatron.get_parameters(), max_norm, norm)

    def step(self) -> None:
        """Step the main weights or this rank's shards, then bring the parameters up to date on every rank."""
        self.megatron.step_with_ready_grads()

    def whole_state(self) -> dict[str, dict[str, Tensor]]:
        """As `ExitOptimizer.whole_state`, with the fp32 copies. With `sharded`, parameters of which this rank is the
        saver, in host memory; one parameter's state at a time is put together on the device."""
        if not self.sharded:
            return {key: self._state(parameter.main_param) for key, parameter in self.parameters.items()}
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        savers, state = self._savers(), {}
        for key, parameter in self.parameters.items():
            part, saver = self._part(parameter), savers[key]
            for name in self._state_names():
                whole = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
                if part is not None:
                    main, where = part
                    whole.view(-1)[where] = self._state(main)[name]
                # Every element is non-zero on at most one rank, so the sum is exact.
                torch.distributed.reduce(whole, torch.distributed.get_global_rank(group, saver), group=group)
                if saver == group.rank():
                    state.setdefault(key, {})[name] = whole.cpu()
        return state

    @torch.no_grad()
    def load_whole_state(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """As `ExitOptimizer.load_whole_state`; with `sharded` the savers send each rank its part."""
        if not self.sharded:
            super().load_whole_state(saved)
            return
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        savers = self._savers()
        for key, parameter in self.parameters.items():
            part, saver = self._part(parameter), savers[key]
            for name in self._state_names():
                whole = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
                if saver == group.rank():
                    whole.copy_(saved[key][name])
                torch.distributed.broadcast(whole, torch.distributed.get_global_rank(group, saver), group=group)
                if part is not None:
                    main, where = part
                    self._state(main)[name].copy_(whole.view(-1)[where])

    def shard_to_save(self, shard: ShardedTensor | ShardedTensorFactory) -> ShardedTensor | ShardedTensorFactory:
        """With `sharded` only the saver has the tensor: it counts as the first data-parallel rank."""
        return replace(shard, replica_id=(*shard.replica_id[:-1], 0)) if self.sharded else shard

    def _state(self, main: Tensor) -> dict[str, Tensor]:
        """State of a main weight or shard; the weight itself where it is a copy."""
        state = tensor_state(self.optimizer, main)
        return {**state, MAIN_WEIGHT: main} if self.has_main_weights else state

    def _state_names(self) -> tuple[str, ...]:
        return (*_ADAM_STATE, MAIN_WEIGHT) if self.has_main_weights else _ADAM_STATE

    def _savers(self) -> dict[str, int]:
        """Parameter key -> data-parallel rank that saves its state; largest first, each to the least loaded rank."""
        load = [0] * parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        savers = {}
        for key, parameter in sorted(self.parameters.items(), key=lambda item: (-item[1].numel(), item[0])):
            savers[key] = load.index(min(load))
            load[savers[key]] += parameter.numel()
        return savers

    def _part(self, parameter: Parameter) -> tuple[Tensor, slice] | None:
        """(the tensor this rank's optimizer steps, its elements of the flattened parameter), None for nothing."""
        place = self.megatron.model_param_group_index_map.get(parameter)
        if place is None:
            return None
        elements = self.megatron._get_model_param_range_map(parameter)["param"]
        return self.optimizer.param_groups[place[0]]["params"][place[1]], slice(elements.start, elements.end)


def _half(optimizer: torch.optim.Optimizer, options: OptimizerConfig) -> Float16OptimizerWithFloat16Params:
    return Float16OptimizerWithFloat16Params(optimizer, options, None, lambda *_: None)


def _distributed(
    optimizer: torch.optim.Optimizer, options: OptimizerConfig, ddp: DistributedDataParallel
) -> DistributedOptimizer:
    # Built without gradients, the shards are plain views; torch would warn of every look at their `grad` otherwise.
    with torch.no_grad():
        return DistributedOptimizer(
            optimizer,
            options,
            None,
            lambda *_: None,
            model_chunks=[ddp],
            per_model_buffers={0: ddp.buffers},
            data_parallel_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            data_parallel_group_gloo=None,  # read by Megatron's own checkpoints only
            data_parallel_group_idx=parallel_state.get_tensor_model_parallel_rank(),
            distributed_optimizer_instance_id=0,
        )
