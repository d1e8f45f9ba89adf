# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs tokens through the layer stack and lets each leave at an exit.

The hidden states of tokens that left are kept as *pending*, until a deeper token of their sequence needs their keys
and values. The stops of the exits in use cut the stack into segments, and `StagedForward.step` goes through them. At
each stop: join (pending rows of this depth join the batch), run (one segment), read (exits are evaluated, sequences at
their end are read), part (rows of a token that leaves become pending). Two tokens of one sequence, exits at stop 5 and
11 of 24, token A passes the threshold of the first exit, token B of none:

    stop     0            5                         11                        24
    step 1   A --- run --> exit passes: output of A
                           A is pending
    step 2   B --- run --> exit fails
                           A joins: [A B] -- run --> exit fails for B
                                                     [A B] ------- run -------> final exit: output of B

It follows that

* every (token, half layer) is computed at most once, with exactly the values of a full-depth run;
* the depth that a sequence's positions have reached never increases with position: rows that are pending at a stop
  precede all rows that reach it later.

`DecodingModel.run_pending_after` only changes when pending rows run: as soon as a sequence has so many. The cap on
pending tokens counts them as if they were still pending.

(EE-LLM's "KV recomputation", arXiv 2312.04916, runs pending tokens again from the first layer. Here nothing is
computed twice. What was computed for a rejected draft is dropped: `truncate`.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from nemo_ee.exits.confidence import end_confidence
from nemo_ee.exits.criteria import PROBE, SMALLER_IS_CONFIDENT
from nemo_ee.generation.decoding_model import DecodingCache, DecodingModel, ExitPoint, TokenPositions
from nemo_ee.generation.forward_rows import ExitOutput, TokenInput
from nemo_ee.generation.hidden_batch import HiddenBatch, pick_rows
from nemo_ee.generation.policy import ExitPlan, LeavingRule
from nemo_ee.generation.sampling import MinLengthMask
from nemo_ee.generation.stats import FINAL


class StagedForward:
    """The sequences in one cache, each in a slot and with a plan of its own.

    Args:
        model: the model.
        cache: its cache.

    Attributes:
        computed_half_layers: sum over rows of the half layers that were run.
        evaluations: exit name -> number of rows at which it was evaluated.
    """

    def __init__(self, model: DecodingModel, cache: DecodingCache) -> None:
        self.model, self.cache = model, cache
        self._end_of_stack = 2 * model.num_layers
        self._plans: dict[int, ExitPlan] = {}
        self._thresholds: dict[int, dict[str, float]] = {}  # slot -> exit -> threshold
        self._min_length = MinLengthMask()
        # stop -> slot -> its pending rows there, one batch for each step that left some, by ascending position
        self._pending: dict[int, dict[int, list[HiddenBatch]]] = defaultdict(dict)
        self._num_pending: dict[int, int] = defaultdict(int)
        self._num_ahead: dict[int, int] = defaultdict(int)  # run by `run_pending_after` since a token went deep
        self._released: set[int] = set()
        self._stops: list[int] = []
        # stop -> exits there in the model's order, each with the threshold of every slot that evaluates it
        self._exits_at: dict[int, list[tuple[ExitPoint, dict[int, float]]]] = {}
        self.computed_half_layers = 0
        self.evaluations = {point.name: 0 for point in model.exits} | {FINAL: 0}

    def admit(self, slot: int, plan: ExitPlan, masked: tuple[int, Collection[int], int] | None = None) -> None:
        """Put a new sequence into a slot whose cache is empty.

        Args:
            slot: slot in the cache.
            plan: the sequence's plan.
            masked: (position, tokens, prompt length): the answer cannot have these tokens before this position.
        """
        for batches in self._pending.values():
            batches.pop(slot, None)
        self._num_pending[slot] = self._num_ahead[slot] = 0
        self._released.discard(slot)
        self._plans[slot] = plan
        # In fp32, as confidences are.
        numbers = torch.tensor([exit.threshold for exit in plan.exits], dtype=torch.float32).tolist()
        names = [exit.point.name for exit in plan.exits]
        self._thresholds[slot] = dict(zip(names, numbers, strict=True))
        if masked is not None:
            self._min_length.mask(slot, *masked)
        self._plan_stops()

    def release(self, slot: int) -> None:
        """Mark the sequence as finished. Its exits no longer split the forward pass. Its pending rows are kept until
        `flush` runs them."""
        self._released.add(slot)
        self._min_length.release(slot)
        self._plan_stops()

    def disable_exits(self, slot: int) -> None:
        """Evaluate no exit for this sequence any more. It must have no pending rows."""
        self._thresholds[slot] = {}
        self._plan_stops()

    def _plan_stops(self, *, released: bool = False) -> None:
        """Compute the stops of the forward pass. `released`: count finished sequences too."""
        slots = [slot for slot in self._plans if released or slot not in self._released]
        ends = {self._end_stop(slot) for slot in slots}
        thresholds: dict[str, dict[int, float]] = defaultdict(dict)
        for slot in slots:
            for name, threshold in self._thresholds[slot].items():
                thresholds[name][slot] = threshold
        self._exits_at = {}
        for point in self.model.exits:
            if point.name in thresholds:
                self._exits_at.setdefault(point.stop, []).append((point, thresholds[point.name]))
        self._stops = sorted(ends | set(self._exits_at))

    def _end_stop(self, slot: int) -> int:
        end = self._plans[slot].end
        return self._end_of_stack if end is None else end.stop

    def num_pending(self, slot: int) -> int:
        """Number of the sequence's tokens that are pending, or would be without `run_pending_after`."""
        return self._num_pending[slot] + self._num_ahead[slot]

    def truncate(self, slot: int, length: int) -> None:
        """Drop what was computed for a sequence's positions from `length` on; none of them may be pending."""
        self.cache.truncate(slot, length)

    def flush(self, leaving: Collection[int] = ()) -> None:
        """Run all pending rows, except in the slots of `leaving`, to full depth. The cache then equals that of a
        full-depth run."""
        self._num_ahead.clear()
        slots = {slot for batches in self._pending.values() for slot in batches} - set(leaving)
        if slots:
            self._plan_stops(released=True)
            self.step({slot: TokenInput(0, ()) for slot in sorted(slots)}, read_ends=False)
            self._plan_stops()

    def _run_pending_ahead(self, slots: Iterable[int], enough: int) -> None:
        """Run the pending rows of the slots that have `enough`. Drafts are left out: verification reads them at the
        end."""
        ahead = [slot for slot in slots if self._num_pending[slot] >= enough and not self._plans[slot].verify]
        for slot in ahead:
            self._num_ahead[slot] += self._num_pending[slot]
        if ahead:
            self.step({slot: TokenInput(0, ()) for slot in ahead}, read_ends=False)

    def step(self, inputs: Mapping[int, TokenInput], *, read_ends: bool = True) -> list[ExitOutput]:
        """Run new tokens, joined by their sequences' pending rows, until each has left or reached its end.

        Args:
            inputs: slot -> its tokens, slots ascending; positions continue those of the sequence.
            read_ends: read the sequences that reach their end.

        Returns:
            With `read_ends` one output for each slot but those with `read_none`, in order; without it an empty list.
        """
        if read_ends and self.model.run_pending_after is not None:
            self._run_pending_ahead(inputs, self.model.run_pending_after)
        may_exit = {slot: own.rule for slot, own in inputs.items() if own.allow_exit}
        running, outputs, depth = set(inputs), [], 0
        batch = self._embed(inputs)
        for stop in self._stops:
            if self._runs_through(stop, running, may_exit):
                continue
            batch = self._join_pending(batch, depth, running)
            if batch is not None:
                batch = self._run(batch, depth, stop)
                exited = self._evaluate_exits(batch, stop, may_exit)
                left = {output.slot for output in exited}
                ended = [slot for slot in batch.positions if slot not in left and self._end_stop(slot) == stop]
                outputs += exited
                if read_ends and ended:
                    outputs += self._read_ends(batch, ended, inputs)
                if read_ends and stop == self._end_of_stack:
                    self._num_ahead.update(dict.fromkeys(batch.positions, 0))
                if left or ended:
                    batch = self._part(batch, stop, left, ended)
                    running.difference_update(left, ended)
                    if not running:
                        break
            depth = stop
        outputs.sort(key=lambda output: output.slot)
        return outputs

    def _runs_through(self, stop: int, running: set[int], may_exit: Mapping[int, LeavingRule | None]) -> bool:
        """Whether nothing happens at this stop: no row joins or ends, no exit is evaluated or writes keys."""
        writing, ends = self.model.exits_with_kv, map(self._end_stop, running)
        if writing is None or stop in ends or not running.isdisjoint(self._pending.get(stop, ())):
            return False
        for point, thresholds in self._exits_at.get(stop, ()):
            for slot in running.intersection(thresholds):
                rule = may_exit.get(slot)
                if point.name in writing or (slot in may_exit and (rule is None or rule.evaluates(point.name))):
                    return False
        return True

    def _embed(self, inputs: Mapping[int, TokenInput]) -> HiddenBatch | None:
        """The new tokens at depth 0; None without any."""
        positions = {
            slot: list(range(own.position, own.position + len(own.tokens)))
            for slot, own in inputs.items()
            if own.tokens
        }
        if not positions:
            return None
        tokens = [token for own in inputs.values() for token in own.tokens]
        rows, on_device = TokenPositions.with_tokens(positions, tokens, self.model.device)
        return HiddenBatch(positions, self.model.embed(on_device, rows), rows)

    def _join_pending(self, batch: HiddenBatch | None, depth: int, slots: Collection[int]) -> HiddenBatch | None:
        """`batch`, with the rows of `slots` that are pending at this depth before its own."""
        pending = self._pending.get(depth)
        if not pending:
            return batch
        parts = []
        for slot in [own for own in pending if own in slots]:
            own_parts = pending.pop(slot)
            self._num_pending[slot] -= sum(len(part.positions[slot]) for part in own_parts)
            parts += own_parts
        if not parts:
            return batch
        return HiddenBatch.merge(parts if batch is None else [*parts, batch])

    def _run(self, batch: HiddenBatch, depth: int, stop: int) -> HiddenBatch:
        """The batch after the half layers (depth, stop]."""
        rows = TokenPositions.of(batch.positions, self.model.device) if batch.rows is None else batch.rows
        self.computed_half_layers += len(rows) * (stop - depth)
        return HiddenBatch(batch.positions, self.model.run(batch.hidden, rows, depth, stop, self.cache), rows)

    def _evaluate_exits(
        self, batch: HiddenBatch, stop: int, may_exit: Mapping[int, LeavingRule | None]
    ) -> list[ExitOutput]:
        """Evaluate the exits at this stop at the newest row of the sequences in `may_exit`.

        Every row has just reached the stop, so an exit's keys and values are written once for each row of the
        sequences that use it: by the evaluation, or before it by `write_exit_kv`, because it may attend to them.

        Returns:
            One output for each sequence that leaves, from the first exit whose threshold its confidence passes.
        """
        outputs: list[ExitOutput] = []
        if stop not in self._exits_at:
            return outputs
        last_rows = batch.last_rows()
        undecided = [slot for slot in batch.positions if slot in may_exit]
        for point, thresholds in self._exits_at[stop]:
            slots = [slot for slot in undecided if slot in thresholds]
            slots = [slot for slot in slots if may_exit[slot] is None or may_exit[slot].evaluates(point.name)]
            probed = self._probe(point, batch, last_rows, slots)
            if probed:  # the head runs only for tokens that leave
                slots = [slot for slot in slots if slot not in probed or probed[slot] > thresholds[slot]]
            rows = [last_rows[slot] for slot in slots]
            self._write_exit_kv(point.name, batch, thresholds, rows)
            if not rows:
                continue
            logits = self._logits(point.name, batch, rows)
            confidences = self._confidence(logits, slots, probed)
            for i, slot in enumerate(slots):
                value, threshold, rule = confidences[i], thresholds[slot], may_exit[slot]
                smaller = self._plans[slot].criterion in SMALLER_IS_CONFIDENT
                passes = value < threshold if smaller else value > threshold
                if passes and (rule is None or rule.leaves(point.name, value, logits[i])):
                    row = slice(i, i + 1)
                    outputs.append(ExitOutput(slot, point.name, point.layer, confidences[row], logits[row]))
                    undecided.remove(slot)
        return outputs

    def _probe(
        self, point: ExitPoint, batch: HiddenBatch, last_rows: Mapping[int, int], slots: Sequence[int]
    ) -> dict[int, float]:
        """Slot -> the confidence that the exit's probe has in its newest row, where a probe decides."""
        slots = [slot for slot in slots if self._plans[slot].criterion == PROBE]
        if not slots:
            return {}
        return dict(zip(slots, point.probe(batch.hidden[[last_rows[slot] for slot in slots]]).tolist(), strict=True))

    def _confidence(
        self, logits: Tensor, slots: Sequence[int], probed: Mapping[int, float] = MappingProxyType({})
    ) -> list[float]:
        """The confidence of each row by the criterion of its slot's plan, of some by `probed`."""
        if probed.keys() >= set(slots):
            return [probed[slot] for slot in slots]
        criteria = [self._plans[slot].criterion for slot in slots]
        by_criterion = {criterion: end_confidence(criterion, logits).tolist() for criterion in dict.fromkeys(criteria)}
        return [
            probed.get(slot, by_criterion[criterion][row])
            for row, (slot, criterion) in enumerate(zip(slots, criteria, strict=True))
        ]

    def _write_exit_kv(
        self, name: str, batch: HiddenBatch, slots: Collection[int], evaluated: Collection[int]
    ) -> None:
        """Write an exit's keys and values for the rows of these slots, except those that are `evaluated`."""
        if len(evaluated) == len(batch.rows):
            return
        skipped, others, row = set(evaluated), [], 0
        for slot, positions in batch.positions.items():
            if slot in slots:
                others += [own for own in range(row, row + len(positions)) if own not in skipped]
            row += len(positions)
        if others:
            self.model.write_exit_kv(name, *pick_rows(batch.hidden, batch.rows, others), self.cache)

    def _logits(self, name: str | None, batch: HiddenBatch, rows: Sequence[int]) -> Tensor:
        """Logits of one exit at these rows. Returns `[len(rows), v]`, fp32."""
        self.evaluations[FINAL if name is None else name] += len(rows)
        hidden, positions = pick_rows(batch.hidden, batch.rows, rows)
        logits = self.model.exit_logits(name, hidden, positions, self.cache)
        assert logits.shape == (len(rows), self.model.vocab_size), f"exit {name}: logits {tuple(logits.shape)}"
        return self._min_length.masked(logits, positions) if self._min_length else logits

    def _read_ends(
        self, batch: HiddenBatch, ended: Sequence[int], inputs: Mapping[int, TokenInput]
    ) -> list[ExitOutput]:
        """Read sequences that have reached their end, each from its static exit or from the final exit."""
        # Not a set: exits are evaluated in the same order on every rank, whatever its hash seed.
        ends = list(dict.fromkeys(self._plans[slot].end for slot in ended))
        if len(ends) > 1:
            by_end = ([slot for slot in ended if self._plans[slot].end == end] for end in ends)
            return [output for slots in by_end for output in self._read_ends(batch, slots, inputs)]
        (end,) = ends
        last_rows = batch.last_rows()
        counts = [
            len(batch.positions[slot]) if inputs[slot].read_all else int(not inputs[slot].read_none) for slot in ended
        ]
        rows: list[int] = []
        owners: list[int] = []
        for slot, count in zip(ended, counts, strict=True):
            rows += range(last_rows[slot] + 1 - count, last_rows[slot] + 1)
            owners += [slot] * count
        name, layer = (None, self.model.num_layers) if end is None else (end.name, end.layer)
        if name is not None:
            self._write_exit_kv(name, batch, ended, rows)
        if not rows:
            return []
        logits = self._logits(name, batch, rows)
        ended, counts = zip(*[own for own in zip(ended, counts, strict=True) if own[1]], strict=True)
        for slot, count in zip(ended, counts, strict=True):
            self._min_length.release(slot, batch.positions[slot][-count])  # later reads are past this row
        confidences = self._confidence(logits, owners)
        if len(ended) == 1:
            return [ExitOutput(ended[0], name, layer, confidences, logits)]
        outputs, first = [], 0
        for slot, count in zip(ended, counts, strict=True):
            own = slice(first, first + count)
            outputs.append(ExitOutput(slot, name, layer, confidences[own], logits[own]))
            first += count
        return outputs

    def _part(
        self, batch: HiddenBatch, stop: int, left: Collection[int], ended: Collection[int]
    ) -> HiddenBatch | None:
        """Keep the rows of sequences that `left` as pending at this stop. Returns the rows that run on."""
        staying = [slot for slot in batch.positions if slot not in left and slot not in ended]
        pending = left if stop != self._end_of_stack else ()
        if not staying and not pending:
            return None
        chunks = batch.chunks() if len(batch.positions) > 1 else {}
        for slot in pending:
            # A copy: a view would keep the whole batch's hidden states alive while these rows are pending.
            own = batch.hidden if len(batch.positions) == 1 else chunks[slot].clone()
            self._pending[stop].setdefault(slot, []).append(HiddenBatch({slot: batch.positions[slot]}, own))
            self._num_pending[slot] += len(batch.positions[slot])
        if not staying:
            return None
        hidden = torch.cat([chunks[slot] for slot in staying])
        return HiddenBatch({slot: batch.positions[slot] for slot in staying}, hidden)
