# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The exit heads of an exported model as torch modules: parameters under the names of the directory, without forward.

They are modules of usual classes, so that transformers initialises, shards and adapts them as it does the backbone's.
"""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from nemo_ee.families.tensors import Stored
from nemo_ee.runtime.exported_model import ExportedModel
from nemo_ee.runtime.loader import stored_tensors

_PREFIX = "exit_heads."


def exit_modules(exported: ExportedModel) -> nn.Module:
    """The modules under `exit_heads`.

    Raises:
        ValueError: an exit's name cannot be that of a torch module.
    """
    leaves: dict[str, dict[str, Stored]] = {}
    for canonical in stored_tensors(exported).values():
        for stored in canonical.stored:
            if stored.name.startswith(_PREFIX):
                path, kind = stored.name.removeprefix(_PREFIX).rsplit(".", 1)
                leaves.setdefault(path, {})[kind] = stored
    root = nn.Module()
    for exit in exported.exits:
        if hasattr(root, exit.name):
            raise ValueError(
                f"exit {exit.name!r}: torch has a method of this name, so transformers cannot load it; decode the "
                "directory with nemo_ee.runtime, or load the backbone without trust_remote_code"
            )
    for path, own in leaves.items():
        *folders, leaf = path.split(".")
        parent = root
        for folder in folders:
            if folder not in parent._modules:
                parent.add_module(folder, nn.Module())
            parent = parent._modules[folder]
        parent.add_module(leaf, _leaf(own["weight"], "bias" in own))
    return root


def _leaf(weight: Stored, bias: bool) -> nn.Module:
    if len(weight.shape) == 1:
        return nn.LayerNorm(weight.shape) if bias else nn.RMSNorm(weight.shape)
    if weight.transposed:  # Conv1D always has a bias, as every linear of GPT-2
        return Conv1D(weight.shape[1], weight.shape[0])
    return nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
