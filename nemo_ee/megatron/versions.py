# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's versions: the supported ones, and every difference between them that this package meets.

0.15        `GPTModel._preprocess` returns more values, `_forward_mlp` takes more: `hidden, rotary, *_`, keywords
0.15 alone  the class of a checkpoint's `.metadata`: checkpoint/restricted_pickle.py
0.18        the MLP of a layer spec: `build_mlp`
0.19        the place of a checkpoint's unsharded part: checkpoint/distributed_checkpoint.py
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch import nn

OLDEST, NEWEST = (0, 13), (0, 19)


def refuse_unsupported_version() -> None:
    """Check the installed Megatron-core before anything of it is imported.

    Raises:
        ImportError: Megatron-core is missing, or its version is not supported.
    """
    try:
        found = version("megatron-core")
    except PackageNotFoundError:
        return  # not installed as a package: a checkout of Megatron-LM on the path, or nothing; the import says which
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or not OLDEST <= tuple(map(int, numbers.groups())) <= NEWEST:
        first, last = (".".join(map(str, numbers)) for numbers in (OLDEST, NEWEST))
        raise ImportError(
            f"megatron-core {found} is not supported, {first} to {last} are: pip install "
            f"'megatron-core~={first}.0' (with NeMo) or 'megatron-core~={last}.0' (without)",
            name="megatron.core",
        )


def build_mlp(spec: Any, config: TransformerConfig) -> nn.Module:
    """The MLP of a layer spec.

    Args:
        spec: `layer_spec.submodules.mlp`.
    """
    from megatron.core import parallel_state
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module

    if isinstance(spec, ModuleSpec):
        return build_module(spec, config=config, tp_group=parallel_state.get_tensor_model_parallel_group())
    # 0.19: a partial of `MLP.as_mlp_submodule`, which takes a collection of groups.
    from megatron.core.process_groups_config import ProcessGroupCollection

    return spec(config=config, pg_collection=ProcessGroupCollection.use_mpu_process_groups(), is_mtp_layer=False)
