# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""config.json of an exported directory, or of a stock model of one of the families, read and checked once.

The table of exits is `early_exit.exits` in it; a directory without one is a model without exits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ee.exits.config import ARCHITECTURES, NAME_PATTERN
from nemo_ee.families.architecture import Architecture
from nemo_ee.families.registry import FAMILIES, read_config
from nemo_ee.generation.decoding_model import ExitPoint
from nemo_ee.text.json_values import JsonError, read_json_object


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
class ExportedModel:
    """A model and its exits, in the order of their taps. `dtype`: the name of the dtype of the stored weights."""

    architecture: Architecture
    exits: tuple[ExitEntry, ...]
    dtype: str


def read_exported_model(directory: str | Path) -> ExportedModel:
    """Read config.json.

    Raises:
        ValueError: no or damaged file, or a model that the runtime does not support (every reason in one message).
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory}: no config.json; give a directory that export_huggingface.py made")
    try:
        values = read_json_object(path)
    except JsonError as problem:
        raise ValueError(f"{problem}; the file is damaged, export again") from problem
    return exported_model(values, path)


def exported_model(values: Mapping[str, Any], origin: object) -> ExportedModel:
    """The model that the values of a config.json describe.

    Args:
        origin: name of the file in messages.

    Raises:
        ValueError: as `read_exported_model`.
    """
    try:
        table = (values.get("early_exit") or {}).get("exits", [])
        problems = [*_exit_problems(values, table)]
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise ValueError(f"{origin}: damaged, {problem!r}; export again") from problem
    try:
        # Any length is accepted: the runtime stops at the attention window.
        architecture = read_config(values, 1, problems=problems)
    except ValueError as problem:
        raise ValueError(f"{origin}: cannot be run. {problem}") from None
    dtype = values.get("torch_dtype") or values.get("dtype") or "float32"
    return ExportedModel(architecture, exit_entries(table), dtype)


def exit_entries(table: list[Mapping[str, Any]]) -> tuple[ExitEntry, ...]:
    """The rows of a checked table of exits, by their taps."""
    exits = [ExitEntry(row["name"], int(row["layer"]), row["architecture"], row["output"] == "own") for row in table]
    return tuple(sorted(exits, key=lambda exit: exit.point.stop))


def _exit_problems(values: Mapping[str, Any], table: list[Mapping[str, Any]]) -> Iterator[str]:
    family = FAMILIES.get(values.get("model_type"))
    layers = 0 if family is None else int(values.get(family.keys["num_layers"]) or 0)
    for row in table:
        if row.get("architecture") not in ARCHITECTURES or not 1 <= int(row.get("layer", 0)) <= layers:
            yield f"early_exit.exits: {row} is no exit of a model of {layers} layers"
        elif not {"name", "output"} <= row.keys():
            yield f"early_exit.exits: {row} lacks its name or its output"
    names = [row.get("name") for row in table]
    for name in names:
        if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
            yield f"early_exit.exits: {name!r} is no name of an exit; names match {NAME_PATTERN.pattern}"
    for name in sorted({str(name) for name in names if names.count(name) > 1}):
        yield f"early_exit.exits: two exits are called {name!r}"
