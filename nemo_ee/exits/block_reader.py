# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Reading one mapping of a config: checks of single values, and a reader that collects every problem."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Reading: a check returns the value in its final type, or raises ValueError with the rule and the way out.
Check = Callable[[Any], Any]


def one_of(choices: tuple[str, ...]) -> Check:
    """One of the given words."""

    def check(value: Any) -> str:
        if isinstance(value, str) and value in choices:
            return value
        raise ValueError(f"must be one of {', '.join(choices)}{close_match(value, choices)}")

    return check


def integer(low: int, high: int | None = None, *, high_is: str = "", way_out: str = "") -> Check:
    """A whole number of at least `low` and at most `high`; `high_is` and `way_out` are added to the rule."""

    span = f"of at least {low}" if high is None else f"in {low}..{high}{high_is}"

    def check(value: Any) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and low <= value and (high is None or value <= high):
            return value
        raise ValueError(f"must be an integer {span}{way_out}")

    return check


def number(low: float = 0.0, high: float = math.inf, *, above: bool = False) -> Check:
    """A finite number in [low, high], or in (low, high] with `above`."""

    rule = f"greater than {low:g}" if above else f"of at least {low:g}"
    rule += "" if high == math.inf else f" and at most {high:g}"

    def check(value: Any) -> float:
        # PyYAML reads 1e-4 (no dot) as text; Hydra and OmegaConf read it as a number.
        hint = ""
        if isinstance(value, str) and reads_as_number(value):
            hint = f"; {value!r} is text here, write the number without quotes and with a dot (1.0e-4)"
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"must be a finite number {rule}{hint}")
        if not math.isfinite(value) or value > high or value < low or (above and value == low):
            raise ValueError(f"must be a finite number {rule}")
        return float(value)

    return check


def boolean(value: Any) -> bool:
    """True or False."""
    if isinstance(value, bool):
        return value
    raise ValueError("must be True or False")


def reads_as_number(text: str) -> bool:
    """Whether a text is a number to Python."""
    try:
        float(text)
    except ValueError:
        return False
    return True


# Retired names of settings, request fields and arguments.
RENAMED_KEYS = {"max_waiting": "max_pending_tokens (in mode self_speculative: num_draft_tokens)"}


def close_match(value: Any, choices: Sequence[str]) -> str:
    """` (did you mean x?)`, or nothing."""
    matches = difflib.get_close_matches(str(value), list(choices), n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""


class BlockReader:
    """Reads the keys of one mapping and collects the problems, each with its full key."""

    def __init__(self, mapping: Mapping[str, Any], path: str, keys: Sequence[str], problems: list[str]) -> None:
        self.mapping, self.path, self.problems = mapping, path, problems
        self.wrong_keys: set[str] = set()
        for key in mapping:
            if key not in keys:
                problems.append(
                    f"{path}.{key} = {mapping[key]!r}: is not a key of this block{close_match(key, keys)}; "
                    f"the keys are {', '.join(keys)}"
                )

    def given(self, key: str) -> Any:
        """The value as written, None when missing."""
        return self.mapping.get(key)

    def problem(self, key: str, rule: str) -> None:
        self.wrong_keys.add(key)
        self.problems.append(f"{self.path}.{key} = {self.given(key)!r}: {rule}")

    def read(self, key: str, check: Check, default: Any) -> Any:
        """The checked value; `default` when it is null, missing or wrong."""
        value = self.given(key)
        if value is None:
            return default
        try:
            return check(value)
        except ValueError as error:
            self.problem(key, str(error))
            return default


def keys_of(dataclass: type) -> tuple[str, ...]:
    """The field names of a dataclass."""
    return tuple(field.name for field in dataclasses.fields(dataclass))
