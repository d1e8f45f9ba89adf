# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""When a token may leave early: the criterion, the thresholds, the exits that are asked, the cap on waiting tokens.

What a user asks for is a mode and an `ExitPolicy`; what the engine follows is the `Course` the two make on a model.

May import: `nemo_ee.exits` and `nemo_ee.generation.items`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .early_exit_exits_confidence import CRITERIA, NEVER_LEAVES, can_leave
from .early_exit_generation_items import ExitPoint

MODES = ("early_exit", "self_speculative", "static_depth", "full")


class AskedExit(NamedTuple):
    """An exit that is asked, with the threshold to beat."""

    point: ExitPoint
    threshold: float


@dataclasses.dataclass(frozen=True)
class Course:
    """The way of one sequence's tokens through a model: a mode and a policy, resolved and checked.

    Attributes:
        exits: the exits to ask, in the model's order.
        criterion: of every reported confidence.
        max_waiting: most tokens of the sequence that may wait; None = no cap.
        end: exit at which every token ends; nothing below it ever runs. None = the end of the stack.
        checks: whether a token that leaves early is only a draft, to be checked against the final exit.
    """

    exits: tuple[AskedExit, ...] = ()
    criterion: str = CRITERIA[0]
    max_waiting: int | None = None
    end: ExitPoint | None = None
    checks: bool = False

    @property
    def exit_names(self) -> tuple[str, ...]:
        """Every exit that is ever read from, but the final one."""
        return tuple(exit.point.name for exit in self.exits) + (() if self.end is None else (self.end.name,))


@dataclasses.dataclass(frozen=True)
class ExitPolicy:
    """Who may leave where.

    Attributes:
        thresholds: one number for all exits, or a number for each active exit by name. A token leaves iff its
            confidence is greater (entropy: less). `max_probability` and `margin`: 0..1, 1.0 never leaves; `entropy`:
            nats from 0, which never leaves.
        criterion: `max_probability`, `margin` or `entropy`, of the exit's whole distribution (before temperature and
            penalties), so that the decision never depends on the sampled token.
        active: names of the exits that may be left at; None = all of the model's. The others cost nothing.
        max_waiting: most tokens of a sequence that may wait for their deeper layers; at the cap the next token goes
            to full depth and takes them along. None = no cap. In mode `self_speculative` this is the longest draft.

    Mode `static_depth` reads every token from the one active exit and looks at no threshold.

    Raises:
        ValueError: with every fault that needs no model to be seen.
    """

    thresholds: float | Mapping[str, float]
    criterion: str = "max_probability"
    active: tuple[str, ...] | None = None
    max_waiting: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.thresholds, Mapping):
            object.__setattr__(self, "thresholds", dict(self.thresholds))
        if self.active is not None and not isinstance(self.active, str):
            object.__setattr__(self, "active", tuple(self.active))
        faults = list(self._faults())
        if faults:
            raise ValueError("exit policy: " + "; ".join(faults))

    def _faults(self):
        if self.criterion not in CRITERIA:
            yield f"criterion = {self.criterion!r} is unknown, use one of {', '.join(CRITERIA)}"
        else:
            by_name = isinstance(self.thresholds, dict)
            for name, value in self.thresholds.items() if by_name else [(None, self.thresholds)]:
                fault = _threshold_fault(value, self.criterion)
                if fault:
                    yield f"threshold{f' of exit {name!r}' if name is not None else ''} = {value!r} {fault}"
        if isinstance(self.active, str):
            yield f"active = {self.active!r} must be a list of exit names, write [{self.active!r}]"
        elif self.active is not None and len(set(self.active)) < len(self.active):
            yield f"active = {list(self.active)} names an exit twice, name each once"
        cap = self.max_waiting
        if cap is not None and (isinstance(cap, bool) or not isinstance(cap, int) or cap < 0):
            yield f"max_waiting = {cap!r} must be a whole number of tokens from 0, or None for no cap"

    def asked_exits(self, exits: Sequence[ExitPoint]) -> tuple[AskedExit, ...]:
        """The model's exits that are to be asked, in the model's order.

        An exit whose threshold no token can beat is left out: asking it would change nothing.

        Raises:
            ValueError: with every name the model does not have and every active exit without a threshold.
        """
        known = [point.name for point in exits]
        faults = self._unknown_names(known)
        active = known if self.active is None else self.active
        if isinstance(self.thresholds, dict):
            missing = [name for name in known if name in active and name not in self.thresholds]
            if missing:
                faults.append(
                    f"thresholds has no number for the active exit{'s' if len(missing) > 1 else ''} "
                    f"{', '.join(missing)}; add one, or list the exits to ask under active"
                )
        if faults:
            raise ValueError("exit policy: " + "; ".join(faults))
        asked = [AskedExit(point, self._threshold(point.name)) for point in exits if point.name in active]
        return tuple(exit for exit in asked if can_leave(exit.threshold, self.criterion))

    def static_exit(self, exits: Sequence[ExitPoint]) -> ExitPoint:
        """The one active exit, from which `static_depth` reads every token.

        Raises:
            ValueError: with every name the model does not have, or when not exactly one exit is active.
        """
        known = [point.name for point in exits]
        faults = self._unknown_names(known)
        active = known if self.active is None else list(self.active)
        if len(active) != 1:
            faults.append(
                f"mode 'static_depth' reads from one exit, but {', '.join(active) or 'none'} "
                f"{'is' if not active else 'are'} active; name one of {', '.join(known) or 'none'} under active"
            )
        if faults:
            raise ValueError("exit policy: " + "; ".join(faults))
        return next(point for point in exits if point.name == active[0])

    def _unknown_names(self, known: Sequence[str]) -> list[str]:
        faults = []
        for key, names in (("active", self.active or ()), ("thresholds", self._names())):
            for name in names:
                if name not in known:
                    close = difflib.get_close_matches(str(name), known, n=1)
                    guess = f" (did you mean {close[0]}?)" if close else ""
                    faults.append(
                        f"{key} names the exit {name!r}, which the model does not have{guess}; "
                        f"its exits are {', '.join(known) or 'none'}"
                    )
        return faults

    def _names(self) -> tuple[str, ...]:
        return tuple(self.thresholds) if isinstance(self.thresholds, dict) else ()

    def _threshold(self, name: str) -> float:
        return float(self.thresholds[name] if isinstance(self.thresholds, dict) else self.thresholds)


def unknown_mode(mode: object) -> str:
    """The fault of a mode that is none of `MODES`."""
    return f"mode = {mode!r} is unknown; use one of {', '.join(MODES)}"


def course_of(mode: str, policy: ExitPolicy | None, exits: Sequence[ExitPoint], num_layers: int) -> Course:
    """What a mode and a policy mean on a model.

    Args:
        mode: one of `MODES`.
        policy: needed by every mode but `full`, which takes only the criterion from it.
        exits: the model's, in its order.
        num_layers: the model's.

    Raises:
        ValueError: unknown mode, no policy where one is needed, or the policy's faults on this model.
    """
    if mode not in MODES:
        raise ValueError(unknown_mode(mode))
    if mode == "full":
        return Course() if policy is None else Course(criterion=policy.criterion)
    if policy is None:
        raise ValueError(f"mode = {mode!r} needs a policy; pass ExitPolicy(thresholds=...) or use mode='full'")
    if mode == "static_depth":
        return Course(criterion=policy.criterion, end=policy.static_exit(exits))
    asked = policy.asked_exits(exits)
    if mode == "self_speculative":
        # A draft from the very end of the stack has nothing left to wait for, and so nothing to save.
        asked = tuple(exit for exit in asked if exit.point.stop < 2 * num_layers)
    return Course(asked, policy.criterion, policy.max_waiting, checks=mode == "self_speculative")


def _threshold_fault(value: object, criterion: str) -> str | None:
    never = NEVER_LEAVES[criterion]
    span = "at least 0 (nats)" if criterion == "entropy" else "in 0..1"
    rule = f"must be a number {span}; {never} never leaves"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        return rule
    return rule if criterion != "entropy" and value > 1 else None
