# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Cost tables in a file, so that `cost_rule=fallback` gives the same text again, here or on another machine."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from pathlib import Path

from nemo_ee.checkpoint.atomic import write_json
from nemo_ee.generation.cost_rule import CostTable
from nemo_ee.generation.decoding_model import DecodingModel
from nemo_ee.text.json_values import read_json_object

Key = tuple[int, tuple[str, ...]]  # number of slots, names of the exits that may be evaluated


class CostTableFile(UserDict[Key, CostTable]):
    """The tables of a file; a table that is added is written to it at once.

    Args:
        path: the file; there are no tables where it is missing.
        model: the model that they are of.

    Raises:
        ValueError: the file is not one of cost tables, or is one of another model.
    """

    def __init__(self, path: Path, model: DecodingModel) -> None:
        super().__init__()
        self._path = path
        self._model = {"num_layers": model.num_layers, "vocab_size": model.vocab_size}
        if not path.exists():
            return
        stored = read_json_object(path)
        if not isinstance(stored.get("tables"), list):
            raise ValueError(f"{path}: not a file of cost tables; delete it or give another name")
        if stored.get("model") != self._model:
            raise ValueError(
                f"{path}: its cost tables are of a model with {stored.get('model')}, this one has {self._model}; "
                "delete it or give another name"
            )
        try:
            tables = [CostTable.from_mapping(one) for one in stored["tables"]]
        except ValueError as problem:
            raise ValueError(f"{path}: {problem}; delete it or give another name") from problem
        self.data = {(one.num_sequences, tuple(sorted(one.exits))): one for one in tables}

    def __setitem__(self, key: Key, table: CostTable) -> None:
        super().__setitem__(key, table)
        tables = [dataclasses.asdict(one) for one in self.data.values()]
        write_json(self._path, {"model": self._model, "tables": tables})
