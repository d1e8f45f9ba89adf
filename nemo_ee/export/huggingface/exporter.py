# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Write a `.nemo` as Hugging Face directories.

    hf_full/          the backbone in its family's stock class
    hf_exit_<name>/   an exit as a model of its own: k layers with the exit's MLP, norm and output, or k + 1
    hf_early_exit/    the backbone with exit_heads.* beside it and the table of exits in config.json; in it
                      early_exit_trtllm/, with which TensorRT-LLM's PyTorch backend leaves early
    manifest.json     written last

Tensor by tensor: read once per directory, low-rank updates folded in, one in memory at a time. Then each directory up
to `parity_gigabytes` is read back whole, for its parity digest. All of it goes to `<output>.partial`, which gets its
name when everything is on disk; after a problem or an interruption nothing is left.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from tqdm import tqdm

from nemo_ee.checkpoint.tokenizer_files import special_token_ids
from nemo_ee.commands.console import messages
from nemo_ee.exits.config import ExitConfig
from nemo_ee.export.huggingface.exported_tensors import Reading, readings
from nemo_ee.export.huggingface.remote_code import auto_map, remote_code
from nemo_ee.export.huggingface.stock_config import (
    FORMAT,
    StockConfig,
    exit_config,
    exit_refusal,
    read_bundled,
    stock_configs,
)
from nemo_ee.export.huggingface.weight_files import num_bytes, write_json, write_weights
from nemo_ee.export.manifest import write_manifest
from nemo_ee.export.model_origins import check_tensors, draft_model, full_model
from nemo_ee.export.output_directory import whole_directory
from nemo_ee.export.parity import written_parity
from nemo_ee.export.shared_settings import SharedSettings, refuse, unknown_exits
from nemo_ee.export.source import EarlyExitSource, copy_tokenizer
from nemo_ee.export.tensorrt_llm.early_exit_files import (
    copy_pytorch_package,
    threshold_block,
    threshold_problems,
)
from nemo_ee.families.family import Family
from nemo_ee.families.registry import FAMILIES
from nemo_ee.runtime.loader import load_model
from nemo_ee.settings.fields import AboveZero, as_list
from nemo_ee.settings.user_input import rule
from nemo_ee.text.special_tokens import GENERATION_CONFIG

logger = logging.getLogger(__name__)

TARGETS = ("full", "exits", "early_exit")
NOT_LOADED = "nothing was loaded into transformers"
_OWN_KV = "its own, every layer writes every position"
_USES = {
    "full": {"use": "the backbone in a stock class of transformers", "lossless": True, "kv": _OWN_KV},
    "exit": {
        "use": "an exit in a stock class: static depth, or a draft model (assistant_model) for hf_full",
        "lossless": "with hf_full as the target; not when served alone",
        "kv": _OWN_KV,
    },
    "early_exit": {
        "use": "backbone and exits; nemo_ee.runtime decodes it, a stock class loads the backbone",
        "lossless": "at full depth, in a stock class, and in mode self_speculative; not where thresholds decide",
        "kv": "carry",
    },
}


class ExportSettings(SharedSettings):
    """See conf/export_huggingface.yaml."""

    targets: Annotated[
        tuple[Literal[TARGETS], ...],
        Field(min_length=1),
        BeforeValidator(as_list),
        rule(f"some of {', '.join(TARGETS)}"),
    ] = TARGETS
    shard_gigabytes: AboveZero = 5.0


@dataclass(frozen=True)
class Artifact:
    """One directory to write."""

    directory: str
    kind: str
    stock: StockConfig
    plan: list[Reading]
    table: list[dict[str, Any]] | None = None
    exit: ExitConfig | None = None

    @property
    def tied(self) -> bool:
        """Whether the output projection is the word embeddings."""
        return self.stock.architecture.tied


def export_huggingface(settings: ExportSettings) -> Path:
    """Export.

    Returns:
        The directory written.

    Raises:
        ValueError: every problem of the model in one message before anything is written; or, later, a damaged
            file or a disk that does not take the output. Nothing is left behind.
    """
    with EarlyExitSource(settings.checkpoint, settings.backbone) as source:
        exits = settings.wanted_exits(source)
        unknown = unknown_exits("exits", settings.exits, source)
        refuse(unknown + threshold_problems(exits, settings.thresholds, settings.criterion))
        artifacts = plan_artifacts(settings, source)
        _ = source.certificates  # a damaged one is a problem now, not after hours of writing
        _write(settings, source, artifacts, settings.dtype_of(source))
    logger.info("wrote %s: %s", settings.output, ", ".join(a.directory for a in artifacts))
    return settings.output


def plan_artifacts(settings: ExportSettings, source: EarlyExitSource) -> list[Artifact]:
    """The directories to write.

    Raises:
        ValueError: no stock class computes the backbone, or an exit that was asked for by name; or config and weights
            do not fit together.
    """
    stocks = _stocks(source)
    exits = settings.wanted_exits(source)
    full, artifacts = _first_that_fits(source, stocks, lambda stock: _full(stock, (), None)), []
    problems = _threshold_problems(settings, stocks[0].family)
    if "full" in settings.targets:
        artifacts.append(full)
    for exit in exits if "exits" in settings.targets else ():
        reason = exit_refusal(stocks[0].family, exit)
        if reason and settings.exits is not None:
            problems.append(f"exit {exit.name!r} cannot be a model of its own: {reason}; leave it out")
        elif reason:
            logger.info("no hf_exit_%s: %s", exit.name, reason)
        else:
            artifacts.append(_first_that_fits(source, stocks, lambda stock, e=exit: _exit(source, stock, e)))
    if "early_exit" in settings.targets:
        table = [exit_entry(source, stocks[0].family, exit) for exit in exits]
        heads = [(exit, source.has_own_output(exit.name)) for exit in exits]
        artifacts.append(_first_that_fits(source, stocks, lambda stock: _full(stock, heads, table)))
    if not artifacts and not problems:
        problems.append(f"targets={list(settings.targets)} and exits={settings.exits} leave nothing to write")
    refuse(problems)
    check_tensors(source, [artifact.plan for artifact in (full, *artifacts)], tied=full.tied)
    return artifacts


def _threshold_problems(settings: ExportSettings, family: Family) -> list[str]:
    """Thresholds that nothing would read: they are for TensorRT-LLM's PyTorch backend, in `hf_early_exit`."""
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


def exit_entry(source: EarlyExitSource, family: Family, exit: ExitConfig) -> dict[str, Any]:
    """A row of the table of exits in config.json and in the manifest."""
    return {**source.exit_row(exit), "stand_alone_refused": exit_refusal(family, exit)}


def _stocks(source: EarlyExitSource) -> list[StockConfig]:
    try:
        return stock_configs(
            source.config,
            read_bundled(source.tokenizer, "config.json"),
            special_token_ids(source.tokenizer),
            stored_rows=source.vocabulary_rows(),
            position_rows=source.position_rows(),
        )
    except ValueError as problem:
        raise ValueError(f"{source.path}: {problem}") from None


def _full(
    stock: StockConfig, heads: Sequence[tuple[ExitConfig, bool]], table: list[dict[str, Any]] | None
) -> Artifact:
    tied = stock.architecture.tied
    model = full_model(stock.architecture.num_layers, heads, tied=tied, write_output=not tied)
    kind = "full" if table is None else "early_exit"
    return Artifact(f"hf_{kind}", kind, stock, readings(stock.architecture, model), table)


def _exit(source: EarlyExitSource, stock: StockConfig, exit: ExitConfig) -> Artifact:
    stock = exit_config(stock, exit, own_output=source.has_own_output(exit.name))
    plan = readings(stock.architecture, draft_model(exit, write_output=not stock.architecture.tied))
    return Artifact(f"hf_exit_{exit.name}", "exit", stock, plan, exit=exit)


def _first_that_fits(
    source: EarlyExitSource, stocks: Sequence[StockConfig], make: Callable[[StockConfig], Artifact]
) -> Artifact:
    """The artifact of the first config whose constants are the parameters' values.

    Raises:
        ValueError: every config has a constant where the `.nemo` has other values.
    """
    for stock in stocks:
        artifact = make(stock)
        lost = [own for own in artifact.plan if own.fill is not None and not _is_constant(source, own)]
        if not lost:
            return artifact
    names = ", ".join(sorted({reading.origin.key for reading in lost}))
    raise ValueError(
        f"{source.path}: {stocks[-1].family.model_class} has no {names}, and theirs are not the values that leaving "
        "them out means; no stock class of transformers computes this model"
    )


def _is_constant(source: EarlyExitSource, reading: Reading) -> bool:
    if source.shape(reading.origin) != reading.shape:
        return False
    return bool((source.read(reading.origin, reading.shape, torch.float32) == reading.fill).all())


def _write(
    settings: ExportSettings, source: EarlyExitSource, artifacts: Sequence[Artifact], dtype: torch.dtype
) -> None:
    total = sum(num_bytes(reading, dtype) for artifact in artifacts for reading in artifact.plan)
    generation = source.generation_config(artifacts[0].stock.architecture.vocab_size)
    with whole_directory(settings.output, total) as partial:
        thresholds = threshold_block(settings.wanted_exits(source), settings.thresholds, settings.criterion)
        models, digests = [], []
        options = {"desc": settings.output.name, "disable": not settings.progress, "file": messages()}
        bar = tqdm(total=total, unit="B", unit_scale=True, **options)
        with bar:
            for artifact in artifacts:
                folder = partial / artifact.directory
                folder.mkdir()
                _write_config(folder, artifact, dtype, thresholds)
                write_json(folder / GENERATION_CONFIG, generation)
                shard_bytes = settings.shard_gigabytes * 1e9
                digests.append(write_weights(folder, artifact.plan, source, dtype, shard_bytes, bar.update))
                copy_tokenizer(source, folder)
                if artifact.table is not None:
                    models.append(copy_pytorch_package(folder, artifact.stock.family))
        parities = [_parity(partial, artifact, settings.parity_gigabytes) for artifact in artifacts]
        facts = _manifest_facts(settings, source, artifacts, digests, parities, dtype)
        write_manifest(partial, {**facts, "early_exit_models": [model for model in models if model is not None]})


def _parity(partial: Path, artifact: Artifact, parity_gigabytes: float) -> dict[str, Any] | None:
    if not artifact.stock.has_final_norm:
        logger.info("%s: no parity digest, our runtime computes no model without final norm", artifact.directory)
        return None
    try:
        return written_parity(partial / artifact.directory, load_model, parity_gigabytes=parity_gigabytes)
    except ValueError as problem:
        raise ValueError(
            f"what was written cannot be run, so nothing was exported: {problem}\n"
            "parity_gigabytes=0 exports without running it"
        ) from problem


def _write_config(folder: Path, artifact: Artifact, dtype: torch.dtype, thresholds: dict[str, Any]) -> None:
    if artifact.table is not None:
        for name, text in remote_code(artifact.stock.family).items():
            (folder / name).write_text(text, encoding="utf-8")
    write_json(folder / "config.json", config_values(artifact, dtype, thresholds))


def config_values(artifact: Artifact, dtype: torch.dtype, thresholds: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of an artifact. `thresholds`: of `threshold_block`, for one with a table of exits."""
    values = {**artifact.stock.values, "torch_dtype": str(dtype).removeprefix("torch.")}
    if artifact.table is not None:
        values |= {"early_exit": {"exits": artifact.table, **thresholds}, "auto_map": auto_map()}
    return values


def _manifest_facts(
    settings: ExportSettings,
    source: EarlyExitSource,
    artifacts: Sequence[Artifact],
    digests: Sequence[str],
    parities: Sequence[dict[str, Any] | None],
    dtype: torch.dtype,
) -> dict[str, Any]:
    family = artifacts[0].stock.family
    return {
        "targets": ["Hugging Face transformers"],
        **settings.manifest_facts(source, dtype),
        "verified": {"transformers": None, "note": NOT_LOADED},
        "exits": [exit_entry(source, family, exit) for exit in source.exits.exits],
        "artifacts": [
            {
                "directory": artifact.directory,
                "format": FORMAT,
                "kind": artifact.kind,
                "class": artifact.stock.values["architectures"][0],
                "exit": None if artifact.exit is None else artifact.exit.name,
                "architecture": None if artifact.exit is None else artifact.exit.architecture,
                "num_layers": artifact.stock.architecture.num_layers,
                **_USES[artifact.kind],
                "max_batch": None,
                "digest": digest,
                "parity": parity,
            }
            for artifact, digest, parity in zip(artifacts, digests, parities, strict=True)
        ],
    }
