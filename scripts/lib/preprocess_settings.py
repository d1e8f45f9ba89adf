# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings that the preprocessing scripts share: how they are read, and how everything wrong with them is reported."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy

from nemo_ee.text.special_tokens import end_of_text_of

logger = logging.getLogger("nemo_ee.scripts")

_MAX_FAULTS = 20  # faults spelled out in a message; the rest is counted
# The limit of a document or line: (the least, what it must be, in words).
DOCUMENT_BYTES = (1, "a whole number of bytes from 1, or null for no limit")
DTYPES = {"uint16": numpy.uint16, "int32": numpy.int32}


class PreprocessError(ValueError):
    """What is wrong with the settings or the data, all in one message."""

    def __init__(self, faults: list[str]) -> None:
        shown = [f"  - {fault}" for fault in faults[:_MAX_FAULTS]]
        if len(faults) > _MAX_FAULTS:
            shown.append(f"  ... and {len(faults) - _MAX_FAULTS} more")
        super().__init__("Nothing was written:\n" + "\n".join(shown))
        self.faults = tuple(faults)


Settings = TypeVar("Settings")


def read_settings(
    cls: type[Settings],
    mapping: Mapping[str, Any],
    *,
    lists: Sequence[str],
    texts: Sequence[str],
    whole: Mapping[str, tuple[int, str]],
) -> Settings:
    """The settings of a preprocessing script as its dataclass; input, output, tokenizer, dtype and the switches are
    read the same way for all.

    Args:
        cls: the dataclass, one field per key.
        mapping: the config, plain values.
        lists: further keys that are lists of strings.
        texts: further keys that are strings.
        whole: keys that are whole numbers or null -> (the least, what it must be, in words).

    Raises:
        PreprocessError: values of the wrong kind.
    """
    values = dict(mapping)
    if isinstance(values["input"], str):
        values["input"] = [values["input"]]
    values |= {key: tuple(str(value) for value in values[key] or ()) for key in ("input", *lists)}
    values |= {key: str(values[key]) for key in ("output", "tokenizer", "dtype", *texts)}
    # The prefix is meant where one of the two files is named.
    values["output"] = re.sub(r"\.(bin|idx)$", "", values["output"])
    faults = []
    if not values["input"]:
        faults.append("input: empty list; name at least one file or directory")
    if values["dtype"] != "auto" and values["dtype"] not in DTYPES:
        faults.append(f"dtype: {values['dtype']!r} is not one of auto, {', '.join(DTYPES)}")
    for key, (least, rule) in whole.items():
        value = values[key]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            faults.append(f"{key}: {value!r} must be {rule}")
    for key in ("append_eod", "overwrite"):
        if not isinstance(values[key], bool):
            faults.append(f"{key}: {values[key]!r} must be True or False")
    if faults:
        raise PreprocessError(faults)
    return cls(**values)


def check_end(tokenizer: str, end: int | None) -> list[str]:
    """Warns where documents end with another token than decoding stops at, if the tokenizer's directory is a model's.

    Args:
        tokenizer: the directory.
        end: the token that ends documents; None = none does.

    Returns:
        What is wrong with the directory's files.
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
