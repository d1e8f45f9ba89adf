# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A decoding session: several sequences that are decoded together, one step at a time.

A session has a fixed number of slots in the model's cache. Sequences are added (`add`) and end (by themselves, or by
`cancel`) while others run; a new one takes a free slot, and its prompt runs in the same forward pass as the next
tokens of the others. A step runs the newest tokens, then samples the next ones or verifies drafts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence

import torch

from nemo_ee.generation.cost_rule import CostRule, CostTable
from nemo_ee.generation.decoding_model import DecodingCache, DecodingModel
from nemo_ee.generation.draft_value import DraftValue
from nemo_ee.generation.forward_rows import ExitOutput, TokenInput
from nemo_ee.generation.policy import ExitPlan, ExitPolicy
from nemo_ee.generation.prompt_scores import PromptScorer, most_likely, rows_per_step, token_logprobs
from nemo_ee.generation.request import Request
from nemo_ee.generation.running_sequence import RunningSequence, prompt_parts
from nemo_ee.generation.sampling import Choice, choose
from nemo_ee.generation.staged_forward import StagedForward
from nemo_ee.generation.stats import DecodingStats, Event, Failure, TokenEvent, exit_histogram, mean_depth
from nemo_ee.generation.validation import plan_request, raise_all
from nemo_ee.generation.verification import Draft, verify


class DecodingSession:
    """See the module. Made by `EarlyExitEngine.start`, which validates what it passes on.

    Args:
        model: the model.
        mode, policy: for requests without their own.
        exits: names of the exits that requests may use.
        num_slots: largest number of sequences at a time.
        max_length: largest number of tokens of a sequence, prompt included.
        cost_rule: when a sequence stops evaluating its exits; None = never.
        draft_costs: gives the costs of a sequence alone that has these exits, for drafts that are chosen by value.

    Attributes:
        cache: the model's cache; the sequences given to `start` have its first slots, in their order.
        finished: whether no sequence is running. More may be added.
        num_free_slots: number of sequences that can be added now.
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
        draft_costs: Callable[[Collection[str]], CostTable] | None = None,
    ) -> None:
        self._cost_rule, self._num_fallbacks, self._draft_costs = cost_rule, 0, draft_costs
        self._model, self._mode, self._policy = model, mode, policy
        self._exits, self._max_length = tuple(point.name for point in model.exits if point.name in exits), max_length
        with torch.inference_mode():
            self.cache: DecodingCache = model.new_cache(num_slots, max_length, self._exits)
        self._forward = StagedForward(model, self.cache)
        self._free = list(range(num_slots))
        self._used: set[int] = set()
        self._running: dict[int, RunningSequence] = {}  # by index, ascending
        self._slots: dict[int, int] = {}  # index -> slot, ended sequences too until their slot is used again
        self._num_added = self._num_prompt_tokens = 0
        self._drafted = self._accepted = self._num_verifications = 0

    @property
    def finished(self) -> bool:
        """Whether no sequence is running."""
        return not self._running

    @property
    def num_free_slots(self) -> int:
        """Number of sequences that can be added now."""
        return len(self._free)

    def add(self, request: Request) -> int:
        """Add a sequence; the step that ends its prompt returns its first token.

        Returns:
            Its index, the `sequence` of its events. Indices count up from 0 and are never used twice.

        Raises:
            ValueError: with every problem of the request.
            RuntimeError: no slot is free.
        """
        what = f"sequence {self._num_added}"
        problems: list[str] = []
        plan = plan_request(self._model, what, request, self._mode, self._policy, problems, self._max_length)
        missing = [name for name in plan.exit_names if name not in self._exits]
        if missing:
            problems.append(
                f"{what}: exit {', '.join(missing)} is not one of the session's ({', '.join(self._exits) or 'none'}); "
                "name it under exits when the session is started"
            )
        elif self._cost_rule is not None:
            problems += self._cost_rule.missing([exit.point.name for exit in plan.exits])
        raise_all(problems)
        if not self._free:
            raise RuntimeError(
                "every slot of the session is taken; wait until a sequence ends, cancel one, or start the session "
                "with more num_slots"
            )
        return self.admit(request, plan)

    def admit(self, request: Request, plan: ExitPlan) -> int:
        """`add` without its validation: the request fits, the plan is its own, and a slot is free."""
        costs = self._draft_costs(plan.exit_names) if plan.by_value and plan.exits else None  # may refuse to measure
        slot = self._free[0]
        if slot in self._used:
            self._forward.truncate(slot, 0)
            self._slots = {index: own for index, own in self._slots.items() if own != slot}
        del self._free[0]
        self._used.add(slot)
        masked = None
        if request.min_new_tokens and request.stop_tokens:
            masked = (len(request.prompt) + request.min_new_tokens, request.stop_tokens, len(request.prompt))
        self._forward.admit(slot, plan, masked)
        index = self._num_added
        self._num_added += 1
        self._num_prompt_tokens += len(request.prompt)
        self._slots[index] = slot
        self._running[index] = sequence = RunningSequence(index, slot, request, plan)
        if costs is not None:
            sequence.value = DraftValue(costs, plan, self._model.num_layers, sequence.length)
        if request.prompt_logprobs is not None:
            sequence.scorer = PromptScorer(index, request)
        return index

    def cancel(self, index: int) -> None:
        """End a sequence without another event. Does nothing if it has ended already."""
        if not 0 <= index < self._num_added:
            raise ValueError(f"sequence {index} is not one of this session's 0..{self._num_added - 1}")
        if index in self._running:
            self._release(self._running[index])

    def _release(self, sequence: RunningSequence) -> None:
        del self._running[sequence.index]
        self._forward.release(sequence.slot)
        self._free = sorted([*self._free, sequence.slot])

    @property
    def num_answers(self) -> int:
        """Number of running sequences whose prompt has run."""
        return sum(own.has_begun for own in self._running.values())

    @property
    def prompt_tokens_left(self) -> int:
        """Tokens of the running sequences' prompts that have not run."""
        return sum(own.prompt_tokens_left for own in self._running.values())

    @torch.inference_mode()
    def step(self, max_prompt_tokens: int | None = None) -> tuple[Event, ...]:
        """Run the newest token of every running sequence.

        Args:
            max_prompt_tokens: most tokens of prompts that run in this step, all sequences together, each its part; the
                rest runs in later ones. None = no limit, but a prompt in pieces goes on in pieces. It changes
                results by rounding alone.

        Returns:
            The new tokens that are final, in the order of the sequences: one for each whose prompt has run; in mode
            `self_speculative` none while a sequence drafts, then all accepted drafts and one more token. A sequence
            whose logits are NaN or inf, or whose `ends` raises, ends with a `Failure`; other sequences are unaffected.
            Before the first token of a request with `prompt_logprobs` come its `PromptScores`.
        """
        if not self._running:
            return ()
        by_slot = {own.slot: own for own in self._running.values()}
        inputs = self._next_inputs(by_slot, max_prompt_tokens)
        if not inputs:
            return ()
        outputs = self._forward.step(inputs)
        events: list[Event] = []
        singles: list[tuple[RunningSequence, ExitOutput]] = []
        for output in outputs:
            sequence = by_slot[output.slot]
            if sequence.scorer is not None:
                scored = sequence.scorer.take(output)
                if scored is not None:
                    events.append(scored)
                    sequence.scorer = None
                if scored is None or scored.finish_reason is not None:
                    continue
                output = output.newest()
            if sequence.has_begun and not sequence.must_verify:  # otherwise no new token was run
                sequence.left[output.exit] = sequence.left.get(output.exit, 0) + 1
            sequence.has_begun = True
            if sequence.drafts and output.exit is None:
                singles += self._verify(sequence, output, events)
                continue
            if output.exit is None:
                sequence.learn(output.logits)
            singles.append((sequence, output))
        events += self._choose(singles)
        for event in events:
            if event.finish_reason is not None:
                self._release(self._running[event.sequence])
        events.sort(key=lambda event: event.sequence)
        return tuple(events)

    def _next_inputs(
        self, by_slot: dict[int, RunningSequence], max_prompt_tokens: int | None
    ) -> dict[int, TokenInput]:
        """The next input of each sequence. A prompt runs later where there is no room, for one that is scored also if
        its logits do not fit into memory now.

        The latter room goes by arrival: a freed slot is taken again at once, so new prompts would overtake old ones.
        """
        parts = prompt_parts(max_prompt_tokens, [own for own in by_slot.values() if not own.has_begun])
        scored = rows_per_step(self._model.vocab_size)
        inputs = {}
        for slot, sequence in by_slot.items():
            if sequence.has_begun:
                inputs[slot] = self._next_input(sequence)
                continue
            room = parts[sequence.index] if sequence.scorer is None else min(parts[sequence.index], scored)
            if room:
                inputs[slot] = sequence.prompt_piece(room)
                scored -= len(inputs[slot].tokens) * (sequence.scorer is not None)
        return dict(sorted(inputs.items()))

    def _next_input(self, sequence: RunningSequence) -> TokenInput:
        """The tokens that the sequence runs next."""
        plan = sequence.plan
        if sequence.must_verify:
            return TokenInput(sequence.length - 1, (), read_all=True)
        cap = plan.max_pending_tokens
        allow_exit = bool(plan.exits) and self._exits_pay(sequence)
        allow_exit = allow_exit and (cap is None or self._forward.num_pending(sequence.slot) < cap)
        if plan.verify:
            request = sequence.request
            # The last token comes from the final exit: a draft of it would have to be verified at once.
            allow_exit = allow_exit and sequence.length + 1 < len(request.prompt) + request.max_new_tokens
        return sequence.newest_token(allow_exit)

    def _exits_pay(self, sequence: RunningSequence) -> bool:
        """Whether the sequence evaluates its exits at the next token. The cost rule decides once, by its first
        tokens."""
        rule = self._cost_rule
        if rule is None or sequence.exits_pay or sequence.value is not None:
            return True
        if sequence.exits_pay is None:
            num_run = sum(sequence.left.values())
            if num_run < sequence.next_verdict:
                return True
            if sequence.drafts:
                # The value of drafts is known once they are verified, so verify them where a verdict is due.
                return not rule.is_due(num_run)
            # The first token of the answer came from the prompt's forward pass.
            emitted = len(sequence.answer) - 1
            sequence.exits_pay = rule.verdict(
                sequence.plan, self._model.num_layers, sequence.left, emitted, sequence.length
            )
            if sequence.exits_pay is None:
                sequence.next_verdict = rule.next_after(num_run)
                return True
            self._num_fallbacks += not sequence.exits_pay
        if not sequence.exits_pay and not self._forward.num_pending(sequence.slot):
            # Later tokens run to the end without a stop.
            self._forward.disable_exits(sequence.slot)
            sequence.plan = dataclasses.replace(sequence.plan, exits=())
        return sequence.exits_pay

    def _verify(
        self, sequence: RunningSequence, output: ExitOutput, events: list[Event]
    ) -> list[tuple[RunningSequence, ExitOutput]]:
        """Verify the drafts and record the final tokens. Returns the output for choosing the next token, if any."""
        drafts, first = sequence.drafts, sequence.length - len(sequence.drafts)
        rows = output.logits[: len(drafts)]
        params = sequence.request.sampling
        sequence.drafts, sequence.must_verify = [], False
        del sequence.answer[-len(drafts) :]
        self._drafted += len(drafts)
        self._num_verifications += 1
        verified = list(verify(rows, drafts, params, first, sequence.previous(), len(sequence.request.prompt)))
        logprobs = token_logprobs(rows[: len(verified)], [token for token, _ in verified])
        all_accepted = verified[-1][1]
        sequence.learn(output.logits if all_accepted else rows[: len(verified)], [own for _, own in verified])
        if not all_accepted and output.logits.shape[0] > len(verified):
            # Row i is at position first - 1 + i. Drop what was computed for the rejected drafts.
            self._forward.truncate(sequence.slot, first - 1 + len(verified))
        for row, ((token, accepted), draft) in enumerate(zip(verified, drafts, strict=False)):
            sources = (draft, None) if accepted else (None, draft.exit)
            events += self._events(sequence, token, logprobs[row], output, row, *sources)
            if isinstance(events[-1], Failure):
                return []
            self._accepted += accepted
        if not all_accepted or output.logits.shape[0] == len(drafts) or events[-1].finish_reason is not None:
            return []
        return [(sequence, output.newest())]

    def _choose(self, outputs: Sequence[tuple[RunningSequence, ExitOutput]]) -> list[TokenEvent | Failure]:
        """Choose a token at each output of one row. Tokens of early exits that need verification become drafts."""
        events, drafted, final = [], [], []
        for one in outputs:
            (drafted if one[0].plan.verify and one[1].exit is not None else final).append(one)
        for (sequence, output), (token, shaped) in zip(drafted, _sample(drafted, "draft"), strict=True):
            sequence.drafts.append(Draft(token, output.exit, output.layer, output.confidence[0], shaped))
            sequence.answer.append(token)
            try:
                sequence.must_verify = sequence.finish_reason() is not None
            except Exception:  # of the caller's `ends`, which is called again, and counts, if the draft is accepted
                sequence.must_verify = True
        if final:
            tokens = [choice.token for choice in _sample(final, "token")]
            logits = final[0][1].logits if len(final) == 1 else torch.cat([one.logits for _, one in final])
            logprobs = token_logprobs(logits, tokens)
            for (sequence, output), token, logprob in zip(final, tokens, logprobs, strict=True):
                events += self._events(sequence, token, logprob, output, 0, None)
        return events

    def _events(
        self,
        sequence: RunningSequence,
        token: int,
        logprob: float,
        output: ExitOutput,
        row: int,
        draft: Draft | None,
        rejected: str | None = None,
    ) -> list[TokenEvent | Failure]:
        """Record a final token. `draft`: the accepted draft, if it was one; `rejected`: see `TokenEvent`."""
        position = sequence.length
        if math.isnan(logprob):
            return [Failure.of_logits(sequence.index, position, output.exit)]
        sequence.answer.append(token)
        finish_reason, failures = None, []
        try:
            finish_reason = sequence.finish_reason()
        except Exception as error:  # of the caller's `ends`
            what = f"sequence {sequence.index}: its `ends` failed at position {position}"
            failures = [Failure(sequence.index, position, f"{what}: {type(error).__name__}: {error}", error)]
        event = TokenEvent(
            sequence=sequence.index,
            position=position,
            token=token,
            exit=output.exit if draft is None else draft.exit,
            layer=output.layer if draft is None else draft.layer,
            confidence=output.confidence[row] if draft is None else draft.confidence,
            logprob=logprob,
            finish_reason=finish_reason,
            top=most_likely(output.logits[row], sequence.request.num_top),
            rejected=rejected,
        )
        return [event, *failures]

    @torch.inference_mode()
    def flush(self) -> None:
        """Run all pending tokens, those of ended sequences too, to full depth, except drafts that are not verified.

        Afterwards every position that ran has its keys and values in every layer, as after a full-depth run.
        """
        self._forward.flush(leaving=[own.slot for own in self._running.values() if own.drafts])

    def num_pending(self, sequence: int) -> int:
        """Number of the sequence's pending tokens."""
        slot = self._slots.get(sequence)
        return 0 if slot is None else self._forward.num_pending(slot)

    def stats(self, events: Sequence[Event]) -> DecodingStats:
        """Sums over these events' tokens and over the work done so far."""
        events = [event for event in events if isinstance(event, TokenEvent)]
        return DecodingStats(
            num_prompt_tokens=self._num_prompt_tokens,
            num_tokens=len(events),
            tokens_per_exit=exit_histogram(events, self._model.exits),
            mean_depth=mean_depth(events),
            num_layers=self._model.num_layers,
            computed_layers=self._forward.computed_half_layers / 2,
            evaluations=dict(self._forward.evaluations),
            drafted=self._drafted,
            accepted=self._accepted,
            num_verifications=self._num_verifications,
            num_fallbacks=self._num_fallbacks,
        )


def _sample(outputs: Sequence[tuple[RunningSequence, ExitOutput]], purpose: str) -> list[Choice]:
    """The next token at each output; drafts count as earlier tokens."""
    if not outputs:
        return []
    logits = outputs[0][1].logits if len(outputs) == 1 else torch.cat([output.logits for _, output in outputs])
    return choose(
        logits,
        [sequence.request.sampling for sequence, _ in outputs],
        [sequence.length for sequence, _ in outputs],
        [sequence.previous() for sequence, _ in outputs],
        purpose,
        [len(sequence.request.prompt) for sequence, _ in outputs],
    )
