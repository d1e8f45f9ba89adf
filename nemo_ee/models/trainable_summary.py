# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""One line per stage that says what trains and what is frozen."""

from __future__ import annotations

from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel


def what_trains(model: EarlyExitGPTModel) -> str:
    """Counts of frozen and trained parameters of this rank's stage: the exits by name, the backbone's first."""
    place = model.placement
    trainable = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    frozen = sum(p.numel() for p in model.parameters()) - sum(trainable.values())
    exits = {h.exit.name: sum(trainable.get(id(p), 0) for p in h.parameters()) for h in model.exits}
    backbone = sum(trainable.values()) - sum(exits.values())
    trains = ({"backbone": backbone} if backbone else {}) | exits
    return (
        f"stage {place.stage}: layers {place.first_layer}-{place.last_layer}, frozen {frozen:,} parameters on this "
        f"rank, trains {sum(trains.values()):,}: " + (", ".join(f"{k} {v:,}" for k, v in trains.items()) or "nothing")
    )
