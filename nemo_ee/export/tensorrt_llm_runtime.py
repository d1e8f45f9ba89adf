# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Reads a TensorRT-LLM unified checkpoint back into `nemo_ee.runtime`'s model: all ranks' shards made whole again.

Written from the format's description, not from the tables the export writes by (`tensorrt_llm_layout`), so that a
fault of those shows. What several ranks hold whole has to be the same on all of them, and padding has to be zeros.

    attention.qkv     [Q; K; V] of each rank's heads; a key-value head that several ranks hold counts once
    dense, mlp.proj   columns side by side         mlp.fc, mlp.gate, lm_head    rows one below the other

May import: torch, safetensors, nemo_ee.exits, nemo_ee.runtime.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_ee.runtime.config import ExitEntry, RuntimeConfig
from nemo_ee.runtime.linear import Linear, make_linear
from nemo_ee.runtime.model import HeadWeights, LayerWeights, MlpWeights, NormWeights, RuntimeModel, Weights
from nemo_ee.runtime.rotary import pairs_together

# TensorRT-LLM's GELU is the tanh approximation.
_ACTIVATIONS = {"silu": "silu", "relu": "relu", "gelu": "gelu_tanh"}


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
            config = _config(values)
            return RuntimeModel(config, _Reader(config, values, files).weights(), torch.float32)
        except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as fault:
            raise ValueError(f"{folder}: cannot be read ({fault!r})") from fault


def _config(values: dict[str, Any]) -> RuntimeConfig:
    llama = values["position_embedding_type"] == "rope_gpt_neox"
    scaling = values.get("rotary_scaling") or {}
    qwen = values["architecture"].startswith("Qwen2")
    plain_bias = values["architecture"].startswith("OPT") or bool(values.get("bias"))
    table = (values.get("early_exit") or {}).get("exits", [])
    exits = [ExitEntry(row["name"], row["layer"], row["architecture"], row["output"] == "own") for row in table]
    return RuntimeConfig(
        family=values["architecture"],
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
        tied=values["tie_word_embeddings"],
        rope={"rope_type": "default", **scaling, "base": values["rotary_base"]} if llama else None,
        position_offset=0,
        dtype=values["dtype"],
        exits=tuple(sorted(exits, key=lambda exit: exit.point.stop)),
    )


class _Reader:
    """Puts the ranks' tensors together, one canonical matrix at a time."""

    def __init__(self, config: RuntimeConfig, values: dict[str, Any], files: list[Any]) -> None:
        self.config, self.files = config, files
        self.tp, self.pp = values["mapping"]["tp_size"], values["mapping"]["pp_size"]
        self.names = [set(file.keys()) for file in files]
        self.half = values["dtype"] != "float32"

    def weights(self) -> Weights:
        config, last = self.config, self.pp - 1
        embedding = self._whole("transformer.vocab_embedding.weight", 0)
        learned = None
        if config.rope is None:
            learned = self._whole("transformer.position_embedding.weight", 0).float()
        output = self._output("lm_head", last)
        if output is None:
            output = self._linear(embedding, None)
        heads: dict[str | None, HeadWeights] = {
            None: HeadWeights(None, None, self._norm("transformer.ln_f", last), output)
        }
        per_stage = config.num_layers // self.pp
        for exit in config.exits:
            heads[exit.name] = self._head(exit, (exit.layer - 1) // per_stage, output)
        layers = tuple(
            self._layer(f"transformer.layers.{index % per_stage}.", index // per_stage)
            for index in range(config.num_layers)
        )
        return Weights(embedding, learned, layers, heads)

    def _head(self, exit: ExitEntry, stage: int, shared: Linear) -> HeadWeights:
        prefix = f"exit_heads.{exit.name}."
        return HeadWeights(
            layer=self._layer(f"{prefix}layer.", stage) if exit.architecture == "layer" else None,
            mlp=self._mlp(prefix, stage) if exit.architecture == "mlp" else None,
            norm=None if exit.architecture == "embedding" else self._norm(f"{prefix}norm", stage),
            output=self._output(f"{prefix}unembed", stage) if exit.own_output else shared,
        )

    def _layer(self, prefix: str, stage: int) -> LayerWeights:
        config = self.config
        bias = self._query_key_value(f"{prefix}attention.qkv.bias", stage) if config.qkv_bias else None
        dense = self._whole(f"{prefix}attention.dense.bias", stage) if config.proj_bias else None
        return LayerWeights(
            norm=self._norm(f"{prefix}input_layernorm", stage),
            qkv=self._linear(self._query_key_value(f"{prefix}attention.qkv.weight", stage), bias),
            proj=self._linear(torch.cat(self._parts(f"{prefix}attention.dense.weight", stage), dim=1), dense),
            mlp=self._mlp(prefix, stage),
        )

    def _mlp(self, prefix: str, stage: int) -> MlpWeights:
        config, halves = self.config, ("fc", "gate") if self.config.activation == "silu" else ("fc",)

        def rows(kind: str) -> Tensor:
            return torch.cat([part for half in halves for part in self._parts(f"{prefix}mlp.{half}.{kind}", stage)])

        proj = self._whole(f"{prefix}mlp.proj.bias", stage) if config.mlp_bias else None
        return MlpWeights(
            norm=self._norm(f"{prefix}post_layernorm", stage),
            fc1=self._linear(rows("weight"), rows("bias") if config.mlp_bias else None),
            fc2=self._linear(torch.cat(self._parts(f"{prefix}mlp.proj.weight", stage), dim=1), proj),
        )

    def _norm(self, name: str, stage: int) -> NormWeights:
        bias = self._whole(f"{name}.bias", stage).float() if self.config.layer_norm else None
        return NormWeights(self._whole(f"{name}.weight", stage).float(), bias)

    def _output(self, name: str, stage: int) -> Linear | None:
        """A projection onto the vocabulary; None where the ranks hold none."""
        if f"{name}.weight" not in self.names[stage * self.tp]:
            return None
        weight, vocabulary = torch.cat(self._parts(f"{name}.weight", stage)), self.config.vocab_size
        if weight[vocabulary:].any():
            raise ValueError(f"{name}.weight: the rows past the vocabulary are not zeros")
        return self._linear(weight[:vocabulary], None)

    def _query_key_value(self, name: str, stage: int) -> Tensor:
        config, size = self.config, self.config.head_dim
        held = max(config.num_kv_heads // self.tp, 1)
        sizes = [config.num_heads // self.tp * size, held * size, held * size]
        queries, keys, values = zip(*(part.split(sizes) for part in self._parts(name, stage)), strict=True)
        repeats = max(self.tp // config.num_kv_heads, 1)
        for parts in (keys, values):
            for rank, part in enumerate(parts):
                self._same(parts[rank - rank % repeats], part, name, rank)
        parts = [torch.cat(queries), torch.cat(keys[::repeats])]
        if config.rope is not None:
            parts = [pairs_together(part, size) for part in parts]
        return torch.cat([*parts, *values[::repeats]])

    def _parts(self, name: str, stage: int) -> list[Tensor]:
        """The tensor of every tensor-parallel rank of a stage."""
        return [file.get_tensor(name) for file in self.files[stage * self.tp : (stage + 1) * self.tp]]

    def _whole(self, name: str, stage: int) -> Tensor:
        """A tensor that every rank of a stage holds."""
        parts = self._parts(name, stage)
        for rank, part in enumerate(parts):
            self._same(parts[0], part, name, rank)
        return parts[0]

    def _same(self, one: Tensor, other: Tensor, name: str, rank: int) -> None:
        if not torch.equal(one, other):
            raise ValueError(f"{name} of tensor-parallel rank {rank} is another than on the ranks before it")

    def _linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return make_linear(weight.float(), None if bias is None else bias.float(), stored_in_half=self.half)
