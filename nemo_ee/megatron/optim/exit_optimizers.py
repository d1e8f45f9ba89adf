# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""One optimizer per exit, seen by Lightning and NeMo as a single one.

Exits are independent: each has its own optimizer, its own gradient clipping and its own learning rate, so tuning some
together gives what tuning them alone gives, and no collective joins two pipeline stages in a step. Everything that is
saved is keyed by the exit's name, so it survives any change of layout; Megatron stores optimizer groups by their index
on rank 0, which a stage with other exits could not read back.

`ExitOptimizer` steps fp32 parameters. fp32 copies of bf16 parameters, and state that data-parallel ranks share out,
are in `distributed_exit_optimizer`; what is saved has the same keys and shapes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from nemo_ee.megatron.model.exit_head import ExitHead
from nemo_ee.megatron.optim.exit_gradients import (
    all_reduce_flat,
    counted_once,
    gradient_norms,
    mean_scale,
    scale_down,
    sees_part_of_sequence,
)

logger = logging.getLogger(__name__)

_SCALARS = ("lr", "weight_decay", "step")  # scalars of each exit, stored as one small tensor under its name


@dataclass
class ExitOptimizer:
    """An exit's optimizer and the parameters it steps.

    Attributes:
        name: the exit's name.
        parameters: trainable parameters by their key in the exit's sharded state dict.
        optimizer: any torch optimizer whose per-parameter state consists of tensors; it counts its steps for each
            parameter, as torch's do, or for each group, as Apex's do.
    """

    name: str
    parameters: dict[str, Parameter]
    optimizer: torch.optim.Optimizer

    def holders(self) -> ProcessGroup:
        """The ranks that hold a part of this entry, one data-parallel replica of it: the tensor-parallel group."""
        return parallel_state.get_tensor_model_parallel_group()

    def rank_of_scalars(self) -> tuple[int, ...]:
        """Replica id of what is stored once for the whole entry."""
        return (
            0,
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_data_parallel_rank(with_context_parallel=True),
        )

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        for parameter in self.parameters.values():  # not the optimizer's own: Apex's takes no argument
            if set_to_none or parameter.grad is None:
                parameter.grad = None
            else:
                parameter.grad.zero_()

    def reduce_gradients(self, counted: Tensor, *, nominal: float) -> None:
        """Sum gradients over data parallelism (and, for replicated parameters, sequence parallelism); make a mean.

        Args:
            counted: [m] fp32, first the sum of the tokens' weights in this rank's microbatches; summed in place over
                the data-parallel group together with whatever else it carries.
            nominal: the factor 1/nominal that the gradients already carry.
        """
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        split = [p.grad for p in self.parameters.values() if p.grad is not None and sees_part_of_sequence(p)]
        if split:
            all_reduce_flat(split, group=parallel_state.get_tensor_model_parallel_group())
        if parallel_state.get_data_parallel_world_size() > 1:
            all_reduce_flat([*gradients, counted], group=parallel_state.get_data_parallel_group())
        scale = mean_scale(counted, nominal)
        for gradient in gradients:
            gradient.mul_(scale)

    def gradients_counted_once(self) -> list[Tensor]:
        """This rank's gradients, ready to be stepped with, for the norm over `holders()`."""
        return counted_once(self.parameters.values())

    def scale_gradients(self, max_norm: float, norm: float) -> None:
        """Scale the gradients so that their norm, which is `norm` over all holders, becomes at most `max_norm`."""
        scale_down([parameter for parameter in self.parameters.values() if parameter.grad is not None], max_norm, norm)

    def step(self) -> None:
        """Step the parameters with the gradients as they are."""
        self.optimizer.step()

    def whole_state(self) -> dict[str, dict[str, Tensor]]:
        """The state this rank saves: parameter key -> {name: tensor of the parameter's shape on this rank}.

        Every data-parallel rank of the exit must call it.
        """
        return {key: tensor_state(self.optimizer, parameter) for key, parameter in self.parameters.items()}

    def load_whole_state(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take back what `whole_state` gave. Every data-parallel rank of the exit must call it."""
        for key, values in self.whole_state().items():
            for name, value in values.items():
                value.copy_(saved[key][name])

    def shard_to_save(self, shard: ShardedTensor | ShardedTensorFactory) -> ShardedTensor | ShardedTensorFactory:
        """The parameter's shard with the replica id of its optimizer state, which decides the rank that saves it. By
        default the shard as it is."""
        return shard


class ExitOptimizers(torch.optim.Optimizer):
    """The optimizers of a stage's exits as one. On a stage without exits it holds an empty parameter and steps
    nothing.

    Args:
        exits: this stage's exit optimizers.
        max_norm: gradient clipping per exit, 0 for none.
    """

    def __init__(self, exits: Iterable[ExitOptimizer], *, max_norm: float = 0.0) -> None:
        self.exits = list(exits)
        self.max_norm = max_norm
        self.grad_norms: dict[str, float] = {}  # norms of the last step, before clipping
        self._clipped = False
        # torch refuses an empty list, NeMo reads param_groups[0]["lr"]; both are satisfied on stages without exits.
        groups = [group for exit in self.exits for group in exit.optimizer.param_groups]
        super().__init__(groups or [{"params": [Parameter(torch.zeros(0))], "lr": 0.0}], {})
        if self.exits:
            self.param_groups = groups  # the very dicts of the inner optimizers: a scheduler's lr reaches them

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clear the gradients of every exit.

        Their memory is kept: it is needed again in every step, and giving it back leaves holes between the
        temporaries, which made peak memory grow with the number of exits.
        """
        for exit in self.exits:
            exit.zero_grad(set_to_none=set_to_none)

    def clip_gradients(self) -> None:
        """Clip each exit's gradients; `step` does it unless it has been done since the last step."""
        if not self._clipped:
            norms = gradient_norms([(exit.gradients_counted_once(), exit.holders()) for exit in self.exits])
            self.grad_norms = {exit.name: norm for exit, norm in zip(self.exits, norms, strict=True)}
            for exit, norm in zip(self.exits, norms, strict=True):
                exit.scale_gradients(self.max_norm, norm)
        self._clipped = True

    def step_values(self, loss_weights: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Clip the gradients; return the loss weight, learning rate and gradient norm of each exit in the coming step.

        Args:
            loss_weights: weights of all the stage's exits, those with nothing to train too.

        Returns:
            exit name -> {"loss_weight", "lr", "grad_norm"}, the last two only for exits that train something.
        """
        self.clip_gradients()
        values: dict[str, dict[str, float]] = {name: {"loss_weight": value} for name, value in loss_weights.items()}
        for exit in self.exits:
            if exit.name not in values:  # the backbone
                continue
            values[exit.name] |= {
                "lr": exit.optimizer.param_groups[0]["lr"],
                "grad_norm": self.grad_norms[exit.name],
            }
        return values

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Run the closure (which fills the gradients), clip each exit's gradients, step each exit.

        An exit whose gradients are not finite keeps its weights and its optimizer state.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.clip_gradients()
        self._clipped = False
        for exit in self.exits:
            norm = self.grad_norms[exit.name]
            if math.isfinite(norm):
                exit.step()
            else:  # every rank that holds a part of the exit sees the same norm
                logger.warning("exit %s: gradient norm %s, its step is left out", exit.name, norm)
        return loss

    def state_dict(self) -> dict:
        """State by exit name; distributed checkpoints use `sharded_state_dict`."""
        return {"exits": {exit.name: exit.optimizer.state_dict() for exit in self.exits}}

    def sharded_state_dict(self, exit_shards: Mapping[str, object]) -> dict:
        """Optimizer state for a distributed checkpoint, keyed by exit name.

        Args:
            exit_shards: the exits' sharded state dict, keys `exits.<name>.<parameter>`.

        Returns:
            {"exits": {name: {"scalars": ShardedTensor, parameter key: {state name: ShardedTensor}}}}
        """
        return {"exits": {exit.name: self._sharded_exit(exit, exit_shards) for exit in self.exits}}

    def _sharded_exit(self, exit: ExitOptimizer, exit_shards: Mapping[str, object]) -> dict:
        fill_state(exit.optimizer)
        groups = exit.optimizer.param_groups
        group = next((group for group in groups if group.get("decays", True)), groups[0])
        steps = _steps_of(exit.optimizer)
        scalars = torch.tensor([group["lr"], group["weight_decay"], steps], dtype=torch.float64)
        key = f"optimizer.{exit.name}.scalars"
        state: dict = {"scalars": ShardedTensor.from_rank_offsets(key, scalars, replica_id=exit.rank_of_scalars())}
        for key, values in exit.whole_state().items():
            shard = exit.shard_to_save(exit_shards[key])
            state[key] = {
                name: make_sharded_optimizer_tensor(shard, value, prefix=f"optimizer.{name}")
                for name, value in values.items()
            }
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Take the state back, from `state_dict` or from a loaded `sharded_state_dict`."""
        for exit in self.exits:
            saved = state_dict["exits"].get(exit.name)
            if saved is None:
                raise ValueError(
                    f"the checkpoint holds no optimizer state of exit {exit.name!r} (it has "
                    f"{sorted(state_dict['exits'])}); resume with the exits it was saved with"
                )
            if "param_groups" in saved:
                exit.optimizer.load_state_dict(saved)
                continue
            scalars = dict(zip(_SCALARS, saved["scalars"].tolist(), strict=True))
            fill_state(exit.optimizer)
            for group in exit.optimizer.param_groups:
                group["lr"] = scalars["lr"]
                if group.get("decays", True):
                    group["weight_decay"] = scalars["weight_decay"]
            exit.load_whole_state(saved)
            _set_steps(exit.optimizer, scalars["step"])


def tensor_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The optimizer's tensors of one parameter, its step count left out."""
    return {name: value for name, value in optimizer.state[parameter].items() if name != "step"}


def fill_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer allocate its state without moving a weight: one step with lr 0 and no decay, then undone."""
    if all(optimizer.state.get(p) for group in optimizer.param_groups for p in group["params"]):
        return
    kept = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    gradients = {p: p.grad for group in optimizer.param_groups for p in group["params"]}
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.0, 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group, (lr, weight_decay) in zip(optimizer.param_groups, kept, strict=True):
        group["lr"], group["weight_decay"] = lr, weight_decay
        for parameter in group["params"]:
            parameter.grad = gradients[parameter]
            for value in optimizer.state[parameter].values():
                if isinstance(value, Tensor):
                    value.zero_()
    _set_steps(optimizer, 0.0)


def _steps_of(optimizer: torch.optim.Optimizer) -> float:
    """Steps taken, which an optimizer counts for each parameter or for each group."""
    counts = [float(values["step"]) for values in optimizer.state.values() if "step" in values]
    counts += [float(group["step"]) for group in optimizer.param_groups if "step" in group]
    return max(counts, default=0.0)


def _set_steps(optimizer: torch.optim.Optimizer, steps: float) -> None:
    for holder in [*optimizer.state.values(), *optimizer.param_groups]:
        if "step" in holder:
            old = holder["step"]
            holder["step"] = torch.full_like(old, steps) if isinstance(old, Tensor) else type(old)(steps)


def exit_parameter_groups(head: ExitHead, optim: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An exit's trainable parameters as groups for torch.optim. Matrices decay, norms and biases do not.

    Args:
        head: the exit.
        optim: `model.optim`; the exit's own lr, min_lr and weight_decay win over it.
    """
    exit, sched = head.exit, optim.get("sched") or {}
    lr = optim["lr"] if exit.lr is None else exit.lr
    min_lr = (sched.get("min_lr") or 0.0) if exit.min_lr is None else exit.min_lr
    decay = (optim.get("weight_decay") or 0.0) if exit.weight_decay is None else exit.weight_decay
    trainable = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return parameter_groups(exit.name, trainable, lr=lr, min_lr=min_lr, weight_decay=decay)


def parameter_groups(
    name: str, parameters: Iterable[Parameter], *, lr: float, min_lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for torch.optim: matrices, which decay, and the rest, which does not; empty ones left out."""
    parameters = list(parameters)
    groups = []
    for decays in (True, False):
        of_kind = [parameter for parameter in parameters if (parameter.dim() > 1) == decays]
        settings = {"lr": lr, "max_lr": lr, "min_lr": min_lr, "exit": name, "decays": decays}
        if of_kind:
            groups.append({"params": of_kind, "weight_decay": weight_decay if decays else 0.0, **settings})
    return groups


def optimizer_options(optim: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `model.optim` that are passed to the optimizer."""
    return {key: optim[key] for key in ("betas", "eps", "lr", "weight_decay") if optim.get(key) is not None}
