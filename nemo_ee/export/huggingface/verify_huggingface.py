# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks of an exported Hugging Face directory against its config.json and its `.nemo`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from nemo_ee.export.huggingface.exporter import HuggingFaceSettings, plan_export
from nemo_ee.export.huggingface.shards import INDEX, SINGLE
from nemo_ee.export.huggingface.stock_config import read_stock_config
from nemo_ee.export.huggingface.stock_tensors import readings
from nemo_ee.export.model_origins import described_model
from nemo_ee.export.readings import Reading
from nemo_ee.export.source import EarlyExitSource
from nemo_ee.export.written import WrittenArtifact, config_problems
from nemo_ee.families.rotary_settings import with_both_spellings
from nemo_ee.runtime.loader import DTYPES, load_model
from nemo_ee.text.json_values import read_json_object


def written_artifact(folder: Path, entry: Mapping[str, Any], source: EarlyExitSource | None) -> WrittenArtifact:
    """The contents of the directory by its config.json.

    Args:
        entry: the directory's entry in the manifest.
        source: the opened `.nemo`, to compare the config with.

    Raises:
        OSError, ValueError, KeyError, TypeError, SafetensorError: the directory cannot be read.
    """
    config = read_json_object(folder / "config.json")
    places, problems = _places(folder)
    problems += _index_problems(folder, places)
    if source is not None:
        problems += _config_problems(config, entry, source)
    first = min(places.values(), default=SINGLE)  # messages place missing tensors in this file
    return WrittenArtifact(
        problems=problems,
        plan=[reading.in_files(lambda name: places.get(name, first)) for reading in _plan(config, entry)],
        files=dict.fromkeys(_file_names(folder), ""),
        dtype=DTYPES[config["torch_dtype"]],
        load=load_model,
    )


def _config_problems(config: dict[str, Any], entry: Mapping[str, Any], source: EarlyExitSource) -> Iterator[str]:
    """Differences between config.json and that of an export of the `.nemo`. Thresholds may differ: users edit them."""
    block, kind = config.get("early_exit") or {}, entry["kind"]
    exits = [row["name"] for row in block.get("exits", ())] if kind == "early_exit" else [entry["exit"]]
    targets, exits = ("exits",) if kind == "exit" else (kind,), () if kind == "full" else tuple(exits)
    # These values come from the directory itself, so they are not checked.
    settings = HuggingFaceSettings.model_construct(checkpoint=source.path, targets=targets, exits=exits)
    (planned,) = plan_export(settings, source, DTYPES[config["torch_dtype"]]).artifacts
    wanted = json.loads(json.dumps(planned.config))
    if kind == "early_exit":
        wanted["early_exit"] |= {key: value for key, value in block.items() if key != "exits"}
    if "rope_parameters" in wanted:  # exports of earlier versions have only one of the two spellings
        config = with_both_spellings(config)
    yield from config_problems(config, wanted)


def _plan(config: Mapping[str, Any], entry: Mapping[str, Any]) -> list[Reading]:
    """The readings of the model that a config.json describes; the origins are those of its export."""
    stock = read_stock_config(config)
    # A stock class ignores a table of exits, so in other kinds of directories the table describes no tensors.
    table = (config.get("early_exit") or {}).get("exits", []) if entry["kind"] == "early_exit" else []
    tied = stock.tied
    return readings(stock, described_model(entry, table, stock.num_layers, tied=tied, write_output=not tied))


def _file_names(folder: Path) -> list[str]:
    if not (folder / INDEX).is_file():
        return [SINGLE]
    return sorted(path.name for path in folder.glob("*.safetensors"))


def _places(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Name of every tensor -> its file, and the problems of tensors that are in several files."""
    places: dict[str, str] = {}
    problems = []
    for file_name in _file_names(folder):
        with safe_open(folder / file_name, framework="pt", device="cpu") as file:
            names = file.keys()
        problems += [f"{name} is in {places[name]} and in {file_name}" for name in names if name in places]
        places |= dict.fromkeys(names, file_name)
    return places, problems


def _index_problems(folder: Path, places: Mapping[str, str]) -> Iterator[str]:
    if not (folder / INDEX).is_file():
        return
    weight_map = read_json_object(folder / INDEX)["weight_map"]
    for name in sorted(weight_map.keys() ^ places.keys()):
        yield f"{name} is in only one of {INDEX} and the files"
    for name in sorted(weight_map.keys() & places.keys()):
        if weight_map[name] != places[name]:
            yield f"{name} is in {places[name]}, but in {weight_map[name]} by {INDEX}"
