# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Sequences being decoded together: runs prompts, feeds tokens, samples or checks, stops each sequence on its own.

A session has a fixed number of slots in the model's cache. Sequences come (`add`) and go (they end, or `cancel`) while
others run; one that comes takes a slot that is free. Its prompt runs in the same flight as the others' next tokens.

May import: torch and `nemo_ee.generation.{checks,cost_rule,descent,items,policy,request,sampling,speculation,stats}`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from .early_exit_generation_checks import raise_all, request_faults
from .early_exit_generation_cost_rule import CostRule
from .early_exit_generation_descent import Descent, Feed, Reading
from .early_exit_generation_items import DecodingModel
from .early_exit_generation_policy import Course, ExitPolicy
from .early_exit_generation_request import Request, resolve
from .early_exit_generation_sampling import Choice, choose
from .early_exit_generation_speculation import Draft, check
from .early_exit_generation_stats import DecodingStats, Failure, TokenEvent, exit_histogram, mean_depth


@dataclasses.dataclass(eq=False)
class _Sequence:
    """A sequence that has not ended. `answer`: its new tokens; the last of them are the `drafts`, which wait to be
    checked."""

    index: int
    slot: int
    request: Request
    course: Course
    answer: list[int] = dataclasses.field(default_factory=list)
    drafts: list[Draft] = dataclasses.field(default_factory=list)
    has_begun: bool = False
    must_check: bool = False  # a draft would end the sequence
    left: dict[str | None, int] = dataclasses.field(default_factory=dict)  # fed tokens by exit, None = the end
    exits_pay: bool | None = None  # by the cost rule; None = not decided

    @property
    def length(self) -> int:
        """Tokens of prompt and answer, the drafted ones too."""
        return len(self.request.prompt) + len(self.answer)

    def previous(self) -> Sequence[int]:
        """What its repetition penalty looks at; nothing without one, as it would be a copy of the whole text."""
        return () if self.request.sampling.repetition_penalty == 1.0 else [*self.request.prompt, *self.answer]

    def finish_reason(self) -> str | None:
        """Why a sequence of these tokens has ended; None = it has not."""
        request = self.request
        if self.answer[-1] in request.stop_tokens:
            return "stop"
        if request.ends is not None and request.ends(self.answer):
            return "stop"
        return "length" if len(self.answer) >= request.max_new_tokens else None


class DecodingSession:
    """Decoding of some sequences, a step at a time. Made by `EarlyExitEngine.start`, which checks what it passes on.

    Args:
        model: what to run.
        mode, policy: of requests that do not say.
        exits: names of the exits that requests may use.
        num_slots: most sequences at a time.
        max_length: most tokens of a sequence, prompt included.
        cost_rule: when a sequence stops asking its exits; None = never.

    Attributes:
        cache: the model's key/value storage; sequences of `start` stand in it in their order.
        finished: whether no sequence is running. One may be added all the same.
        num_free_slots: how many sequences can be added now.
    """

    def __init__(
        self,
        model: DecodingModel,
        mode: str,
        policy: ExitPolicy | None,
        exits: Collection[str],
        num_slots: int,
        max_length: int,
        cost_rule: CostRule | None = None,
    ) -> None:
        self._cost_rule, self._num_fallbacks = cost_rule, 0
        self._model, self._mode, self._policy = model, mode, policy
        self._exits, self._max_length = tuple(point.name for point in model.exits if point.name in exits), max_length
        with torch.inference_mode():
            self.cache: Any = model.new_cache(num_slots, max_length, self._exits)
        self._descent = Descent(model, self.cache)
        self._free = list(range(num_slots))
        self._used: set[int] = set()
        self._running: dict[int, _Sequence] = {}  # by index, ascending
        self._slots: dict[int, int] = {}  # index -> slot, ended sequences too until their slot is used again
        self._num_added = self._num_prompt_tokens = 0
        self._drafted = self._accepted = self._checks = 0

    @property
    def finished(self) -> bool:
        """Whether no sequence is running."""
        return not self._running

    @property
    def num_free_slots(self) -> int:
        """How many sequences can be added now."""
        return len(self._free)

    def add(self, request: Request) -> int:
        """Take in a sequence; its first token comes with the next step.

        Returns:
            Its index: the `sequence` of its events. Indices count up from 0 and are never used twice.

        Raises:
            ValueError: with every fault of the request.
            RuntimeError: no slot is free.
        """
        what = f"sequence {self._num_added}"
        faults = list(request_faults(self._model, what, request))
        course = resolve(self._model, request, self._mode, self._policy, faults)
        missing = [name for name in course.exit_names if name not in self._exits]
        if missing:
            faults.append(
                f"{what}: exit {', '.join(missing)} is not one of the session's ({', '.join(self._exits) or 'none'}); "
                "name it under exits when the session is started"
            )
        elif self._cost_rule is not None:
            faults += self._cost_rule.missing([exit.point.name for exit in course.exits])
        if not faults and len(request.prompt) + request.max_new_tokens > self._max_length:
            faults.append(
                f"{what}: {len(request.prompt)} prompt tokens + max_new_tokens = {request.max_new_tokens} are more "
                f"than this session's {self._max_length} positions; shorten the prompt, ask for fewer tokens, or "
                "start the session with a larger max_length"
            )
        raise_all(faults)
        if not self._free:
            raise RuntimeError(
                "every slot of the session is taken; wait until a sequence ends, cancel one, or start the session "
                "with more num_slots"
            )
        return self.admit(request, course)

    def admit(self, request: Request, course: Course) -> int:
        """`add` without its checks: a request that fits, on its course, with a slot free."""
        slot = self._free[0]
        if course.checks or slot in self._used:
            self._needs_truncate("mode = 'self_speculative'" if course.checks else "a slot that is used again")
        if slot in self._used:
            self._descent.truncate(slot, 0)
            self._slots = {index: own for index, own in self._slots.items() if own != slot}
        del self._free[0]
        self._used.add(slot)
        held = None
        if request.min_new_tokens and request.stop_tokens:
            held = (len(request.prompt) + request.min_new_tokens, request.stop_tokens)
        self._descent.admit(slot, course, held)
        index = self._num_added
        self._num_added += 1
        self._num_prompt_tokens += len(request.prompt)
        self._slots[index] = slot
        self._running[index] = _Sequence(index, slot, request, course)
        return index

    def _needs_truncate(self, what: str) -> None:
        if not hasattr(self.cache, "truncate"):
            raise ValueError(f"{what} needs a model whose cache can be truncated, which this one's cannot be")

    def cancel(self, index: int) -> None:
        """End a sequence without another event; nothing happens when it has ended already."""
        if not 0 <= index < self._num_added:
            raise ValueError(f"sequence {index} is not one of this session's 0..{self._num_added - 1}")
        if index in self._running:
            self._release(self._running[index])

    def _release(self, sequence: _Sequence) -> None:
        del self._running[sequence.index]
        self._descent.release(sequence.slot)
        self._free = sorted([*self._free, sequence.slot])

    @torch.inference_mode()
    def step(self) -> tuple[TokenEvent | Failure, ...]:
        """Send the newest token of every running sequence down the stack.

        Returns:
            The tokens that are certain after it, in the order of the sequences: one of each sequence; in mode
            `self_speculative` none while a sequence only drafts, then all that its check left. A sequence whose
            logits are not numbers, or whose `ends` raises, ends with a `Failure`; the others do not notice.
        """
        if not self._running:
            return ()
        by_slot = {own.slot: own for own in self._running.values()}
        readings = self._descent.step({slot: self._feed(by_slot[slot]) for slot in sorted(by_slot)})
        events: list[TokenEvent | Failure] = []
        singles: list[tuple[_Sequence, Reading]] = []
        for reading in readings:
            sequence = by_slot[reading.slot]
            if sequence.has_begun and not sequence.must_check:  # which feeds no token
                sequence.left[reading.exit] = sequence.left.get(reading.exit, 0) + 1
            sequence.has_begun = True
            if sequence.drafts and reading.exit is None:
                singles += self._check(sequence, reading, events)
            else:
                singles.append((sequence, reading))
        events += self._choose(singles)
        for event in events:
            if event.finish_reason is not None:
                self._release(self._running[event.sequence])
        events.sort(key=lambda event: event.sequence)
        return tuple(events)

    def _feed(self, sequence: _Sequence) -> Feed:
        """What a sequence sends down next."""
        course = sequence.course
        if not sequence.has_begun:
            return Feed(0, sequence.request.prompt)
        position = sequence.length - 1
        if sequence.must_check:
            return Feed(position, (), read_all=True)
        cap = course.max_waiting
        may_leave = bool(course.exits) and self._exits_pay(sequence)
        may_leave = may_leave and (cap is None or self._descent.waiting(sequence.slot) < cap)
        if course.checks:
            request = sequence.request
            # The last token a sequence may have comes from the final exit: its draft would have to be checked at once.
            may_leave = may_leave and sequence.length + 1 < len(request.prompt) + request.max_new_tokens
        return Feed(position, (sequence.answer[-1],), may_leave, read_all=course.checks)

    def _exits_pay(self, sequence: _Sequence) -> bool:
        """Whether a sequence is to ask its exits: by what its first tokens did, then for good."""
        rule = self._cost_rule
        if rule is None or sequence.exits_pay:
            return True
        if sequence.exits_pay is None:
            if sequence.drafts:
                # What they are worth is known when they are checked, so where a verdict is due they are.
                return not rule.is_due(sum(sequence.left.values()))
            # The first token of an answer came with the prompt.
            emitted = len(sequence.answer) - 1
            sequence.exits_pay = rule.verdict(sequence.course, self._model.num_layers, sequence.left, emitted)
            if sequence.exits_pay is None:
                return True
            self._num_fallbacks += not sequence.exits_pay
        if not sequence.exits_pay and not self._descent.waiting(sequence.slot):
            # Later tokens run to the end in one piece.
            self._descent.stop_asking(sequence.slot)
            sequence.course = dataclasses.replace(sequence.course, exits=())
        return sequence.exits_pay

    def _check(
        self, sequence: _Sequence, reading: Reading, events: list[TokenEvent | Failure]
    ) -> list[tuple[_Sequence, Reading]]:
        """Keep the drafts that stand. Returns the reading of the token after them, if one is to be chosen."""
        drafts, first = sequence.drafts, sequence.length - len(sequence.drafts)
        rows = reading.logits[: len(drafts)]
        params = sequence.request.sampling
        sequence.drafts, sequence.must_check = [], False
        del sequence.answer[-len(drafts) :]
        self._drafted += len(drafts)
        self._checks += 1
        checked = list(check(rows, drafts, params, first, sequence.previous()))
        logprobs = _logprobs(rows[: len(checked)], [token for token, _ in checked])
        all_stay = checked[-1][1]
        if not all_stay and reading.logits.shape[0] > len(checked):
            # Row i stands at position first - 1 + i; what was fed after the last row that was checked goes.
            self._descent.truncate(sequence.slot, first - 1 + len(checked))
        for row, ((token, stays), draft) in enumerate(zip(checked, drafts, strict=False)):
            source = draft if stays else None
            events += self._events(sequence, token, logprobs[row], reading, row, source)
            if isinstance(events[-1], Failure):
                return []
            self._accepted += stays
        if not all_stay or reading.logits.shape[0] == len(drafts) or events[-1].finish_reason is not None:
            return []
        newest = dataclasses.replace(reading, confidence=reading.confidence[-1:], logits=reading.logits[-1:])
        return [(sequence, newest)]

    def _choose(self, readings: Sequence[tuple[_Sequence, Reading]]) -> list[TokenEvent | Failure]:
        """A token from each reading of one row; those of early exits that are to be checked become drafts."""
        events: list[TokenEvent | Failure] = []
        drafted: list[tuple[_Sequence, Reading]] = []
        certain: list[tuple[_Sequence, Reading]] = []
        for one in readings:
            (drafted if one[0].course.checks and one[1].exit is not None else certain).append(one)
        for (sequence, reading), (token, shaped) in zip(drafted, _sample(drafted, "draft"), strict=True):
            sequence.drafts.append(Draft(token, reading.exit, reading.layer, reading.confidence[0], shaped))
            sequence.answer.append(token)
            try:
                sequence.must_check = sequence.finish_reason() is not None
            except Exception:  # of the caller's `ends`: it counts if the draft stays, and is asked again then
                sequence.must_check = True
        if certain:
            tokens = [choice.token for choice in _sample(certain, "token")]
            logits = certain[0][1].logits if len(certain) == 1 else torch.cat([one.logits for _, one in certain])
            for (sequence, reading), token, logprob in zip(certain, tokens, _logprobs(logits, tokens), strict=True):
                events += self._events(sequence, token, logprob, reading, 0, None)
        return events

    def _events(
        self, sequence: _Sequence, token: int, logprob: float, reading: Reading, row: int, draft: Draft | None
    ) -> list[TokenEvent | Failure]:
        """Record a token that is certain. `draft`: what it was before, if it was one."""
        position, what = sequence.length, f"sequence {sequence.index}"
        if math.isnan(logprob):
            source = "the final exit" if reading.exit is None else f"exit {reading.exit!r}"
            message = (
                f"{what}: the logits for position {position} from {source} are not numbers "
                "(NaN or inf); check the checkpoint for broken weights, or decode in bf16 or fp32, not fp16"
            )
            return [Failure(sequence.index, position, message)]
        sequence.answer.append(token)
        finish_reason, failures = None, []
        try:
            finish_reason = sequence.finish_reason()
        except Exception as error:  # of the caller's `ends`
            message = f"{what}: its `ends` failed at position {position}: {type(error).__name__}: {error}"
            failures = [Failure(sequence.index, position, message, error)]
        event = TokenEvent(
            sequence=sequence.index,
            position=position,
            token=token,
            exit=reading.exit if draft is None else draft.exit,
            layer=reading.layer if draft is None else draft.layer,
            confidence=reading.confidence[row] if draft is None else draft.confidence,
            logprob=logprob,
            finish_reason=finish_reason,
            top=_most_likely(reading.logits[row], sequence.request.num_top),
        )
        return [event, *failures]

    @torch.inference_mode()
    def flush(self) -> None:
        """Run everything that waits, of ended sequences too, to full depth, except drafts still to be checked.

        Afterwards every position that was fed has its keys and values in every layer, as after a full-depth run.
        """
        self._descent.flush(leaving=[own.slot for own in self._running.values() if own.drafts])

    def waiting(self, sequence: int) -> int:
        """How many tokens of the sequence wait for deeper layers."""
        slot = self._slots.get(sequence)
        return 0 if slot is None else self._descent.waiting(slot)

    def stats(self, events: Sequence[TokenEvent | Failure]) -> DecodingStats:
        """Sums over these events, failures left out, and over the work done so far."""
        events = [event for event in events if isinstance(event, TokenEvent)]
        return DecodingStats(
            num_prompt_tokens=self._num_prompt_tokens,
            num_tokens=len(events),
            tokens_per_exit=exit_histogram(events, self._model.exits),
            mean_depth=mean_depth(events),
            num_layers=self._model.num_layers,
            computed_layers=self._descent.computed_half_layers / 2,
            asked=dict(self._descent.asked),
            drafted=self._drafted,
            accepted=self._accepted,
            checks=self._checks,
            num_fallbacks=self._num_fallbacks,
        )


def _sample(readings: Sequence[tuple[_Sequence, Reading]], purpose: str) -> list[Choice]:
    """The next token of each, drafts included in what came before."""
    if not readings:
        return []
    logits = readings[0][1].logits if len(readings) == 1 else torch.cat([reading.logits for _, reading in readings])
    return choose(
        logits,
        [sequence.request.sampling for sequence, _ in readings],
        [sequence.length for sequence, _ in readings],
        [sequence.previous() for sequence, _ in readings],
        purpose,
    )


def _most_likely(logits: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """(token, ln p) of the most likely tokens. `logits`: `[v]`."""
    if not count:
        return ()
    values, tokens = logits.log_softmax(dim=0).topk(min(count, logits.shape[0]))
    return tuple(zip(tokens.tolist(), values.tolist(), strict=True))


def _logprobs(logits: Tensor, tokens: Sequence[int]) -> list[float]:
    """ln p of a token in each row. `logits`: `[n, v]`."""
    logprobs = logits.log_softmax(dim=1)
    if len(tokens) == 1:
        return [logprobs[0, tokens[0]].item()]
    return logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
