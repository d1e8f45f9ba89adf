# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The canonical rows of each tensor of a Hugging Face model or a GGUF file: the importer's table, inverted.

`families.tensors` has the place of each canonical tensor's rows in stored tensors. Each stored tensor comes from one
canonical tensor, so its rows are a list of ranges of that tensor. An exit's tensors are under `exit_heads.<name>.`.
"""

from __future__ import annotations

from nemo_ee.exits.config import ExitConfig
from nemo_ee.export.model_origins import Model
from nemo_ee.export.readings import Reading, WrittenTensor, joined
from nemo_ee.export.source import Origin
from nemo_ee.families.architecture import Architecture
from nemo_ee.families.registry import tensors_of
from nemo_ee.families.tensors import Canonical, Stored, TensorTable


def readings(architecture: Architecture, model: Model, table: TensorTable | None = None) -> list[Reading]:
    """Every canonical tensor to read, in the order of the tensors in the files.

    Args:
        architecture: the written stock model; it has as many layers as `model`.
        table: its tensors; None = those of the family's Hugging Face model.
    """
    table = tensors_of(architecture) if table is None else table

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
    return Reading(origin, tensor.shape, tuple(_written(stored, sorted(parts)) for stored, parts in places.items()))


def _written(stored: Stored, parts: list[tuple[int, int, int]]) -> WrittenTensor:
    """A stored tensor from (its row, the canonical row, number of rows), in the order of its rows."""
    zeros = position = parts[0][0]
    for start, _, height in parts:
        assert start == position, f"{stored.name}: rows {position}..{start} have no source"
        position += height
    height = stored.shape[-1 if stored.transposed else 0]
    assert position == height, f"{stored.name}: rows {position}..{height} have no source"
    rows = joined((top, top + height) for _, top, height in parts)
    stored_as = {"transposed": stored.transposed, "pairs": stored.pairs}
    return WrittenTensor(stored.name, stored.shape, rows, zeros_above=zeros, **stored_as)
