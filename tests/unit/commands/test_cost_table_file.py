# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Measured costs in a file: a second run reads what the first one wrote, and measures nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from nemo_ee.commands.cost_table_file import CostTableFile
from nemo_ee.generation.cost_rule import CostTable
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from tests.helpers.stub_models import TinyTransformer
from tests.unit.generation.test_against_reference import ALL_KINDS


def generate(path: Path, exits: tuple[str, ...]) -> None:
    model = TinyTransformer(ALL_KINDS)
    engine = EarlyExitEngine(model, cost_rule="fallback", cost_tables=CostTableFile(path, model))
    engine.generate([[1, 2], [3]], max_new_tokens=2, policy=ExitPolicy(0.5, active=exits))


def test_what_was_measured_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, names = tmp_path / "costs.json", [point.name for point in TinyTransformer(ALL_KINDS).exits]
    generate(path, (names[0],))
    first = json.loads(path.read_text())
    assert [table["num_sequences"] for table in first["tables"]] == [2]
    with monkeypatch.context() as patch:
        patch.setattr("nemo_ee.generation.engine.measure_costs", None)
        generate(path, (names[0],))
        with pytest.raises(TypeError):  # control: other exits are not in the file
            generate(path, (names[1],))
    assert json.loads(path.read_text()) == first
    generate(path, (names[1],))
    tables = json.loads(path.read_text())["tables"]
    assert tables[0] == first["tables"][0] and [list(table["exits"]) for table in tables] == [[names[0]], [names[1]]]


OTHER = {"num_layers": 99, "vocab_size": 37, "exits": {}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "costs.json is no file of cost tables"),
        ('{"tables": 3}', "is no file of cost tables"),
        (json.dumps({"model": OTHER, "tables": []}), "tables of a model with .*99.* this one has"),
        ('{"model": {}, "tables": [{"num_sequences": 2}]}', "not a table of costs .* delete it or give another"),
    ],
)
def test_files_that_are_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "costs.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        CostTableFile(tmp_path / "costs.json", TinyTransformer(ALL_KINDS))


def test_an_exit_elsewhere_is_another_model(tmp_path: Path) -> None:
    model = TinyTransformer(ALL_KINDS)
    CostTableFile(tmp_path / "costs.json", model)[2, ()] = CostTable(2, ((1, ((1, 1.0),)),), {}, ((1, 1.0),))
    assert len(CostTableFile(tmp_path / "costs.json", model)) == 1, "control"
    point = model.exits[0]
    model.exits = (dataclasses.replace(point, stop=point.stop - 1), *model.exits[1:])
    with pytest.raises(ValueError, match="cost tables of a model with"):
        CostTableFile(tmp_path / "costs.json", model)


def test_two_processes_add_their_tables(tmp_path: Path) -> None:
    model, tables = TinyTransformer(ALL_KINDS), {}
    files = [CostTableFile(tmp_path / "costs.json", model) for _ in range(2)]
    for count, file in enumerate(files, start=1):
        tables[count, ()] = file[count, ()] = CostTable(count, ((1, ((1, 1.0),)),), {}, ((1, 1.0),))
    assert dict(CostTableFile(tmp_path / "costs.json", model)) == tables
