# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A Megatron .bin/.idx text cut into windows, the same for every layout, batch size and machine.

The documents are concatenated in file order. Window i reads the tokens i*s .. i*s + s inclusive and predicts the last
s of them, so neighbours share one token and every token but the very first is predicted exactly once. With
`max_tokens` the kept windows are spread evenly over the whole text: the first files alone would be a poor sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from nemo_ee.data.token_files import missing_files, open_data, vocabulary_problem
from nemo_ee.megatron.model.microbatch import MicroBatch
from nemo_ee.text.text_files import data_prefix


class TokenWindows:
    """Windows over a tokenised text.

    Args:
        prefix: path of the data, with or without .bin or .idx.
        seq_length: s, tokens predicted per window.
        max_tokens: most tokens to predict, in whole windows; None for the whole text.
        vocab_size: ids in the windows must be below it; None for no check.

    Raises:
        ValueError: files are missing or cut off, nothing to predict, `max_tokens` is less than one window, or a token
            is outside the vocabulary.
    """

    def __init__(
        self, prefix: str, *, seq_length: int, max_tokens: int | None = None, vocab_size: int | None = None
    ) -> None:
        prefix = data_prefix(prefix)
        if missing := missing_files(prefix):
            raise ValueError(f"{' and '.join(missing)} not found; make the data with scripts/data/preprocess_text.py")
        self.seq_length = seq_length
        self._dataset = open_data(prefix)
        # Position of every document's first token in the concatenation; the last entry is the number of tokens.
        self._starts = np.concatenate(([0], np.cumsum(self._dataset.sequence_lengths, dtype=np.int64)))
        available = int(self._starts[-1]) - 1
        if available < 1:
            raise ValueError(f"{prefix} holds {available + 1} tokens; at least 2 are needed to predict one")
        windows = math.ceil(available / seq_length)
        kept = windows
        if max_tokens is not None and max_tokens < available:
            kept = max_tokens // seq_length
            if kept < 1:
                raise ValueError(
                    f"max_tokens={max_tokens} is less than one window of seq_length={seq_length}; raise it or shorten "
                    "the windows"
                )
        # Rounded down: if not all windows are kept, the last and perhaps partial one is left out.
        self._windows = [index * windows // kept for index in range(kept)]
        self.num_tokens = sum(min(seq_length, available - window * seq_length) for window in self._windows)
        starts = [window * seq_length for window in self._windows]
        spans = None if kept == windows else [(start, start + seq_length + 1) for start in starts]
        if problem := vocabulary_problem(prefix, vocab_size, spans):
            raise ValueError(problem)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, labels and loss mask of a window, each [s]; the text's last window is filled up with mask 0."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = self._windows[index] * self.seq_length
        text = self._read(start, min(start + self.seq_length + 1, int(self._starts[-1])))
        tokens, labels, mask = (np.zeros(self.seq_length, dtype=kind) for kind in (np.int64, np.int64, np.float32))
        count = len(text) - 1
        tokens[:count], labels[:count], mask[:count] = text[:-1], text[1:], 1.0
        return tokens, labels, mask

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the concatenation."""
        document = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        while start < stop:
            offset = start - int(self._starts[document])
            length = min(stop, int(self._starts[document + 1])) - start
            if length > 0:
                parts.append(self._dataset.get(document, offset=offset, length=length))
            start, document = start + max(0, length), document + 1
        return np.concatenate(parts).astype(np.int64)


def num_batches(windows: Sequence, *, global_batch_size: int) -> int:
    """Number of global batches in a pass over the windows; the same on every rank."""
    return math.ceil(len(windows) / global_batch_size)


def microbatches(
    windows: Sequence,
    *,
    micro_batch_size: int,
    global_batch_size: int,
    data_rank: int,
    data_size: int,
    device: torch.device,
) -> Iterator[list[MicroBatch]]:
    """This data-parallel rank's microbatches of every global batch.

    Every rank gets the same number of global batches and of microbatches in each; a rank without enough windows gets
    rows whose loss mask is zero.

    Args:
        windows: `TokenWindows`, or anything whose items are (tokens, labels, mask) of one length.
        micro_batch_size: b, windows per microbatch and rank.
        global_batch_size: windows per global batch over all ranks, a multiple of b * data_size.
        data_rank, data_size: rank in the data-parallel group, and size of the group.
        device: device of the tensors.
    """
    stride = micro_batch_size * data_size
    for start in range(0, len(windows), global_batch_size):
        stop = min(start + global_batch_size, len(windows))
        batches = []
        for first in range(start, stop, stride):
            mine = range(first + data_rank * micro_batch_size, first + (data_rank + 1) * micro_batch_size)
            rows = [windows[index] if index < stop else _empty(windows[start]) for index in mine]
            columns = [np.stack(column) for column in zip(*rows, strict=True)]
            tokens, labels, mask = (torch.from_numpy(column).to(device) for column in columns)
            positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
            batches.append(MicroBatch(tokens, labels, mask, positions))
        yield batches


def _empty(window: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    return tuple(np.zeros_like(column) for column in window)
