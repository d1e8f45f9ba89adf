# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Check one TensorRT-LLM checkpoint directory: config fields, names, shapes, shards; with its `.nemo`, every number.

config.json is compared field by field with the one the export would write: for what the `.nemo` says where that is
given, otherwise for what the file itself says of the model. Thresholds may be edited, so they are not compared.

Nothing here runs TensorRT-LLM; a directory without problems is what its format asks for and computes, in nemo_ee's own
runtime, what its manifest states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from nemo_ee.checkpoint.nemo_config import read_architecture
from nemo_ee.export.model_origins import described_model
from nemo_ee.export.parity import parity_problems
from nemo_ee.export.safetensors_writer import header_problems
from nemo_ee.export.source import EarlyExitSource, Origin
from nemo_ee.export.tensorrt_llm.unified_checkpoint import part_of
from nemo_ee.export.tensorrt_llm.unified_config import architecture_of, checkpoint_config, stock_family
from nemo_ee.export.tensorrt_llm.unified_reader import load_checkpoint
from nemo_ee.export.tensorrt_llm.unified_tensors import Reading, rank_shapes, readings
from nemo_ee.families.architecture import Architecture
from nemo_ee.runtime.loader import DTYPES
from nemo_ee.text.json_values import read_json_object


def artifact_problems(
    folder: Path, artifact: dict[str, Any], source: EarlyExitSource | None, *, parity_gigabytes: float
) -> list[str]:
    """Every problem of a checkpoint directory.

    Args:
        artifact: its entry in the manifest, with the manifest's `max_position_embeddings`.
        source: the opened `.nemo`, to compare the numbers with.
        parity_gigabytes: largest model that is run.

    Raises:
        OSError, ValueError, KeyError, TypeError, SafetensorError: the directory cannot be read.
    """
    config = read_json_object(folder / "config.json")
    architecture, sizes = architecture_of(config), config["mapping"]
    tp, pp, dtype = sizes["tp_size"], sizes["pp_size"], DTYPES[config["dtype"]]
    if sizes["world_size"] != tp * pp:
        return [f"mapping: world_size {sizes['world_size']} is not tp_size {tp} x pp_size {pp}"]
    computed_by = stock_family(architecture).engine.architecture
    if config["architecture"] != computed_by:
        return [f"architecture: {config['architecture']}, but {computed_by} computes what is described"]
    problems = [*_config_problems(config, _expected_architecture(architecture, artifact, source))]
    if source is not None:
        problems += _exit_table_problems(config, source)
    plan = _plan(architecture, config, artifact, tp * pp, pp)
    for rank, shapes in enumerate(rank_shapes(plan, tp, pp)):
        path = folder / f"rank{rank}.safetensors"
        if not path.is_file():
            problems.append(f"{path.name} is missing")
            continue
        with safe_open(path, framework="pt", device="cpu") as file:
            wrong = header_problems(dict.fromkeys(file.keys(), file), shapes, dtype)
            problems += [f"{path.name}: {problem}" for problem in wrong]
    if source is not None and not problems:
        problems += _weight_problems(folder, plan, source, dtype, tp, pp)
    if not problems:
        problems += parity_problems(artifact.get("parity"), folder, load_checkpoint, parity_gigabytes=parity_gigabytes)
    return problems


def _expected_architecture(
    described: Architecture, artifact: dict[str, Any], source: EarlyExitSource | None
) -> Architecture:
    """What config.json has to describe: what it does without a source, else the `.nemo`'s model, or its draft."""
    if source is None:
        return described
    expected = read_architecture(
        source.config, stored_rows=source.vocabulary_rows(), max_positions=artifact.get("max_position_embeddings")
    )
    if artifact["exit"] is None:
        return expected
    exit = next((exit for exit in source.exits.exits if exit.name == artifact["exit"]), None)
    if exit is None:
        raise ValueError(f"the .nemo has no exit {artifact['exit']!r}")
    return dataclasses.replace(expected, num_layers=exit.layer + (exit.architecture == "layer"), tied=False)


def _config_problems(config: dict[str, Any], architecture: Architecture) -> Iterator[str]:
    """Fields that differ from what the export writes for this model, on the ranks and in the dtype of the shards."""
    sizes = config["mapping"]
    expected = checkpoint_config(
        architecture,
        num_layers=architecture.num_layers,
        tensor_parallel=sizes["tp_size"],
        pipeline_parallel=sizes["pp_size"],
        dtype=config["dtype"],
        tied=architecture.tied,
        early_exit=config.get("early_exit"),
    )
    for field in sorted(config.keys() | expected.keys()):
        if field not in expected:
            yield f"config.json: {field} does not belong there"
        elif field not in config:
            yield f"config.json: {field} is missing, must be {expected[field]!r}"
        elif config[field] != expected[field]:
            yield f"config.json: {field} is {config[field]!r}, must be {expected[field]!r}"


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
    architecture: Architecture, config: dict[str, Any], artifact: dict[str, Any], world_size: int, pp: int
) -> list[Reading]:
    """The readings of the checkpoint that a config.json describes; the origins are those of its export."""
    table = (config.get("early_exit") or {}).get("exits", [])
    layers, tied = architecture.num_layers, architecture.tied
    write_output = artifact["exit"] is not None or not tied or world_size > 1
    model = described_model(artifact, table, layers, tied=tied, write_output=write_output)
    return readings(architecture, model, pp)


def _weight_problems(
    folder: Path, plan: list[Reading], source: EarlyExitSource, dtype: torch.dtype, tp: int, pp: int
) -> Iterator[str]:
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(folder / f"rank{rank}.safetensors", framework="pt", device="cpu"))
            for rank in range(tp * pp)
        ]
        for reading in plan:
            if source.shape(reading.origin) is None:
                yield f"{_where(reading.origin)} is not in the .nemo"
                continue
            tensor = source.read(reading.origin, reading.shape, dtype)
            for rank, name, part in reading.parts(tp):
                expected = torch.cat(list(part_of(tensor, part)))
                if not torch.equal(files[rank].get_tensor(name), expected):
                    yield f"rank{rank}.safetensors: {name} differs from {_where(reading.origin)} of the .nemo"


def _where(origin: Origin) -> str:
    return origin.key if origin.layer is None else f"{origin.key}, layer {origin.layer + 1},"
