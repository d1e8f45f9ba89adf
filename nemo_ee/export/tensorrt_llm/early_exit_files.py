# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Early exit in exports for TensorRT-LLM: thresholds in config.json, and a model file beside it.

    PyTorch backend    hf_early_exit/early_exit_trtllm/__init__.py     for trtllm-serve --custom_module_dirs
    engine backend     tensorrt_llm_model.py beside trtllm_ckpt/       for trtllm-build --model_cls_file (legacy)

The model files are copied unchanged and are never imported here.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_ee.exits.config import ExitConfig
from nemo_ee.exits.criteria import CRITERIA, PROBE
from nemo_ee.families.family import EngineClass, Family
from nemo_ee.families.registry import FAMILIES
from nemo_ee.generation.decoding_model import ExitPoint
from nemo_ee.generation.policy import ExitPolicy

_FILES = Path(__file__).with_name("files")  # copied into exports, never imported here
ENGINE_FILE = "tensorrt_llm_model.py"
ENGINE_CRITERIA = ("max_probability", "entropy")
ENGINE_VERSIONS = "0.20.0 to 1.2.1, or a release candidate of 1.3.0 up to rc20"  # the last that have the backend
PYTORCH_FILE = "tensorrt_llm_pytorch_model.py"
PYTORCH_CRITERIA = ("max_probability", "margin", "entropy")
PYTORCH_VERSIONS = "1.0 to 1.4"
PYTORCH_PACKAGE = "early_exit_trtllm"
_PYTORCH_MODULE = f"{PYTORCH_PACKAGE}/__init__.py"
VERIFIED = "on an eager stand-in of the API it uses, on the CPU, one rank, fp32; no real TensorRT-LLM has loaded it"


def threshold_block(
    exits: Sequence[ExitConfig], thresholds: float | Mapping[str, float] | None, criterion: str
) -> dict[str, Any]:
    """`criterion` and `thresholds` for `early_exit` in config.json; empty without thresholds.

    Args:
        exits: the exported exits.
        thresholds: a number for all exits without an attention layer, or numbers by name, or None.
        criterion: one of `nemo_ee.exits.confidence.CRITERIA`.

    Raises:
        ValueError: numbers or names do not fit the exits.
    """
    if thresholds is None:
        return {}
    named = thresholds if isinstance(thresholds, Mapping) else None
    attending = [exit.name for exit in exits if exit.architecture == "layer"]
    if named is not None and any(name in attending for name in named):
        refused = ", ".join(name for name in attending if name in named)
        raise ValueError(
            f"thresholds: {refused}: TensorRT-LLM has no cache for the attention of `layer` exits; leave them out"
        )
    points = [ExitPoint(exit.name, exit.layer, 2 * exit.layer) for exit in exits if exit.name not in attending]
    policy = ExitPolicy(thresholds, criterion, None if named is None else tuple(named))
    chosen = {exit.point.name: exit.threshold for exit in policy.evaluated_exits(points)}
    return {"criterion": criterion, "thresholds": chosen}


def threshold_problems(
    exits: Sequence[ExitConfig],
    thresholds: float | Mapping[str, float] | None,
    criterion: str,
    criteria: Sequence[str],
) -> list[str]:
    """Problems of thresholds: those that `threshold_block` would raise, a criterion that is not among `criteria` (also
    without thresholds), and thresholds that no exit gets."""
    if criterion not in CRITERIA:
        return [f"criterion={criterion!r} is unknown; use one of {', '.join(criteria)}"]
    if criterion not in criteria and (thresholds is not None or criterion == PROBE):
        return [f"criterion={criterion!r}: the model file for TensorRT-LLM has {', '.join(criteria)}; use one of them"]
    try:
        block = threshold_block(exits, thresholds, criterion)
    except ValueError as problem:
        return [str(problem)]
    if thresholds is not None and not block["thresholds"]:
        return [
            f"thresholds={thresholds!r}: no exit gets one (it is empty, or no exit without an attention layer is "
            "exported); export one, or leave thresholds out"
        ]
    return []


def engine_problems(engine: EngineClass, pipeline_parallel: int) -> list[str]:
    """Reasons why no class of the engine's model file builds this checkpoint, so that thresholds have no effect."""
    problems = []
    if engine.early_exit is None:
        engines = [family.engine for family in FAMILIES.values() if family.engine is not None]
        able = [own.architecture for own in engines if own.early_exit is not None]
        problems.append(
            f"thresholds: {engine.architecture} has no class with which an engine leaves early, only "
            f"{', '.join(able)} have; leave thresholds out"
        )
    if pipeline_parallel > 1:
        problems.append(
            f"thresholds with pipeline_parallel={pipeline_parallel}: an engine that leaves early has one stage; set "
            "pipeline_parallel=1, or leave thresholds out"
        )
    return problems


def engine_files(engine: EngineClass, pipeline_parallel: int) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The engine's model file, name -> text, and its entry for the manifest; empty if it cannot build this export."""
    if engine_problems(engine, pipeline_parallel):
        return {}, []
    entry = {
        "file": ENGINE_FILE,
        "class": engine.early_exit,
        "loads": "trtllm_ckpt",
        "backend": f"TensorRT engines, TensorRT-LLM {ENGINE_VERSIONS}",
        **_decision("runs the attention of every layer, skips MLPs"),
    }
    return {ENGINE_FILE: (_FILES / ENGINE_FILE).read_text(encoding="utf-8")}, [entry]


def pytorch_files(family: Family) -> dict[str, str]:
    """The PyTorch backend's model file as a package, name -> text; empty for a family that has none."""
    if not family.pytorch_early_exit:
        return {}
    return {_PYTORCH_MODULE: (_FILES / PYTORCH_FILE).read_text(encoding="utf-8")}


def pytorch_entries(directory: str, files: Container[str]) -> list[dict[str, Any]]:
    """The manifest's entry for `pytorch_files`, if a directory has them."""
    if _PYTORCH_MODULE not in files:
        return []
    entry = {
        "file": f"{directory}/{_PYTORCH_MODULE}",
        "class": None,
        "loads": directory,
        "backend": f"PyTorch, TensorRT-LLM {PYTORCH_VERSIONS}",
        **_decision(
            "writes the keys and values of skipped layers, with their attention except on FlashInfer; skips their "
            "MLPs and output projections"
        ),
    }
    return [entry]


def _decision(work: str) -> dict[str, Any]:
    return {
        "leaves": "when an exit's confidence passes its threshold for every sequence of a decoding step",
        "work": work,
        "lossless": False,
        "kv": "propagate",
        "max_batch": None,  # no limit, but with more sequences fewer steps leave early
        "verified": VERIFIED,
    }
