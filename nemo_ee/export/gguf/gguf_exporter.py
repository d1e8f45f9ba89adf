# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Exports a `.nemo` as GGUF files, which llama.cpp loads.

full.gguf          the backbone
exit_<name>.gguf   an exit as a stand-alone model: static depth, or the draft model of full.gguf
manifest.json      written last
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from tqdm import tqdm

from nemo_ee.checkpoint.atomic import atomic_directory
from nemo_ee.checkpoint.gguf_file import SUFFIX, gguf_library
from nemo_ee.commands.console import messages
from nemo_ee.exits.config import ExitConfig
from nemo_ee.export.export_plan import OWN_KEYS_AND_VALUES
from nemo_ee.export.export_settings import OutputSettings, refuse, unknown_exits
from nemo_ee.export.gguf.gguf_writer import KINDS, GgufArtifact, num_bytes, write_gguf
from nemo_ee.export.gguf.vocabulary import vocabulary
from nemo_ee.export.huggingface.exporter import first_that_fits, stocks_of
from nemo_ee.export.huggingface.stock_config import StockConfig, exit_config, exit_refusal
from nemo_ee.export.huggingface.stock_tensors import readings
from nemo_ee.export.manifest import write_manifest
from nemo_ee.export.model_origins import draft_model, full_model
from nemo_ee.export.readings import Reading, check_tensors
from nemo_ee.export.source import EarlyExitSource
from nemo_ee.families.gguf_metadata import ROPE_FACTORS, has_rope_factors, llama3_factors
from nemo_ee.families.registry import gguf_tensors_of
from nemo_ee.settings.fields import as_list
from nemo_ee.settings.user_input import rule

logger = logging.getLogger(__name__)

FORMAT = "gguf"  # format of a file, in the manifest
TARGETS = ("full", "exits")
_USES = {
    "full": {"use": "the backbone in llama.cpp", "lossless": True},
    "exit": {
        "use": "an exit in llama.cpp: static depth, or the draft model (--model-draft) of full.gguf",
        "lossless": "with full.gguf as the target; not when served alone",
    },
}


class GgufSettings(OutputSettings):
    """conf/export_gguf.yaml, a field for each key."""

    targets: Annotated[
        tuple[Literal[TARGETS], ...],
        Field(min_length=1),
        BeforeValidator(as_list),
        rule(f"some of {', '.join(TARGETS)}"),
    ] = TARGETS
    dtype: Literal[tuple(KINDS)] = "float16"


@dataclass(frozen=True)
class GgufPlan:
    """Contents of an export.

    Attributes:
        artifacts: the files.
        backbone: readings of the whole backbone.
        tied: the output projection is the word embeddings.
    """

    artifacts: Sequence[GgufArtifact]
    backbone: Sequence[Reading]
    tied: bool


def export_gguf(settings: GgufSettings) -> Path:
    """Export.

    Returns:
        Path of the written directory.

    Raises:
        ValueError: every problem of the model in one message before anything is written; or, later, a damaged file or
            an output that cannot be written. Nothing is left behind.
    """
    gguf_library()
    with EarlyExitSource(settings.checkpoint, settings.backbone) as source:
        plan = plan_export(settings, source)
        check_tensors(source, [plan.backbone, *(one.plan for one in plan.artifacts)], tied=plan.tied)
        certificates = source.certificates
        total = sum(num_bytes(one.plan, settings.dtype) for one in plan.artifacts)
        options = {"desc": settings.output.name, "disable": not settings.progress, "file": messages()}
        with atomic_directory(settings.output, total) as folder:
            with tqdm(total=total, unit="B", unit_scale=True, **options) as bar:
                for one in plan.artifacts:
                    write_gguf(folder, one, source, settings.dtype, bar.update)
            facts = {
                "targets": ["llama.cpp"],
                "verified": {"llama.cpp": None, "note": "nothing was loaded into llama.cpp"},
                "source": {"checkpoint": settings.checkpoint.name, "backbone_fingerprint": source.fingerprint},
                "dtype": settings.dtype,
                "exits": [source.exit_row(exit) for exit in source.exits.exits],
                "certificates": certificates,
                "artifacts": [one.entry for one in plan.artifacts],
                "early_exit_models": [],
            }
            write_manifest(folder, facts)
    logger.info("wrote %s: %s", settings.output, ", ".join(one.name for one in plan.artifacts))
    return settings.output


def plan_export(settings: GgufSettings, source: EarlyExitSource) -> GgufPlan:
    """The plan of the export.

    Raises:
        ValueError: llama.cpp does not compute the backbone, or has no such tokenizer; no exit has a name in `exits`,
            or an exit with such a name cannot be a model of its own.
    """
    refuse(unknown_exits("exits", settings.exits, source))
    found = stocks_of(source)
    stocks = [stock for stock in found if _refusal(stock) is None]
    problems = [] if stocks else [f"{source.path}: {_refusal(found[0])}"]
    family, architecture = (stocks or found)[0].family, (stocks or found)[0].architecture
    named = source.generation_config(architecture.vocab_size).get("eos_token_id")
    ends = named if isinstance(named, list) else [] if named is None else [named]
    tokenizer: dict[str, Any] = {}
    try:
        tokenizer = vocabulary(source.tokenizer, architecture.vocab_size, ends)
    except ValueError as problem:
        problems.append(str(problem))
    wanted: list[ExitConfig | None] = [None] if "full" in settings.targets else []
    for exit in settings.wanted_exits(source) if "exits" in settings.targets else ():
        reason = exit_refusal(family, exit)
        if reason and settings.exits is not None:
            problems.append(f"exit {exit.name!r} cannot be a stand-alone model: {reason}; leave it out")
        elif reason:
            logger.info("no exit_%s%s: %s", exit.name, SUFFIX, reason)
        else:
            wanted.append(exit)
    if not wanted and not problems:
        problems.append(f"targets={list(settings.targets)} and exits={settings.exits} leave nothing to write")
    refuse(problems)
    full, *artifacts = (
        first_that_fits(source, stocks, partial(_artifact, settings, source, tokenizer, exit))
        for exit in (None, *wanted)
    )
    return GgufPlan(artifacts, full.plan, architecture.tied)


def _refusal(stock: StockConfig) -> str | None:
    """Reason why llama.cpp does not compute the model of a config; None if it does."""
    form = stock.family.gguf
    return f"llama.cpp has no {stock.family.model_type}" if form is None else form.refusal(stock.architecture)


def _artifact(
    settings: GgufSettings,
    source: EarlyExitSource,
    tokenizer: Mapping[str, Any],
    exit: ExitConfig | None,
    stock: StockConfig,
) -> GgufArtifact:
    """The file of the backbone, or of an exit."""
    if exit is None:
        tied = stock.architecture.tied
        model = full_model(stock.architecture.num_layers, [], tied=tied, write_output=not tied)
    else:
        stock = exit_config(stock, exit, own_output=source.has_own_output(exit.name))
        model = draft_model(exit, write_output=not stock.architecture.tied)
    architecture, form = stock.architecture, stock.family.gguf
    kind, name = ("full", f"full{SUFFIX}") if exit is None else ("exit", f"exit_{exit.name}{SUFFIX}")
    number = KINDS[settings.dtype][1]
    general = {"general.type": "model", "general.name": f"{settings.checkpoint.stem} {Path(name).stem}"}
    general |= {"general.file_type": number, "general.quantization_version": 2}
    entry = {
        "file": name,
        "format": FORMAT,
        "kind": kind,
        "exit": None if exit is None else exit.name,
        "architecture": None if exit is None else exit.architecture,
        "num_layers": architecture.num_layers,
        "model": form.architecture,
        **_USES[kind],
        "kv": OWN_KEYS_AND_VALUES,
    }
    return GgufArtifact(
        name=name,
        metadata={**form.metadata(architecture), **general, **tokenizer},
        plan=readings(architecture, model, gguf_tensors_of(architecture)),
        extra={ROPE_FACTORS: llama3_factors(architecture)} if has_rope_factors(architecture) else {},
        entry=entry,
    )
