# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""One teacher-forced forward pass over given text, with each exit's logits for the next token at every position.

Early exit computes pending tokens later with the values of a full-depth run. So given text runs once, all positions
together, and never token by token.

Row r of a pass is a (sequence, position) pair, see `TokenPositions`. The last token of a sequence predicts nothing and
has no row.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import LongTensor, Tensor

from nemo_ee.generation.decoding_model import DecodingModel, TokenPositions
from nemo_ee.generation.hidden_batch import pick_rows

# Largest number of logits computed in one call, 64 MiB in fp32.
LOGITS_PER_CALL = 2**24


class ExitLogits(NamedTuple):
    """The predictions of an exit at m rows.

    Attributes:
        rows: the m rows, ascending.
        logits: `[m, v]`, fp32.
        tokens: `[m]`, int64, the tokens that follow in the text.
        logprobs: `[m]`, fp32, ln of their probabilities.
    """

    rows: Sequence[int]
    logits: Tensor
    tokens: LongTensor
    logprobs: Tensor


class TeacherForcedPass:
    """The pass. Run it to a stop (`run_to`), evaluate exits there (`evaluate`), run on.

    Args:
        model: the model.
        sequences: token ids, at least two for each sequence.
        exits: names of the exits that will be evaluated.

    Attributes:
        positions: the rows.
        first_rows: first row of each sequence.
        hidden: `[n, h]`, hidden states at the stop that was reached last.
    """

    def __init__(self, model: DecodingModel, sequences: Sequence[Sequence[int]], exits: tuple[str, ...]) -> None:
        self.model = model
        inputs = [list(own[:-1]) for own in sequences]
        self.positions = TokenPositions.of({index: range(len(own)) for index, own in enumerate(inputs)}, model.device)
        self.first_rows = [group.first_row for group in self.positions.groups]
        self._cache = model.new_cache(len(inputs), max(map(len, inputs)), exits)
        self._next = torch.tensor([token for own in sequences for token in own[1:]], dtype=torch.long)
        tokens = torch.tensor([token for own in inputs for token in own], dtype=torch.long, device=model.device)
        self.hidden = model.embed(tokens, self.positions)

    def run_to(self, stops: Collection[int]) -> Iterator[int]:
        """Run to each of these stops, the shallowest first, and yield it; evaluate exits in between."""
        depth = 0
        for stop in sorted(set(stops)):
            self.hidden, depth = self.model.run(self.hidden, self.positions, depth, stop, self._cache), stop
            yield stop

    def evaluate(self, name: str | None, rows: Sequence[int]) -> Iterator[ExitLogits]:
        """Evaluate an exit (None: the final exit) at these rows (ascending), a chunk at a time.

        Its keys and values are first written for all other rows, because a `layer` exit attends to them.
        """
        if name is not None:
            others = sorted(set(range(len(self.positions))) - set(rows))
            if others:
                self.model.write_exit_kv(name, *pick_rows(self.hidden, self.positions, others), self._cache)
        at_once = max(1, LOGITS_PER_CALL // self.model.vocab_size)
        for begin in range(0, len(rows), at_once):
            chunk = rows[begin : begin + at_once]
            logits = self.model.exit_logits(name, *pick_rows(self.hidden, self.positions, chunk), self._cache)
            tokens = self._next[chunk].to(logits.device)
            chosen = logits.gather(1, tokens[:, None])[:, 0]
            yield ExitLogits(chunk, logits, tokens, chosen - logits.logsumexp(dim=1))
