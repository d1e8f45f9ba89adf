# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Reads a TensorRT-LLM unified checkpoint back into `nemo_ee.runtime`'s model: all ranks' shards made whole again.

Written from the format's description, not from the tables the export writes by (`tensorrt_llm_layout`), so that a
fault of those shows. What several ranks hold whole has to be the same on all of them, and padding has to be zeros.

    attention.qkv     [Q; K; V] of each rank's heads; a key-value head that several ranks hold counts once
    dense, mlp.proj   columns side by side         mlp.fc, mlp.gate, lm_head    rows one below the other
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_ee.runtime.config import ExitEntry, RuntimeConfig
from nemo_ee.runtime.loader import model_of_files
from nemo_ee.runtime.model import RuntimeModel
from nemo_ee.runtime.names import NAMES

# TensorRT-LLM's GELU is the tanh approximation.
_ACTIVATIONS = {"silu": "silu", "relu": "relu", "gelu": "gelu_tanh"}
_KINDS = ("weight", "bias")


def load_checkpoint(folder: Path) -> RuntimeModel:
    """The model of a checkpoint directory with the exits carried along, computing in fp32.

    Raises:
        ValueError: files that are missing, damaged or do not fit together, or ranks that contradict each other.
    """
    with ExitStack() as stack:
        try:
            values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            files = [
                stack.enter_context(safe_open(folder / f"rank{rank}.safetensors", framework="pt", device="cpu"))
                for rank in range(values["mapping"]["world_size"])
            ]
            config = _config(values, has_output="lm_head.weight" in files[-1].keys())
            shards = _MergedShards(config, values, files)
            return model_of_files(config, dict.fromkeys(shards.tensors, shards), folder)
        except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as fault:
            raise ValueError(f"{folder}: cannot be read ({fault!r})") from fault


def _config(values: dict[str, Any], *, has_output: bool) -> RuntimeConfig:
    """The runtime's description: a Llama, or with learned positions an OPT, whose first position is row 0 here.

    Args:
        has_output: the files hold an output projection, which for a tied model is a copy of the embeddings.
    """
    llama = values["position_embedding_type"] == "rope_gpt_neox"
    scaling = values.get("rotary_scaling") or {}
    qwen = values["architecture"].startswith("Qwen2")
    plain_bias = values["architecture"].startswith("OPT") or bool(values.get("bias"))
    table = (values.get("early_exit") or {}).get("exits", [])
    exits = [ExitEntry(row["name"], row["layer"], row["architecture"], row["output"] == "own") for row in table]
    return RuntimeConfig(
        family="llama" if llama else "opt",
        num_layers=values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        ffn_hidden_size=values["intermediate_size"],
        num_heads=values["num_attention_heads"],
        num_kv_heads=values["num_key_value_heads"],
        head_dim=values["head_size"],
        vocab_size=values["vocab_size"],
        max_positions=values["max_position_embeddings"],
        activation=_ACTIVATIONS[values["hidden_act"]],
        layer_norm=not llama,
        norm_affine=True,
        norm_epsilon=values["norm_epsilon"],
        qkv_bias=values["attn_bias"] if llama else plain_bias,
        proj_bias=(values["attn_bias"] and not qwen) if llama else plain_bias,
        mlp_bias=values["mlp_bias"] if llama else plain_bias,
        tied=not has_output,
        rope={"rope_type": "default", **scaling, "base": values["rotary_base"]} if llama else None,
        position_offset=0,
        dtype=values["dtype"],
        exits=tuple(sorted(exits, key=lambda exit: exit.point.stop)),
    )


class _MergedShards:
    """All ranks' files as one that names its tensors as a directory of the config's family does.

    Attributes:
        tensors: name -> what makes the tensor.
    """

    def __init__(self, config: RuntimeConfig, values: dict[str, Any], files: list[Any]) -> None:
        self.config, self.files, self.family = config, files, NAMES[config.family]
        self.tp, self.pp = values["mapping"]["tp_size"], values["mapping"]["pp_size"]
        self._names = [set(file.keys()) for file in files]
        self.tensors: dict[str, Callable[[], Tensor]] = {}
        per_stage, last, family = config.num_layers // self.pp, self.pp - 1, self.family
        self._add(self._whole, family.embedding, "transformer.vocab_embedding.weight", 0)
        if family.positions is not None:
            self._add(self._whole, family.positions, "transformer.position_embedding.weight", 0)
        for index in range(config.num_layers):
            prefix = f"transformer.layers.{index % per_stage}."
            self._add_layer(family.layer.format(index), prefix, index // per_stage)
        self._add_both(self._whole, family.final_norm, "transformer.ln_f", last)
        self._add(self._vocabulary, "lm_head.weight", "lm_head.weight", last)
        for exit in config.exits:
            prefix, stage = f"exit_heads.{exit.name}.", (exit.layer - 1) // per_stage
            self._add_layer(f"{prefix}layer.", f"{prefix}layer.", stage)
            self._add_mlp(prefix, prefix, stage)
            self._add_both(self._whole, f"{prefix}norm", f"{prefix}norm", stage)
            self._add(self._vocabulary, f"{prefix}unembed.weight", f"{prefix}unembed.weight", stage)

    def get_tensor(self, name: str) -> Tensor:
        """As of a safetensors file."""
        return self.tensors[name]()

    def get_slice(self, name: str) -> Any:
        """As of a safetensors file; only its `get_dtype` is right."""
        return self.files[0].get_slice("transformer.vocab_embedding.weight")

    def _add(self, make: Callable[[str, int], Tensor], name: str, stored: str, stage: int) -> None:
        """A tensor of the family, where the stage has what it is made from."""
        if stored in self._names[stage * self.tp]:
            self.tensors[name] = partial(make, stored, stage)

    def _add_both(self, make: Callable[[str, int], Tensor], name: str, stored: str, stage: int) -> None:
        for kind in _KINDS:
            self._add(make, f"{name}.{kind}", f"{stored}.{kind}", stage)

    def _add_layer(self, name: str, stored: str, stage: int) -> None:
        family = self.family
        self._add_both(self._whole, f"{name}{family.attention_norm}", f"{stored}input_layernorm", stage)
        for index, linear in enumerate(family.qkv):
            part = partial(self._query_key_value, index)
            self._add_both(part, f"{name}{linear}", f"{stored}attention.qkv", stage)
        self._add(self._columns, f"{name}{family.proj}.weight", f"{stored}attention.dense.weight", stage)
        self._add(self._whole, f"{name}{family.proj}.bias", f"{stored}attention.dense.bias", stage)
        self._add_mlp(name, stored, stage)

    def _add_mlp(self, name: str, stored: str, stage: int) -> None:
        family = self.family
        self._add_both(self._whole, f"{name}{family.mlp_norm}", f"{stored}post_layernorm", stage)
        for linear, own in zip(family.fc1, ("fc", "gate"), strict=False):
            self._add_both(self._rows, f"{name}{linear}", f"{stored}mlp.{own}", stage)
        self._add(self._columns, f"{name}{family.fc2}.weight", f"{stored}mlp.proj.weight", stage)
        self._add(self._whole, f"{name}{family.fc2}.bias", f"{stored}mlp.proj.bias", stage)

    def _parts(self, name: str, stage: int) -> list[Tensor]:
        """The tensor of every tensor-parallel rank of a stage."""
        return [file.get_tensor(name) for file in self.files[stage * self.tp : (stage + 1) * self.tp]]

    def _rows(self, name: str, stage: int) -> Tensor:
        return torch.cat(self._parts(name, stage))

    def _columns(self, name: str, stage: int) -> Tensor:
        return torch.cat(self._parts(name, stage), dim=1)

    def _whole(self, name: str, stage: int) -> Tensor:
        """A tensor that every rank of a stage holds."""
        parts = self._parts(name, stage)
        for rank, part in enumerate(parts):
            _refuse_another(parts[0], part, name, rank)
        return parts[0]

    def _vocabulary(self, name: str, stage: int) -> Tensor:
        rows, count = self._rows(name, stage), self.config.vocab_size
        if rows[count:].any():
            raise ValueError(f"{name}: the rows past the vocabulary are not zeros")
        return rows[:count]

    def _query_key_value(self, index: int, name: str, stage: int) -> Tensor:
        """One of the three; `index`: 0, 1, 2."""
        config, size = self.config, self.config.head_dim
        held = max(config.num_kv_heads // self.tp, 1)
        sizes = [config.num_heads // self.tp * size, held * size, held * size]
        parts = [part.split(sizes)[index] for part in self._parts(name, stage)]
        repeats = max(self.tp // config.num_kv_heads, 1) if index else 1
        for rank, part in enumerate(parts):
            _refuse_another(parts[rank - rank % repeats], part, name, rank)
        return torch.cat(parts[::repeats])


def _refuse_another(one: Tensor, other: Tensor, name: str, rank: int) -> None:
    if not torch.equal(one, other):
        raise ValueError(f"{name} of tensor-parallel rank {rank} is another than on the ranks before it")
