# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""One pass over known text, at whose rows exits are asked about the token that follows.

What waits in early exit is computed later with the values of a full-depth run, so known text runs once, all positions
together, and never token by token.

Row r of a pass is a (sequence, position) pair as in `Items`; the last token of a sequence predicts nothing and has no
row.

May import: torch, `nemo_ee.generation.{descent,items}`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import LongTensor, Tensor

from .early_exit_generation_descent import pick_rows
from .early_exit_generation_items import DecodingModel, Items

# Rows of logits asked for at a time: at most this many numbers, 64 MiB in fp32.
LOGITS_PER_QUESTION = 2**24


class Answers(NamedTuple):
    """What an exit says at m rows: its logits `[m, v]`, the tokens that follow `[m]` and ln of their probabilities."""

    rows: Sequence[int]
    logits: Tensor
    tokens: LongTensor
    logprobs: Tensor


class KnownTextPass:
    """A batch on its way through the model.

    Args:
        model: what to run.
        sequences: token ids, at least two each.
        exits: names of the exits that will be asked.

    Attributes:
        items: the rows.
        first_rows: of each sequence.
        hidden: `[n, h]`, at the stop that was last run to.
    """

    def __init__(self, model: DecodingModel, sequences: Sequence[Sequence[int]], exits: tuple[str, ...]) -> None:
        self.model = model
        device = getattr(model, "device", torch.device("cpu"))
        fed = [list(own[:-1]) for own in sequences]
        self.items = Items.of({index: range(len(own)) for index, own in enumerate(fed)}, device)
        self.first_rows = [group.first_row for group in self.items.groups]
        self._cache = model.new_cache(len(fed), max(map(len, fed)), exits)
        self._next = torch.tensor([token for own in sequences for token in own[1:]], dtype=torch.long)
        tokens = torch.tensor([token for own in fed for token in own], dtype=torch.long, device=device)
        self.hidden = model.embed(tokens, self.items)

    def run_to(self, stops: Collection[int]) -> Iterator[int]:
        """Run to each of these stops, the shallowest first; ask between them."""
        depth = 0
        for stop in sorted(set(stops)):
            self.hidden, depth = self.model.run(self.hidden, self.items, depth, stop, self._cache), stop
            yield stop

    def ask(self, name: str | None, rows: Sequence[int]) -> Iterator[Answers]:
        """Ask an exit (None: the final one) about these rows (ascending), a chunk at a time.

        It is told of all other rows first: a `layer` exit's question attends to every position before its own.
        """
        if name is not None:
            others = sorted(set(range(len(self.items))) - set(rows))
            if others:
                self.model.observe_exit(name, *pick_rows(self.hidden, self.items, others), self._cache)
        at_once = max(1, LOGITS_PER_QUESTION // self.model.vocab_size)
        for begin in range(0, len(rows), at_once):
            chunk = rows[begin : begin + at_once]
            logits = self.model.exit_logits(name, *pick_rows(self.hidden, self.items, chunk), self._cache)
            tokens = self._next[chunk].to(logits.device)
            chosen = logits.gather(1, tokens[:, None])[:, 0]
            yield Answers(chunk, logits, tokens, chosen - logits.logsumexp(dim=1))
