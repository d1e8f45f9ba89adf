# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's versions: the supported ones, and every difference between them that this package meets.

    0.15        `GPTModel._preprocess` returns more values: callers unpack `hidden, rotary, *_`
    0.15        Adam of the distributed optimizer: `distributed_adam`
    0.15 alone  class of a checkpoint's `.metadata`: checkpoint/restricted_pickle.py
    0.16        group of a replicated parameter: `_sharded` in model/exit_head.py
    0.16        layers need the data-parallel group in the metadata of a sharded state: `sharding_metadata`
    0.18        MLP of a layer spec: `build_mlp`, `mlp_submodules`
    0.19        optimizers' method that selects the gradients of a norm: optim/exit_gradients.py selects them
    0.19        place of a checkpoint's unsharded part: checkpoint/distributed_checkpoint.py

No other file reads the version.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

OLDEST, NEWEST = (0, 13), (0, 19)


def refuse_unsupported_version() -> None:
    """Check the installed Megatron-core before anything of it is imported.

    Raises:
        ImportError: its version is not supported.
    """
    try:
        found = version("megatron-core")
    except PackageNotFoundError:
        return  # a checkout of Megatron-LM on the path; or nothing, and then the import of Megatron-core fails
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or not OLDEST <= tuple(map(int, numbers.groups())) <= NEWEST:
        first, last = (".".join(map(str, numbers)) for numbers in (OLDEST, NEWEST))
        raise ImportError(
            f"megatron-core {found} is not supported, {first} to {last} are: pip install "
            f"'megatron-core~={first}.0' (with NeMo) or 'megatron-core~={last}.0' (without)",
            name="megatron.core",
        )


def build_mlp(spec: Any, config: TransformerConfig) -> torch.nn.Module:
    """The MLP of a layer spec.

    Args:
        spec: `layer_spec.submodules.mlp`.
    """
    from megatron.core import parallel_state
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module

    if isinstance(spec, ModuleSpec):
        return build_module(spec, config=config, tp_group=parallel_state.get_tensor_model_parallel_group())
    # 0.18: a partial of `MLP.as_mlp_submodule`, which takes a collection of groups.
    from megatron.core.process_groups_config import ProcessGroupCollection

    return spec(config=config, pg_collection=ProcessGroupCollection.use_mpu_process_groups(), is_mtp_layer=False)


def mlp_submodules(spec: Any) -> Any:
    """The submodules of the MLP of a layer spec. Argument as for `build_mlp`."""
    return spec.submodules if hasattr(spec, "submodules") else spec.keywords["submodules"]


def sharding_metadata(metadata: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The metadata that a layer's `sharded_state_dict` needs.

    Args:
        metadata: what the caller got; Megatron's own, or None.
    """
    from megatron.core.transformer import utils

    # 0.16: without it a linear layer ends with "'NoneType' object is not subscriptable".
    complete = getattr(utils, "ensure_metadata_has_dp_cp_group", None)
    return metadata if complete is None else complete(metadata)


def distributed_adam() -> type[torch.optim.Optimizer]:
    """The Adam of Megatron's distributed optimizer, with decoupled weight decay.

    It is Transformer Engine's, else Apex's, else torch's AdamW.
    """
    import torch
    from megatron.core.optimizer.distrib_optimizer import Adam

    # 0.15: without Transformer Engine and Apex it is torch's Adam, whose weight decay is part of the gradient.
    return torch.optim.AdamW if Adam is torch.optim.Adam else Adam
