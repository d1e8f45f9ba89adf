# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Texts that a user names: a UTF-8 file, or a `.jsonl` with a JSON value on each line; either may be gzipped."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")


def read_text(setting: str, path: Path) -> tuple[str, str]:
    """The text of a file and the sha256 of its bytes. `.gz` is unpacked.

    Args:
        setting: what the user set to the path, for messages.

    Raises:
        ValueError: it cannot be read, or is not UTF-8.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except UnicodeDecodeError as fault:
        reason = f"{fault.reason} at byte {fault.start}"
        raise ValueError(f"{setting}={path} is not UTF-8 ({reason}); convert it") from fault
    except (OSError, EOFError, zlib.error) as fault:
        reason = getattr(fault, "strerror", None) or fault
        raise ValueError(f"{setting}={path} cannot be read ({reason}); check the name") from fault
    return text, hashlib.sha256(raw).hexdigest()


def is_jsonl(path: Path) -> bool:
    """Whether each line of a file of this name is a JSON value."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix == ".jsonl"


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """(number from 1, line) of those that are not blank. Split at newlines alone: a text may hold other separators."""
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def read_json_lines(path: Path, text: str, read: Callable[[Any], _T]) -> tuple[list[_T], list[str]]:
    """What `read` makes of the value of each line, and the faults.

    Args:
        path: for messages.
        text: of the file.
        read: raises ValueError with what is wrong with a value.
    """
    values, faults = [], []
    for number, line in numbered_lines(text):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as fault:
            faults.append(f"{path}, line {number}: not JSON ({fault})")
            continue
        try:
            values.append(read(value))
        except ValueError as fault:
            faults.append(f"{path}, line {number}: {fault}")
    return values, faults
