# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Loads an exported directory: config.json, safetensors, tokenizer. Nothing in it is executed.

Projections that are computed together are put into one matrix as they are read, so that no tensor is in memory twice.

May import: torch, safetensors, transformers (inside functions), nemo_ee.runtime.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_ee.runtime.config import ExitEntry, RuntimeConfig, read_config
from nemo_ee.runtime.model import HeadWeights, LayerWeights, MlpWeights, RuntimeModel, Weights
from nemo_ee.runtime.rotary import pairs_together

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_model(
    directory: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None
) -> RuntimeModel:
    """Load a model with its exits.

    Args:
        directory: `hf_early_exit/` of an export; a stock Llama, Mistral or Qwen2 directory loads as a model without
            exits.
        device: where it runs.
        dtype: to compute in, a torch dtype or its name; None = the stored one.

    Raises:
        ValueError: a model that is not run here, or files that are missing, damaged or do not fit together.
    """
    directory = Path(directory)
    config = read_config(directory)
    if isinstance(dtype, str) or dtype is None:
        name = dtype or config.dtype
        if name not in DTYPES:
            raise ValueError(f"dtype={name!r} must be one of {', '.join(DTYPES)}")
        dtype = DTYPES[name]
    with _Tensors(directory, torch.device(device), dtype) as tensors:
        weights = _weights(config, tensors)
    return RuntimeModel(config, weights)


def load_tokenizer(directory: str | Path) -> Any:
    """The directory's tokenizer (transformers).

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    if not any((Path(directory) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(f"{directory}: no tokenizer in it; export from a .nemo that carries one, or use token ids")
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)


class _Tensors:
    """The stored tensors by name; a context manager."""

    def __init__(self, directory: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.directory, self.device, self.dtype = directory, device, dtype
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> _Tensors:
        try:
            for path in self._paths():
                try:
                    file = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
                except (SafetensorError, OSError) as fault:
                    raise ValueError(f"{path}: missing or damaged ({fault}); export again") from fault
                self._files |= dict.fromkeys(file.keys(), file)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *fault: object) -> None:
        self._stack.close()

    def _paths(self) -> list[Path]:
        index = self.directory / "model.safetensors.index.json"
        if not index.is_file():
            return [self.directory / "model.safetensors"]
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as fault:
            raise ValueError(f"{index}: damaged ({fault!r}); export again") from fault
        if any(Path(str(name)).name != name for name in names):
            raise ValueError(f"{index}: refused, it names files outside of the directory")
        return [self.directory / name for name in names]

    def read(self, name: str, *shape: int) -> Tensor:
        """One tensor, converted and on the device.

        Raises:
            ValueError: missing, or of another shape.
        """
        return self.below((name,), *shape)

    def below(self, names: tuple[str, ...], *shape: int, reordered: dict[str, int] | None = None) -> Tensor:
        """Tensors one below the other as one.

        Args:
            shape: of the result.
            reordered: name -> head size, for rows whose rotary pairs are put together.
        """
        result, top = torch.empty(shape, dtype=self.dtype, device=self.device), 0
        for name in names:
            if name not in self._files:
                raise ValueError(f"{self.directory}: {name} is missing; export again")
            part = self._files[name].get_tensor(name)
            stop = top + part.shape[0]
            if part.shape[1:] != result.shape[1:] or stop > shape[0]:
                raise ValueError(f"{self.directory}: {name} has shape {list(part.shape)}, config.json says otherwise")
            size = (reordered or {}).get(name)
            result[top:stop] = part if size is None else pairs_together(part, size)
            top = stop
        if top != shape[0]:
            raise ValueError(f"{self.directory}: {names[-1]} has too few rows for config.json")
        return result


def _weights(config: RuntimeConfig, tensors: _Tensors) -> Weights:
    matrix = (config.vocab_size, config.hidden_size)
    embedding = tensors.read("model.embed_tokens.weight", *matrix)
    output = embedding if config.tied else tensors.read("lm_head.weight", *matrix)
    layers = tuple(_layer(config, tensors, f"model.layers.{index}.") for index in range(config.num_layers))
    heads: dict[str | None, HeadWeights] = {
        None: HeadWeights(None, None, tensors.read("model.norm.weight", config.hidden_size), output)
    }
    for exit in config.exits:
        heads[exit.name] = _head(config, tensors, exit, output)
    return Weights(embedding, layers, heads)


def _head(config: RuntimeConfig, tensors: _Tensors, exit: ExitEntry, shared: Tensor) -> HeadWeights:
    prefix, hidden = f"exit_heads.{exit.name}.", config.hidden_size
    return HeadWeights(
        layer=_layer(config, tensors, f"{prefix}layer.") if exit.architecture == "layer" else None,
        mlp=_mlp(config, tensors, prefix) if exit.architecture == "mlp" else None,
        norm=None if exit.architecture == "embedding" else tensors.read(f"{prefix}norm.weight", hidden),
        output=tensors.read(f"{prefix}unembed.weight", config.vocab_size, hidden) if exit.own_output else shared,
    )


def _layer(config: RuntimeConfig, tensors: _Tensors, prefix: str) -> LayerWeights:
    hidden, size, heads = config.hidden_size, config.head_dim, config.num_heads
    height, names = (heads + 2 * config.num_kv_heads) * size, [f"{prefix}self_attn.{x}_proj." for x in "qkv"]

    def fused(kind: str, *columns: int) -> Tensor:
        turned = {f"{name}{kind}": size for name in names[:2]}
        return tensors.below(tuple(f"{name}{kind}" for name in names), height, *columns, reordered=turned)

    proj = f"{prefix}self_attn.o_proj."
    return LayerWeights(
        norm=tensors.read(f"{prefix}input_layernorm.weight", hidden),
        qkv=fused("weight", hidden),
        qkv_bias=fused("bias") if config.qkv_bias else None,
        proj=tensors.read(f"{proj}weight", hidden, heads * size).t(),
        proj_bias=tensors.read(f"{proj}bias", hidden) if config.proj_bias else None,
        mlp=_mlp(config, tensors, prefix),
    )


def _mlp(config: RuntimeConfig, tensors: _Tensors, prefix: str) -> MlpWeights:
    hidden, ffn = config.hidden_size, config.ffn_hidden_size

    def fused(kind: str, *columns: int) -> Tensor:
        return tensors.below((f"{prefix}mlp.gate_proj.{kind}", f"{prefix}mlp.up_proj.{kind}"), 2 * ffn, *columns)

    return MlpWeights(
        norm=tensors.read(f"{prefix}post_attention_layernorm.weight", hidden),
        gate_up=fused("weight", hidden),
        gate_up_bias=fused("bias") if config.mlp_bias else None,
        down=tensors.read(f"{prefix}mlp.down_proj.weight", hidden, ffn).t(),
        down_bias=tensors.read(f"{prefix}mlp.down_proj.bias", hidden) if config.mlp_bias else None,
    )
