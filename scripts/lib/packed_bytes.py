# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Documents to training windows of bytes, in an order that is a function of the seed alone.

Documents are shuffled, joined with an end token after each, and cut into windows of `length + 1` tokens that share one
token with the next; the windows are shuffled again, anew in every epoch. Nothing has to be stored to resume: the
windows of step i are those with the numbers i x batch ... (i + 1) x batch - 1.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy

from lib.byte_tokenizer import encode
from nemo_ee.text.text_files import MAX_DOCUMENT_BYTES, read_json_lines


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and its source."""

    text: str
    source: str

    def digest(self) -> str:
        """Digest of the text."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()


def read_documents(
    paths: Iterable[str], max_bytes: int | None = MAX_DOCUMENT_BYTES
) -> tuple[list[Document], list[str]]:
    """The lines of JSONL files (fields `text` and, if there is one, `source`), and the problems of the files.

    Args:
        paths: the files; `.gz` is unpacked.
        max_bytes: limit of a line; None = no limit.
    """
    documents: list[Document] = []
    problems: list[str] = []
    for path in paths:
        if not Path(path).is_file():
            problems.append(f"{path} does not exist; scripts/data/collect_python_sources.py makes such a file")
            continue
        lines = read_json_lines(Path(path), _document, max_bytes=max_bytes, problems=problems)
        documents += [document for _, document in lines]
    return documents, problems


def _document(record: Any) -> Document:
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError("no object with a text in the field 'text'")
    return Document(record["text"], str(record.get("source", "")))


def without(documents: Sequence[Document], held_out: Sequence[Document]) -> list[Document]:
    """The documents whose text is in no held-out document, and whose source has no held-out document's path."""
    texts = {document.digest() for document in held_out}
    paths = {document.source for document in held_out if document.source}
    return [one for one in documents if one.digest() not in texts and one.source not in paths]


class PackedWindows:
    """Windows of packed documents.

    Args:
        documents: at least one window's worth of text.
        length: tokens predicted per window.
        seed: random seed of the orders.

    Raises:
        ValueError: less text than one window.
    """

    def __init__(self, documents: Sequence[Document], length: int, seed: int) -> None:
        order = numpy.random.default_rng([seed, 0]).permutation(len(documents))
        parts = [encode(documents[index].text) for index in order]
        self._stream = numpy.concatenate(parts) if parts else numpy.zeros(0, dtype=numpy.uint16)
        self._length, self._seed = length, seed
        self._count = (len(self._stream) - 1) // length
        self._order: tuple[int, numpy.ndarray] | None = None
        if self._count < 1:
            raise ValueError(
                f"{len(self._stream)} tokens of text are less than a window of {length + 1}; give more text"
            )

    def __len__(self) -> int:
        """Windows in an epoch."""
        return self._count

    def digest(self) -> str:
        """Digest of the data, which must be the same when a run resumes."""
        return hashlib.sha256(self._stream.tobytes()).hexdigest()

    def window(self, number: int) -> numpy.ndarray:
        """Tokens `[length + 1]`, int64, of the number-th window counted over all epochs."""
        epoch, index = divmod(number, self._count)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, numpy.random.default_rng([self._seed, 1, epoch]).permutation(self._count))
        begin = int(self._order[1][index]) * self._length
        return self._stream[begin : begin + self._length + 1].astype(numpy.int64)

    def batch(self, step: int, size: int) -> numpy.ndarray:
        """Tokens `[size, length + 1]`, int64, of one step."""
        return numpy.stack([self.window(step * size + row) for row in range(size)])
