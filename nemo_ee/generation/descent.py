# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The way of tokens down the stack, with the hidden states that wait on it.

The active exits' stops cut the stack into segments. A token runs segment by segment and is asked at each stop; one
that leaves keeps its hidden state there. When a later token of its sequence goes deeper than that stop, the hidden
states waiting there run through the next segment with it, in one batch, and fill the keys and values it needs. So

* every (token, half layer) is computed at most once, with exactly the values of a full-depth run;
* a sequence's depths never increase with position: what waits at a stop comes before everything that reaches it later.

(EE-LLM's "KV recomputation", arXiv 2312.04916, runs waiting tokens again from the first layer; here nothing is
computed twice.)

May import: torch, `nemo_ee.exits` and `nemo_ee.generation.items`, `policy`, `stats`.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from nemo_ee.exits.confidence import confidence, leaves
from nemo_ee.generation.items import DecodingModel, Items
from nemo_ee.generation.policy import AskedExit
from nemo_ee.generation.stats import FINAL


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """What the exit a token left at says about the next one.

    Attributes:
        sequence: whose newest token was fed.
        exit: name of the exit; None = the final exit.
        layer: layers below it.
        confidence: by the criterion.
        logits: `[v]`, fp32.
    """

    sequence: int
    exit: str | None
    layer: int
    confidence: float
    logits: Tensor


@dataclasses.dataclass(eq=False)
class Rows:
    """Hidden states at one depth: each sequence's positions (both ascending) and `[n, h]` in that order."""

    positions: dict[int, list[int]]
    hidden: Tensor

    def chunks(self) -> dict[int, Tensor]:
        """Each sequence's hidden states, `[m, h]`."""
        sizes = [len(own) for own in self.positions.values()]
        return dict(zip(self.positions, self.hidden.split(sizes), strict=True))

    def last_rows(self) -> dict[int, int]:
        """The row of each sequence's newest position."""
        ends = accumulate(len(own) for own in self.positions.values())
        return {sequence: end - 1 for sequence, end in zip(self.positions, ends, strict=True)}

    @staticmethod
    def merge(parts: Iterable[Rows]) -> Rows:
        """One `Rows` from several of which the earlier hold each sequence's earlier positions."""
        positions: dict[int, list[int]] = defaultdict(list)
        chunks: dict[int, list[Tensor]] = defaultdict(list)
        for part in parts:
            for sequence, chunk in part.chunks().items():
                positions[sequence] += part.positions[sequence]
                chunks[sequence].append(chunk)
        order = sorted(positions)
        hidden = torch.cat([chunk for sequence in order for chunk in chunks[sequence]])
        return Rows({sequence: positions[sequence] for sequence in order}, hidden)


class Descent:
    """The state of a batch of sequences in one cache.

    Args:
        model: what to run.
        cache: its keys and values, made for `exits`.
        exits: the exits to ask, in the model's order.
        criterion: of the confidence.
        max_waiting: most tokens of a sequence that may wait; None = no cap.
    """

    def __init__(
        self,
        model: DecodingModel,
        cache: Any,
        exits: Sequence[AskedExit],
        criterion: str,
        max_waiting: int | None,
    ) -> None:
        self.model, self.cache, self.criterion, self.max_waiting = model, cache, criterion, max_waiting
        self.device = getattr(model, "device", torch.device("cpu"))
        self.end = 2 * model.num_layers
        self._exits_at: dict[int, list[AskedExit]] = defaultdict(list)
        for exit in exits:
            self._exits_at[exit.point.stop].append(exit)
        self._stops = sorted({*self._exits_at, self.end})
        # stop -> sequence -> its rows there, in the order of their positions
        self._waiting: dict[int, dict[int, Rows]] = {stop: {} for stop in self._stops if stop != self.end}
        self.computed_half_layers = 0
        self.asked = {exit.point.name: 0 for exit in exits} | {FINAL: 0}

    def waiting(self, sequence: int) -> int:
        """How many tokens of the sequence wait for deeper layers."""
        return sum(len(rows[sequence].positions[sequence]) for rows in self._waiting.values() if sequence in rows)

    def prompt(self, tokens: Mapping[int, Sequence[int]]) -> list[Reading]:
        """Run whole prompts at full depth and read their last position from the final exit.

        Args:
            tokens: each new sequence's prompt, sequences ascending.

        Returns:
            A reading per sequence, in order.
        """
        rows = self.embed({sequence: (0, own) for sequence, own in tokens.items()})
        return self._descend(rows, asking=(), taking_along=())

    def step(self, tokens: Mapping[int, tuple[int, int]]) -> list[Reading]:
        """Feed one token to each of some sequences and read it where it leaves.

        Args:
            tokens: sequence -> (position, token), sequences ascending, each position the next of its sequence.

        Returns:
            A reading per sequence, in order.
        """
        rows = self.embed({sequence: (position, [token]) for sequence, (position, token) in tokens.items()})
        cap = self.max_waiting
        asking = [sequence for sequence in tokens if cap is None or self.waiting(sequence) < cap]
        return self._descend(rows, asking=asking, taking_along=tuple(tokens))

    def flush(self) -> None:
        """Run everything that waits to full depth; afterwards the cache is that of a full-depth run."""
        everyone = {sequence for rows in self._waiting.values() for sequence in rows}
        self._descend(None, asking=(), taking_along=sorted(everyone), reading=False)

    def forget(self, sequence: int) -> None:
        """Drop what waits of a sequence that has ended."""
        for rows in self._waiting.values():
            rows.pop(sequence, None)

    def embed(self, tokens: Mapping[int, tuple[int, Sequence[int]]]) -> Rows:
        """Rows at depth 0 from sequence -> (first position, tokens)."""
        positions = {sequence: list(range(first, first + len(own))) for sequence, (first, own) in tokens.items()}
        flat = torch.tensor([token for _, own in tokens.values() for token in own], dtype=torch.long)
        return Rows(positions, self.model.embed(flat.to(self.device), self.items_of(positions)))

    def items_of(self, positions: Mapping[int, Sequence[int]]) -> Items:
        """Items on the model's device."""
        return Items.of(positions, self.device)

    def _descend(
        self,
        rows: Rows | None,
        *,
        asking: Collection[int],
        taking_along: Sequence[int],
        reading: bool = True,
    ) -> list[Reading]:
        """Run `rows` (at depth 0) down until every sequence has left.

        Args:
            rows: the new rows; None when only waiting rows run.
            asking: sequences whose newest row is asked at the exits on the way; the others go to full depth.
            taking_along: sequences whose waiting rows join as the flight passes them.
            reading: read those who reach the end from the final exit.
        """
        readings: list[Reading] = []
        taking = set(taking_along)
        depth = 0
        for stop in self._stops:
            rows = self._take_along(rows, depth, taking)
            if rows is not None:
                items = self.items_of(rows.positions)
                rows = Rows(rows.positions, self.model.run(rows.hidden, items, depth, stop, self.cache))
                self.computed_half_layers += len(items) * (stop - depth)
                left = self._ask(rows, items, stop, asking)
                readings += left
                if left:
                    gone = {one.sequence for one in left}
                    rows = self._leave(rows, stop, gone)
                    taking -= gone
            depth = stop
        if rows is not None and reading:
            readings += self._read_final(rows)
        return sorted(readings, key=lambda one: one.sequence)

    def _take_along(self, rows: Rows | None, depth: int, sequences: Collection[int]) -> Rows | None:
        """`rows`, with the rows of `sequences` that wait at this depth before them."""
        waiting = self._waiting.get(depth, {})
        parts = [waiting.pop(sequence) for sequence in sorted(waiting) if sequence in sequences]
        if not parts:
            return rows
        return Rows.merge(parts if rows is None else [*parts, rows])

    def _ask(self, rows: Rows, items: Items, stop: int, asking: Collection[int]) -> list[Reading]:
        """Ask the exits at this stop about the newest row of each asking sequence; the first that is sure wins.

        Every row here has just reached the stop, so each exit hears of each row once: by a question, or by
        `observe_exit`, which comes first because a question may attend to it.
        """
        readings: list[Reading] = []
        last_rows = rows.last_rows()
        undecided = [sequence for sequence in rows.positions if sequence in asking]
        for point, threshold in self._exits_at[stop]:
            questions = [last_rows[sequence] for sequence in undecided]
            self._observe(point.name, rows.hidden, items, set(questions))
            if not questions:
                continue
            logits = self.read(point.name, rows.hidden, items, questions)
            certainty = confidence(logits, self.criterion)
            sure = leaves(certainty, threshold, self.criterion).tolist()
            certainty = certainty.tolist()
            readings += [
                Reading(sequence, point.name, point.layer, certainty[i], logits[i])
                for i, sequence in enumerate(undecided)
                if sure[i]
            ]
            undecided = [sequence for i, sequence in enumerate(undecided) if not sure[i]]
        return readings

    def _observe(self, name: str, hidden: Tensor, items: Items, questions: Collection[int]) -> None:
        others = [row for row in range(len(items)) if row not in questions]
        if others:
            self.model.observe_exit(name, *pick_rows(hidden, items, others), self.cache)

    def read(self, name: str | None, hidden: Tensor, items: Items, rows: Sequence[int]) -> Tensor:
        """Ask one exit about these rows of `hidden`. Returns `[len(rows), v]`, fp32."""
        self.asked[FINAL if name is None else name] += len(rows)
        logits = self.model.exit_logits(name, *pick_rows(hidden, items, rows), self.cache)
        assert logits.shape == (len(rows), self.model.vocab_size), f"exit {name}: logits {tuple(logits.shape)}"
        return logits

    def _read_final(self, rows: Rows) -> list[Reading]:
        last_rows = rows.last_rows()
        logits = self.read(None, rows.hidden, self.items_of(rows.positions), list(last_rows.values()))
        certainty = confidence(logits, self.criterion).tolist()
        layers = self.model.num_layers
        return [Reading(sequence, None, layers, certainty[i], logits[i]) for i, sequence in enumerate(last_rows)]

    def _leave(self, rows: Rows, stop: int, gone: Collection[int]) -> Rows | None:
        """Put the rows of the sequences that leave on the waiting list of this stop; the rest goes on."""
        chunks = rows.chunks()
        staying = [sequence for sequence in rows.positions if sequence not in gone]
        if stop != self.end:
            for sequence in gone:
                # A copy: a view would keep the whole batch's hidden states alive for as long as this one waits.
                own = chunks[sequence].clone() if staying or len(gone) > 1 else rows.hidden
                part = Rows({sequence: rows.positions[sequence]}, own)
                earlier = self._waiting[stop].get(sequence)
                self._waiting[stop][sequence] = part if earlier is None else Rows.merge([earlier, part])
        if not staying:
            return None
        hidden = torch.cat([chunks[sequence] for sequence in staying])
        return Rows({sequence: rows.positions[sequence] for sequence in staying}, hidden)


def pick_rows(hidden: Tensor, items: Items, rows: Sequence[int]) -> tuple[Tensor, Items]:
    """These rows (ascending) of the hidden states and of the items; the same objects when that is all of them."""
    if len(rows) == len(items):
        return hidden, items
    index = torch.tensor(rows, dtype=torch.long)
    return hidden[index.to(hidden.device)], items.select(index)
