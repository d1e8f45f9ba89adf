# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Cost tables in a file, so that `cost_rule=fallback` and `draft_rule=value` decide alike again, here or on another
machine."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from pathlib import Path
from typing import Any

from nemo_ee.checkpoint.atomic import write_json
from nemo_ee.generation.cost_rule import CostTable
from nemo_ee.generation.decoding_model import DecodingModel
from nemo_ee.text.json_values import read_json_object

Key = tuple[int, tuple[str, ...]]  # number of slots, names of the exits that may be evaluated


def read_tables(path: Path) -> tuple[dict[str, Any], dict[Key, CostTable]]:
    """What a file says of its model, and its tables.

    Raises:
        ValueError: it is no file of cost tables.
    """
    try:
        stored = read_json_object(path)
        tables = [CostTable.from_mapping(one) for one in stored["tables"]]
        return dict(stored["model"]), {(one.num_sequences, tuple(sorted(one.exits))): one for one in tables}
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"is no file of cost tables ({problem}); delete it or give another name") from problem


class CostTableFile(UserDict[Key, CostTable]):
    """The tables of a file; a table that is added is written to it at once.

    Args:
        path: the file; there are no tables where it is missing.
        model: the model that they are of.

    Raises:
        ValueError: the file is not one of cost tables, or its model has other layers, vocabulary or exits.
    """

    def __init__(self, path: Path, model: DecodingModel) -> None:
        super().__init__()
        self._path = path
        exits = {point.name: point.stop for point in model.exits}
        self._model = {"num_layers": model.num_layers, "vocab_size": model.vocab_size, "exits": exits}
        if path.exists():
            self.data = self._read()

    def _read(self) -> dict[Key, CostTable]:
        try:
            model, tables = read_tables(self._path)
        except ValueError as problem:
            raise ValueError(f"{self._path} {problem}") from problem
        if model != self._model:
            raise ValueError(
                f"{self._path} has cost tables of a model with {model}, this one has {self._model}; delete it or give "
                "another name"
            )
        return tables

    def __setitem__(self, key: Key, table: CostTable) -> None:
        if self._path.exists():  # another process may have added some
            self.data |= self._read()
        super().__setitem__(key, table)
        tables = [dataclasses.asdict(one) for one in self.data.values()]
        write_json(self._path, {"model": self._model, "tables": tables})
