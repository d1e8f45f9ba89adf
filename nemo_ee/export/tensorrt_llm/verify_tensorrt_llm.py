# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks of a TensorRT-LLM checkpoint directory against its config.json and its `.nemo`.

config.json is compared field by field with the one that the export would write: for the `.nemo`'s model if that is
given, otherwise for the model of the file itself. Thresholds may be edited, so they are not compared. TensorRT-LLM is
not run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_ee.checkpoint.nemo_config import read_architecture
from nemo_ee.export.model_origins import described_model
from nemo_ee.export.readings import Reading
from nemo_ee.export.source import EarlyExitSource
from nemo_ee.export.tensorrt_llm.unified_config import architecture_of, checkpoint_config, stock_family
from nemo_ee.export.tensorrt_llm.unified_reader import load_checkpoint
from nemo_ee.export.tensorrt_llm.unified_tensors import rank_file, readings
from nemo_ee.export.written import WrittenArtifact, config_problems
from nemo_ee.families.architecture import Architecture
from nemo_ee.runtime.loader import DTYPES
from nemo_ee.text.json_values import read_json_object


def written_artifact(folder: Path, entry: Mapping[str, Any], source: EarlyExitSource | None) -> WrittenArtifact:
    """The contents of the directory by its config.json.

    Args:
        entry: the directory's entry in the manifest, with the manifest's `max_position_embeddings`.
        source: the opened `.nemo`, to compare the config with.

    Raises:
        OSError, ValueError, KeyError, TypeError: the directory cannot be read.
    """
    config = read_json_object(folder / "config.json")
    architecture, sizes = architecture_of(config), config["mapping"]
    tp, pp = sizes["tp_size"], sizes["pp_size"]
    if sizes["world_size"] != tp * pp:
        return WrittenArtifact(
            problems=[f"mapping: world_size {sizes['world_size']} is not tp_size {tp} x pp_size {pp}"]
        )
    computed_by = stock_family(architecture).engine.architecture
    if config["architecture"] != computed_by:
        return WrittenArtifact(
            problems=[f"architecture: {config['architecture']}, but {computed_by} computes the described model"]
        )
    expected = _expected_architecture(architecture, entry, source)
    wanted = checkpoint_config(
        expected,
        tensor_parallel=tp,
        pipeline_parallel=pp,
        dtype=config["dtype"],
        early_exit=config.get("early_exit"),
    )
    problems = [*config_problems(config, wanted)]
    if source is not None:
        problems += _exit_table_problems(config, source)
    names = [rank_file(rank) for rank in range(tp * pp)]
    return WrittenArtifact(
        problems=problems,
        plan=_plan(architecture, config, entry, tp, pp),
        files={name: f"{name}: " for name in names},
        dtype=DTYPES[config["dtype"]],
        load=load_checkpoint,
    )


def _expected_architecture(
    described: Architecture, entry: Mapping[str, Any], source: EarlyExitSource | None
) -> Architecture:
    """The architecture that config.json must have: that of the `.nemo`'s model or draft; without a source its own."""
    if source is None:
        return described
    expected = read_architecture(
        source.config, stored_rows=source.vocabulary_rows(), max_positions=entry.get("max_position_embeddings")
    )
    if entry["exit"] is None:
        return expected
    exit = next((exit for exit in source.exits.exits if exit.name == entry["exit"]), None)
    if exit is None:
        raise ValueError(f"the .nemo has no exit {entry['exit']!r}")
    return dataclasses.replace(expected, num_layers=exit.layer + (exit.architecture == "layer"), tied=False)


def _exit_table_problems(config: dict[str, Any], source: EarlyExitSource) -> Iterator[str]:
    known = {exit.name: exit for exit in source.exits.exits}
    for row in (config.get("early_exit") or {}).get("exits", []):
        exit = known.get(row["name"])
        if exit is None:
            yield f"config.json: early_exit names {row['name']!r}, which is no exit of the .nemo"
            continue
        for field, value in source.exit_row(exit).items():
            if row[field] != value:
                yield f"config.json: early_exit: {exit.name}: {field} is {row[field]!r}, must be {value!r}"


def _plan(
    architecture: Architecture, config: dict[str, Any], entry: Mapping[str, Any], tp: int, pp: int
) -> list[Reading]:
    """The readings of the checkpoint that a config.json describes; the origins are those of its export."""
    table = (config.get("early_exit") or {}).get("exits", [])
    layers, tied = architecture.num_layers, architecture.tied
    write_output = entry["exit"] is not None or not tied or tp * pp > 1
    model = described_model(entry, table, layers, tied=tied, write_output=write_output)
    return readings(architecture, model, tp, pp)
