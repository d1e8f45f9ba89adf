# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The metadata of a GGUF file, the format of llama.cpp, and the architecture that it describes, in both directions.

A family's file says what llama.cpp calls it (`GgufForm`). Keys have the prefix `<architecture>.`. Llama 3's rotary
scaling has no keys: the file has a tensor of factors by which the wavelengths are stretched.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_ee.families.architecture import FC1, FC2, PROJ, QKV, Architecture, linear_scaling, llama3_scaling
from nemo_ee.families.config_reader import ConfigReader
from nemo_ee.families.tensors import Names

ARCHITECTURE = "general.architecture"
ROPE_FACTORS = "rope_freqs.weight"

_SIZES = {
    "num_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "ffn_hidden_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_query_groups": "attention.head_count_kv",
    "kv_channels": "attention.key_length",
}
_EPSILON = {True: "attention.layer_norm_epsilon", False: "attention.layer_norm_rms_epsilon"}  # by LayerNorm
_ROPE_BASE, _ROPE_SIZE, _SCALING = "rope.freq_base", "rope.dimension_count", "rope.scaling."
_TOLERANCE = 1e-4  # of factors, which are stored in fp32
_EDGE = 1e-4  # shares so near to 0 or 1 may be cut off


@dataclass(frozen=True, kw_only=True)
class GgufForm:
    """A family in GGUF files.

    Attributes:
        architecture: llama.cpp's name of it.
        names: names of the stored tensors.
        fields: fields of `Architecture` without a key, which are the same in every model of the family.
        computes: whether llama.cpp computes an architecture that has these fields.
    """

    architecture: str
    names: Names
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    computes: Callable[[Architecture], bool] = lambda a: True

    def key(self, name: str) -> str:
        """A key with the architecture's prefix."""
        return f"{self.architecture}.{name}"

    def read(
        self,
        reader: ConfigReader,
        tensors: Mapping[str, tuple[int, ...]],
        rope_factors: Sequence[float] | None,
        **others: Any,
    ) -> Architecture:
        """The architecture of a file; the reader collects problems.

        Args:
            reader: over the file's metadata.
            tensors: name of each stored tensor -> its shape.
            rope_factors: the tensor `ROPE_FACTORS`, `[d/2]`; None without one.
            others: further fields of `Architecture`.
        """
        hidden, heads = reader.size(self.key("embedding_length")), reader.size(self.key("attention.head_count"))
        layer_norm = bool(self.fields.get("layer_norm"))
        keys = {field: self.key(name) for field, name in _SIZES.items()}
        keys["norm_epsilon"] = self.key(_EPSILON[layer_norm])
        fields = reader.fields(keys, num_query_groups=heads, kv_channels=max(hidden // heads, 1))
        base, scaling = 10000.0, None
        if not self.fields.get("learned_positions"):
            base, scaling = self._rope(reader, fields["kv_channels"], rope_factors)
        reader.refuse_if(reader.get(self.key("expert_count")), "mixtures of experts are not supported")
        value_size = reader.get(self.key("attention.value_length"), fields["kv_channels"])
        reader.refuse_if(
            value_size != fields["kv_channels"],
            f"{self.key('attention.value_length')}: {value_size}, must be the size of a key head",
        )
        return Architecture(
            **fields,
            **self.fields,
            vocab_size=tensors.get(self.names.words, (1,))[0],
            biases=self._biases(tensors),
            tied=self.names.output not in tensors,
            rotary_base=base,
            rotary_scaling=scaling,
            **others,
        )

    def metadata(self, a: Architecture) -> dict[str, Any]:
        """The keys that describe an architecture: whole numbers, floats and texts."""
        sizes = {name: getattr(a, field) for field, name in _SIZES.items()}
        sizes |= {"attention.value_length": a.kv_channels, "vocab_size": a.vocab_size}
        sizes |= {"context_length": a.usable_positions, _EPSILON[a.layer_norm]: a.norm_epsilon}
        if not a.learned_positions:
            sizes |= {_ROPE_SIZE: a.kv_channels, _ROPE_BASE: a.rotary_base}
        if a.rotary_scaling is not None and a.rotary_scaling["type"] == "linear":
            sizes |= {f"{_SCALING}type": "linear", f"{_SCALING}factor": a.rotary_scaling["factor"]}
        return {ARCHITECTURE: self.architecture} | {self.key(name): value for name, value in sizes.items()}

    def refusal(self, a: Architecture) -> str | None:
        """Reason why llama.cpp does not compute an architecture as this family; None if it does."""
        differing = [name for name, value in self.fields.items() if getattr(a, name) != value]
        if differing:
            values = ", ".join(f"{name}={getattr(a, name)!r}" for name in differing)
            return f"llama.cpp's {self.architecture} has no {values}"
        return (
            None if self.computes(a) else f"llama.cpp's {self.architecture} has other sizes, biases or rotary scaling"
        )

    def _biases(self, tensors: Collection[str]) -> frozenset[str]:
        """The linears that have a bias, by the stored tensors of the first layer."""
        names, prefix = self.names, self.names.layer.format(0)
        first = {QKV: names.qkv[0], PROJ: names.proj, FC1: names.fc1[0], FC2: names.fc2}
        return frozenset(linear for linear, name in first.items() if f"{prefix}{name}.bias" in tensors)

    def _rope(
        self, reader: ConfigReader, head_size: int, factors: Sequence[float] | None
    ) -> tuple[float, dict[str, Any] | None]:
        """Base and scaling of rotary positions."""
        base = float(reader.number(self.key(_ROPE_BASE), 10000.0))
        rotated = reader.get(self.key(_ROPE_SIZE), head_size)
        reader.refuse_if(
            rotated != head_size,
            f"{self.key(_ROPE_SIZE)}: {rotated}, partial rotary positions are not supported (a head has {head_size})",
        )
        kind = reader.get(self.key(f"{_SCALING}type"), "linear")  # llama.cpp's default, with a factor of 1
        reader.refuse_if(
            kind not in ("none", "linear"),
            f"{self.key(f'{_SCALING}type')}: {kind!r} is not supported; supported are none, linear and Llama 3's",
        )
        # Files from before 2024 have one key for the linear factor.
        factor = reader.number(self.key(f"{_SCALING}factor"), reader.get(self.key("rope.scale_linear"), 1.0))
        scaling = linear_scaling(factor) if kind == "linear" and factor != 1 else None
        if factors is not None:
            reader.refuse_if(scaling, f"{ROPE_FACTORS} beside linear scaling is not supported")
            try:
                scaling = fitted_llama3(factors, base, head_size)
            except ValueError as problem:
                reader.problems.append(str(problem))
        return base, scaling


def has_rope_factors(a: Architecture) -> bool:
    """Whether a file of this model has the tensor `ROPE_FACTORS`; llama.cpp reads it for Llama alone."""
    return (a.rotary_scaling or {}).get("type") == "llama3"


def llama3_factors(a: Architecture) -> list[float]:
    """The factor by which Llama 3's scaling stretches each rotary wavelength, `[d/2]`."""
    return _factors(_turns(a.rotary_base, a.kv_channels), a.rotary_scaling)


def _turns(base: float, head_size: int) -> list[float]:
    """The turns per position of each pair of dimensions."""
    return [base ** (-index / head_size) / (2 * math.pi) for index in range(0, head_size, 2)]


def _factors(turns: Sequence[float], scaling: Mapping[str, Any]) -> list[float]:
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    kept = [min(max((original * one - low) / (high - low), 0.0), 1.0) for one in turns]
    return [1 / (share + (1 - share) / factor) for share in kept]


def fitted_llama3(factors: Sequence[float], base: float, head_size: int) -> dict[str, Any] | None:
    """Llama 3's scaling that gives these factors; None if every factor is 1.

    The kept share of a frequency is a line over the frequency, cut off at 0 and 1. Several settings give one line.

    Raises:
        ValueError: Llama 3's rule does not give these factors.
    """
    turns = _turns(base, head_size)
    problem = f"{ROPE_FACTORS}: not the factors of Llama 3's rotary scaling, and no other is supported"
    if len(factors) != len(turns) or not all(math.isfinite(one) and one >= 1 for one in factors):
        raise ValueError(problem)
    largest = max(factors)
    if largest == 1:
        return None
    candidates = [(1.0, 4.0, 8192)]  # of every released Llama 3.x
    kept = [(1 / one - 1 / largest) / (1 - 1 / largest) for one in factors]
    slope, ratio = _line(turns, kept)
    if slope > 0 and ratio > 0:
        low, high = (8192 * one / slope for one in (ratio, 1 + ratio))
        candidates += [(1.0, round(high / low, 6), max(round(8192 / low), 1)), (low, high, 8192)]
    for low, high, original in candidates:
        scaling = llama3_scaling(largest, low, high, original)
        if all(abs(a - b) <= _TOLERANCE * b for a, b in zip(factors, _factors(turns, scaling), strict=True)):
            return scaling
    raise ValueError(problem)


def _line(turns: Sequence[float], kept: Sequence[float]) -> tuple[float, float]:
    """Slope and negative intercept of the line of the shares between 0 and 1; if there are less than two of them, of
    the flattest line that is 0 and 1 where they are.

    Args:
        turns: turns per position of each pair, the largest first.
        kept: the kept share of each.
    """
    points = list(zip(turns, kept, strict=True))
    blended = [point for point in points if _EDGE < point[1] < 1 - _EDGE]
    whole = [turn for turn, share in points if share >= 1 - _EDGE] or [2 * turns[0]]
    none = [turn for turn, share in points if share <= _EDGE] or [0.0]
    if len(blended) > 1:
        (turn, share), (other, less) = blended[0], blended[-1]
        slope = (share - less) / (turn - other)
    else:
        turn, share = blended[0] if blended else (whole[-1], 1.0)
        slope = max(share / (turn - none[0]), (1 - share) / ((whole[-1] - turn) or 1.0))
    return slope, slope * turn - share
