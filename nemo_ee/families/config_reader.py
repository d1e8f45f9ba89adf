# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Typed access to a config.json: all problems are collected, and a wrong value is replaced by a harmless one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from nemo_ee.families.architecture import Architecture, linear_scaling, llama3_scaling
from nemo_ee.families.rotary_settings import rotary_settings

# transformers' name of an activation -> `Architecture.hidden_act`, of an MLP with a gate and of one without.
GATED = dict.fromkeys(("silu", "swish"), "silu")
PLAIN = {"relu": "relu"}
PLAIN |= dict.fromkeys(("gelu", "gelu_python"), "gelu_erf")
PLAIN |= dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"), "gelu")


class ConfigReader:
    """Reads one config.json.

    Args:
        values: the parsed file.
        sequence_length: the length for which the model will be used; None = the model's maximum.

    Attributes:
        problems: the problems in the order in which they were found.
    """

    def __init__(self, values: Mapping[str, Any], sequence_length: int | None = None) -> None:
        self.values, self.sequence_length = values, sequence_length
        self.problems: list[str] = []

    def get(self, name: str, default: Any = None) -> Any:
        """The unchecked value."""
        return self.values.get(name, default)

    def flag(self, name: str, default: bool | None = False) -> bool:
        """A boolean."""
        return bool(self.values.get(name, default))

    def size(self, name: str, default: int | None = None) -> int:
        """A positive whole number; required when there is no default."""
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.problems.append(f"{name}: {value!r}, must be a whole number of at least 1")
            return 1
        return value

    def number(self, name: str, default: float | None = None, *, within: Mapping[str, Any] | None = None) -> float:
        """A positive finite number; required when there is no default."""
        value = (self.values if within is None else within).get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
            self.problems.append(f"{name}: {value!r}, must be a number above 0")
            return 1.0
        return value

    def fields(self, keys: Mapping[str, str], **defaults: Any) -> dict[str, Any]:
        """Fields of `Architecture`, each read from its key; a key without a default is required."""
        types = {field.name: field.type for field in dataclasses.fields(Architecture)}
        readers = {"int": self.size, "float": self.number, "bool": self.flag}
        return {field: readers[types[field]](key, defaults.get(field)) for field, key in keys.items()}

    def choice(self, name: str, default: str, known: Mapping[str, str]) -> str:
        """The meaning of a value that must be one of the known words."""
        value = self.values.get(name, default)
        if not isinstance(value, str) or value not in known:
            self.problems.append(f"{name}: {value!r} is not supported; supported are {', '.join(known)}")
            return known[default]
        return known[value]

    def refuse_if(self, condition: Any, problem: str) -> None:
        """Add a problem if a condition holds."""
        if condition:
            self.problems.append(problem)

    def refuse(self, reasons: Mapping[str, str], *, value: bool = True) -> None:
        """Add a problem for every named switch that has the refused value, with its reason.

        Args:
            value: the refused value; an absent switch has the other value.
        """
        for name, reason in reasons.items():
            self.refuse_if(self.flag(name, not value) is value, f"{name}: {str(value).lower()}, {reason}")

    def used_length(self, longest: int) -> int:
        """The length for which the model will be used, at most `longest`."""
        wanted = self.sequence_length
        self.refuse_if(
            wanted is not None and not 1 <= wanted <= longest,
            f"sequence length {wanted}: must lie in 1..{longest}, the model's",
        )
        return wanted or longest

    def window(self, length: int) -> int | None:
        """The attention window, at least the length for which the model will be used."""
        name = "sliding_window"
        window = self.values.get(name, 4096)
        if window is None:
            return None
        if not isinstance(window, int) or isinstance(window, bool):
            self.problems.append(f"{name}: {window!r}, must be a whole number or null")
            return None
        self.refuse_if(
            window < length,
            f"{name}: {window} is shorter than the sequence length {length}, which Megatron's local attention "
            f"cannot do; set a sequence length of at most {window}",
        )
        return window

    def rope(self) -> tuple[float, dict[str, Any] | None]:
        """Base and scaling of rotary positions."""
        try:
            settings = rotary_settings(self.values)
        except ValueError as problem:
            self.problems.append(str(problem))
            return 1.0, None
        base, kind = float(self.number("rope_theta", within=settings)), settings["rope_type"]
        partial = settings.get("partial_rotary_factor", self.get("partial_rotary_factor", 1.0))
        self.refuse_if(partial != 1.0, f"partial_rotary_factor: {partial!r}, only 1.0 is supported")
        if kind == "linear":
            return base, linear_scaling(self.number("factor", within=settings))
        if kind == "llama3":
            low, high = (self.number(name, within=settings) for name in ("low_freq_factor", "high_freq_factor"))
            self.refuse_if(low >= high, f"low_freq_factor: {low}, must be below high_freq_factor {high}")
            original = self.number("original_max_position_embeddings", within=settings)
            return base, llama3_scaling(self.number("factor", within=settings), low, high, original)
        self.refuse_if(
            kind != "default", f"rope type {kind!r} is not supported; supported are default, linear, llama3"
        )
        return base, None
