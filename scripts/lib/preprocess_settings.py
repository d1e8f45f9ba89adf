# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings that the preprocessing scripts share, and the error that reports all their problems."""

from __future__ import annotations

import logging
import re
from typing import Annotated, ClassVar, Literal

import numpy
from pydantic import AfterValidator

from nemo_ee.settings.fields import Files, Texts
from nemo_ee.settings.script_input import ScriptInput
from nemo_ee.settings.user_input import Positive, Text, rule
from nemo_ee.text.special_tokens import end_of_text_of

logger = logging.getLogger("nemo_ee.scripts")

_MAX_PROBLEMS = 20  # problems spelled out in a message; the rest is counted
DTYPES = {"uint16": numpy.uint16, "int32": numpy.int32}


class PreprocessError(ValueError):
    """The problems of the settings or the data, all in one message."""

    def __init__(self, problems: list[str]) -> None:
        shown = [f"  - {problem}" for problem in problems[:_MAX_PROBLEMS]]
        if len(problems) > _MAX_PROBLEMS:
            shown.append(f"  ... and {len(problems) - _MAX_PROBLEMS} more")
        super().__init__("Nothing was written:\n" + "\n".join(shown))
        self.problems = tuple(problems)


def _without_ending(output: str) -> str:
    """The prefix, also where one of the two files is named."""
    return re.sub(r"\.(bin|idx)$", "", output)


class PreprocessSettings(ScriptInput):
    """The settings of both scripts."""

    headline: ClassVar = "Nothing was written"

    input: Files
    output: Annotated[Text, AfterValidator(_without_ending)]
    tokenizer: Text
    jsonl_extensions: Texts
    append_eod: bool
    max_document_bytes: Annotated[Positive | None, rule("a whole number of bytes from 1, or null for no limit")]
    dtype: Literal["auto", "uint16", "int32"]
    overwrite: bool


def check_end(tokenizer: str, end: int | None) -> list[str]:
    """Warn if documents end with a token at which decoding does not stop, where the tokenizer's directory is a
    model's.

    Args:
        tokenizer: the directory.
        end: the token that ends documents; None = none does.

    Returns:
        The problems of the directory's files.
    """
    if end is None:
        return []
    try:
        found = end_of_text_of(tokenizer, end)
    except ValueError as error:
        return [f"tokenizer: {error}"]
    if found.differs:
        logger.warning(
            "documents end with the tokenizer's end-of-text token, %d, but decoding with the model in %s stops at %s; "
            "a model that is tuned on them may not learn to stop there",
            end,
            tokenizer,
            ", ".join(map(str, found.ids)),
        )
    return []
