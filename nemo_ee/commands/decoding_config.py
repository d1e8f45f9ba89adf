# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The keys that the yamls of generation and calibration share: checked, and read, alike."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_ee.generation.sampling import SamplingParams

_PRECISIONS = ("32", "32-true", "bf16", "bf16-mixed", "bf16-true")


def sampling_of(config: Mapping[str, Any]) -> SamplingParams:
    """How tokens are chosen.

    Raises:
        ValueError: every fault of these keys.
    """
    keys = ("greedy", "temperature", "top_p", "repetition_penalty", "seed")
    top_k = None if config["top_k"] == 0 else config["top_k"]  # NeMo's 0 = all
    return SamplingParams(top_k=top_k, **{key: config[key] for key in keys})


def whole_number_faults(
    config: Mapping[str, Any], lowest: Mapping[str, int], or_null: Collection[str] = ()
) -> Iterator[str]:
    """Which keys are no whole number from the lowest one they may have; those of `or_null` may be null."""
    for key, least in lowest.items():
        value = config[key]
        if key in or_null and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            yield f"{key}={value!r} must be a whole number from {least}"


def switch_faults(config: Mapping[str, Any], keys: Collection[str], or_null: Collection[str] = ()) -> Iterator[str]:
    """Which keys are neither True nor False; those of `or_null` may be null too."""
    for key in (*keys, *or_null):
        if not isinstance(config[key], bool) and not (key in or_null and config[key] is None):
            yield f"{key}={config[key]!r} must be True or False{' or null' if key in or_null else ''}"


def precision_faults(config: Mapping[str, Any]) -> Iterator[str]:
    """Whether weights can be held in `trainer.precision`."""
    precision = config["trainer"]["precision"]
    if str(precision) not in _PRECISIONS:
        yield f"trainer.precision={precision!r} is not supported; use 32 or bf16"


def model_path_faults(config: Mapping[str, Any]) -> Iterator[str]:
    """Whether there is such a model."""
    path = config["model"]["restore_from_path"]
    if path in (None, "???", ""):
        yield "model.restore_from_path is not set; give an early-exit .nemo"
    elif not Path(path).exists():
        yield f"model.restore_from_path={path} does not exist"
