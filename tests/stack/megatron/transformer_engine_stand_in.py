# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoint keys under Megatron-core's Transformer-Engine spec, on the meta device, with a stand-in for that library
where it is not installed.

    python -m tests.stack.megatron.transformer_engine_stand_in <family>

Transformer Engine needs CUDA, if only to be built (docs/tuning-at-scale.md). The stand-in has the classes that
Megatron derives its layers from, with the parameters that Transformer Engine registers (names and shapes from its
public documentation); every other name that is imported is an empty class or module. Megatron's own code around them,
which makes the keys, is the installed version's. Prints the keys and global shapes of backbone and exits as JSON.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import sys
from types import ModuleType
from typing import Any
from unittest import mock

NAME = "transformer_engine"
SHAPES = {  # of the recorded keys: tests/data/exit_checkpoint_keys.txt
    "llama": dict(
        num_layers=3, hidden_size=40, ffn_hidden_size=56, num_attention_heads=6, num_query_groups=2, kv_channels=10,
        vocab_size=133, max_position_embeddings=32,
    ),
    "gpt2": dict(
        num_layers=3, hidden_size=24, ffn_hidden_size=44, num_attention_heads=4, num_query_groups=4, kv_channels=6,
        vocab_size=131, max_position_embeddings=32, layer_norm=True, hidden_act="gelu", learned_positions=True,
        tied=True,
    ),
}  # fmt: skip


class StandIn(ModuleType):
    """A module of Transformer Engine: classes that were put into it; any other name is an empty class or module."""

    __path__: list[str] = []
    __version__ = "2.9.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if not name[0].isupper():
            return importlib.import_module(f"{self.__name__}.{name}")
        made = type(name, (), {"__module__": self.__name__})
        setattr(self, name, made)
        return made

    def __call__(self, *args: Any, **others: Any) -> tuple[None, None]:
        """As a function: a pair, which is what Megatron unpacks where it calls one to build a block."""
        return None, None


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module of Transformer Engine."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] != NAME:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def let_real_one_build() -> None:
    """Let the modules of the real Transformer Engine be built without a GPU: they assert one, and need none for it."""
    import torch  # loads the libraries of CUDA that Transformer Engine links to
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    build = TransformerEngineBaseModule.__init__

    def __init__(self, *arguments: Any, **options: Any) -> None:
        with mock.patch.object(torch.cuda, "is_available", lambda: True):
            build(self, *arguments, **options)

    TransformerEngineBaseModule.__init__ = __init__


def install() -> None:
    """Put the stand-in in place; Megatron-core must not be imported yet."""
    assert "megatron.core" not in sys.modules
    sys.meta_path.insert(0, Finder())
    import torch
    import transformer_engine.pytorch as te

    def parameter(*shape: int, device: Any) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.empty(shape, device=device))

    class Linear(torch.nn.Module):
        def __init__(
            self, in_features, out_features, *, bias, parallel_mode=None, tp_size=1, device="meta", **others
        ) -> None:
            super().__init__()
            rows = out_features // tp_size if parallel_mode == "column" else out_features
            columns = in_features // tp_size if parallel_mode == "row" else in_features
            self.weight = parameter(rows, columns, device=device)
            if bias:
                self.bias = parameter(rows, device=device)

        def get_extra_state(self) -> io.BytesIO:
            return io.BytesIO()

        def set_extra_state(self, state: Any) -> None:
            pass

    class LayerNormLinear(Linear):
        def __init__(self, in_features, out_features, *, normalization="LayerNorm", device="meta", **others) -> None:
            super().__init__(in_features, out_features, device=device, **others)
            self.layer_norm_weight = parameter(in_features, device=device)
            if normalization == "LayerNorm":
                self.layer_norm_bias = parameter(in_features, device=device)

    class LayerNorm(torch.nn.Module):
        has_bias = True

        def __init__(self, normalized_shape=None, *, hidden_size=None, device="meta", **others) -> None:
            super().__init__()
            self.weight = parameter(normalized_shape or hidden_size, device=device)
            if self.has_bias:
                self.bias = parameter(normalized_shape or hidden_size, device=device)

    class RMSNorm(LayerNorm):
        has_bias = False

    class DotProductAttention(torch.nn.Module):
        def __init__(self, *args: Any, **others: Any) -> None:
            super().__init__()

    for made in (Linear, LayerNormLinear, LayerNorm, RMSNorm, DotProductAttention):
        setattr(te, made.__name__, made)


def keys(family: str) -> dict[str, list[str]]:
    """`<key> <global shape>` of the backbone's and the exits' tensors."""
    from nemo_ee.exits.config import EarlyExitConfig
    from nemo_ee.exits.placement import place_exits
    from nemo_ee.families.architecture import ALL_LINEARS, Architecture
    from tests.helpers.core_models import ALL_ARCHITECTURES, exit_entry, set_up_groups

    set_up_groups()
    from nemo_ee.checkpoint.megatron_model import stage_of
    from nemo_ee.megatron.model.exit_head_init import local_shards

    biases = ALL_LINEARS if family == "gpt2" else frozenset()
    architecture = Architecture(**SHAPES[family], biases=biases)
    entries = [
        exit_entry(2, kind, init, output, rank=3)
        for kind in ALL_ARCHITECTURES
        for init in ("copy", "random", "lora")
        for output in ("own", "shared", "low_rank")
    ]
    early_exit = EarlyExitConfig.from_mapping({"exits": entries}, num_layers=3)
    placements = place_exits(early_exit.exits, num_layers=3, num_stages=1, full_depth=True)
    model = stage_of(
        architecture, early_exit, placements, transformer_engine=True, vocab_multiple=16,
        use_cpu_initialization=False, init_model_with_meta_device=True,
    )  # fmt: skip
    names = {type(module).__name__ for module in model.decoder.modules()}
    assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention"} <= names, names
    parts = {"backbone": model.backbone_sharded_state_dict(), "exits": model.exit_sharded_state_dict()}
    return {
        part: sorted({f"{shard.key} {list(shard.global_shape)}" for shard in local_shards(shards)})
        for part, shards in parts.items()
    }


if __name__ == "__main__":
    real = importlib.util.find_spec(NAME) is not None
    let_real_one_build() if real else install()
    print(json.dumps(keys(sys.argv[1]) | {"transformer_engine": "real" if real else "stand-in"}))
