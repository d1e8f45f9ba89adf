# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Reads fields of a request's body and collects what is wrong with them."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from nemo_ee.serving.errors import ApiError, shown

MAX_FAULTS = 10  # that one error lists
_LONGEST_NAME = 40  # of a field; nothing longer was mistyped


class Fields:
    """The fields of one request.

    Args:
        body: parsed JSON. A field that is null counts as not given.
    """

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.body = body
        self.faults: list[tuple[str, str]] = []  # field, message

    def fault(self, field: str, message: str) -> None:
        """Note a fault. One too many ends the reading, so that a body of nothing but faults costs little."""
        self.faults.append((field, message))
        if len(self.faults) >= MAX_FAULTS:
            self.raise_all()

    def number(self, field: str, default: float, least: float, most: float) -> float:
        """A number in a range."""
        value = self.body.get(field)
        if value is None:
            return default
        if not is_number(value, least, most):
            self.fault(field, f"{field} = {shown(value)} must be a number from {least:g} to {most:g}")
            return default
        return float(value)

    def whole(self, field: str, default: int | None, least: int, most: int) -> int | None:
        """A whole number in a range."""
        value = self.body.get(field)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.fault(field, f"{field} = {shown(value)} must be a whole number from {least} to {most}")
            return default
        return value

    def switch(self, field: str, default: bool = False) -> bool:
        """True or false."""
        value = self.body.get(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fault(field, f"{field} = {shown(value)} must be true or false")
            return default
        return value

    def refuse_others(
        self, where: str, given: Mapping[str, Any], known: Collection[str], neutral: Collection[str] = ()
    ) -> None:
        """A fault for each key of an object that is not known, but for neutral ones that hold nothing."""
        for key, value in given.items():
            if key in known or key in neutral and value in (None, [], ""):
                continue
            self.fault(where, f"{where}.{key[:40]} is not supported here; {guess(key, known, 'leave it out')}")

    def raise_all(self) -> None:
        """One error with every fault; nothing without any.

        Raises:
            ApiError: 400.
        """
        if self.faults:
            field = self.faults[0][0]
            raise ApiError(400, "; ".join(message for _, message in self.faults), param=field)


def is_number(value: object, least: float, most: float) -> bool:
    """Whether a value of JSON is a number in a range."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def guess(name: str, known: Collection[str], otherwise: str) -> str:
    """The way out where a name is not known: the one that was meant, or else `otherwise`."""
    close = difflib.get_close_matches(name, known, n=1) if len(name) <= _LONGEST_NAME else []
    return f"did you mean {close[0]}?" if close else otherwise
