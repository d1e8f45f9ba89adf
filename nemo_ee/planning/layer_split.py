# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The `model.layer_split` block, and the split of the layers that run over pipeline stages by it.

    layers: [8, 2]     the split, stage by stage
    cost: parameters   otherwise: the costs that the split balances (`nemo_ee.exits.partition.balanced_cut`)

The block describes a run, not a model: any split loads what another one saved, because weights are stored by global
layer number. So it is not kept in a `.nemo`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_ee.exits.block_reader import BlockReader, integer, keys_of, number, one_of
from nemo_ee.exits.config import ExitConfig
from nemo_ee.exits.partition import balanced_cut
from nemo_ee.exits.placement import StagePlacement, layers_that_run
from nemo_ee.planning.cost_model import StageCosts

BLOCK = "model.layer_split"
COSTS = ("parameters", "measured", "even")
_COST_KEYS = ("layer_without_mlp", "embedding", "final_exit", "exits")


class LayerSplitError(ValueError):
    """The block has problems; the message holds them all."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{BLOCK} has {count}:", *(f"  - {problem}" for problem in self.problems)]))


@dataclasses.dataclass(frozen=True)
class CostOverrides:
    """Costs given by the user, in units of one layer's forward; None or a missing exit: the cost source's value.

    Attributes:
        layer_without_mlp: the deepest layer, where its MLP is skipped.
        embedding: on the first stage.
        final_exit: final norm and output, on the last stage where they run.
        exits: exit name -> forward, loss and backward.
    """

    layer_without_mlp: float | None = None
    embedding: float | None = None
    final_exit: float | None = None
    exits: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def over(self, costs: StageCosts) -> StageCosts:
        """`costs` with the given ones in their place."""
        given = {key: getattr(self, key) for key in _COST_KEYS[:-1] if getattr(self, key) is not None}
        return dataclasses.replace(costs, **given, exits={**costs.exits, **self.exits})


@dataclasses.dataclass(frozen=True)
class LayerSplitConfig:
    """The block.

    Attributes:
        layers: layers per stage; None: chosen by cost.
        cost: `parameters` (FLOPs of the matrix products), `measured` (the same operations timed when the run starts)
            or `even` (every layer the same, exits nothing).
        costs: overrides of single costs; with `even` there is nothing to override.
    """

    layers: tuple[int, ...] | None = None
    cost: str = "parameters"
    costs: CostOverrides = CostOverrides()

    @classmethod
    def from_mapping(
        cls,
        mapping: Mapping[str, Any] | None,
        *,
        exits: Sequence[ExitConfig],
        num_layers: int,
        num_stages: int,
        full_depth: bool,
    ) -> LayerSplitConfig:
        """Read the block.

        Args:
            mapping: the yaml block (plain containers); None and missing keys mean the defaults.
            exits, num_layers, num_stages, full_depth: as for `nemo_ee.exits.placement.place_exits`, which checks them.

        Raises:
            LayerSplitError: with every problem of the block.
        """
        mapping = {} if mapping is None else mapping
        keys = keys_of(cls)
        if not isinstance(mapping, Mapping):
            raise LayerSplitError([f"{BLOCK} = {mapping!r}: must be a mapping with the keys {', '.join(keys)}"])
        problems: list[str] = []
        reader, base = BlockReader(mapping, BLOCK, keys, problems), cls()
        config = cls(
            layers=_read_layers(
                reader, num_stages, layers_that_run(exits, num_layers=num_layers, full_depth=full_depth)
            ),
            cost=reader.read("cost", one_of(COSTS), base.cost),
            costs=_read_costs(reader, exits),
        )
        if config.layers is None and config.cost == "even" and config.costs != base.costs:
            reader.problem("costs", "nothing reads it with cost: even; set cost to parameters or measured")
        if problems:
            raise LayerSplitError(problems)
        return config


def _read_layers(reader: BlockReader, num_stages: int, layers_to_run: int) -> tuple[int, ...] | None:
    value = reader.given("layers")
    if value is None:
        return None
    rule = f"a list of {num_stages} whole numbers of at least 1 (pipeline stages) with the sum {layers_to_run}"
    whole = integer(1)
    try:
        if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
            raise ValueError("not a list")
        layers = tuple(whole(count) for count in value)
    except ValueError:
        reader.problem("layers", f"must be {rule} (the layers that run), or null to have them split by cost")
        return None
    if len(layers) != num_stages:
        reader.problem(
            "layers",
            f"has {len(layers)} entries for pipeline_model_parallel_size = {num_stages}; it must be {rule}",
        )
    if sum(layers) != layers_to_run:
        reader.problem(
            "layers",
            f"sums to {sum(layers)}, and {layers_to_run} layers run (those up to the deepest exit, or all of the "
            "model's where the final exit is needed); make the sum fit, or null to have them split by cost",
        )
    return layers


def _read_costs(reader: BlockReader, exits: Sequence[ExitConfig]) -> CostOverrides:
    value = reader.given("costs")
    if value is None:
        return CostOverrides()
    if not isinstance(value, Mapping):
        reader.problem(
            "costs", f"must be a mapping with the keys {', '.join(_COST_KEYS)}, in units of a layer's forward"
        )
        return CostOverrides()
    inner = BlockReader(value, f"{BLOCK}.costs", _COST_KEYS, reader.problems)
    single = {key: inner.read(key, number(), None) for key in _COST_KEYS[:-1]}
    named = inner.given("exits")
    if named is not None and not isinstance(named, Mapping):
        inner.problem("exits", "must be a mapping of exit names to costs; write {layer8-mlp: 4.0}")
    if not isinstance(named, Mapping):
        return CostOverrides(**single)
    names = BlockReader(named, f"{BLOCK}.costs.exits", [exit.name for exit in exits], reader.problems)
    read = {exit.name: names.read(exit.name, number(), None) for exit in exits}
    return CostOverrides(**single, exits={name: cost for name, cost in read.items() if cost is not None})


def layers_per_stage(config: LayerSplitConfig, num_stages: int, layer_costs: Sequence[float]) -> tuple[int, ...]:
    """The split.

    Args:
        config: the block.
        num_stages: pipeline-parallel size.
        layer_costs: cost of every layer that runs with its exits (`StageCosts.per_layer`).
    """
    if config.layers is not None:
        return config.layers
    return balanced_cut([1.0] * len(layer_costs) if config.cost == "even" else layer_costs, num_stages)


def stage_costs(layer_costs: Sequence[float], placements: Sequence[StagePlacement]) -> list[float]:
    """Predicted cost of each stage."""
    return [sum(layer_costs[stage.first_layer - 1 : stage.last_layer]) for stage in placements]


def describe_split(placements: Sequence[StagePlacement], layer_costs: Sequence[float], chosen_by: str) -> str:
    """The split as text: a line per stage with layers, exits and predicted cost, and how even it is.

    Args:
        placements: one per stage.
        layer_costs: cost of every layer that runs, in units of one layer's forward.
        chosen_by: where the split comes from.
    """
    costs = stage_costs(layer_costs, placements)
    total = sum(costs)
    even = balanced_cut([1.0] * len(layer_costs), len(placements))
    ends = [sum(even[: index + 1]) for index in range(len(even))]
    slowest_even = max(sum(layer_costs[end - count : end]) for end, count in zip(ends, even, strict=True))
    lines = [f"layer split by {chosen_by}; predicted cost of a microbatch in units of one layer's forward:"]
    for stage, cost in zip(placements, costs, strict=True):
        names = ", ".join(exit.name for exit in stage.exits) or "none"
        lines.append(
            f"  stage {stage.stage}: layers {stage.first_layer}-{stage.last_layer}, exits {names}, "
            f"cost {cost:.2f} ({cost / total:.1%} of the work)"
        )
    lines.append(
        f"  the slowest stage has {max(costs) / total:.1%} of the work (perfect balance {1 / len(costs):.1%}, an even "
        f"split of the layers {slowest_even / total:.1%})"
    )
    return "\n".join(lines)
