# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings of the scripts that measure a model on a text with the runtime: report and placement."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from nemo_ee.settings.fields import AboveZero, FilePath
from nemo_ee.settings.script_input import ScriptInput
from nemo_ee.settings.user_input import Positive, Text, UserInput, rule

VERDICT_AT = 0.05  # the perplexity that the verdict on a placement may lose


def _exists(path: Path) -> Path:
    if not path.exists():
        raise ValueError("does not exist")
    return path


def _is_a_file(path: Path) -> Path:
    if path.is_dir():
        raise ValueError("is a directory; give the name of a file")
    return path


class TextSettings(ScriptInput):
    """The model, the text and the way they run."""

    headline: ClassVar = "nothing was measured"

    checkpoint: Annotated[FilePath, AfterValidator(_exists)]
    backbone: Annotated[FilePath, AfterValidator(_exists)] | None
    data: Annotated[FilePath, AfterValidator(_exists), AfterValidator(_is_a_file)]
    max_document_bytes: Positive | None
    window_tokens: Annotated[int, Field(ge=8), rule("a whole number of at least 8")]
    max_windows: Annotated[int, Field(ge=2), rule("a whole number of at least 2")]
    dtype: Literal["float32", "bfloat16", "float16"] | None
    threads: Positive


class ReportSettings(TextSettings):
    """The settings of the report, a field for each key."""

    output: Annotated[FilePath, AfterValidator(_is_a_file)]
    title: Text | None
    measured_tokens: Positive


Limit = Annotated[float, Field(gt=0, le=1)]


class Costs(UserInput):
    """The setting `costs`, in seconds; None: measured here."""

    half: AboveZero | None
    row: AboveZero | None
    head: AboveZero | None


def _ends_in_json(path: Path) -> Path:
    if path.suffix != ".json":
        raise ValueError("must end in .json")
    return path


class PlacementSettings(TextSettings):
    """The settings of conf/megatron_gpt_early_exit_place.yaml, a field for each key."""

    output: Annotated[FilePath, AfterValidator(_ends_in_json)]
    architecture: Literal["norm", "mlp"]
    limits: Annotated[
        tuple[Limit, ...], Field(min_length=1), rule("a list of numbers above 0 up to 1, such as [0.05]")
    ]
    most_exits: Annotated[tuple[Positive, ...], Field(min_length=1), rule("a list of whole numbers, such as [1, 2]")]
    costs: Costs
