# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Which pipeline stage runs which layers and which exits.

Only the layers that run are split: those up to the deepest exit, or all of them when the final exit is needed.

May import: the standard library and `nemo_ee.exits.config`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from nemo_ee.exits.config import ExitConfig


@dataclasses.dataclass(frozen=True)
class StagePlacement:
    """The layers and exits of one pipeline stage.

    Attributes:
        stage: pipeline stage, from 0.
        first_layer: 1-based number of its first layer.
        num_layers: how many layers it runs, at least 1.
        exits: the exits whose layer it runs, in the configuration's order.
        skip_last_mlp: its last layer's own MLP is run by nobody: every exit there is an `mlp` exit, nothing follows.
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


def place_exits(
    exits: Sequence[ExitConfig], *, num_layers: int, num_stages: int, full_depth: bool
) -> tuple[StagePlacement, ...]:
    """Split the layers that run over the stages as evenly as possible, larger stages first.

    Args:
        exits: the model's exits.
        num_layers: layers of the backbone.
        num_stages: pipeline-parallel size.
        full_depth: run every layer (the final exit is needed), not only those up to the deepest exit.

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
    layers_to_run = num_layers if full_depth else max(exit.layer for exit in exits)
    if num_stages > layers_to_run:
        reason = "all of the model's" if full_depth else f"up to the deepest exit, of {num_layers} in the model"
        way_out = "" if full_depth else ", or add a deeper exit"
        raise ValueError(
            f"pipeline_model_parallel_size = {num_stages} is more than the {layers_to_run} layers that run "
            f"({reason}); every stage needs at least one: use at most {layers_to_run} stages{way_out}"
        )
    deepest_needs_no_mlp = not full_depth and all(e.architecture == "mlp" for e in exits if e.layer == layers_to_run)
    placements = []
    first_layer = 1
    for stage in range(num_stages):
        count = layers_to_run // num_stages + (stage < layers_to_run % num_stages)
        own_layers = range(first_layer, first_layer + count)
        own_exits = tuple(exit for exit in exits if exit.layer in own_layers)
        is_last = stage == num_stages - 1
        placements.append(StagePlacement(stage, first_layer, count, own_exits, is_last and deepest_needs_no_mlp))
        first_layer += count
    return tuple(placements)
