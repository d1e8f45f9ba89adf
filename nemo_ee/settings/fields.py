# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Types of settings that several scripts have, beside those of `nemo_ee.settings.user_input`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from nemo_ee.settings.user_input import Text, rule


def as_text(value: Any) -> Any:
    """A whole number that is meant as a text, as 32 or 2024 is on the command line."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def as_list(value: Any) -> Any:
    """One value alone, of a setting that is a list."""
    return value if value is None or isinstance(value, tuple) else (value,)


def _as_path(value: Any) -> Any:
    return Path(value) if isinstance(value, str) and value.strip() else value


Label = Annotated[Text, BeforeValidator(as_text), rule("a text with something in it")]
Texts = tuple[Text, ...]
Names = Annotated[Texts, BeforeValidator(as_list), rule("a name, or a list of names")]
FilePath = Annotated[Path, BeforeValidator(_as_path), rule("the name of a file or directory")]
Files = Annotated[Texts, Field(min_length=1), BeforeValidator(as_list), rule("one or more names of files")]
ExitNames = Annotated[Texts | None, rule("a list of exits' names, or null")]
NonNegative = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Betas = tuple[BelowOne, BelowOne]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # numpy takes no larger one
Criterion = Literal["max_probability", "margin", "entropy"]  # nemo_ee.exits.confidence needs torch
Accelerator = Annotated[Literal["gpu", "cpu", "cuda", "auto"], BeforeValidator(as_text)]
Precision = Annotated[Literal["32", "32-true", "bf16", "bf16-mixed", "bf16-true"], BeforeValidator(as_text)]
Verify = Literal["stored", "full"]
