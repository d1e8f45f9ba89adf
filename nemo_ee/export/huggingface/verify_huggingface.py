# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Check one exported Hugging Face directory against its config.json and, when given, the `.nemo`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from nemo_ee.export.content_digest import ContentDigest
from nemo_ee.export.huggingface.exported_tensors import Reading, parts_of, readings
from nemo_ee.export.huggingface.exporter import ExportSettings, config_values, plan_artifacts
from nemo_ee.export.huggingface.stock_config import read_stock_config
from nemo_ee.export.model_origins import described_model
from nemo_ee.export.parity import parity_problems
from nemo_ee.export.safetensors_writer import DTYPE_NAMES, header_problems
from nemo_ee.export.source import EarlyExitSource
from nemo_ee.families.rotary_settings import with_both_spellings
from nemo_ee.runtime.loader import DTYPES, load_model
from nemo_ee.text.json_values import read_json_object

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def artifact_problems(
    folder: Path, artifact: dict[str, Any], source: EarlyExitSource | None, *, parity_gigabytes: float
) -> list[str]:
    """Every problem of the directory.

    Args:
        artifact: its entry in the manifest.
        source: the opened `.nemo`, to compare the numbers with.
        parity_gigabytes: largest model that is run.

    Raises:
        OSError, ValueError, KeyError, TypeError, SafetensorError: the directory cannot be read.
    """
    config = read_json_object(folder / "config.json")
    plan, dtype = _plan(config, artifact), DTYPES[config["torch_dtype"]]
    shapes = {piece.name: piece.shape for reading in plan for piece in reading.written}
    problems: list[str] = []
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        places: dict[str, str] = {}
        for file_name in _file_names(folder):
            file = stack.enter_context(safe_open(folder / file_name, framework="pt", device="cpu"))
            problems += [f"{name} is in {places[name]} and in {file_name}" for name in file.keys() if name in places]
            files |= dict.fromkeys(file.keys(), file)
            places |= dict.fromkeys(file.keys(), file_name)
        problems += header_problems(files, shapes, dtype)
        problems += _index_problems(folder, places)
        if source is not None:
            problems += _config_problems(config, artifact, source)
        if not problems:
            problems += _weight_problems(plan, files, source, dtype, artifact.get("digest"))
    if not problems:
        problems += parity_problems(artifact.get("parity"), folder, load_model, parity_gigabytes=parity_gigabytes)
    return problems


def _config_problems(config: dict[str, Any], artifact: dict[str, Any], source: EarlyExitSource) -> Iterator[str]:
    """Where config.json is not what an export of the `.nemo` would say; the thresholds are the user's choice."""
    block, kind = config.get("early_exit") or {}, artifact["kind"]
    exits = [entry["name"] for entry in block.get("exits", ())] if kind == "early_exit" else [artifact["exit"]]
    targets, exits = ("exits",) if kind == "exit" else (kind,), () if kind == "full" else tuple(exits)
    # Taken from the directory itself, so nothing of it is a user's to check.
    settings = ExportSettings.model_construct(checkpoint=source.path, targets=targets, exits=exits)
    thresholds = {key: value for key, value in block.items() if key != "exits"}
    (planned,) = plan_artifacts(settings, source)
    wanted = json.loads(json.dumps(config_values(planned, DTYPES[config["torch_dtype"]], thresholds)))
    if not planned.stock.architecture.learned_positions:  # exports of earlier versions have one spelling
        config = with_both_spellings(config)
    for key in sorted(wanted.keys() | config.keys()):
        if wanted.get(key) != config.get(key) or (key in wanted) != (key in config):
            found, must = (repr(values[key]) if key in values else "absent" for values in (config, wanted))
            yield f"config.json: {key} is {found}, must be {must}"


def _plan(config: dict[str, Any], artifact: dict[str, Any]) -> list[Reading]:
    """The readings of the model that a config.json describes; the origins are those of its export."""
    stock = read_stock_config(config)
    # A stock class ignores a table of exits, so one in another kind's config.json says nothing of its tensors.
    table = (config.get("early_exit") or {}).get("exits", []) if artifact["kind"] == "early_exit" else []
    tied = stock.tied
    return readings(stock, described_model(artifact, table, stock.num_layers, tied=tied, write_output=not tied))


def _file_names(folder: Path) -> list[str]:
    if not (folder / _INDEX).is_file():
        return [_SINGLE]
    return sorted(path.name for path in folder.glob("*.safetensors"))


def _index_problems(folder: Path, places: dict[str, str]) -> Iterator[str]:
    if not (folder / _INDEX).is_file():
        return
    weight_map = read_json_object(folder / _INDEX)["weight_map"]
    for name in sorted(weight_map.keys() ^ places.keys()):
        yield f"{name} is in only one of {_INDEX} and the files"
    for name in sorted(weight_map.keys() & places.keys()):
        if weight_map[name] != places[name]:
            yield f"{name} is in {places[name]}, {_INDEX} says {weight_map[name]}"


def _weight_problems(
    plan: list[Reading],
    files: dict[str, Any],
    source: EarlyExitSource | None,
    dtype: torch.dtype,
    stated: str | None,
) -> Iterator[str]:
    """Numbers that are not the `.nemo`'s, and a digest that is another than the manifest's.

    Args:
        source: None to take the digest of what the files hold.
        stated: the manifest's digest, if it has one.
    """
    digest, holder = ContentDigest(), "the files" if source is None else "the .nemo"
    for reading in plan:
        yield from _reading_problems(reading, files, source, dtype, digest)
    if stated is not None and digest.hexdigest() != stated:
        yield f"the manifest's digest is {stated}, that of {holder} is {digest.hexdigest()}"


def _reading_problems(
    reading: Reading, files: dict[str, Any], source: EarlyExitSource | None, dtype: torch.dtype, digest: ContentDigest
) -> Iterator[str]:
    if not reading.written:
        return
    origin = reading.origin
    where = origin.key if origin.layer is None else f"{origin.key}, layer {origin.layer + 1},"
    tensor = None
    if source is not None:
        if source.shape(origin) is None:
            yield f"{where} is not in the .nemo"
            return
        tensor = source.read(origin, reading.shape, dtype)
    for piece in reading.written:
        stored = files[piece.name].get_tensor(piece.name)
        made = stored if tensor is None else torch.cat(list(parts_of(tensor, piece)))
        for _ in digest.passing(piece.name, DTYPE_NAMES[dtype], piece.shape, [made]):
            pass
        if tensor is not None and not torch.equal(stored, made):
            yield f"{piece.name} differs from {where} of the .nemo"
