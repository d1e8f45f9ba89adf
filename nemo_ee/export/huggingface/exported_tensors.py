# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Which rows of which canonical tensor make up each tensor of a Hugging Face model: the importer's table, inverted.

`families.tensors` says for each canonical tensor where its rows lie in stored tensors. Each stored tensor comes from
one canonical tensor, so its rows are a list of ranges of that one. An exit's tensors are under `exit_heads.<name>.`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_ee.exits.config import ExitConfig
from nemo_ee.export.model_origins import Model
from nemo_ee.export.source import Origin, row_blocks
from nemo_ee.families.architecture import Architecture
from nemo_ee.families.registry import tensors_of
from nemo_ee.families.tensors import Canonical, Stored


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


def readings(architecture: Architecture, model: Model) -> list[Reading]:
    """Every canonical tensor to read, in the order in which the files hold what is written from them.

    Args:
        architecture: the stock model that is written; it has as many layers as `model`.
    """
    table = tensors_of(architecture)

    def prefix(place: int | ExitConfig | None) -> str:
        if place is None:
            return ""
        return table.prefix.format(place) if isinstance(place, int) else f"exit_heads.{place.name}."

    return [_reading(part.origin, part.tensor.under(prefix(part.place))) for part in model.parts(table)]


def _reading(origin: Origin, tensor: Canonical) -> Reading:
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
    return Reading(origin, tensor.shape, tuple(_piece(stored, sorted(parts)) for stored, parts in places.items()))


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
