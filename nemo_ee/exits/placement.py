# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Which pipeline stage runs which layers and which exits.

Only the layers that run are split: those up to the deepest exit, or all of them when the final exit is needed.
`nemo_ee.planning.layer_split` chooses the number of layers of each stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from nemo_ee.exits.config import ExitConfig
from nemo_ee.exits.partition import balanced_cut


@dataclasses.dataclass(frozen=True)
class StagePlacement:
    """The layers and exits of one pipeline stage.

    Attributes:
        stage: pipeline stage, from 0.
        first_layer: 1-based number of its first layer.
        num_layers: number of layers it runs, at least 1.
        exits: the exits whose layer it runs, in the configuration's order.
        skip_last_mlp: its last layer's own MLP does not run: every exit there is an `mlp` exit, nothing follows.
    """

    stage: int
    first_layer: int
    num_layers: int
    exits: tuple[ExitConfig, ...]
    skip_last_mlp: bool

    @property
    def last_layer(self) -> int:
        """1-based number of its last layer."""
        return self.first_layer + self.num_layers - 1


def layers_that_run(exits: Sequence[ExitConfig], *, num_layers: int, full_depth: bool) -> int:
    """The number of layers that run: all of them at full depth, otherwise those up to the deepest exit."""
    return num_layers if full_depth else max(exit.layer for exit in exits)


def skips_last_mlp(exits: Sequence[ExitConfig], *, layers_to_run: int, full_depth: bool) -> bool:
    """Whether the deepest layer's own MLP does not run: every exit there is an `mlp` exit and nothing follows."""
    return not full_depth and all(exit.architecture == "mlp" for exit in exits if exit.layer == layers_to_run)


def place_exits(
    exits: Sequence[ExitConfig],
    *,
    num_layers: int,
    num_stages: int,
    full_depth: bool,
    layers_per_stage: Sequence[int] | None = None,
) -> tuple[StagePlacement, ...]:
    """Split the layers that run over the stages.

    Args:
        exits: the model's exits.
        num_layers: layers of the backbone.
        num_stages: pipeline-parallel size.
        full_depth: run every layer (the final exit is needed), not only those up to the deepest exit.
        layers_per_stage: the split (see `nemo_ee.planning.layer_split`); None: as even as possible, larger
            stages first.

    Returns:
        One placement per stage; a stage may have no exits.

    Raises:
        ValueError: nothing to run, an exit outside the model, or more stages than layers to run.
    """
    outside = [f"{exit.name} (layer {exit.layer})" for exit in exits if not 1 <= exit.layer <= num_layers]
    if outside:
        raise ValueError(
            f"exits outside the model's layers 1..{num_layers}: {', '.join(outside)}; move or remove them"
        )
    if num_stages < 1:
        raise ValueError(f"pipeline_model_parallel_size = {num_stages} must be at least 1")
    if not exits and not full_depth:
        raise ValueError("there are no exits, so there is nothing to run; add exits under model.early_exit.exits")
    layers_to_run = layers_that_run(exits, num_layers=num_layers, full_depth=full_depth)
    if num_stages > layers_to_run:
        reason = "all of the model's" if full_depth else f"up to the deepest exit, of {num_layers} in the model"
        way_out = "" if full_depth else ", or add a deeper exit"
        raise ValueError(
            f"pipeline_model_parallel_size = {num_stages} is more than the {layers_to_run} layers that run "
            f"({reason}); every stage needs at least one: use at most {layers_to_run} stages{way_out}"
        )
    if layers_per_stage is None:
        layers_per_stage = balanced_cut([1.0] * layers_to_run, num_stages)
    assert len(layers_per_stage) == num_stages and sum(layers_per_stage) == layers_to_run, layers_per_stage
    deepest_needs_no_mlp = skips_last_mlp(exits, layers_to_run=layers_to_run, full_depth=full_depth)
    placements = []
    first_layer = 1
    for stage, count in enumerate(layers_per_stage):
        own_layers = range(first_layer, first_layer + count)
        own_exits = tuple(exit for exit in exits if exit.layer in own_layers)
        is_last = stage == num_stages - 1
        placements.append(StagePlacement(stage, first_layer, count, own_exits, is_last and deepest_needs_no_mlp))
        first_layer += count
    return tuple(placements)
