# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The `model.layer_split` block: what it says, its problems, the split it gives."""

from __future__ import annotations

import re
from typing import Any

import pytest

from nemo_ee.exits.config import ExitConfig
from nemo_ee.exits.placement import place_exits
from nemo_ee.planning.cost_model import StageCosts
from nemo_ee.planning.layer_split import (
    CostOverrides,
    LayerSplitConfig,
    LayerSplitError,
    describe_split,
    layers_per_stage,
    stage_costs,
)

EXITS = (ExitConfig("half", 6, "mlp", "copy", "own"),)


def read(block: Any, *, num_stages: int = 2, full_depth: bool = False) -> LayerSplitConfig:
    return LayerSplitConfig.from_mapping(
        block, exits=EXITS, num_layers=12, num_stages=num_stages, full_depth=full_depth
    )


def test_null_means_the_defaults() -> None:
    for block in (None, {}, {"layers": None, "cost": None, "costs": None}):
        assert read(block) == LayerSplitConfig(None, "parameters", CostOverrides())


def test_what_can_be_said() -> None:
    assert read({"layers": [5, 1]}).layers == (5, 1)
    assert read({"layers": [11, 1]}, full_depth=True).layers == (11, 1)
    costs = read({"cost": "measured", "costs": {"final_exit": 0.5, "exits": {"half": 4}}}).costs
    assert costs == CostOverrides(final_exit=0.5, exits={"half": 4.0})
    assert read({"cost": "even"}).cost == "even"


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ([5, 1], ["must be a mapping"]),
        ({"layer": [5, 1]}, ["is not a key of this block (did you mean layers?)"]),
        ({"layers": [4, 1, 1]}, ["has 3 entries for pipeline_model_parallel_size = 2"]),
        ({"layers": [5, 2]}, ["sums to 7, and 6 layers run"]),
        ({"layers": [8, 4, 1]}, ["has 3 entries", "sums to 13"]),
        ({"layers": [6, 0]}, ["must be a list of 2 whole numbers of at least 1"]),
        ({"layers": "5,1"}, ["must be a list of 2"]),
        ({"layers": [True, 5]}, ["must be a list of 2"]),
        ({"cost": "time"}, ["must be one of parameters, measured, even"]),
        ({"costs": 4.0}, ["must be a mapping with the keys layer_without_mlp"]),
        ({"costs": {"head": 1.0}}, ["model.layer_split.costs.head = 1.0: is not a key"]),
        ({"costs": {"embedding": -1.0}}, ["costs.embedding = -1.0: must be a finite number of at least 0"]),
        ({"costs": {"exits": {"halve": 1.0}}}, ["costs.exits.halve = 1.0: is not a key", "did you mean half?"]),
        ({"costs": {"exits": 4.0}}, ["must be a mapping of exit names"]),
        ({"cost": "even", "costs": {"embedding": 1.0}}, ["nothing reads it with cost: even"]),
        ({"layers": [6], "cost": 3, "costs": {"x": 1}}, ["has 1 entries", "must be one of", "costs.x"]),
    ],
)
def test_problems_are_reported_together(block: Any, words: list[str]) -> None:
    with pytest.raises(LayerSplitError) as caught:
        read(block)
    for word in words:
        assert re.search(re.escape(word), str(caught.value)), str(caught.value)


COSTS = StageCosts(layer=1.0, layer_without_mlp=0.5, embedding=0.0, final_exit=0.9, exits={"half": 4.5})


def split_of(block: Any, num_stages: int = 2) -> tuple[int, ...]:
    config = read(block, num_stages=num_stages)
    costs = config.costs.over(COSTS).per_layer(EXITS, layers_to_run=6, skip_last_mlp=True, final_exit=False)
    return layers_per_stage(config, num_stages, costs)


def test_exits_count() -> None:
    """One exit at half depth weighs as much as four and a half layers: five layers, then one with the exit."""
    assert split_of(None) == (5, 1)
    assert split_of({"cost": "even"}) == (3, 3), "control: without exits' costs"
    assert split_of({"layers": [2, 4]}) == (2, 4)
    assert split_of(None, num_stages=3) == (3, 2, 1)
    assert split_of({"costs": {"exits": {"half": 0.0}}}) == (3, 3)
    assert split_of({"costs": {"exits": {"half": 0.0}, "embedding": 3.0}}) == (1, 5)
    assert split_of({"costs": {"exits": {"half": 0.0}, "layer_without_mlp": 3.0}}) == (4, 2)


def test_the_log_says_what_was_predicted() -> None:
    layer_costs = COSTS.per_layer(EXITS, layers_to_run=6, skip_last_mlp=True, final_exit=False)
    placements = place_exits(EXITS, num_layers=12, num_stages=2, full_depth=False, layers_per_stage=(5, 1))
    assert stage_costs(layer_costs, placements) == [5.0, 5.0]
    text = describe_split(placements, layer_costs, "FLOPs")
    assert "stage 0: layers 1-5, exits none, cost 5.00 (50.0% of the work)" in text
    assert "stage 1: layers 6-6, exits half, cost 5.00 (50.0% of the work)" in text
    assert "slowest stage has 50.0% of the work (perfect balance 50.0%, an even split of the layers 70.0%)" in text
