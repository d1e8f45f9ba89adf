# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""config.json of an exported directory (or of any stock Llama, Mistral or Qwen2), read and checked once.

The table of exits is `early_exit.exits` in it; a directory without one is a model without exits. Absent optional keys
mean what they mean in the transformers library.

May import: the standard library, nemo_ee.exits, nemo_ee.generation.items.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ee.exits.config import ARCHITECTURES
from nemo_ee.generation.items import ExitPoint

FAMILIES = ("llama", "mistral", "qwen2")
_SIZES = (
    "hidden_size num_attention_heads num_hidden_layers intermediate_size vocab_size max_position_embeddings".split()
)
_ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class ExitEntry:
    """A row of the table of exits.

    Attributes:
        name, layer, architecture: as in `nemo_ee.exits.config.ExitConfig`.
        own_output: it has an output projection of its own; else the backbone's.
    """

    name: str
    layer: int
    architecture: str
    own_output: bool

    @property
    def point(self) -> ExitPoint:
        """The exit as the engine sees it; an `mlp` exit taps layer k between attention and MLP."""
        return ExitPoint(self.name, self.layer, 2 * self.layer - (self.architecture == "mlp"))


@dataclass(frozen=True)
class RuntimeConfig:
    """What the model is. `rope` holds transformers' own numbers: base, type and those of the type."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_epsilon: float
    qkv_bias: bool
    proj_bias: bool
    mlp_bias: bool
    tied: bool
    rope: dict[str, Any]
    dtype: str
    exits: tuple[ExitEntry, ...]


def read_config(directory: str | Path) -> RuntimeConfig:
    """Read config.json.

    Raises:
        ValueError: no or damaged file, or a model this one does not compute (every reason in one message).
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{directory}: no config.json; give a directory that scripts/export/export_huggingface.py made"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(values, dict)
    except (ValueError, AssertionError) as fault:
        raise ValueError(f"{path}: damaged ({fault}); export again") from fault
    try:
        faults = _faults(values)
        config = None if faults else _config(values)
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        raise ValueError(f"{path}: damaged, {fault!r}; export again") from fault
    if config is None:
        raise ValueError(f"{path}: cannot be run. {'; '.join(faults)}")
    return config


def _faults(values: Mapping[str, Any]) -> list[str]:
    family, faults = values.get("model_type"), []
    if family not in FAMILIES:
        return [f"model_type={family!r} is not run here; supported are {', '.join(FAMILIES)}; use transformers"]
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        faults.append(f"hidden_act={values['hidden_act']!r}, supported are silu and swish")
    rope_type = _rope(values)["rope_type"]
    if rope_type not in _ROPE_TYPES:
        faults.append(f"rope type {rope_type!r}, supported are {', '.join(_ROPE_TYPES)}")
    if values.get("quantization_config"):
        faults.append("quantization_config: quantised weights are not read; give the unquantised model")
    layers = values.get("num_hidden_layers")
    for name in _SIZES:
        size = values.get(name)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            faults.append(f"{name}={size!r} must be a whole number of at least 1")
    for entry in _entries(values):
        if entry.get("architecture") not in ARCHITECTURES or not 1 <= int(entry.get("layer", 0)) <= int(layers or 0):
            faults.append(f"early_exit.exits: {entry} is no exit of a model of {layers} layers")
    return faults


def _entries(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return (values.get("early_exit") or {}).get("exits", [])


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    # transformers 5 writes rope_parameters with rope_theta in it; before, there were rope_theta and rope_scaling.
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    base = scaling.get("rope_theta") or values.get("rope_theta") or 10000.0
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return {**scaling, "base": float(base), "rope_type": kind}


def _config(values: Mapping[str, Any]) -> RuntimeConfig:
    get, family = values.get, values["model_type"]
    hidden, heads, layers = values["hidden_size"], values["num_attention_heads"], values["num_hidden_layers"]
    llama = family == "llama"
    exits = tuple(
        ExitEntry(entry["name"], int(entry["layer"]), entry["architecture"], entry["output"] == "own")
        for entry in _entries(values)
    )
    return RuntimeConfig(
        family=family,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=values["intermediate_size"],
        num_heads=heads,
        num_kv_heads=get("num_key_value_heads") or {"mistral": 8, "qwen2": 32}.get(family, heads),
        head_dim=get("head_dim") or hidden // heads,
        vocab_size=values["vocab_size"],
        max_positions=min(values["max_position_embeddings"], _window(values)),
        norm_epsilon=float(get("rms_norm_eps", 1e-6)),
        qkv_bias=bool(get("attention_bias", False)) if llama else family == "qwen2",
        proj_bias=bool(get("attention_bias", False)) if llama else False,
        mlp_bias=bool(get("mlp_bias", False)) if llama else False,
        tied=bool(get("tie_word_embeddings", False)),
        rope=_rope(values),
        dtype=get("torch_dtype") or get("dtype") or "float32",
        exits=tuple(sorted(exits, key=lambda exit: exit.point.stop)),
    )


def _window(values: Mapping[str, Any]) -> int:
    """Positions up to which sliding-window attention sees everything."""
    family, window, everything = values["model_type"], values.get("sliding_window", 4096), 1 << 30
    if family == "llama" or (family == "qwen2" and not values.get("use_sliding_window", False)):
        return everything
    return window or everything
