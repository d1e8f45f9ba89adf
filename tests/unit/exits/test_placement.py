# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Layers and exits over pipeline stages."""

from __future__ import annotations

import itertools

import pytest

from nemo_ee.exits.config import ExitConfig
from nemo_ee.exits.placement import place_exits


def exits_at(*places):
    return tuple(ExitConfig(f"e{i}", layer, kind, "copy", "own") for i, (layer, kind) in enumerate(places))


def test_only_the_layers_up_to_the_deepest_exit_are_split():
    exits = exits_at((3, "mlp"), (7, "mlp"))
    stages = place_exits(exits, num_layers=12, num_stages=3, full_depth=False)
    assert [(s.stage, s.first_layer, s.num_layers, s.last_layer) for s in stages] == [
        (0, 1, 3, 3),
        (1, 4, 2, 5),
        (2, 6, 2, 7),
    ]
    assert [s.exits for s in stages] == [exits[:1], (), exits[1:]]
    assert [s.skip_last_mlp for s in stages] == [False, False, True]


def test_full_depth_runs_every_layer_and_its_mlp():
    stages = place_exits(exits_at((3, "mlp"), (12, "mlp")), num_layers=12, num_stages=2, full_depth=True)
    assert [s.num_layers for s in stages] == [6, 6]
    assert not any(s.skip_last_mlp for s in stages)


@pytest.mark.parametrize("other, skipped", [("mlp", True), ("norm", False), ("embedding", False), ("layer", False)])
def test_the_last_mlp_is_skipped_only_when_every_deepest_exit_is_an_mlp_exit(other, skipped):
    exits = exits_at((2, "norm"), (4, "mlp"), (4, other))
    (stage,) = place_exits(exits, num_layers=6, num_stages=1, full_depth=False)
    assert stage.skip_last_mlp is skipped
    assert stage.exits == exits


@pytest.mark.parametrize("full_depth", [False, True])
def test_every_layer_and_exit_is_placed_once_as_evenly_as_possible(full_depth):
    for num_layers, deepest, num_stages in itertools.product((1, 5, 12), (1, 4, 5, 12), (1, 2, 3, 4, 5)):
        if deepest > num_layers:
            continue
        exits = exits_at((1, "norm"), (deepest, "mlp"))
        to_run = num_layers if full_depth else deepest
        if num_stages > to_run:
            continue
        stages = place_exits(exits, num_layers=num_layers, num_stages=num_stages, full_depth=full_depth)
        layers = [k for s in stages for k in range(s.first_layer, s.last_layer + 1)]
        assert layers == list(range(1, to_run + 1))
        sizes = [s.num_layers for s in stages]
        assert sizes == sorted(sizes, reverse=True) and max(sizes) - min(sizes) <= 1
        assert sorted(e.name for s in stages for e in s.exits) == ["e0", "e1"]
        assert all(s.first_layer <= e.layer <= s.last_layer for s in stages for e in s.exits)


def test_more_stages_than_layers_to_run():
    exits = exits_at((3, "mlp"))
    with pytest.raises(ValueError, match=r"= 4 is more than the 3 layers that run .* use at most 3 stages, or add"):
        place_exits(exits, num_layers=12, num_stages=4, full_depth=False)
    with pytest.raises(ValueError, match=r"= 13 is more than the 12 layers .* use at most 12 stages$"):
        place_exits(exits, num_layers=12, num_stages=13, full_depth=True)


def test_nothing_to_run_outside_the_model_and_no_stages():
    with pytest.raises(ValueError, match="no exits.*add exits"):
        place_exits((), num_layers=12, num_stages=1, full_depth=False)
    assert len(place_exits((), num_layers=12, num_stages=2, full_depth=True)) == 2
    with pytest.raises(ValueError, match=r"layers 1\.\.4: e0 \(layer 5\)"):
        place_exits(exits_at((5, "mlp")), num_layers=4, num_stages=1, full_depth=True)
    with pytest.raises(ValueError, match="pipeline_model_parallel_size = 0"):
        place_exits(exits_at((1, "mlp")), num_layers=4, num_stages=0, full_depth=True)
