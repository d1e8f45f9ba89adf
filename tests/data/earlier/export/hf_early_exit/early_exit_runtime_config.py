# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""config.json of an exported directory (or of a stock Llama, Mistral, Qwen2, GPT-2 or OPT), read and checked once.

The table of exits is `early_exit.exits` in it; a directory without one is a model without exits. Absent optional keys
mean what they mean in the transformers library.

May import: the standard library, nemo_ee.exits, nemo_ee.generation.items.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .early_exit_exits_config import ARCHITECTURES
from .early_exit_generation_items import ExitPoint

# Family -> the keys of hidden size, heads, layers, MLP size and positions; all but GPT-2's MLP size are needed.
_SIZES = {
    "llama": "hidden_size num_attention_heads num_hidden_layers intermediate_size max_position_embeddings",
    "gpt2": "n_embd n_head n_layer n_inner n_positions",
    "opt": "hidden_size num_attention_heads num_hidden_layers ffn_dim max_position_embeddings",
}
_SIZES |= dict.fromkeys(("mistral", "qwen2"), _SIZES["llama"])
FAMILIES = tuple(sorted(_SIZES))
# Rotary type -> the numbers that it needs.
_ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_GATED = {"silu": "silu", "swish": "silu"}
_PLAIN = {"relu": "relu", **dict.fromkeys(("gelu", "gelu_python"), "gelu")}
_PLAIN |= dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"), "gelu_tanh")


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
    """What the model is.

    Attributes:
        activation: `silu` of a gated MLP; `relu`, `gelu` or `gelu_tanh` of a plain one.
        layer_norm: LayerNorm instead of RMSNorm; `norm_affine`: with weight and bias.
        rope: transformers' own numbers (base, type and those of the type); None = learned positions.
        position_offset: learned position p is row p + this.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    activation: str
    layer_norm: bool
    norm_affine: bool
    norm_epsilon: float
    qkv_bias: bool
    proj_bias: bool
    mlp_bias: bool
    tied: bool
    rope: dict[str, Any] | None
    position_offset: int
    dtype: str
    exits: tuple[ExitEntry, ...]


def read_config(directory: str | Path) -> RuntimeConfig:
    """Read config.json.

    Raises:
        ValueError: no or damaged file, or a model this one does not compute (every reason in one message).
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory}: no config.json; give a directory that export_huggingface.py made")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
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
    for name in (*_SIZES[family].split(), "vocab_size"):
        size = values.get(name)
        optional = name == "n_inner" and size is None
        if not optional and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            faults.append(f"{name}={size!r} must be a whole number of at least 1")
    act, known = _activation(values)
    if act not in known:
        faults.append(f"activation {act!r}, supported are {', '.join(known)}")
    if family not in ("gpt2", "opt"):
        faults += _rotary_faults(values)
    if values.get("quantization_config"):
        faults.append("quantization_config: quantised weights are not read; give the unquantised model")
    for name in ("_remove_final_layer_norm", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
        if values.get(name):
            faults.append(f"{name}: not computed here; use transformers")
    if not values.get("scale_attn_weights", True):
        faults.append("scale_attn_weights=False: scores without 1/sqrt(head size) are not computed here")
    if not values.get("do_layer_norm_before", True):
        faults.append("do_layer_norm_before=False: norms after the residual are not computed here")
    layers = values.get(_SIZES[family].split()[2])
    for entry in _entries(values):
        if entry.get("architecture") not in ARCHITECTURES or not 1 <= int(entry.get("layer", 0)) <= int(layers or 0):
            faults.append(f"early_exit.exits: {entry} is no exit of a model of {layers} layers")
    names = [entry.get("name") for entry in _entries(values)]
    for name in sorted({str(name) for name in names if names.count(name) > 1}):
        faults.append(f"early_exit.exits: two exits are called {name!r}")
    return faults


def _rotary_faults(values: Mapping[str, Any]) -> Iterator[str]:
    rope = _rope(values)
    kind, part = rope["rope_type"], _first(rope.get("partial_rotary_factor"), values.get("partial_rotary_factor"), 1)
    if kind not in _ROPE_TYPES:
        yield f"rope type {kind!r}, supported are {', '.join(_ROPE_TYPES)}"
    for name in _ROPE_TYPES.get(kind, ()):
        if isinstance(rope.get(name), bool) or not isinstance(rope.get(name), int | float) or rope[name] <= 0:
            yield f"rope type {kind}: {name}={rope.get(name)!r} must be a number above 0"
    if part != 1:
        yield f"partial_rotary_factor={part!r}: all of a head is turned here; use transformers"
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        dim = values.get("head_dim") or hidden // heads
        if dim % 2:
            yield f"head_dim={dim}: rotary positions need an even number"


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _entries(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return (values.get("early_exit") or {}).get("exits", [])


def _activation(values: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """The MLP's activation by transformers' name, and the names that are known for the family."""
    if values["model_type"] in ("gpt2", "opt"):
        return values.get("activation_function", "gelu_new" if values["model_type"] == "gpt2" else "relu"), _PLAIN
    return values.get("hidden_act", "silu"), _GATED


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    # transformers 5 writes rope_parameters with rope_theta in it; before, there were rope_theta and rope_scaling.
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    base = scaling.get("rope_theta") or values.get("rope_theta") or 10000.0
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return {**scaling, "base": float(base), "rope_type": kind}


def _config(values: Mapping[str, Any]) -> RuntimeConfig:
    get, family = values.get, values["model_type"]
    hidden, heads, layers, ffn, positions = (values.get(name) for name in _SIZES[family].split())
    exits = tuple(
        ExitEntry(entry["name"], int(entry["layer"]), entry["architecture"], entry["output"] == "own")
        for entry in _entries(values)
    )
    act, known = _activation(values)
    layer_norm = family in ("gpt2", "opt")
    return RuntimeConfig(
        family=family,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn or 4 * hidden,
        num_heads=heads,
        num_kv_heads=heads if layer_norm else get("num_key_value_heads") or _DEFAULT_GROUPS.get(family, heads),
        head_dim=get("head_dim") or hidden // heads,
        vocab_size=values["vocab_size"],
        max_positions=min(positions, _window(values)),
        activation=known[act],
        layer_norm=layer_norm,
        norm_affine=family != "opt" or bool(get("layer_norm_elementwise_affine", True)),
        norm_epsilon=float(get("layer_norm_epsilon", 1e-5) if layer_norm else get("rms_norm_eps", 1e-6)),
        tied=bool(get("tie_word_embeddings", layer_norm)),
        rope=None if layer_norm else _rope(values),
        position_offset=2 if family == "opt" else 0,
        dtype=get("torch_dtype") or get("dtype") or "float32",
        exits=tuple(sorted(exits, key=lambda exit: exit.point.stop)),
        **_biases(values),
    )


_DEFAULT_GROUPS = {"mistral": 8, "qwen2": 32}


def _biases(values: Mapping[str, Any]) -> dict[str, bool]:
    family = values["model_type"]
    if family in ("gpt2", "opt"):
        all_of_them = family == "gpt2" or bool(values.get("enable_bias", True))
        return {"qkv_bias": all_of_them, "proj_bias": all_of_them, "mlp_bias": all_of_them}
    attention = family == "llama" and bool(values.get("attention_bias", False))
    mlp = family == "llama" and bool(values.get("mlp_bias", False))
    return {"qkv_bias": attention or family == "qwen2", "proj_bias": attention, "mlp_bias": mlp}


def _window(values: Mapping[str, Any]) -> int:
    """Positions up to which sliding-window attention sees everything."""
    family, window, everything = values["model_type"], values.get("sliding_window", 4096), 1 << 30
    if family not in ("mistral", "qwen2") or (family == "qwen2" and not values.get("use_sliding_window", False)):
        return everything
    return window or everything
