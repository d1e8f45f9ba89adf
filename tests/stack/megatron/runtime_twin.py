# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A tiny model with exits twice: on Megatron-core, and as an exported directory for the runtime, which needs none.

The exits are copies of parts of a second model, the donor: their weights are unlike the backbone's, and both sides
read them from the donor's Hugging Face directory by their own table of names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nemo_ee.families.registry import tensors_of
from nemo_ee.families.tensors import FINAL_NORM, OUTPUT, WORDS
from tests.helpers.core_models import ALL_ARCHITECTURES, CoreModel, core_model
from tests.helpers.huggingface_models import save_tiny_model

EXITS = [
    {"name": f"{architecture}{layer}", "layer": layer, "architecture": architecture}
    for layer in (1, 2)
    for architecture in ALL_ARCHITECTURES
] + [{"name": "shared2", "layer": 2, "architecture": "norm", "output": "shared"}]


def twins(folder: Path, family: str) -> tuple[CoreModel, Any]:
    """(model on Megatron-core, `RuntimeModel`) of the same weights. `family`: a key of `TINY_MODELS`."""
    from nemo_ee.checkpoint.huggingface import HuggingFaceSource
    from nemo_ee.checkpoint.module_weights import load_exits
    from nemo_ee.runtime.loader import load_model

    base, donor = folder / "base", folder / "donor"
    save_tiny_model(base, family)
    save_tiny_model(donor, family, seed=7)
    model = core_model(base, EXITS)
    load_exits(model.model, HuggingFaceSource(donor), None, seed=1)
    _add_exits(base, donor, HuggingFaceSource(base).backbone)
    return model, load_model(base)


def _add_exits(base: Path, donor: Path, architecture: Any) -> None:
    """Put the donor's parts into the base's files under the names of an export."""
    table, theirs = tensors_of(architecture), load_file(donor / "model.safetensors")
    stored = load_file(base / "model.safetensors")
    output = table.others.get(OUTPUT, table.others[WORDS]).stored[0].name
    for exit in EXITS:
        own = exit.get("output", "own") == "own"
        for tensor in table.of_exit(exit["architecture"], own).values():
            for name in (own.name for own in tensor.stored):
                if name == "unembed.weight":
                    source = output
                elif name.startswith("norm."):
                    source = table.others[FINAL_NORM + name.removeprefix("norm.")].stored[0].name
                elif name.startswith("layer."):
                    source = table.prefix.format(architecture.num_layers - 1) + name.removeprefix("layer.")
                else:
                    source = table.prefix.format(exit["layer"] - 1) + name
                stored[f"exit_heads.{exit['name']}.{name}"] = theirs[source].clone()
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    rows = [{"output": "own", **exit} for exit in EXITS]
    rows = [row | {"output": "own" if row["output"] == "own" else "backbone"} for row in rows]
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"early_exit": {"exits": rows}}))


def prompts(vocab_size: int, lengths: tuple[int, ...] = (5, 1, 9)) -> list[list[int]]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]
