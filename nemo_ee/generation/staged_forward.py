# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The way of tokens down the stack, with the hidden states that wait on it.

The stops of the exits in use cut the stack into segments. A token runs segment by segment and is evaluated at the stops of
its own sequence's plan; one that leaves keeps its hidden state there. When a later token of its sequence goes deeper
than that stop, the hidden states waiting there run through the next segment with it, in one batch, and fill the keys
and values it needs. So

* every (token, half layer) is computed at most once, with exactly the values of a full-depth run;
* a sequence's depths never increase with position: what waits at a stop comes before everything that reaches it later.

A model whose deeper half layers stand on other ranks may have a `run_pending_after`: a sequence's tokens are then sent on as
soon as that many wait, and other ranks run them while this one goes on with the next token. Only the time at which
they run changes; the cap on waiting tokens counts them as if they still waited.

(EE-LLM's "KV recomputation", arXiv 2312.04916, runs waiting tokens again from the first layer; here nothing is
computed twice. What a rejected draft computed is thrown away: `truncate`.)
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_ee.exits.confidence import confidence
from nemo_ee.generation.decoding_model import DecodingModel, ExitPoint, TokenPositions
from nemo_ee.generation.min_length_mask import MinLengthMask
from nemo_ee.generation.policy import ExitPlan
from nemo_ee.generation.stats import FINAL


class TokenInput(NamedTuple):
    """What one sequence sends down.

    `tokens` go to the positions from `position` on; without any, only what waits goes down. `allow_exit`: whether the
    newest token is evaluated on the way. `read_all`: at the end every row that arrives is read, not just the newest.
    """

    position: int
    tokens: Sequence[int]
    allow_exit: bool = False
    read_all: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class ExitOutput:
    """What an exit says about the tokens after some rows of a sequence.

    Attributes:
        slot: the sequence's place in the cache.
        exit: the exit; None = the final exit.
        layer: layers below it.
        confidence: of each row, by the plan's criterion.
        logits: `[m, v]`, fp32; m = 1 but where `TokenInput.read_all` asked for more.
    """

    slot: int
    exit: str | None
    layer: int
    confidence: Sequence[float]
    logits: Tensor


@dataclasses.dataclass(eq=False)
class HiddenBatch:
    """Hidden states at one depth: each slot's positions (both ascending) and `[n, h]` in that order.

    `items` says the same to the model. It is made when it is needed, and kept while the rows stay together.
    """

    positions: dict[int, list[int]]
    hidden: Tensor
    items: TokenPositions | None = None

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
    def merge(parts: Iterable[HiddenBatch]) -> HiddenBatch:
        """One `HiddenBatch` from several of which the earlier hold each slot's earlier positions."""
        positions: dict[int, list[int]] = defaultdict(list)
        chunks: dict[int, list[Tensor]] = defaultdict(list)
        for part in parts:
            for slot, chunk in part.chunks().items():
                positions[slot] += part.positions[slot]
                chunks[slot].append(chunk)
        order = sorted(positions)
        hidden = torch.cat([chunk for slot in order for chunk in chunks[slot]])
        return HiddenBatch({slot: positions[slot] for slot in order}, hidden)


class StagedForward:
    """The state of the sequences in one cache, each in its slot and on its own plan.

    Args:
        model: what to run.
        cache: its keys and values.
    """

    def __init__(self, model: DecodingModel, cache: Any) -> None:
        self.model, self.cache = model, cache
        self.device = getattr(model, "device", torch.device("cpu"))
        self._end_of_stack = 2 * model.num_layers
        self._plans: dict[int, ExitPlan] = {}
        self._thresholds: dict[int, dict[str, float]] = {}  # slot -> exit -> threshold
        self._min_length = MinLengthMask()
        # stop -> slot -> its rows there, a part for each flight that left some, in the order of their positions
        self._pending: dict[int, dict[int, list[HiddenBatch]]] = defaultdict(dict)
        self._num_pending: dict[int, int] = defaultdict(int)
        self._run_pending_after: int | None = getattr(model, "run_pending_after", None)
        self._num_ahead: dict[int, int] = defaultdict(int)  # sent on before a deeper token came for them
        self._released: set[int] = set()
        self._stops: list[int] = []
        # stop -> exits there in the model's order, each with the threshold of every slot that evaluates it
        self._exits_at: dict[int, list[tuple[ExitPoint, dict[int, float]]]] = {}
        self.computed_half_layers = 0
        self.evaluations = {point.name: 0 for point in model.exits} | {FINAL: 0}

    def admit(self, slot: int, plan: ExitPlan, masked: tuple[int, Collection[int], int] | None = None) -> None:
        """Put a new sequence into a slot whose cache is empty.

        Args:
            slot: its place in the cache.
            plan: of its tokens.
            masked: (position, tokens, prompt length): no token of the answer before the position is one of these; exits
                give them no probability.
        """
        for rows in self._pending.values():
            rows.pop(slot, None)
        self._num_pending[slot] = self._num_ahead[slot] = 0
        self._released.discard(slot)
        self._plans[slot] = plan
        # In fp32, as confidences are.
        numbers = torch.tensor([exit.threshold for exit in plan.exits], dtype=torch.float32).tolist()
        names = [exit.point.name for exit in plan.exits]
        self._thresholds[slot] = dict(zip(names, numbers, strict=True))
        if masked is not None:
            self._min_length.hold(slot, *masked)
        self._plan_stops()

    def release(self, slot: int) -> None:
        """A sequence has ended: its plan cuts no flight any more. What waits of it waits on, for `flush`."""
        self._released.add(slot)
        self._min_length.release(slot)
        self._plan_stops()

    def disable_exits(self, slot: int) -> None:
        """Its sequence evaluates no exit any more, and its plan cuts no flight; nothing of it may wait."""
        self._thresholds[slot] = {}
        self._plan_stops()

    def _plan_stops(self, *, released: bool = False) -> None:
        """Where flights stop; `released`: for the slots that were released too."""
        slots = [slot for slot in self._plans if released or slot not in self._released]
        ends = {self._end_stop(slot) for slot in slots}
        evaluated: dict[str, dict[int, float]] = defaultdict(dict)
        for slot in slots:
            for name, threshold in self._thresholds[slot].items():
                evaluated[name][slot] = threshold
        self._exits_at = {}
        for point in self.model.exits:
            if point.name in evaluated:
                self._exits_at.setdefault(point.stop, []).append((point, evaluated[point.name]))
        self._stops = sorted(ends | set(self._exits_at))

    def num_pending(self, slot: int) -> int:
        """How many tokens of the slot's sequence wait for deeper layers, or would if they had not been sent ahead."""
        return self._num_pending[slot] + self._num_ahead[slot]

    def truncate(self, slot: int, length: int) -> None:
        """Throw away what was computed for a sequence's positions from `length` on; none of them may wait."""
        self.cache.truncate(slot, length)

    def flush(self, leaving: Collection[int] = ()) -> None:
        """Run what waits, except in the slots of `leaving`, to full depth; the cache is then that of a full-depth
        run."""
        self._num_ahead.clear()
        slots = {slot for rows in self._pending.values() for slot in rows} - set(leaving)
        if slots:
            self._plan_stops(released=True)
            self.step({slot: TokenInput(0, ()) for slot in sorted(slots)}, read_ends=False)
            self._plan_stops()

    def _run_pending_ahead(self, slots: Iterable[int]) -> None:
        """Send on what waits of these slots where it is enough. Drafts stay: their check reads them at the end."""
        enough = [slot for slot in slots if self._num_pending[slot] >= self._run_pending_after]
        enough = [slot for slot in enough if not self._plans[slot].verify]
        for slot in enough:
            self._num_ahead[slot] += self._num_pending[slot]
        if enough:
            self.step({slot: TokenInput(0, ()) for slot in enough}, read_ends=False)

    def step(self, inputs: Mapping[int, TokenInput], *, read_ends: bool = True) -> list[ExitOutput]:
        """Send tokens down until each has left or ended, with what waits of their sequences where they pass.

        Args:
            inputs: by slot, ascending; new positions continue those of their sequence.
            read_ends: read the sequences that reach their end.

        Returns:
            Without `read_ends` nothing; with it an output per slot, in order.
        """
        if read_ends and self._run_pending_after is not None:
            self._run_pending_ahead(inputs)
        rows = self._embed(inputs)
        evaluating = {slot for slot, token_input in inputs.items() if token_input.allow_exit}
        running = set(inputs)
        outputs: list[ExitOutput] = []
        depth = 0
        for stop in self._stops:
            rows = self._take_along(rows, depth, running)
            if rows is not None:
                items = self.items_of(rows.positions) if rows.items is None else rows.items
                hidden = self.model.run(rows.hidden, items, depth, stop, self.cache)
                rows = HiddenBatch(rows.positions, hidden, items)
                self.computed_half_layers += len(items) * (stop - depth)
                left = self._evaluate(rows, items, stop, evaluating)
                gone = {one.slot for one in left}
                ended = [slot for slot in rows.positions if slot not in gone and self._end_stop(slot) == stop]
                if ended and read_ends:
                    left += self._read_ends(rows, items, ended, inputs)
                if read_ends and stop == self._end_of_stack:
                    self._num_ahead.update(dict.fromkeys(rows.positions, 0))
                if gone or ended:
                    outputs += left
                    running -= gone
                    running.difference_update(ended)
                    rows = self._leave(rows, stop, gone, ended)
                    if not running:
                        break
            depth = stop
        outputs.sort(key=lambda one: one.slot)
        return outputs

    def _end_stop(self, slot: int) -> int:
        end = self._plans[slot].end
        return self._end_of_stack if end is None else end.stop

    def _embed(self, inputs: Mapping[int, TokenInput]) -> HiddenBatch | None:
        """HiddenBatch at depth 0; None without new tokens."""
        positions = {
            slot: list(range(token_input.position, token_input.position + len(token_input.tokens)))
            for slot, token_input in inputs.items()
            if token_input.tokens
        }
        if not positions:
            return None
        flat = [token for token_input in inputs.values() for token in token_input.tokens]
        items, tokens = TokenPositions.with_tokens(positions, flat, self.device)
        return HiddenBatch(positions, self.model.embed(tokens, items), items)

    def items_of(self, positions: Mapping[int, Sequence[int]]) -> TokenPositions:
        """Items on the model's device."""
        return TokenPositions.of(positions, self.device)

    def _take_along(self, rows: HiddenBatch | None, depth: int, slots: Collection[int]) -> HiddenBatch | None:
        """`rows`, with the rows of `slots` that wait at this depth before them."""
        waiting = self._pending.get(depth)
        if not waiting:
            return rows
        parts = []
        for slot in [own for own in waiting if own in slots]:
            own_parts = waiting.pop(slot)
            self._num_pending[slot] -= sum(len(part.positions[slot]) for part in own_parts)
            parts += own_parts
        if not parts:
            return rows
        return HiddenBatch.merge(parts if rows is None else [*parts, rows])

    def _evaluate(
        self, rows: HiddenBatch, items: TokenPositions, stop: int, evaluating: Collection[int]
    ) -> list[ExitOutput]:
        """Ask the exits at this stop about the newest row of each evaluating sequence; the first that is confident wins.

        Every row here has just reached the stop, so each exit hears of each row of the sequences that use it once: by
        a question, or by `write_exit_kv`, which comes first because a question may attend to it.
        """
        outputs: list[ExitOutput] = []
        if stop not in self._exits_at:
            return outputs
        last_rows = rows.last_rows()
        undecided = [slot for slot in rows.positions if slot in evaluating]
        for point, thresholds in self._exits_at[stop]:
            slots = [slot for slot in undecided if slot in thresholds]
            questions = [last_rows[slot] for slot in slots]
            self._write_exit_kv(point.name, rows, items, thresholds, questions)
            if not questions:
                continue
            logits = self._read(point.name, rows.hidden, items, questions)
            confidences = self._confidence(logits, slots)
            for i, slot in enumerate(slots):
                value, threshold = confidences[i], thresholds[slot]
                if value < threshold if self._plans[slot].criterion == "entropy" else value > threshold:
                    outputs.append(
                        ExitOutput(slot, point.name, point.layer, confidences[i : i + 1], logits[i : i + 1])
                    )
                    undecided.remove(slot)
        return outputs

    def _confidence(self, logits: Tensor, slots: Sequence[int]) -> list[float]:
        """The confidence of each row by the criterion of its slot's plan."""
        criteria = [self._plans[slot].criterion for slot in slots]
        if len(set(criteria)) == 1:
            return confidence(logits, criteria[0]).tolist()
        by_criterion = {criterion: confidence(logits, criterion).tolist() for criterion in dict.fromkeys(criteria)}
        return [by_criterion[criterion][row] for row, criterion in enumerate(criteria)]

    def _write_exit_kv(
        self, name: str, rows: HiddenBatch, items: TokenPositions, slots: Collection[int], questions: Collection[int]
    ) -> None:
        """Tell an exit of the rows of these slots that it is not evaluated about."""
        if len(questions) == len(items):
            return
        in_question, others, row = set(questions), [], 0
        for slot, positions in rows.positions.items():
            if slot in slots:
                others += [own for own in range(row, row + len(positions)) if own not in in_question]
            row += len(positions)
        if others:
            self.model.write_exit_kv(name, *pick_rows(rows.hidden, items, others), self.cache)

    def _read(self, name: str | None, hidden: Tensor, items: TokenPositions, rows: Sequence[int]) -> Tensor:
        """Ask one exit about these rows of `hidden`. Returns `[len(rows), v]`, fp32."""
        self.evaluations[FINAL if name is None else name] += len(rows)
        hidden, items = pick_rows(hidden, items, rows)
        logits = self.model.exit_logits(name, hidden, items, self.cache)
        assert logits.shape == (len(rows), self.model.vocab_size), f"exit {name}: logits {tuple(logits.shape)}"
        return self._min_length.without(logits, items) if self._min_length else logits

    def _read_ends(
        self, rows: HiddenBatch, items: TokenPositions, ended: Sequence[int], inputs: Mapping[int, TokenInput]
    ) -> list[ExitOutput]:
        """Read sequences that have reached their ends, each from its static exit or from the final one."""
        # Not a set: exits are evaluated in the same order on every rank, whatever its hash seed.
        ends = list(dict.fromkeys(self._plans[slot].end for slot in ended))
        if len(ends) > 1:
            by_end = ([slot for slot in ended if self._plans[slot].end == end] for end in ends)
            return [one for slots in by_end for one in self._read_ends(rows, items, slots, inputs)]
        (end,) = ends
        last_rows = rows.last_rows()
        counts = [len(rows.positions[slot]) if inputs[slot].read_all else 1 for slot in ended]
        questions: list[int] = []
        owners: list[int] = []
        for slot, count in zip(ended, counts, strict=True):
            questions += range(last_rows[slot] + 1 - count, last_rows[slot] + 1)
            owners += [slot] * count
        name, layer = (None, self.model.num_layers) if end is None else (end.name, end.layer)
        if name is not None:
            self._write_exit_kv(name, rows, items, ended, questions)
        logits = self._read(name, rows.hidden, items, questions)
        for slot, count in zip(ended, counts, strict=True):
            self._min_length.release(slot, rows.positions[slot][-count])  # what is read later stands behind this row
        confidences = self._confidence(logits, owners)
        if len(ended) == 1:
            return [ExitOutput(ended[0], name, layer, confidences, logits)]
        outputs, first = [], 0
        for slot, count in zip(ended, counts, strict=True):
            own = slice(first, first + count)
            outputs.append(ExitOutput(slot, name, layer, confidences[own], logits[own]))
            first += count
        return outputs

    def _leave(
        self, rows: HiddenBatch, stop: int, gone: Collection[int], ended: Collection[int]
    ) -> HiddenBatch | None:
        """Put the rows of the sequences in `gone` on the waiting list of this stop; those that neither leave nor end
        go on."""
        staying = [slot for slot in rows.positions if slot not in gone and slot not in ended]
        keeping = gone if stop != self._end_of_stack else ()
        if not staying and not keeping:
            return None
        chunks = rows.chunks() if len(rows.positions) > 1 else {}
        for slot in keeping:
            # A copy: a view would keep the whole batch's hidden states alive for as long as this one waits.
            own = rows.hidden if len(rows.positions) == 1 else chunks[slot].clone()
            self._pending[stop].setdefault(slot, []).append(HiddenBatch({slot: rows.positions[slot]}, own))
            self._num_pending[slot] += len(rows.positions[slot])
        if not staying:
            return None
        hidden = torch.cat([chunks[slot] for slot in staying])
        return HiddenBatch({slot: rows.positions[slot] for slot in staying}, hidden)


def pick_rows(hidden: Tensor, items: TokenPositions, rows: Sequence[int]) -> tuple[Tensor, TokenPositions]:
    """These rows (ascending) of the hidden states and of the items; the same objects when that is all of them."""
    if len(rows) == len(items):
        return hidden, items
    index = torch.tensor(rows, dtype=torch.long)
    return hidden[index.to(hidden.device)], items.select(index)
