# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Exports a `.nemo` as Hugging Face directories.

hf_full/          the backbone in its family's stock class
hf_exit_<name>/   an exit as a stand-alone model: k layers with the exit's MLP, norm and output, or k + 1
hf_early_exit/    the backbone with exit_heads.* beside it and the table of exits in config.json; in it
                  early_exit_trtllm/, with which TensorRT-LLM's PyTorch backend leaves early
manifest.json     written last
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field

from nemo_ee.checkpoint.tokenizer_files import special_token_ids
from nemo_ee.exits.config import ExitConfig
from nemo_ee.exits.criteria import PROBES_FILE
from nemo_ee.export.export_plan import OWN_KEYS_AND_VALUES, Artifact, ExportPlan, export
from nemo_ee.export.export_settings import ExportSettings, refuse, unknown_exits
from nemo_ee.export.huggingface.remote_code import auto_map, remote_code
from nemo_ee.export.huggingface.shards import index_file, sharded
from nemo_ee.export.huggingface.stock_config import (
    FORMAT,
    StockConfig,
    exit_config,
    exit_refusal,
    stock_configs,
)
from nemo_ee.export.huggingface.stock_tensors import readings
from nemo_ee.export.model_origins import draft_model, full_model
from nemo_ee.export.readings import Reading
from nemo_ee.export.source import EarlyExitSource
from nemo_ee.export.tensorrt_llm.early_exit_files import (
    PYTORCH_CRITERIA,
    pytorch_entries,
    pytorch_files,
    threshold_block,
    threshold_problems,
)
from nemo_ee.families.family import Family
from nemo_ee.families.registry import FAMILIES
from nemo_ee.runtime.loader import load_model
from nemo_ee.settings.fields import AboveZero, as_list
from nemo_ee.settings.user_input import rule
from nemo_ee.text.special_tokens import CONFIG

logger = logging.getLogger(__name__)

TARGETS = ("full", "exits", "early_exit")
NOT_LOADED = "nothing was loaded into transformers"
_USES = {
    "full": {"use": "the backbone in a stock class of transformers", "lossless": True, "kv": OWN_KEYS_AND_VALUES},
    "exit": {
        "use": "an exit in a stock class: static depth, or a draft model (assistant_model) for hf_full",
        "lossless": "with hf_full as the target; not when served alone",
        "kv": OWN_KEYS_AND_VALUES,
    },
    "early_exit": {
        "use": "backbone and exits; nemo_ee.runtime decodes it, a stock class loads the backbone",
        "lossless": "at full depth, in a stock class, and in mode self_speculative; not where thresholds decide",
        "kv": "carry",
    },
}


class HuggingFaceSettings(ExportSettings):
    """conf/export_huggingface.yaml, a field for each key."""

    targets: Annotated[
        tuple[Literal[TARGETS], ...],
        Field(min_length=1),
        BeforeValidator(as_list),
        rule(f"some of {', '.join(TARGETS)}"),
    ] = TARGETS
    shard_gigabytes: AboveZero = 5.0


def export_huggingface(settings: HuggingFaceSettings) -> Path:
    """Export; see `nemo_ee.export.export_plan.export`."""
    return export(settings, partial(plan_export, settings))


def plan_export(settings: HuggingFaceSettings, source: EarlyExitSource, dtype: torch.dtype) -> ExportPlan:
    """The plan of the export.

    Raises:
        ValueError: no stock class computes the backbone, or an exit that `exits` names; settings that do not fit the
            exits.
    """
    exits = settings.wanted_exits(source)
    unknown = unknown_exits("exits", settings.exits, source)
    refuse(unknown + threshold_problems(exits, settings.thresholds, settings.criterion, PYTORCH_CRITERIA))
    stocks = stocks_of(source)
    family, architecture = stocks[0].family, stocks[0].architecture
    problems = _problems_of_thresholds(settings, family)

    def artifact(kind: str, exits: Sequence[ExitConfig] = ()) -> Artifact:
        return first_that_fits(source, stocks, partial(_artifact, settings, source, dtype, kind, exits))

    full, artifacts, models = artifact("full"), [], []
    if "full" in settings.targets:
        artifacts.append(full)
    for exit in exits if "exits" in settings.targets else ():
        reason = exit_refusal(family, exit)
        if reason and settings.exits is not None:
            problems.append(f"exit {exit.name!r} cannot be a stand-alone model: {reason}; leave it out")
        elif reason:
            logger.info("no hf_exit_%s: %s", exit.name, reason)
        else:
            artifacts.append(artifact("exit", [exit]))
    if "early_exit" in settings.targets:
        artifacts.append(artifact("early_exit", exits))
        models = pytorch_entries(artifacts[-1].directory, artifacts[-1].files)
    if not artifacts and not problems:
        problems.append(f"targets={list(settings.targets)} and exits={settings.exits} leave nothing to write")
    refuse(problems)
    return ExportPlan(
        artifacts=artifacts,
        backbone=full.plan,
        tied=architecture.tied,
        vocab_size=architecture.vocab_size,
        facts={
            "targets": ["Hugging Face transformers"],
            "verified": {"transformers": None, "note": NOT_LOADED},
            "exits": [_exit_entry(source, family, exit) for exit in source.exits.exits],
        },
        early_exit_models=models,
        tokenizers=[one.directory for one in artifacts],
        with_digest=True,
    )


def _problems_of_thresholds(settings: HuggingFaceSettings, family: Family) -> list[str]:
    """Problems of unread thresholds: only TensorRT-LLM's PyTorch backend reads them, in `hf_early_exit`."""
    if settings.thresholds is None:
        return []
    problems = []
    if not family.pytorch_early_exit:
        able = ", ".join(name for name, other in FAMILIES.items() if other.pytorch_early_exit)
        problems.append(
            f"thresholds={settings.thresholds!r}: TensorRT-LLM's PyTorch backend reads them, and there is no model "
            f"file for {family.model_type}, only for {able}; leave them out"
        )
    if "early_exit" not in settings.targets:
        problems.append("thresholds are written to hf_early_exit alone; add early_exit to targets, or leave them out")
    return problems


def _exit_entry(source: EarlyExitSource, family: Family, exit: ExitConfig) -> dict[str, Any]:
    """A row of the table of exits in config.json and in the manifest."""
    return {**source.exit_row(exit), "stand_alone_refused": exit_refusal(family, exit)}


def stocks_of(source: EarlyExitSource) -> list[StockConfig]:
    """All configs that describe the backbone; see `stock_configs`.

    Raises:
        ValueError: no stock class computes this model.
    """
    try:
        return stock_configs(
            source.config,
            source.bundled(CONFIG),
            special_token_ids(source.tokenizer),
            stored_rows=source.vocabulary_rows(),
            position_rows=source.position_rows(),
        )
    except ValueError as problem:
        raise ValueError(f"{source.path}: {problem}") from None


def _artifact(
    settings: HuggingFaceSettings,
    source: EarlyExitSource,
    dtype: torch.dtype,
    kind: str,
    exits: Sequence[ExitConfig],
    stock: StockConfig,
) -> Artifact:
    """The artifact of a kind with these exits; for an `exit` it has that one alone."""
    exit, values, files = None, {}, {}
    if kind == "exit":
        (exit,) = exits
        stock = exit_config(stock, exit, own_output=source.has_own_output(exit.name))
        model = draft_model(exit, write_output=not stock.architecture.tied)
    else:
        tied, heads = stock.architecture.tied, [(exit, source.has_own_output(exit.name)) for exit in exits]
        model = full_model(stock.architecture.num_layers, heads, tied=tied, write_output=not tied)
    if kind == "early_exit":
        table = [_exit_entry(source, stock.family, exit) for exit in exits]
        block = {"exits": table, **threshold_block(exits, settings.thresholds, settings.criterion)}
        values = {"early_exit": block, "auto_map": auto_map()}
        files = {**remote_code(stock.family), **pytorch_files(stock.family)}
        if source.probes is not None:
            files[PROBES_FILE] = source.probes
    shards = sharded(readings(stock.architecture, model), dtype, settings.shard_gigabytes * 1e9)
    return Artifact(
        directory=f"hf_{kind}" if exit is None else f"hf_exit_{exit.name}",
        config={**stock.values, "torch_dtype": str(dtype).removeprefix("torch."), **values},
        shards=shards,
        entry={"format": FORMAT, "kind": kind, "class": stock.values["architectures"][0], **_USES[kind]},
        num_layers=stock.architecture.num_layers,
        exit=exit,
        files={**index_file(shards, dtype), **files},
        load=load_model if stock.has_final_norm else None,
    )


def first_that_fits(source: EarlyExitSource, stocks: Sequence[StockConfig], make: Callable[[StockConfig], Any]) -> Any:
    """The artifact (with its readings, `plan`) of the first config whose constants equal the `.nemo`'s parameters.

    Raises:
        ValueError: every config has constants that differ from the `.nemo`'s parameters.
    """
    for stock in stocks:
        artifact = make(stock)
        lost = [own for own in artifact.plan if own.fill is not None and not _is_constant(source, own)]
        if not lost:
            return artifact
    names = ", ".join(sorted({reading.origin.key for reading in lost}))
    raise ValueError(
        f"{source.path}: {stocks[-1].family.model_class} has no {names}, and their values are not those of a "
        "model without them; no stock class of transformers computes this model"
    )


def _is_constant(source: EarlyExitSource, reading: Reading) -> bool:
    if source.shape(reading.origin) != reading.shape:
        return False
    return bool((source.read(reading.origin, reading.shape, torch.float32) == reading.fill).all())
