# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Text files given by the user: a UTF-8 file, or a `.jsonl` with a JSON value on each line; either may be gzipped.

Files are unpacked and read piece by piece: a line or a document that is longer than the limit is refused before it is
in memory, however small its archive is.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from nemo_ee.text.json_values import parse_json

_T = TypeVar("_T")
# Default of the settings `max_document_bytes`.
MAX_DOCUMENT_BYTES = 64 * 2**20
_WAY_OUT = "; split it, or raise max_document_bytes where the settings have it"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_READ_ERRORS = (OSError, EOFError, zlib.error)


class TextError(ValueError):
    """A file that cannot be read any further, `path:line: reason` or `path: reason`."""


def is_gzipped(path: Path) -> bool:
    """Whether a file of this name is unpacked."""
    return path.name.lower().endswith(".gz")


def is_jsonl(path: Path) -> bool:
    """Whether each line of a file of this name is a JSON value."""
    return Path(path.name.lower().removesuffix(".gz")).suffix == ".jsonl"


def read_document(
    path: Path, max_bytes: int | None = MAX_DOCUMENT_BYTES, moved: Callable[[int], object] | None = None
) -> str:
    """The text of a file.

    Args:
        path: UTF-8, unpacked where its name ends in `.gz`.
        max_bytes: size limit, unpacked; None = no limit.
        moved: called with the bytes read from disk so far.

    Raises:
        TextError: it cannot be read, is longer than the limit, or is not UTF-8.
    """
    with _unpacked(path) as (raw, stream):
        try:
            content = stream.read(-1 if max_bytes is None else max_bytes + 1)
        except _READ_ERRORS as error:
            raise TextError(f"{path}: cannot be read: {_reason(error)}") from error
        if moved is not None:
            moved(raw.tell())
    if max_bytes is not None and len(content) > max_bytes:
        raise TextError(f"{path}: more than {max_bytes} bytes, the limit of a document{_WAY_OUT}")
    try:
        return content.removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); convert it") from error


def read_lines(
    path: Path, max_bytes: int | None = MAX_DOCUMENT_BYTES, moved: Callable[[int], object] | None = None
) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line with its end) of every line that is not blank, split at newlines alone.

    Args:
        path: unpacked where its name ends in `.gz`.
        max_bytes: size limit of a line; None = no limit.
        moved: called with the bytes read from disk so far.

    Raises:
        TextError: the file cannot be read any further, or a line is longer than the limit.
    """
    number, limit = 0, -1 if max_bytes is None else max_bytes + 1
    with _unpacked(path) as (raw, stream):
        while True:
            try:
                line = stream.readline(limit)
            except _READ_ERRORS as error:
                raise TextError(f"{path}:{number + 1}: cannot be read: {_reason(error)}") from error
            if not line:
                return
            number += 1
            if len(line) == limit and not line.endswith(b"\n"):
                raise TextError(
                    f"{path}:{number}: more than {max_bytes} bytes, the limit of a line{_WAY_OUT}; what follows is "
                    "not read"
                )
            if moved is not None:
                moved(raw.tell())
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if line and not line.isspace():
                yield number, line


@contextmanager
def _unpacked(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """(the file, its content)."""
    try:
        raw = open(path, "rb")  # noqa: SIM115  closed below
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {_reason(error)}") from error
    with raw:
        yield raw, gzip.GzipFile(fileobj=raw) if is_gzipped(path) else raw


def _reason(error: BaseException) -> object:
    return getattr(error, "strerror", None) or error


def text_line(path: Path, number: int, line: bytes) -> str:
    """A line of a plain text without its end.

    Raises:
        TextError: it is not UTF-8.
    """
    try:
        return line.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start} of the line); convert it"
        ) from error


def read_json_lines(
    path: Path,
    read: Callable[[Any], _T],
    *,
    max_bytes: int | None = MAX_DOCUMENT_BYTES,
    moved: Callable[[int], object] | None = None,
    problems: list[str],
) -> Iterator[tuple[str, _T]]:
    """(`path:line`, result of `read` for its value) of the lines of a JSONL file.

    Args:
        path: the file.
        read: raises ValueError with the problem of a value.
        max_bytes, moved: as in `read_lines`.
        problems: grows by `path:line: reason`.
    """
    try:
        for number, line in read_lines(path, max_bytes, moved):
            try:
                value = read(parse_json(line, wide_integers=True))
            except ValueError as error:
                problems.append(f"{path}:{number}: {error}")
            else:
                yield f"{path}:{number}", value
    except TextError as error:
        problems.append(str(error))


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, packed as they are."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_prefix(name: str) -> str:
    """The prefix of tokenised data, `<prefix>.bin/.idx`, where one of the two files is named instead."""
    stem = name.removesuffix(name[-4:]) if name.endswith((".bin", ".idx")) else name
    own, other = ([Path(one + ending).is_file() for ending in (".bin", ".idx")] for one in (name, stem))
    return stem if all(other) and not any(own) else name


def sample_index_folder(prefix: str) -> Path:
    """The folder in which Megatron caches the order of the samples of this data by default."""
    return Path(prefix, "cache", "GPTDataset_indices")
