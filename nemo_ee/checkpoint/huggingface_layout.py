# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Where each row of Megatron's canonical tensors lies in a Hugging Face model, as a table.

Every canonical tensor (of one layer, for the stacked ones) is a column of row ranges of stored tensors, one below the
other. So the query-key-value matrix, whose rows Megatron groups as [query heads of a group, its key, its value], the
gated MLP's [gate; up], GPT-2's transposed matrices and OPT's positions that start at row 2 are all the same kind of
thing, and any chunk can be read by reading the ranges it touches.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from nemo_ee.checkpoint.huggingface_backbone import FC1, FC2, PROJ, QKV, HuggingFaceBackbone

LAYERS = "decoder.layers."


@dataclass(frozen=True)
class Stored:
    """One tensor as Hugging Face stores it, without the base prefix; `{layer}` stands for the 0-based layer."""

    name: str
    shape: tuple[int, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of a stored tensor (its columns, when transposed), or a constant where nothing is stored."""

    stored: Stored | None
    start: int
    stop: int
    fill: float = 0.0


@dataclass(frozen=True)
class Canonical:
    """A canonical tensor: its shape (of one layer, without the layer axis) and its rows from top to bottom."""

    shape: tuple[int, ...]
    rows: tuple[Rows, ...]


@dataclass(frozen=True)
class Layout:
    """A family's naming: base prefixes that a file may or may not use, stored buffers that are no weights."""

    base_prefix: str
    buffers: re.Pattern[str]
    output_name: str = "lm_head.weight"


LAYOUTS = {
    "llama": Layout("model.", re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")),
    "mistral": Layout("model.", re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")),
    "qwen2": Layout("model.", re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")),
    "gpt2": Layout("transformer.", re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")),
    "opt": Layout("model.", re.compile(r"(?!)")),
}


def canonical_tensors(backbone: HuggingFaceBackbone) -> dict[str, Canonical]:
    """Every canonical tensor of a backbone by name, and where its rows come from."""
    if backbone.family == "gpt2":
        return _gpt2(backbone)
    return _opt(backbone) if backbone.family == "opt" else _llama_like(backbone)


def _whole(name: str, *shape: int, transposed: bool = False) -> Canonical:
    """A canonical tensor that is stored as it is, or transposed; `shape` is the canonical one."""
    stored = Stored(name, shape[::-1] if transposed else shape, transposed)
    return Canonical(shape, (Rows(stored, 0, shape[0]),))


def _constant(value: float, *shape: int) -> Canonical:
    return Canonical(shape, (Rows(None, 0, shape[0], value),))


def _below(*parts: Canonical) -> Canonical:
    """Tensors one below the other."""
    height = sum(part.shape[0] for part in parts)
    return Canonical((height, *parts[0].shape[1:]), tuple(rows for part in parts for rows in part.rows))


def _interleaved(backbone: HuggingFaceBackbone, query: Rows, key: Rows, value: Rows, *columns: int) -> Canonical:
    """Query, key and value rows in Megatron's order: per group its query heads, its key head, its value head."""
    size, groups = backbone.kv_channels, backbone.num_query_groups
    per_group = backbone.num_attention_heads // groups * size

    def part(rows: Rows, group: int, height: int) -> Rows:
        start = rows.start + group * height
        return Rows(rows.stored, start, start + height, rows.fill)

    order = tuple(
        part(rows, group, height)
        for group in range(groups)
        for rows, height in ((query, per_group), (key, size), (value, size))
    )
    return Canonical((groups * (per_group + 2 * size), *columns), order)


def _separate_qkv(backbone: HuggingFaceBackbone, prefix: str, kind: str, *columns: int) -> Canonical:
    """The fused matrix (or bias) of three stored ones."""
    heights = [backbone.num_attention_heads * backbone.kv_channels] + [
        backbone.num_query_groups * backbone.kv_channels
    ] * 2
    parts = [
        Rows(Stored(f"{prefix}.{name}_proj.{kind}", (height, *columns)), 0, height)
        for name, height in zip("qkv", heights, strict=True)
    ]
    return _interleaved(backbone, *parts, *columns)


def _biases(backbone: HuggingFaceBackbone, stored: dict[str, Callable[[], Canonical]]) -> dict[str, Canonical]:
    """The biases of a layer's linears: stored, zeros (Megatron has one switch for all), or absent."""
    names = {QKV: "self_attention.linear_qkv", PROJ: "self_attention.linear_proj"}
    names |= {FC1: "mlp.linear_fc1", FC2: "mlp.linear_fc2"}
    biases = {}
    for linear, name in names.items():
        if linear in backbone.linear_biases:
            biases[f"{LAYERS}{name}.bias"] = stored[linear]()
        elif backbone.bias:
            biases[f"{LAYERS}{name}.bias"] = _constant(0.0, stored[linear]().shape[0])
    return biases


def _embeddings(backbone: HuggingFaceBackbone, name: str) -> dict[str, Canonical]:
    tensors = {"embedding.word_embeddings.weight": _whole(name, backbone.vocab_size, backbone.hidden_size)}
    if not backbone.tied:
        output = LAYOUTS[backbone.family].output_name
        tensors["output_layer.weight"] = _whole(output, backbone.vocab_size, backbone.hidden_size)
    return tensors


def _llama_like(backbone: HuggingFaceBackbone) -> dict[str, Canonical]:
    hidden, ffn = backbone.hidden_size, backbone.ffn_hidden_size
    attention_size = backbone.num_attention_heads * backbone.kv_channels
    layer, attention, mlp = "layers.{layer}", "layers.{layer}.self_attn", "layers.{layer}.mlp"
    biases: dict[str, Callable[[], Canonical]] = {
        QKV: lambda: _separate_qkv(backbone, attention, "bias"),
        PROJ: lambda: _whole(f"{attention}.o_proj.bias", hidden),
        FC1: lambda: _below(_whole(f"{mlp}.gate_proj.bias", ffn), _whole(f"{mlp}.up_proj.bias", ffn)),
        FC2: lambda: _whole(f"{mlp}.down_proj.bias", hidden),
    }
    return {
        **_embeddings(backbone, "embed_tokens.weight"),
        f"{LAYERS}self_attention.linear_qkv.layer_norm_weight": _whole(f"{layer}.input_layernorm.weight", hidden),
        f"{LAYERS}self_attention.linear_qkv.weight": _separate_qkv(backbone, attention, "weight", hidden),
        f"{LAYERS}self_attention.linear_proj.weight": _whole(f"{attention}.o_proj.weight", hidden, attention_size),
        f"{LAYERS}mlp.linear_fc1.layer_norm_weight": _whole(f"{layer}.post_attention_layernorm.weight", hidden),
        f"{LAYERS}mlp.linear_fc1.weight": _below(
            _whole(f"{mlp}.gate_proj.weight", ffn, hidden), _whole(f"{mlp}.up_proj.weight", ffn, hidden)
        ),
        f"{LAYERS}mlp.linear_fc2.weight": _whole(f"{mlp}.down_proj.weight", hidden, ffn),
        **_biases(backbone, biases),
        "decoder.final_layernorm.weight": _whole("norm.weight", hidden),
    }


def _gpt2(backbone: HuggingFaceBackbone) -> dict[str, Canonical]:
    hidden, ffn, layer = backbone.hidden_size, backbone.ffn_hidden_size, "h.{layer}"

    def fused(kind: str, *columns: int) -> Canonical:
        shape = (3 * hidden, *columns)
        stored = Stored(f"{layer}.attn.c_attn.{kind}", shape[::-1], transposed=bool(columns))
        return _interleaved(backbone, *(Rows(stored, i * hidden, (i + 1) * hidden) for i in range(3)), *columns)

    biases: dict[str, Callable[[], Canonical]] = {
        QKV: lambda: fused("bias"),
        PROJ: lambda: _whole(f"{layer}.attn.c_proj.bias", hidden),
        FC1: lambda: _whole(f"{layer}.mlp.c_fc.bias", ffn),
        FC2: lambda: _whole(f"{layer}.mlp.c_proj.bias", hidden),
    }
    return {
        **_embeddings(backbone, "wte.weight"),
        "embedding.position_embeddings.weight": _whole("wpe.weight", backbone.max_position_embeddings, hidden),
        **_layer_norms(backbone, f"{layer}.ln_1", f"{layer}.ln_2", "ln_f"),
        f"{LAYERS}self_attention.linear_qkv.weight": fused("weight", hidden),
        f"{LAYERS}self_attention.linear_proj.weight": _whole(
            f"{layer}.attn.c_proj.weight", hidden, hidden, transposed=True
        ),
        f"{LAYERS}mlp.linear_fc1.weight": _whole(f"{layer}.mlp.c_fc.weight", ffn, hidden, transposed=True),
        f"{LAYERS}mlp.linear_fc2.weight": _whole(f"{layer}.mlp.c_proj.weight", hidden, ffn, transposed=True),
        **_biases(backbone, biases),
    }


def _opt(backbone: HuggingFaceBackbone) -> dict[str, Canonical]:
    hidden, ffn, positions = backbone.hidden_size, backbone.ffn_hidden_size, backbone.max_position_embeddings
    layer, attention = "decoder.layers.{layer}", "decoder.layers.{layer}.self_attn"
    # OPT's position p is row p + 2: two rows that were padding are never looked up.
    position_rows = Rows(Stored("decoder.embed_positions.weight", (positions + 2, hidden)), 2, positions + 2)
    biases: dict[str, Callable[[], Canonical]] = {
        QKV: lambda: _separate_qkv(backbone, attention, "bias"),
        PROJ: lambda: _whole(f"{attention}.out_proj.bias", hidden),
        FC1: lambda: _whole(f"{layer}.fc1.bias", ffn),
        FC2: lambda: _whole(f"{layer}.fc2.bias", hidden),
    }
    return {
        **_embeddings(backbone, "decoder.embed_tokens.weight"),
        "embedding.position_embeddings.weight": Canonical((positions, hidden), (position_rows,)),
        **_layer_norms(
            backbone, f"{layer}.self_attn_layer_norm", f"{layer}.final_layer_norm", "decoder.final_layer_norm"
        ),
        f"{LAYERS}self_attention.linear_qkv.weight": _separate_qkv(backbone, attention, "weight", hidden),
        f"{LAYERS}self_attention.linear_proj.weight": _whole(f"{attention}.out_proj.weight", hidden, hidden),
        f"{LAYERS}mlp.linear_fc1.weight": _whole(f"{layer}.fc1.weight", ffn, hidden),
        f"{LAYERS}mlp.linear_fc2.weight": _whole(f"{layer}.fc2.weight", hidden, ffn),
        **_biases(backbone, biases),
    }


def _layer_norms(backbone: HuggingFaceBackbone, attention: str, mlp: str, final: str) -> dict[str, Canonical]:
    names = {
        f"{LAYERS}self_attention.linear_qkv.layer_norm_": attention,
        f"{LAYERS}mlp.linear_fc1.layer_norm_": mlp,
        "decoder.final_layernorm.": final,
    }
    return {
        f"{name}{kind}": _whole(f"{stored}.{kind}", backbone.hidden_size)
        if backbone.norm_affine
        else _constant(1.0 if kind == "weight" else 0.0, backbone.hidden_size)
        for name, stored in names.items()
        for kind in ("weight", "bias")
    }
