# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The way of tokens down the stack, with the hidden states that wait on it.

The stops of the exits in use cut the stack into segments. A token runs segment by segment and is asked at the stops of
its own sequence's course; one that leaves keeps its hidden state there. When a later token of its sequence goes deeper
than that stop, the hidden states waiting there run through the next segment with it, in one batch, and fill the keys
and values it needs. So

* every (token, half layer) is computed at most once, with exactly the values of a full-depth run;
* a sequence's depths never increase with position: what waits at a stop comes before everything that reaches it later.

A model whose deeper half layers stand on other ranks may have a `fill_ahead`: a sequence's tokens are then sent on as
soon as that many wait, and other ranks run them while this one goes on with the next token. Only the time at which
they run changes; the cap on waiting tokens counts them as if they still waited.

(EE-LLM's "KV recomputation", arXiv 2312.04916, runs waiting tokens again from the first layer; here nothing is
computed twice. What a rejected draft computed is thrown away: `truncate`.)

May import: torch, `nemo_ee.exits` and `nemo_ee.generation.held_tokens`, `items`, `policy`, `stats`.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .early_exit_exits_confidence import confidence
from .early_exit_generation_held_tokens import HeldTokens
from .early_exit_generation_items import DecodingModel, ExitPoint, Items
from .early_exit_generation_policy import Course
from .early_exit_generation_stats import FINAL


class Feed(NamedTuple):
    """What one sequence sends down.

    `tokens` go to the positions from `position` on; without any, only what waits goes down. `may_leave`: whether the
    newest token is asked on the way. `read_all`: at the end every row that arrives is read, not just the newest.
    """

    position: int
    tokens: Sequence[int]
    may_leave: bool = False
    read_all: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """What an exit says about the tokens after some rows of a sequence.

    Attributes:
        slot: the sequence's place in the cache.
        exit: the exit; None = the final exit.
        layer: layers below it.
        confidence: of each row, by the course's criterion.
        logits: `[m, v]`, fp32; m = 1 but where `Feed.read_all` asked for more.
    """

    slot: int
    exit: str | None
    layer: int
    confidence: Sequence[float]
    logits: Tensor


@dataclasses.dataclass(eq=False)
class Rows:
    """Hidden states at one depth: each slot's positions (both ascending) and `[n, h]` in that order.

    `items` says the same to the model. It is made when it is needed, and kept while the rows stay together.
    """

    positions: dict[int, list[int]]
    hidden: Tensor
    items: Items | None = None

    def chunks(self) -> dict[int, Tensor]:
        """Each slot's hidden states, `[m, h]`."""
        if len(self.positions) == 1:
            return dict.fromkeys(self.positions, self.hidden)
        sizes = [len(own) for own in self.positions.values()]
        return dict(zip(self.positions, self.hidden.split(sizes), strict=True))

    def last_rows(self) -> dict[int, int]:
        """The row of each slot's newest position."""
        ends = accumulate(len(own) for own in self.positions.values())
        return {slot: end - 1 for slot, end in zip(self.positions, ends, strict=True)}

    @staticmethod
    def merge(parts: Iterable[Rows]) -> Rows:
        """One `Rows` from several of which the earlier hold each slot's earlier positions."""
        positions: dict[int, list[int]] = defaultdict(list)
        chunks: dict[int, list[Tensor]] = defaultdict(list)
        for part in parts:
            for slot, chunk in part.chunks().items():
                positions[slot] += part.positions[slot]
                chunks[slot].append(chunk)
        order = sorted(positions)
        hidden = torch.cat([chunk for slot in order for chunk in chunks[slot]])
        return Rows({slot: positions[slot] for slot in order}, hidden)


class Descent:
    """The state of the sequences in one cache, each in its slot and on its own course.

    Args:
        model: what to run.
        cache: its keys and values.
    """

    def __init__(self, model: DecodingModel, cache: Any) -> None:
        self.model, self.cache = model, cache
        self.device = getattr(model, "device", torch.device("cpu"))
        self._bottom = 2 * model.num_layers
        self._courses: dict[int, Course] = {}
        self._thresholds: dict[int, dict[str, float]] = {}  # slot -> exit -> threshold
        self._held = HeldTokens()
        # stop -> slot -> its rows there, a part for each flight that left some, in the order of their positions
        self._waiting: dict[int, dict[int, list[Rows]]] = defaultdict(dict)
        self._num_waiting: dict[int, int] = defaultdict(int)
        self._fill_ahead: int | None = getattr(model, "fill_ahead", None)
        self._num_ahead: dict[int, int] = defaultdict(int)  # sent on before a deeper token came for them
        self._released: set[int] = set()
        self._stops: list[int] = []
        # stop -> exits there in the model's order, each with the threshold of every slot that asks it
        self._exits_at: dict[int, list[tuple[ExitPoint, dict[int, float]]]] = {}
        self.computed_half_layers = 0
        self.asked = {point.name: 0 for point in model.exits} | {FINAL: 0}

    def admit(self, slot: int, course: Course, held: tuple[int, Collection[int]] | None = None) -> None:
        """Put a new sequence into a slot whose cache is empty.

        Args:
            slot: its place in the cache.
            course: of its tokens.
            held: (position, tokens): no token before the position is one of these; exits give them no probability.
        """
        for rows in self._waiting.values():
            rows.pop(slot, None)
        self._num_waiting[slot] = self._num_ahead[slot] = 0
        self._released.discard(slot)
        self._courses[slot] = course
        # In fp32, as confidences are.
        numbers = torch.tensor([exit.threshold for exit in course.exits], dtype=torch.float32).tolist()
        names = [exit.point.name for exit in course.exits]
        self._thresholds[slot] = dict(zip(names, numbers, strict=True))
        if held is not None:
            self._held.hold(slot, *held)
        self._plan()

    def release(self, slot: int) -> None:
        """A sequence has ended: its course cuts no flight any more. What waits of it waits on, for `flush`."""
        self._released.add(slot)
        self._held.release(slot)
        self._plan()

    def stop_asking(self, slot: int) -> None:
        """Its sequence asks no exit any more, and its course cuts no flight; nothing of it may wait."""
        self._thresholds[slot] = {}
        self._plan()

    def _plan(self, *, released: bool = False) -> None:
        """Where flights stop; `released`: for the slots that were released too."""
        slots = [slot for slot in self._courses if released or slot not in self._released]
        ends = {self._end_stop(slot) for slot in slots}
        asked: dict[str, dict[int, float]] = defaultdict(dict)
        for slot in slots:
            for name, threshold in self._thresholds[slot].items():
                asked[name][slot] = threshold
        self._exits_at = {}
        for point in self.model.exits:
            if point.name in asked:
                self._exits_at.setdefault(point.stop, []).append((point, asked[point.name]))
        self._stops = sorted(ends | set(self._exits_at))

    def waiting(self, slot: int) -> int:
        """How many tokens of the slot's sequence wait for deeper layers, or would if they had not been sent ahead."""
        return self._num_waiting[slot] + self._num_ahead[slot]

    def truncate(self, slot: int, length: int) -> None:
        """Throw away what was computed for a sequence's positions from `length` on; none of them may wait."""
        self.cache.truncate(slot, length)

    def flush(self, leaving: Collection[int] = ()) -> None:
        """Run what waits, except in the slots of `leaving`, to full depth; the cache is then that of a full-depth
        run."""
        self._num_ahead.clear()
        slots = {slot for rows in self._waiting.values() for slot in rows} - set(leaving)
        if slots:
            self._plan(released=True)
            self.step({slot: Feed(0, ()) for slot in sorted(slots)}, reading=False)
            self._plan()

    def _send_ahead(self, slots: Iterable[int]) -> None:
        """Send on what waits of these slots where it is enough. Drafts stay: their check reads them at the end."""
        enough = [slot for slot in slots if self._num_waiting[slot] >= self._fill_ahead]
        enough = [slot for slot in enough if not self._courses[slot].checks]
        for slot in enough:
            self._num_ahead[slot] += self._num_waiting[slot]
        if enough:
            self.step({slot: Feed(0, ()) for slot in enough}, reading=False)

    def step(self, feeds: Mapping[int, Feed], *, reading: bool = True) -> list[Reading]:
        """Send tokens down until each has left or ended, with what waits of their sequences where they pass.

        Args:
            feeds: by slot, ascending; new positions continue those of their sequence.
            reading: read those who reach their end.

        Returns:
            Without `reading` nothing; with it a reading per slot, in order.
        """
        if reading and self._fill_ahead is not None:
            self._send_ahead(feeds)
        rows = self._embed(feeds)
        asking = {slot for slot, feed in feeds.items() if feed.may_leave}
        flying = set(feeds)
        readings: list[Reading] = []
        depth = 0
        for stop in self._stops:
            rows = self._take_along(rows, depth, flying)
            if rows is not None:
                items = self.items_of(rows.positions) if rows.items is None else rows.items
                hidden = self.model.run(rows.hidden, items, depth, stop, self.cache)
                rows = Rows(rows.positions, hidden, items)
                self.computed_half_layers += len(items) * (stop - depth)
                left = self._ask(rows, items, stop, asking)
                gone = {one.slot for one in left}
                ended = [slot for slot in rows.positions if slot not in gone and self._end_stop(slot) == stop]
                if ended and reading:
                    left += self._read_ends(rows, items, ended, feeds)
                if reading and stop == self._bottom:
                    self._num_ahead.update(dict.fromkeys(rows.positions, 0))
                if gone or ended:
                    readings += left
                    flying -= gone
                    flying.difference_update(ended)
                    rows = self._leave(rows, stop, gone, ended)
                    if not flying:
                        break
            depth = stop
        readings.sort(key=lambda one: one.slot)
        return readings

    def _end_stop(self, slot: int) -> int:
        end = self._courses[slot].end
        return self._bottom if end is None else end.stop

    def _embed(self, feeds: Mapping[int, Feed]) -> Rows | None:
        """Rows at depth 0; None without new tokens."""
        positions = {
            slot: list(range(feed.position, feed.position + len(feed.tokens)))
            for slot, feed in feeds.items()
            if feed.tokens
        }
        if not positions:
            return None
        flat = [token for feed in feeds.values() for token in feed.tokens]
        items, tokens = Items.with_tokens(positions, flat, self.device)
        return Rows(positions, self.model.embed(tokens, items), items)

    def items_of(self, positions: Mapping[int, Sequence[int]]) -> Items:
        """Items on the model's device."""
        return Items.of(positions, self.device)

    def _take_along(self, rows: Rows | None, depth: int, slots: Collection[int]) -> Rows | None:
        """`rows`, with the rows of `slots` that wait at this depth before them."""
        waiting = self._waiting.get(depth)
        if not waiting:
            return rows
        parts = []
        for slot in [own for own in waiting if own in slots]:
            own_parts = waiting.pop(slot)
            self._num_waiting[slot] -= sum(len(part.positions[slot]) for part in own_parts)
            parts += own_parts
        if not parts:
            return rows
        return Rows.merge(parts if rows is None else [*parts, rows])

    def _ask(self, rows: Rows, items: Items, stop: int, asking: Collection[int]) -> list[Reading]:
        """Ask the exits at this stop about the newest row of each asking sequence; the first that is sure wins.

        Every row here has just reached the stop, so each exit hears of each row of the sequences that use it once: by
        a question, or by `observe_exit`, which comes first because a question may attend to it.
        """
        readings: list[Reading] = []
        if stop not in self._exits_at:
            return readings
        last_rows = rows.last_rows()
        undecided = [slot for slot in rows.positions if slot in asking]
        for point, thresholds in self._exits_at[stop]:
            slots = [slot for slot in undecided if slot in thresholds]
            questions = [last_rows[slot] for slot in slots]
            self._observe(point.name, rows, items, thresholds, questions)
            if not questions:
                continue
            logits = self._read(point.name, rows.hidden, items, questions)
            certainty = self._confidence(logits, slots)
            for i, slot in enumerate(slots):
                value, threshold = certainty[i], thresholds[slot]
                if value < threshold if self._courses[slot].criterion == "entropy" else value > threshold:
                    readings.append(Reading(slot, point.name, point.layer, certainty[i : i + 1], logits[i : i + 1]))
                    undecided.remove(slot)
        return readings

    def _confidence(self, logits: Tensor, slots: Sequence[int]) -> list[float]:
        """The confidence of each row by the criterion of its slot's course."""
        criteria = [self._courses[slot].criterion for slot in slots]
        if len(set(criteria)) == 1:
            return confidence(logits, criteria[0]).tolist()
        by_criterion = {criterion: confidence(logits, criterion).tolist() for criterion in dict.fromkeys(criteria)}
        return [by_criterion[criterion][row] for row, criterion in enumerate(criteria)]

    def _observe(
        self, name: str, rows: Rows, items: Items, slots: Collection[int], questions: Collection[int]
    ) -> None:
        """Tell an exit of the rows of these slots that it is not asked about."""
        if len(questions) == len(items):
            return
        in_question, others, row = set(questions), [], 0
        for slot, positions in rows.positions.items():
            if slot in slots:
                others += [own for own in range(row, row + len(positions)) if own not in in_question]
            row += len(positions)
        if others:
            self.model.observe_exit(name, *pick_rows(rows.hidden, items, others), self.cache)

    def _read(self, name: str | None, hidden: Tensor, items: Items, rows: Sequence[int]) -> Tensor:
        """Ask one exit about these rows of `hidden`. Returns `[len(rows), v]`, fp32."""
        self.asked[FINAL if name is None else name] += len(rows)
        hidden, items = pick_rows(hidden, items, rows)
        logits = self.model.exit_logits(name, hidden, items, self.cache)
        assert logits.shape == (len(rows), self.model.vocab_size), f"exit {name}: logits {tuple(logits.shape)}"
        return self._held.without(logits, items) if self._held else logits

    def _read_ends(self, rows: Rows, items: Items, ended: Sequence[int], feeds: Mapping[int, Feed]) -> list[Reading]:
        """Read sequences that have reached their ends, each from its static exit or from the final one."""
        # Not a set: exits are asked in the same order on every rank, whatever its hash seed.
        ends = list(dict.fromkeys(self._courses[slot].end for slot in ended))
        if len(ends) > 1:
            by_end = ([slot for slot in ended if self._courses[slot].end == end] for end in ends)
            return [one for slots in by_end for one in self._read_ends(rows, items, slots, feeds)]
        (end,) = ends
        last_rows = rows.last_rows()
        counts = [len(rows.positions[slot]) if feeds[slot].read_all else 1 for slot in ended]
        questions: list[int] = []
        owners: list[int] = []
        for slot, count in zip(ended, counts, strict=True):
            questions += range(last_rows[slot] + 1 - count, last_rows[slot] + 1)
            owners += [slot] * count
        name, layer = (None, self.model.num_layers) if end is None else (end.name, end.layer)
        if name is not None:
            self._observe(name, rows, items, ended, questions)
        logits = self._read(name, rows.hidden, items, questions)
        for slot, count in zip(ended, counts, strict=True):
            self._held.release(slot, rows.positions[slot][-count])  # what is read later stands behind this row
        certainty = self._confidence(logits, owners)
        if len(ended) == 1:
            return [Reading(ended[0], name, layer, certainty, logits)]
        readings, first = [], 0
        for slot, count in zip(ended, counts, strict=True):
            own = slice(first, first + count)
            readings.append(Reading(slot, name, layer, certainty[own], logits[own]))
            first += count
        return readings

    def _leave(self, rows: Rows, stop: int, gone: Collection[int], ended: Collection[int]) -> Rows | None:
        """Put the rows of the sequences in `gone` on the waiting list of this stop; those that neither leave nor end
        go on."""
        staying = [slot for slot in rows.positions if slot not in gone and slot not in ended]
        keeping = gone if stop != self._bottom else ()
        if not staying and not keeping:
            return None
        chunks = rows.chunks() if len(rows.positions) > 1 else {}
        for slot in keeping:
            # A copy: a view would keep the whole batch's hidden states alive for as long as this one waits.
            own = rows.hidden if len(rows.positions) == 1 else chunks[slot].clone()
            self._waiting[stop].setdefault(slot, []).append(Rows({slot: rows.positions[slot]}, own))
            self._num_waiting[slot] += len(rows.positions[slot])
        if not staying:
            return None
        hidden = torch.cat([chunks[slot] for slot in staying])
        return Rows({slot: rows.positions[slot] for slot in staying}, hidden)


def pick_rows(hidden: Tensor, items: Items, rows: Sequence[int]) -> tuple[Tensor, Items]:
    """These rows (ascending) of the hidden states and of the items; the same objects when that is all of them."""
    if len(rows) == len(items):
        return hidden, items
    index = torch.tensor(rows, dtype=torch.long)
    return hidden[index.to(hidden.device)], items.select(index)
