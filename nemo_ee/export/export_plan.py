# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs an export of any format: check everything, write tensor by tensor, read back, write manifest.json last.

A format makes an `ExportPlan`; this file writes it. All files go to `<output>.partial`, which gets its final name when
everything is on disk; after a problem or an interruption nothing is left. Each canonical tensor is read once per
directory, with low-rank updates added, one tensor in memory at a time. Then each directory up to `parity_gigabytes` is
read back completely for its parity digest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nemo_ee.checkpoint.atomic import atomic_directory, write_json
from nemo_ee.commands.console import messages
from nemo_ee.exits.config import ExitConfig
from nemo_ee.export.content_digest import ContentDigest
from nemo_ee.export.export_settings import ExportSettings
from nemo_ee.export.manifest import write_manifest
from nemo_ee.export.parity import written_parity
from nemo_ee.export.readings import Reading, check_tensors, write_weights
from nemo_ee.export.source import EarlyExitSource, copy_tokenizer
from nemo_ee.runtime.model import RuntimeModel
from nemo_ee.text.special_tokens import GENERATION_CONFIG

logger = logging.getLogger(__name__)

OWN_KEYS_AND_VALUES = "its own, every layer writes every position"


@dataclass(frozen=True)
class Artifact:
    """One directory to write.

    Attributes:
        directory: name of the directory in the export.
        config: the values of config.json.
        shards: readings of the files that are written together, in the order of the files.
        entry: further keys of its entry in the manifest.
        num_layers: number of layers of its model.
        exit: the exit that the directory holds as a stand-alone model; None = the whole backbone.
        files: further files, name -> text; values are written as JSON.
        load: reads the directory back for the parity digest; None = the runtime does not compute this model.
    """

    directory: str
    config: dict[str, Any]
    shards: Sequence[Sequence[Reading]]
    entry: Mapping[str, Any]
    num_layers: int
    load: Callable[[Path], RuntimeModel] | None
    exit: ExitConfig | None = None
    files: Mapping[str, Any] = field(default_factory=dict)

    @property
    def plan(self) -> list[Reading]:
        """All readings of the directory."""
        return list(chain.from_iterable(self.shards))


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """Contents of an export.

    Attributes:
        artifacts: the directories.
        backbone: readings of the whole backbone, also if no artifact has all of it.
        tied: the output projection is the word embeddings.
        vocab_size: vocabulary size of the model.
        facts: entries of the manifest.
        early_exit_models: entries of the manifest about model files for an engine.
        files: files beside the directories, name -> text.
        tokenizers: directories that get the tokenizer.
        config_indent: indentation of config.json.
        with_digest: whether the manifest has a digest of each directory's numbers.
    """

    artifacts: Sequence[Artifact]
    backbone: Sequence[Reading]
    tied: bool
    vocab_size: int
    facts: Mapping[str, Any]
    early_exit_models: Sequence[Mapping[str, Any]]
    tokenizers: Sequence[str]
    files: Mapping[str, str] = field(default_factory=dict)
    config_indent: int = 2
    with_digest: bool = False


def export(settings: ExportSettings, plan_of: Callable[[EarlyExitSource, torch.dtype], ExportPlan]) -> Path:
    """Export.

    Args:
        plan_of: makes the format's plan and checks everything that needs no weights.

    Returns:
        Path of the written directory.

    Raises:
        ValueError: every problem of the model in one message before anything is written; or, later, a damaged file or
            an output that cannot be written. Nothing is left behind.
    """
    with EarlyExitSource(settings.checkpoint, settings.backbone) as source:
        dtype = settings.dtype_of(source)
        plan = plan_of(source, dtype)
        check_tensors(source, [plan.backbone, *(artifact.plan for artifact in plan.artifacts)], tied=plan.tied)
        _ = source.certificates  # a damaged certificate is reported now, not after hours of writing
        _write(settings, source, plan, dtype)
    logger.info("wrote %s: %s", settings.output, ", ".join(artifact.directory for artifact in plan.artifacts))
    return settings.output


def _write(settings: ExportSettings, source: EarlyExitSource, plan: ExportPlan, dtype: torch.dtype) -> None:
    readings = (reading for artifact in plan.artifacts for reading in artifact.plan)
    total = sum(reading.num_elements for reading in readings) * dtype.itemsize
    generation = source.generation_config(plan.vocab_size)
    with atomic_directory(settings.output, total) as partial:
        options = {"desc": settings.output.name, "disable": not settings.progress, "file": messages()}
        bar = tqdm(total=total, unit="B", unit_scale=True, **options)
        entries = []
        with bar:
            for artifact in plan.artifacts:
                folder = partial / artifact.directory
                folder.mkdir()
                write_json(folder / "config.json", artifact.config, indent=plan.config_indent)
                write_json(folder / GENERATION_CONFIG, generation)
                _write_files(folder, artifact.files)
                digest = ContentDigest() if plan.with_digest else None
                for shard in artifact.shards:
                    write_weights(folder, shard, source, dtype, bar.update, digest)
                entries.append(_entry(artifact, digest))
        _write_files(partial, plan.files)
        for directory in plan.tokenizers:
            copy_tokenizer(source, partial / directory)
        for artifact, entry in zip(plan.artifacts, entries, strict=True):
            entry["parity"] = _parity(partial / artifact.directory, artifact, settings.parity_gigabytes)
        facts = {
            "source": {"checkpoint": settings.checkpoint.name, "backbone_fingerprint": source.fingerprint},
            "dtype": str(dtype).removeprefix("torch."),
            "certificates": source.certificates,
            "artifacts": entries,
            "early_exit_models": list(plan.early_exit_models),
        }
        write_manifest(partial, {**plan.facts, **facts})


def _write_files(folder: Path, files: Mapping[str, Any]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if isinstance(content, str):
            (folder / name).write_text(content, encoding="utf-8")
        else:
            write_json(folder / name, content)


def _entry(artifact: Artifact, digest: ContentDigest | None) -> dict[str, Any]:
    return {
        "directory": artifact.directory,
        "exit": None if artifact.exit is None else artifact.exit.name,
        "architecture": None if artifact.exit is None else artifact.exit.architecture,
        "num_layers": artifact.num_layers,
        **artifact.entry,
        "max_batch": None,
        **({} if digest is None else {"digest": digest.hexdigest()}),
    }


def _parity(folder: Path, artifact: Artifact, parity_gigabytes: float) -> dict[str, Any] | None:
    if artifact.load is None:
        logger.info("%s: no parity digest, nemo_ee's runtime computes no model without final norm", artifact.directory)
        return None
    try:
        return written_parity(folder, artifact.load, parity_gigabytes=parity_gigabytes)
    except ValueError as problem:
        raise ValueError(
            f"the written model cannot be run, so nothing was exported: {problem}\n"
            "parity_gigabytes=0 exports without running it"
        ) from problem
