# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings of what is measured on a text with the runtime, and of conf/megatron_gpt_early_exit_report.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from nemo_ee.settings.fields import FilePath
from nemo_ee.settings.script_input import ScriptInput
from nemo_ee.settings.user_input import Positive, Text, rule


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
