# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks of tokenised data on disk, `<prefix>.bin/.idx`: it exists, is complete, and holds tokens of the
vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nemo_ee.text.text_files import data_prefix

MASK_SUFFIX = ".mask"  # of the prefix of a chat's answers, beside its tokens
_CHUNK = 1 << 23  # tokens checked at a time; they fit into the processor's cache


def clean_prefixes(given: Any) -> Any:
    """`model.data.data_prefix` with a prefix in place of each file that is named in full; other values stay."""
    if isinstance(given, Mapping):
        return {key: clean_prefixes(value) for key, value in given.items()}
    if isinstance(given, list | tuple):
        return [clean_prefixes(value) for value in given]
    return given if is_weight(given) else data_prefix(given)


def listed_prefixes(given: Any) -> list[str]:
    """Every prefix of `model.data.data_prefix`, each once: a list, or a mapping from splits to lists; weights stand
    between prefixes."""
    lists = given.values() if isinstance(given, Mapping) else [given]
    return list(dict.fromkeys(prefix for own in lists for prefix in own or () if not is_weight(prefix)))


def is_weight(prefix: Any) -> bool:
    """Whether an entry of a list of prefixes is a weight."""
    return not isinstance(prefix, str) or prefix.replace(".", "", 1).isdigit()


def missing_files(prefix: str) -> list[str]:
    """The missing files of a data prefix."""
    return [prefix + ending for ending in (".bin", ".idx") if not Path(prefix + ending).is_file()]


def open_data(prefix: str) -> IndexedDataset:
    """The data set of a prefix whose files exist.

    Raises:
        ValueError: the index is damaged.
    """
    try:
        return IndexedDataset(prefix)
    except Exception as error:  # Megatron asserts, numpy raises, depending on the problem
        raise ValueError(f"{prefix}.idx cannot be read ({error}); make the data anew") from error


def vocabulary_problem(
    prefix: str, vocab_size: int | None, spans: Sequence[tuple[int, int]] | None = None
) -> str | None:
    """The reason why a model cannot read the data, or None: a shortened file, or the first token outside the
    vocabulary.

    A pass over the file in its order, at the speed of memory (0.1 s for a GB that is cached).

    Args:
        prefix: its files exist.
        vocab_size: true size of the model's vocabulary, without padding; None checks the file's length alone.
        spans: (first, last + 1) of the tokens to check, counted over all documents; None = all.

    Raises:
        ValueError: the index is damaged.
    """
    dataset = open_data(prefix)
    lengths, kind = dataset.sequence_lengths, numpy.dtype(dataset.index.dtype)
    starts = numpy.concatenate(([0], numpy.cumsum(lengths, dtype=numpy.int64)))
    count = int(starts[-1])
    del lengths, dataset
    size, needed = Path(f"{prefix}.bin").stat().st_size, count * kind.itemsize
    if size < needed:
        return f"{prefix}.bin has {size:,} bytes and {prefix}.idx describes {needed:,}; make the data anew"
    if vocab_size is None or not count:
        return None
    # Read as unsigned, negative ids are large.
    unsigned = kind if kind.kind == "u" else numpy.dtype(f"u{kind.itemsize}")
    tokens = numpy.memmap(f"{prefix}.bin", dtype=unsigned, mode="r", shape=(count,))
    if numpy.iinfo(unsigned).max < vocab_size:
        return None
    for start, stop in _chunks([(0, count)] if spans is None else spans):
        if tokens[start:stop].max() >= vocab_size:
            place = start + int(numpy.argmax(tokens[start:stop] >= vocab_size))
            document = int(numpy.searchsorted(starts, place, side="right")) - 1
            return (
                f"{prefix}.bin holds the token {int(tokens[place].view(kind))} (document {document}, position "
                f"{place - int(starts[document])}), which is outside the model's vocabulary 0..{vocab_size - 1}; make "
                "the data with the model's own tokenizer, without the tokens that the tokenizer has beyond it"
            )
    return None


def _chunks(spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for begin, end in spans:
        for start in range(begin, end, _CHUNK):
            yield start, min(start + _CHUNK, end)
