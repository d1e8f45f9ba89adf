# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Which rows of which canonical tensor make up each tensor of a Hugging Face model: the importer's table, inverted.

`checkpoint.huggingface_layout` says for each canonical tensor where its rows lie in stored tensors. Each stored tensor
comes from one canonical tensor, so its rows are a list of ranges of that one. An exit's tensors are named like those
of a layer and of the final norm, under `exit_heads.<name>.`; its output projection is `unembed`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_ee.checkpoint.huggingface_backbone import HuggingFaceBackbone
from nemo_ee.checkpoint.huggingface_layout import LAYERS, LAYOUTS, Canonical, Stored, canonical_tensors
from nemo_ee.exits.config import ExitConfig
from nemo_ee.export.early_exit_source import OUTPUT, Origin, row_blocks
from nemo_ee.export.model_origins import Model

_FINAL_NORM = "decoder.final_layernorm."
_LAYER_PREFIX = re.compile(r"^.*\{layer\}\.")


@dataclass(frozen=True)
class Piece:
    """One tensor to write.

    Attributes:
        name, shape: in the file.
        rows: ranges of the canonical tensor's rows, one below the other.
        transposed: the file holds the transpose.
        zeros: rows of zeros before them (OPT's two positions that no token looks up).
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]
    transposed: bool = False
    zeros: int = 0


@dataclass(frozen=True)
class Reading:
    """One canonical tensor, of one layer, and the tensors written from it; `fill`: it is a constant, none is."""

    origin: Origin
    shape: tuple[int, ...]
    written: tuple[Piece, ...]
    fill: float | None = None


def readings(
    backbone: HuggingFaceBackbone, model: Model, exits: Sequence[tuple[ExitConfig, Origin | None]] = (),
    *, final_norm: bool = True,
) -> list[Reading]:  # fmt: skip
    """Every canonical tensor to read, in the order in which the files hold what is written from them.

    Args:
        backbone: the stock model that is written; it has as many layers as `model`.
        model: where its layers, final norm and output come from.
        exits: heads beside it: (exit, its output projection or None where it is the backbone's).
        final_norm: False leaves the final norm out.
    """
    base, tensors = LAYOUTS[backbone.family].base_prefix, canonical_tensors(backbone)
    output_name = LAYOUTS[backbone.family].output_name
    layered = {key.removeprefix(LAYERS): tensor for key, tensor in tensors.items() if key.startswith(LAYERS)}
    result = [
        _reading(Origin("backbone", key), tensor, lambda stored: f"{base}{stored.name}")
        for key, tensor in tensors.items()
        if key.startswith("embedding.")
    ]
    for index, layer in enumerate(model.layers):
        prefix = f"{base}{_layer_prefix(tensors)}".format(layer=index)
        result += _layer(layered, layer, prefix)
    if final_norm:
        for kind, tensor in _norm(tensors):
            result.append(_reading(model.final_norm(kind), tensor, lambda stored: f"{base}{stored.name}"))
    if OUTPUT in tensors:
        result.append(_reading(model.output, tensors[OUTPUT], lambda stored: output_name))
    for exit, output in exits:
        result += _exit_head(backbone, tensors, layered, exit, output)
    return result


def _exit_head(
    backbone: HuggingFaceBackbone, tensors: dict[str, Canonical], layered: dict[str, Canonical], exit: ExitConfig,
    output: Origin | None,
) -> Iterator[Reading]:  # fmt: skip
    prefix, own = f"exit_heads.{exit.name}.", exit.name
    if exit.architecture == "mlp":
        mlp = {key: tensor for key, tensor in layered.items() if key.startswith("mlp.")}
        yield from _layer(mlp, lambda key: Origin("exit", f"{own}.{key}"), prefix)
    if exit.architecture == "layer":
        yield from _layer(layered, lambda key: Origin("exit", f"{own}.layer.{key}"), f"{prefix}layer.")
    if exit.architecture != "embedding":
        for kind, tensor in _norm(tensors):
            yield _reading(Origin("exit", f"{own}.norm.{kind}"), tensor, lambda stored, k=kind: f"{prefix}norm.{k}")
    if output is not None:
        matrix = (backbone.vocab_size, backbone.hidden_size)
        yield Reading(output, matrix, (Piece(f"{prefix}unembed.weight", matrix, ((0, matrix[0]),)),))


def _layer(tensors: dict[str, Canonical], origin: Callable[[str], Origin], prefix: str) -> Iterator[Reading]:
    for key, tensor in tensors.items():
        yield _reading(origin(key), tensor, lambda stored: prefix + _LAYER_PREFIX.sub("", stored.name))


def _layer_prefix(tensors: dict[str, Canonical]) -> str:
    """What the names of a layer's tensors begin with, `{layer}` in it."""
    rows = tensors[f"{LAYERS}mlp.linear_fc1.weight"].rows
    return _LAYER_PREFIX.match(rows[0].stored.name)[0]


def _norm(tensors: dict[str, Canonical]) -> Iterator[tuple[str, Canonical]]:
    for kind in ("weight", "bias"):
        if f"{_FINAL_NORM}{kind}" in tensors:
            yield kind, tensors[f"{_FINAL_NORM}{kind}"]


def _reading(origin: Origin, tensor: Canonical, name: Callable[[Stored], str]) -> Reading:
    constants = {rows.fill for rows in tensor.rows if rows.stored is None}
    if constants:
        assert len(tensor.rows) == 1, f"{origin.key}: constants beside stored rows"
        return Reading(origin, tensor.shape, (), constants.pop())
    places: dict[Stored, list[tuple[int, int, int]]] = {}
    top = 0
    for rows in tensor.rows:
        height = rows.stop - rows.start
        places.setdefault(rows.stored, []).append((rows.start, top, height))
        top += height
    pieces = []
    for stored, parts in places.items():
        piece = _piece(stored, sorted(parts))
        pieces.append(replace(piece, name=name(stored)))
    return Reading(origin, tensor.shape, tuple(pieces))


def _piece(stored: Stored, parts: list[tuple[int, int, int]]) -> Piece:
    """A stored tensor from (its row, the canonical row, number of rows), in the order of its rows."""
    ranges: list[tuple[int, int]] = []
    zeros = position = parts[0][0]
    for start, top, height in parts:
        assert start == position, f"{stored.name}: rows {position}..{start} come from nowhere"
        position += height
        if ranges and ranges[-1][1] == top:
            ranges[-1] = (ranges[-1][0], top + height)
        else:
            ranges.append((top, top + height))
    height = stored.shape[-1 if stored.transposed else 0]
    assert position == height, f"{stored.name}: rows {position}..{height} come from nowhere"
    return Piece(stored.name, stored.shape, tuple(ranges), stored.transposed, zeros)


def parts_of(tensor: Tensor, piece: Piece) -> Iterator[Tensor]:
    """A tensor of the file in pieces of rows, from the canonical one."""
    if piece.transposed:
        yield torch.cat([tensor[start:stop] for start, stop in piece.rows]).t()
        return
    if piece.zeros:
        yield torch.zeros((piece.zeros, *piece.shape[1:]), dtype=tensor.dtype)
    for start, stop in piece.rows:
        rows = tensor[start:stop]
        for first, last in row_blocks(tuple(rows.shape)):
            yield rows[first:last]
