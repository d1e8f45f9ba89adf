# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks of single settings, beside those of `nemo_ee.exits.block_reader`: each raises ValueError with the rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nemo_ee.exits.block_reader import Check, number, one_of


def anything(value: Any) -> Any:
    """No check: the reader of the setting has its own."""
    return value


def or_null(check: Check) -> Check:
    """null, or what `check` says."""

    def both(value: Any) -> Any:
        try:
            return None if value is None else check(value)
        except ValueError as rule:
            raise ValueError(f"{rule}, or null") from None

    return both


def text(value: Any) -> str:
    """A text with something in it, such as the name of a file."""
    if isinstance(value, str) and value.strip():
        return value
    hint = "; a number as a name is written with quotes: \"'2024'\"" if isinstance(value, int | float) else ""
    raise ValueError(f"must be a text{hint}")


def label(value: Any) -> str:
    """A text, or a whole number that is meant as one."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else text(value)


def exactly(wanted: Any, why: str) -> Check:
    """The one value that is possible; `why` is added to the rule."""

    def check(value: Any) -> Any:
        if value == wanted and type(value) is type(wanted):
            return value
        raise ValueError(f"must be {wanted}: {why}")

    return check


def word(*choices: str) -> Check:
    """One of the given words, of which some read as numbers (32)."""

    def check(value: Any) -> str:
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value) in choices:
            return str(value)
        raise ValueError(f"must be one of {', '.join(choices)}")

    return check


def list_of(check: Check, *, what: str, length: int | None = None) -> Check:
    """A list, of `length` entries where one is given, whose entries pass `check`. `what`: the rule in words."""

    def checked(value: Any) -> list:
        if isinstance(value, list) and length in (None, len(value)):
            try:
                return [check(one) for one in value]
            except ValueError:
                pass
        raise ValueError(f"must be {what}")

    return checked


def one_or_list_of(check: Check, *, what: str) -> Check:
    """One value that passes `check`, or a list of such values. `what`: the rule in words."""
    several = list_of(check, what=what)
    return lambda value: several(value if isinstance(value, list) else [value])


def either(*checks: Check, rule: str) -> Check:
    """What any of the checks takes; `rule` says it in words."""

    def check(value: Any) -> Any:
        for one in checks:
            try:
                return one(value)
            except ValueError:
                continue
        raise ValueError(rule)

    return check


def below(limit: float, check: Callable[[Any], float]) -> Check:
    """A number of `check` that is smaller than `limit`."""

    def checked(value: Any) -> float:
        if (found := check(value)) < limit:
            return found
        raise ValueError(f"must be a number below {limit:g}")

    return checked


def block(value: Any) -> dict:
    """A mapping; its own reader checks what is in it."""
    if isinstance(value, dict):
        return value
    raise ValueError("must be a block of settings")


share = number(high=1.0)
criterion = one_of(("max_probability", "margin", "entropy"))  # nemo_ee.exits.confidence needs torch
exit_names = or_null(list_of(text, what="a list of exits' names"))
