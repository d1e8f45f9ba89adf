# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Table of the place of each row of Megatron's canonical tensors in a stored model.

Every canonical tensor is a list of row ranges of stored tensors, from top to bottom. This form covers the
query-key-value matrix, whose rows Megatron groups as [query heads of a group, its key, its value], a gated MLP's
[gate; up], GPT-2's transposed matrices and OPT's positions from row 2 on: a chunk is read from the ranges that it
overlaps, and a stored tensor is written from the inverted ranges.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from nemo_ee.families.architecture import FC1, FC2, PROJ, QKV, Architecture

LAYERS = "decoder.layers."  # prefix of the layers' canonical names
WORDS, POSITIONS = "embedding.word_embeddings.weight", "embedding.position_embeddings.weight"
FINAL_NORM, OUTPUT = "decoder.final_layernorm.", "output_layer.weight"
# The canonical names of a layer's linears, and of the norms in front of the first and the third.
LINEARS = {
    QKV: "self_attention.linear_qkv.",
    PROJ: "self_attention.linear_proj.",
    FC1: "mlp.linear_fc1.",
    FC2: "mlp.linear_fc2.",
}
ATTENTION_NORM, MLP_NORM = f"{LINEARS[QKV]}layer_norm_", f"{LINEARS[FC1]}layer_norm_"
Q_NORM, K_NORM = "self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"


@dataclass(frozen=True)
class Stored:
    """One stored tensor; in a layer, its name omits the layer's prefix.

    Attributes:
        name, shape: name and shape in the file.
        transposed: whether the file holds the transpose.
        pairs: size of a head if its rows are stored in pairs, one of each half: 0, d/2, 1, d/2 + 1, ...; 0 = in their
            order. Ranges of rows always count the rows in their order.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    pairs: int = 0


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of a stored tensor (its columns, when transposed), or a constant if nothing is stored."""

    stored: Stored | None
    start: int
    stop: int
    fill: float = 0.0


@dataclass(frozen=True)
class Canonical:
    """A canonical tensor: its shape (of one layer, without the layer axis) and its rows from top to bottom."""

    shape: tuple[int, ...]
    rows: tuple[Rows, ...]

    @property
    def stored(self) -> tuple[Stored, ...]:
        """The stored tensors with its rows, in the order of their first rows; empty for a constant."""
        return tuple(dict.fromkeys(rows.stored for rows in self.rows if rows.stored is not None))

    def rows_of(self, stored: Stored) -> tuple[int, int]:
        """First and last + 1 of its rows in a stored tensor (columns, when transposed)."""
        parts = [rows for rows in self.rows if rows.stored == stored]
        return min(rows.start for rows in parts), max(rows.stop for rows in parts)

    def under(self, prefix: str) -> Canonical:
        """The same tensor with `prefix` in front of its stored names."""
        named = {stored: replace(stored, name=f"{prefix}{stored.name}") for stored in self.stored}
        return replace(self, rows=tuple(replace(rows, stored=named.get(rows.stored)) for rows in self.rows))


@dataclass(frozen=True, kw_only=True)
class Names:
    """A family's names of tensors. Names in a layer omit its prefix; linears and norms omit `.weight`.

    Attributes:
        base: prefix that files of a bare model (without output projection) do not have.
        layer: prefix of a layer, with {} for its index from 0.
        qkv: query, key and value, or one linear that holds them one below the other.
        fc1: the MLP's first matrix: gate and up of a gated MLP, or one linear with the rows of both, gate first.
        q_norm, k_norm: norms of query and key heads, if the family has them.
        positions: learned positions, if the family has them; position p is row p + `position_offset`.
        transposed: whether linears are stored as [in, out].
        pairs: whether the rows of a query or key head are stored in pairs, see `Stored`.
        buffers: regular expression for stored tensors that are not weights.
    """

    base: str
    words: str
    layer: str
    attention_norm: str
    qkv: tuple[str, ...]
    proj: str
    mlp_norm: str
    fc1: tuple[str, ...]
    fc2: str
    final_norm: str
    output: str = "lm_head.weight"
    q_norm: str | None = None
    k_norm: str | None = None
    positions: str | None = None
    position_offset: int = 0
    transposed: bool = False
    pairs: bool = False
    buffers: str = r"(?!)"

    def is_buffer(self, name: str) -> bool:
        """Whether a stored tensor, named without `base`, is not a weight."""
        return re.fullmatch(self.buffers, name) is not None


@dataclass(frozen=True)
class TensorTable:
    """The canonical tensors of a model by name.

    Attributes:
        layer: tensors of a layer by names without `LAYERS`; stored names omit the layer's prefix.
        others: all other tensors.
        prefix: prefix of a layer's stored names, with {} for its index from 0.
    """

    layer: dict[str, Canonical]
    others: dict[str, Canonical]
    prefix: str

    def of_layer(self, index: int) -> dict[str, Canonical]:
        """The tensors of one layer under their full stored names; `index` from 0."""
        return {key: tensor.under(self.prefix.format(index)) for key, tensor in self.layer.items()}

    def of_exit(self, architecture: str, own_output: bool) -> dict[str, Canonical]:
        """The tensors of an exit head of a model of this family, by their canonical names in the head.

        Their stored names are those of a layer; the norm is `norm`, the output projection `unembed`.

        Args:
            architecture: see `nemo_ee.exits.config.ExitConfig`.
            own_output: whether the head has an output projection.
        """
        found: dict[str, Canonical] = {}
        if architecture == "mlp":
            found |= {key: tensor for key, tensor in self.layer.items() if key.startswith("mlp.")}
        if architecture == "layer":
            found |= {f"layer.{key}": tensor.under("layer.") for key, tensor in self.layer.items()}
        if architecture != "embedding":
            for key, tensor in self.others.items():
                name = f"norm.{key.removeprefix(FINAL_NORM)}"
                if key.startswith(FINAL_NORM):
                    found[name] = _whole(name, *tensor.shape) if tensor.stored else tensor
        if own_output:
            found["output.weight"] = _whole("unembed.weight", *self.others[WORDS].shape)
        return found


def tensor_table(names: Names, a: Architecture) -> TensorTable:
    """The canonical tensors of a model of a family with these names."""
    heads = [a.num_attention_heads * a.kv_channels] + [a.num_query_groups * a.kv_channels] * 2
    matrix, hidden = (a.vocab_size, a.hidden_size), a.hidden_size
    parts = {  # linear -> (its stored parts with their heights, the columns of its matrix)
        QKV: (_parts(names.qkv, heads), hidden),
        PROJ: (_parts((names.proj,), [hidden]), a.proj_columns),
        FC1: (_parts(names.fc1, [a.ffn_hidden_size] * (1 + a.gated)), hidden),
        FC2: (_parts((names.fc2,), [hidden]), a.ffn_hidden_size),
    }
    norms = {QKV: (ATTENTION_NORM, names.attention_norm), FC1: (MLP_NORM, names.mlp_norm)}
    layer: dict[str, Canonical] = {}
    for linear, (stored, columns) in parts.items():
        key = LINEARS[linear]
        if linear in norms:
            layer |= _norm(a, *norms[linear])
        layer[f"{key}weight"] = _linear(a, names, linear, stored, "weight", (columns,))
        bias = _linear(a, names, linear, stored, "bias")
        if linear in a.biases:
            layer[f"{key}bias"] = bias
        elif a.bias:  # Megatron has one switch for all biases
            layer[f"{key}bias"] = _constant(0.0, *bias.shape)
    if a.qk_norm:
        assert names.q_norm is not None and names.k_norm is not None, "the family has no query and key norms"
        layer[Q_NORM] = _whole(f"{names.q_norm}.weight", a.kv_channels)
        layer[K_NORM] = _whole(f"{names.k_norm}.weight", a.kv_channels)
    others = {WORDS: _whole(names.words, *matrix)}
    if names.positions is not None:
        first, last = names.position_offset, names.position_offset + a.max_position_embeddings
        stored = Stored(names.positions, (last, hidden))
        others[POSITIONS] = Canonical((last - first, hidden), (Rows(stored, first, last),))
    others |= _norm(a, FINAL_NORM, names.final_norm)
    if not a.tied:
        others[OUTPUT] = _whole(names.output, *matrix)
    return TensorTable(layer, others, names.layer)


def _parts(names: tuple[str, ...], heights: list[int]) -> list[tuple[str, list[int]]]:
    """Stored linears, each with the heights of its parts."""
    if len(names) == len(heights):
        return [(name, [height]) for name, height in zip(names, heights, strict=True)]
    (name,) = names
    return [(name, heights)]


def _linear(
    a: Architecture,
    names: Names,
    linear: str,
    parts: list[tuple[str, list[int]]],
    kind: str,
    columns: tuple[int, ...] = (),
) -> Canonical:
    """A linear's matrix or bias: its parts from top to bottom, those of `QKV` in Megatron's order."""
    rows = []
    for name, heights in parts:
        shape = (sum(heights), *columns)
        transposed = names.transposed and bool(columns)
        pairs = a.kv_channels if names.pairs and linear == QKV and name in names.qkv[:2] else 0
        stored, start = Stored(f"{name}.{kind}", shape[::-1] if transposed else shape, transposed, pairs), 0
        for height in heights:
            rows.append(Rows(stored, start, start + height))
            start += height
    if linear == QKV:
        rows = _by_group(a, *rows)
    return Canonical((sum(part.stop - part.start for part in rows), *columns), tuple(rows))


def _by_group(a: Architecture, query: Rows, key: Rows, value: Rows) -> list[Rows]:
    """Query, key and value rows in Megatron's order: for each group its query heads, key head and value head."""
    size, groups = a.kv_channels, a.num_query_groups
    per_group = a.num_attention_heads // groups * size
    return [
        Rows(rows.stored, rows.start + group * height, rows.start + (group + 1) * height)
        for group in range(groups)
        for rows, height in ((query, per_group), (key, size), (value, size))
    ]


def _norm(a: Architecture, key: str, name: str) -> dict[str, Canonical]:
    constants = {"weight": 1.0, "bias": 0.0}
    return {
        f"{key}{kind}": _whole(f"{name}.{kind}", a.hidden_size)
        if a.norm_affine
        else _constant(constants[kind], a.hidden_size)
        for kind in (("weight", "bias") if a.layer_norm else ("weight",))
    }


def _whole(name: str, *shape: int) -> Canonical:
    return Canonical(shape, (Rows(Stored(name, shape), 0, shape[0]),))


def _constant(value: float, *shape: int) -> Canonical:
    return Canonical(shape, (Rows(None, 0, shape[0], value),))
