# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""JSON from outside, stricter than Python's parser: accepted values can be written as UTF-8 and read by any parser.

Numbers are finite, whole numbers fit into 64 bits, text is valid Unicode, nesting and file sizes are bounded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

MAX_DEPTH = 100  # lists and objects inside one another
MAX_FILE_BYTES = 256 * 2**20  # of a file that is one JSON value; the largest tokenizer.json known has 35 MB
# Tokenizers write "no limit" as int(1e30).
_WIDE_DIGITS = 40
# The files of a Hugging Face directory that transformers reads with a parser of its own.
_MODEL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "chat_template.json",
)  # fmt: skip
# Strings are matched whole, so that their content is not read as JSON.
_PARTS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]|[-+.\w]+', re.DOTALL)


class JsonError(ValueError):
    """The problem of a JSON text, as a predicate: "not JSON (...)", "holds the number ...".

    Attributes:
        line: number of the line in the text, from 1; 1 where it is not known.
    """

    def __init__(self, reason: str, line: int = 1) -> None:
        super().__init__(reason)
        self.line = line


class _Refused(Exception):
    """A part of a text that JSON or this reader does not have: (the part, the reason)."""


def _constant(word: str) -> NoReturn:
    raise _Refused(word, f"holds {word}, which is not JSON; numbers must be finite")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(text, f"holds the number {text[:40]}, which is too large; numbers must be finite")
    return value


def _whole(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise _Refused(text, f"holds the number {text[:40]}, which does not fit into 64 bits")
    return int(text)


def _wide(text: str) -> int:
    if len(text) > _WIDE_DIGITS:
        raise _Refused(text, f"holds the number {text[:40]}, which has more than {_WIDE_DIGITS} digits")
    return int(text)


_DECODER = json.JSONDecoder(parse_constant=_constant, parse_float=_finite, parse_int=_whole)
_WIDE_DECODER = json.JSONDecoder(parse_constant=_constant, parse_float=_finite, parse_int=_wide)


def parse_json(text: bytes | str, *, wide_integers: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        text: UTF-8; a byte order mark in front of bytes is skipped.
        wide_integers: whole numbers may have up to 40 digits, which tokenizers' files need.

    Raises:
        JsonError: anything else than JSON within the limits of this module.
    """
    if isinstance(text, bytes):
        text = _decoded(text)
    try:
        value = (_WIDE_DECODER if wide_integers else _DECODER).decode(text)
    except json.JSONDecodeError as error:
        raise JsonError(f"not JSON ({error.msg} at column {error.colno})", error.lineno) from None
    except _Refused as refused:
        part, reason = refused.args
        raise JsonError(reason, _line_of_part(text, part)) from None
    except RecursionError:
        raise _too_deep(text) from None
    _check_parts(value, text)
    return value


def read_json(
    path: str | Path, *, wide_integers: bool = False, max_bytes: int = MAX_FILE_BYTES, shown: object = None
) -> Any:
    """The value of a JSON file.

    Args:
        shown: name of the file in messages; None = its path.

    Raises:
        JsonError: `path:line: reason`.
        OSError: it cannot be opened.
    """
    shown = path if shown is None else shown
    with open(path, "rb") as file:
        text = file.read(max_bytes + 1)
    if len(text) > max_bytes:
        raise JsonError(f"{shown}: more than {max_bytes} bytes, the limit of a JSON file")
    try:
        return parse_json(text, wide_integers=wide_integers)
    except JsonError as error:
        raise JsonError(f"{shown}:{error.line}: {error}", error.line) from None


def read_json_object(path: str | Path, *, wide_integers: bool = False, shown: object = None) -> dict[str, Any]:
    """The mapping in a JSON file.

    Args:
        shown: see `read_json`.

    Raises:
        JsonError: as `read_json`, or it holds something else.
        OSError: it cannot be opened.
    """
    value = read_json(path, wide_integers=wide_integers, shown=shown)
    if not isinstance(value, dict):
        raise JsonError(f"{path if shown is None else shown}:1: a JSON {type(value).__name__}, not an object")
    return value


def check_model_files(directory: str | Path) -> None:
    """Read the JSON files of a Hugging Face directory once. transformers and tokenizers read them without limits, and
    fail with a traceback.

    Raises:
        ValueError: every damaged file, as `path:line: reason`.
    """
    problems = []
    for path in (Path(directory) / name for name in _MODEL_FILES):
        try:
            if path.is_file():
                read_json_object(path, wide_integers="token" in path.name)
        except JsonError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join([*problems, "fetch or save the files again"]))


def _decoded(text: bytes) -> str:
    try:
        return text.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        start = text.rfind(b"\n", 0, error.start) + 1
        where = f"{error.reason} at byte {error.start - start} of the line"
        raise JsonError(f"not UTF-8 ({where})", text.count(b"\n", 0, error.start) + 1) from None


def _check_parts(value: Any, text: str) -> None:
    """Raises JsonError for a value that is nested too deeply or holds text that no encoding can hold."""
    level, depth = [value], 0
    while level:
        containers = [part for part in level if type(part) is dict or type(part) is list]
        depth += bool(containers)
        if depth > MAX_DEPTH:
            raise _too_deep(text)
        for part in level:
            if type(part) is str and not part.isascii():  # isascii takes no time
                _check_text(part, text)
        level = [part for one in containers for part in (one if type(one) is list else [*one, *one.values()])]


def _check_text(part: str, text: str) -> None:
    try:
        part.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(part[error.start]):x}"
        line = _line_at(text, text.lower().find(half))
        raise JsonError(
            f"holds half a character ({half}, half of a surrogate pair); write the whole character", line
        ) from None


def _too_deep(text: str) -> JsonError:
    depth, line = 0, 1
    for position, part in _parts(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(part, 0)
        if depth > MAX_DEPTH:
            line = _line_at(text, position)
            break
    return JsonError(f"nested too deeply, more than {MAX_DEPTH} levels", line)


def _line_of_part(text: str, part: str) -> int:
    return _line_at(text, next((position for position, found in _parts(text) if found == part), 0))


def _parts(text: str) -> Iterator[tuple[int, str]]:
    """(position, part) of brackets, words and numbers of a JSON text, and of its strings."""
    return ((match.start(), match[0]) for match in _PARTS.finditer(text))


def _line_at(text: str, position: int) -> int:
    return text.count("\n", 0, max(position, 0)) + 1
