# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""When a token may leave early: criterion, thresholds, active exits and the caps on pending tokens and drafts.

A user states a mode and an `ExitPolicy`. The engine follows the `ExitPlan` that `plan_exits` makes of the two for one
model.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from nemo_ee.exits.confidence import can_leave
from nemo_ee.exits.criteria import CRITERIA, NEVER_LEAVES, PROBE, SMALLER_IS_CONFIDENT
from nemo_ee.generation.decoding_model import ExitPoint

MODES = ("early_exit", "self_speculative", "static_depth", "full")
DRAFT_RULES = ("fixed", "value")


class EvaluatedExit(NamedTuple):
    """An exit that is evaluated, with the threshold that a confidence must pass."""

    point: ExitPoint
    threshold: float


class LeavingRule(Protocol):
    """Decides, beside the thresholds, where a sequence's newest token leaves."""

    def evaluates(self, exit: str) -> bool:
        """Whether the token is evaluated at this exit, where it has not left before; it may be called again."""
        ...

    def leaves(self, exit: str, confidence: float, logits: Tensor) -> bool:
        """Whether the token leaves at this exit, whose threshold it passes. `logits`: `[v]`, the exit's."""
        ...


@dataclasses.dataclass(frozen=True)
class ExitPlan:
    """The exits, thresholds and caps of one sequence on one model: a mode and a policy, resolved and validated.

    Attributes:
        exits: the exits to evaluate, in the model's order.
        criterion: criterion of every reported confidence.
        max_pending_tokens: largest number of pending tokens of the sequence; at the cap the next token runs to full
            depth. None = no cap. Drafts are pending tokens, so in mode `self_speculative` it is the longest draft.
        end: exit at which every token ends; nothing past it ever runs. None = the end of the stack.
        verify: a token that leaves early is only a draft, which the final exit verifies.
        by_value: `generation.draft_value` decides where tokens leave, not the thresholds.
    """

    exits: tuple[EvaluatedExit, ...] = ()
    criterion: str = CRITERIA[0]
    max_pending_tokens: int | None = None
    end: ExitPoint | None = None
    verify: bool = False
    by_value: bool = False

    @property
    def exit_names(self) -> tuple[str, ...]:
        """Every exit that the sequence may be read from, except the final one."""
        return tuple(exit.point.name for exit in self.exits) + (() if self.end is None else (self.end.name,))


@dataclasses.dataclass(frozen=True)
class ExitPolicy:
    """Which tokens leave at which exits.

    Attributes:
        thresholds: one number for all exits, or exit name -> number for each active exit. A token leaves iff its
            confidence is greater (entropy: less). `max_probability`, `margin` and `probe`: 0..1, 1.0 never leaves;
            `entropy`: nats from 0, which never leaves.
        criterion: `max_probability`, `margin` or `entropy` of the exit's whole distribution (before temperature and
            penalties), or `probe` of the hidden state, so that the decision never depends on the sampled token.
        active: names of the exits at which tokens may leave; None = all of the model's. Other exits cost nothing.
        max_pending_tokens: mode `early_exit`: largest number of a sequence's tokens that are pending; at the cap the
            next token runs to full depth, and the pending ones with it. None = no cap.
        num_draft_tokens: mode `self_speculative`: largest number of tokens that are drafted before they are verified.
            None = no cap.
        draft_rule: mode `self_speculative`: `fixed`: tokens are drafted by the thresholds; `value`: where that gives
            the most expected tokens per second, by measured costs and counted acceptance, whatever the thresholds.

    Mode `static_depth` reads every token from the one active exit and uses no threshold.

    Raises:
        ValueError: with every problem that is visible without a model.
    """

    thresholds: float | Mapping[str, float]
    criterion: str = "max_probability"
    active: tuple[str, ...] | None = None
    max_pending_tokens: int | None = None
    num_draft_tokens: int | None = None
    draft_rule: str = "fixed"

    def __post_init__(self) -> None:
        if isinstance(self.thresholds, Mapping):
            object.__setattr__(self, "thresholds", dict(self.thresholds))
        if self.active is not None and not isinstance(self.active, str):
            object.__setattr__(self, "active", tuple(self.active))
        problems = list(self._problems())
        if problems:
            raise ValueError("exit policy: " + "; ".join(problems))

    def _problems(self):
        if self.criterion not in CRITERIA:
            yield f"criterion = {self.criterion!r} is unknown, use one of {', '.join(CRITERIA)}"
        else:
            by_name = isinstance(self.thresholds, dict)
            for name, value in self.thresholds.items() if by_name else [(None, self.thresholds)]:
                problem = _threshold_problem(value, self.criterion)
                if problem:
                    yield f"threshold{f' of exit {name!r}' if name is not None else ''} = {value!r} {problem}"
        if self.draft_rule not in DRAFT_RULES:
            yield f"draft_rule = {self.draft_rule!r} is unknown, use one of {', '.join(DRAFT_RULES)}"
        elif self.draft_rule == "value" and (self.criterion in SMALLER_IS_CONFIDENT or self.criterion == PROBE):
            yield (
                f"draft_rule = 'value' needs the head's confidence from 0 to 1, which criterion = {self.criterion!r} "
                "is not; use max_probability"
            )
        if isinstance(self.active, str):
            yield f"active = {self.active!r} must be a list of exit names, write [{self.active!r}]"
        elif self.active is not None and len(set(self.active)) < len(self.active):
            yield f"active = {list(self.active)} names an exit twice, name each once"
        for key in ("max_pending_tokens", "num_draft_tokens"):
            cap = getattr(self, key)
            if cap is not None and (isinstance(cap, bool) or not isinstance(cap, int) or cap < 0):
                yield f"{key} = {cap!r} must be a whole number of tokens from 0, or None for no cap"

    def evaluated_exits(self, exits: Sequence[ExitPoint], *, by_value: bool = False) -> tuple[EvaluatedExit, ...]:
        """The model's exits to evaluate, in the model's order. `by_value`: no thresholds are needed, and each is 0,
        which any confidence may pass.

        An exit whose threshold no confidence can pass is left out: evaluating it would change nothing.

        Raises:
            ValueError: with every name the model does not have, and every active exit without a threshold or without
                the probe that the criterion needs.
        """
        known = [point.name for point in exits]
        problems = self._unknown_names(known)
        active = known if self.active is None else self.active
        problems += missing_probes(self.criterion, [point for point in exits if point.name in active])
        if isinstance(self.thresholds, dict) and not by_value:
            missing = [name for name in known if name in active and name not in self.thresholds]
            if missing:
                problems.append(
                    f"thresholds has no number for the active exit{'s' if len(missing) > 1 else ''} "
                    f"{', '.join(missing)}; add one, or list the exits to evaluate under active"
                )
        if problems:
            raise ValueError("exit policy: " + "; ".join(problems))
        chosen = [point for point in exits if point.name in active]
        evaluated = [EvaluatedExit(point, 0.0 if by_value else self._threshold(point.name)) for point in chosen]
        return tuple(exit for exit in evaluated if can_leave(exit.threshold, self.criterion))

    def static_exit(self, exits: Sequence[ExitPoint]) -> ExitPoint:
        """The one active exit, from which mode `static_depth` reads every token.

        Raises:
            ValueError: with every name the model does not have, or when not exactly one exit is active.
        """
        known = [point.name for point in exits]
        problems = self._unknown_names(known)
        active = known if self.active is None else list(self.active)
        if len(active) != 1:
            problems.append(
                f"mode 'static_depth' reads from one exit, but {', '.join(active) or 'none'} "
                f"{'is' if not active else 'are'} active; name one of {', '.join(known) or 'none'} under active"
            )
        if problems:
            raise ValueError("exit policy: " + "; ".join(problems))
        return next(point for point in exits if point.name == active[0])

    def _unknown_names(self, known: Sequence[str]) -> list[str]:
        problems = []
        for key, names in (("active", self.active or ()), ("thresholds", self._names())):
            for name in names:
                if name not in known:
                    close = difflib.get_close_matches(str(name), known, n=1)
                    guess = f" (did you mean {close[0]}?)" if close else ""
                    problems.append(
                        f"{key} names the exit {name!r}, which the model does not have{guess}; "
                        f"its exits are {', '.join(known) or 'none'}"
                    )
        return problems

    def _names(self) -> tuple[str, ...]:
        return tuple(self.thresholds) if isinstance(self.thresholds, dict) else ()

    def _threshold(self, name: str) -> float:
        return float(self.thresholds[name] if isinstance(self.thresholds, dict) else self.thresholds)


def missing_probes(criterion: str, exits: Iterable[ExitPoint]) -> Iterator[str]:
    """The problem of exits without the probe that the criterion needs."""
    without = [point.name for point in exits if point.probe is None]
    if criterion == PROBE and without:
        yield (
            f"criterion = {PROBE!r}: {', '.join(without)} {'has' if len(without) == 1 else 'have'} no probe; fit "
            "probes with examples/megatron_gpt_early_exit_probe.py (and export again), or use another criterion"
        )


def unknown_mode(mode: object) -> str:
    """The message for a mode that is not one of `MODES`."""
    return f"mode = {mode!r} is unknown; use one of {', '.join(MODES)}"


def plan_exits(mode: str, policy: ExitPolicy | None, exits: Sequence[ExitPoint], num_layers: int) -> ExitPlan:
    """Resolve a mode and a policy for one model.

    Args:
        mode: one of `MODES`.
        policy: needed by every mode except `full`, which takes only the criterion from it.
        exits: the model's exits, in its order.
        num_layers: number of the model's layers.

    Raises:
        ValueError: unknown mode, no policy where one is needed, or the policy's problems on this model.
    """
    if mode not in MODES:
        raise ValueError(unknown_mode(mode))
    if mode == "full":
        return ExitPlan() if policy is None else ExitPlan(criterion=policy.criterion)
    if policy is None:
        raise ValueError(f"mode = {mode!r} needs a policy; pass ExitPolicy(thresholds=...) or use mode='full'")
    if mode == "static_depth":
        return ExitPlan(criterion=policy.criterion, end=policy.static_exit(exits))
    by_value = mode == "self_speculative" and policy.draft_rule == "value"
    evaluated = policy.evaluated_exits(exits, by_value=by_value)
    if mode == "early_exit":
        return ExitPlan(evaluated, policy.criterion, policy.max_pending_tokens)
    # A draft from the end of the stack would not be pending, so it would save nothing.
    evaluated = tuple(exit for exit in evaluated if exit.point.stop < 2 * num_layers)
    return ExitPlan(evaluated, policy.criterion, policy.num_draft_tokens, verify=True, by_value=by_value)


def unused_cap(mode: str, max_pending_tokens: int | None, num_draft_tokens: int | None) -> str | None:
    """The problem of a cap of another mode without the mode's own. A policy for several modes may have both caps."""
    pending, draft = ("max_pending_tokens", max_pending_tokens), ("num_draft_tokens", num_draft_tokens)
    pairs = {"early_exit": (pending, draft), "self_speculative": (draft, pending)}
    if mode not in pairs:
        return None
    (own, own_value), (other, value) = pairs[mode]
    if own_value is not None or value is None:
        return None
    return f"{other} = {value} has no effect in mode {mode!r}; use {own}"


def _threshold_problem(value: object, criterion: str) -> str | None:
    never = NEVER_LEAVES[criterion]
    span = "at least 0 (nats)" if criterion == "entropy" else "in 0..1"
    rule = f"must be a number {span}; {never} never leaves"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        return rule
    return rule if criterion != "entropy" and value > 1 else None
