# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What the engine and a model tell each other: positions to compute, exits to ask, half-layer ranges to run.

Depth is counted in half layers ("stops"): 0 = after the embedding; 2k-1 = after layer k's attention and residual,
before its MLP; 2k = after layer k; 2 num_layers = the end of the stack, before the final norm. An `mlp` exit at layer
k taps stop 2k-1, every other exit stop 2k.

May import: torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import LongTensor, Tensor

_CPU = torch.device("cpu")


class ItemGroup(NamedTuple):
    """The rows `first_row : last_row + 1` of an `Items`, which belong to one sequence.

    `positions` are theirs, a range where they are consecutive (as all of the engine's are); `length` = the last + 1.
    """

    sequence: int
    first_row: int
    last_row: int
    length: int
    positions: range | tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Items:
    """n (sequence, position) pairs, ordered by sequence, then by position.

    Row i of every tensor that travels with an `Items` is about pair i. A batch of ragged sequences, some with waiting
    tokens and some without, is simply a longer list of pairs; nothing is padded.

    Attributes:
        sequence: `[n]`, int64, slot of the sequence in the cache, from 0.
        position: `[n]`, int64, position in the sequence, from 0.
    """

    sequence: LongTensor
    position: LongTensor

    def __post_init__(self) -> None:
        assert self.sequence.ndim == 1 and len(self.sequence) == len(self.position), "Items are two [n] tensors"

    @classmethod
    def of(cls, positions: Mapping[int, Sequence[int]], device: torch.device | str = "cpu") -> Items:
        """Items from each sequence's positions; sequences and their positions ascend."""
        return cls.with_tokens(positions, None, device)[0]

    @classmethod
    def with_tokens(
        cls, positions: Mapping[int, Sequence[int]], tokens: Sequence[int] | None, device: torch.device | str = "cpu"
    ) -> tuple[Items, LongTensor]:
        """`of`, and the tokens of the items as a tensor `[n]` (of zeros without any) on the same way to the device."""
        sequence: list[int] = []
        position: list[int] = []
        groups = []
        for index, own in positions.items():
            first, start, length = len(sequence), own[0], own[-1] + 1
            consecutive = range(start, length)
            if len(own) != length - start:
                assert all(a < b for a, b in pairwise(own)), "Items ascend by sequence, then position"
                consecutive = tuple(own)
            sequence += [index] * len(own)
            position += own
            groups.append(ItemGroup(index, first, len(sequence) - 1, length, consecutive))
        last = [0] * len(sequence) if tokens is None else tokens
        on_host = torch.tensor([sequence, position, last], dtype=torch.long)
        rows = on_host.unbind()
        on_device = rows if device == _CPU or device == "cpu" else on_host.to(device).unbind()
        items = cls(on_device[0], on_device[1])
        # Kept beside the device's copy so that grouping by sequence never waits for the device.
        items.__dict__["on_host"] = rows[:2]
        items.__dict__["groups"] = tuple(groups)
        return items, on_device[2]

    def __len__(self) -> int:
        return self.sequence.shape[0]

    def select(self, rows: LongTensor) -> Items:
        """The pairs at these rows, which ascend. `rows`: `[m]`, int64, on the host."""
        picked = Items(*(side[rows.to(side.device)] for side in (self.sequence, self.position)))
        picked.__dict__["on_host"] = tuple(side[rows] for side in self.on_host)
        return picked

    @cached_property
    def on_host(self) -> tuple[LongTensor, LongTensor]:
        """`sequence` and `position` in host memory."""
        return self.sequence.cpu(), self.position.cpu()

    @cached_property
    def groups(self) -> tuple[ItemGroup, ...]:
        """The sequences in row order."""
        sequences, positions = (side.tolist() for side in self.on_host)
        pairs = list(zip(sequences, positions, strict=True))
        assert all(a < b for a, b in pairwise(pairs)), "Items ascend by sequence, then position"
        last_rows = [row for row in range(len(pairs)) if row + 1 == len(pairs) or sequences[row + 1] != sequences[row]]
        first_rows = [0, *(row + 1 for row in last_rows[:-1])]
        groups = []
        for first, last in zip(first_rows, last_rows, strict=False):
            own: range | tuple[int, ...] = range(positions[first], positions[last] + 1)
            if len(own) != last + 1 - first:
                own = tuple(positions[first : last + 1])
            groups.append(ItemGroup(sequences[last], first, last, positions[last] + 1, own))
        return tuple(groups)


@dataclasses.dataclass(frozen=True)
class ExitPoint:
    """An exit as the engine sees it: its name, the layers below it, and where it taps the stack."""

    name: str
    layer: int
    stop: int


class DecodingModel(Protocol):
    """A model that can be run piece by piece. n = number of items, h = hidden size.

    Implementations return for each row what they would return for it alone: rows only meet in attention, and only
    within their sequence. An implementation may have an attribute `device`; without it the engine uses the CPU.
    Its cache may have `truncate(sequence, length)`: keep the first `length` positions of one sequence, everywhere.
    Mode `self_speculative` and sessions that use a sequence's place twice need it. An attribute `fill_ahead` (int)
    asks for waiting tokens to be run on as soon as a sequence has that many, not when one of its tokens goes deeper.
    """

    num_layers: int
    vocab_size: int
    max_positions: int
    exits: tuple[ExitPoint, ...]  # sorted by stop; exits that share a stop are asked in this order

    def new_cache(self, num_sequences: int, max_length: int, active_exits: tuple[str, ...]) -> Any:
        """Key/value storage for sequences 0..num_sequences-1 of at most max_length positions; opaque to the engine."""
        ...

    def embed(self, tokens: LongTensor, items: Items) -> Tensor:
        """The hidden states at stop 0. `tokens`: `[n]`, int64. Returns `[n, h]`."""
        ...

    def run(self, hidden: Tensor, items: Items, start: int, stop: int, cache: Any) -> Tensor:
        """Run the half layers (start, stop] on `hidden` `[n, h]` and write their keys and values. Returns `[n, h]`."""
        ...

    def observe_exit(self, name: str, hidden: Tensor, items: Items, cache: Any) -> None:
        """Tell an active exit of items that reach its tap without being asked: a `layer` exit writes its own keys and
        values for them, every other exit does nothing. `hidden`: `[n, h]` at the exit's stop."""
        ...

    def exit_logits(self, name: str | None, hidden: Tensor, items: Items, cache: Any) -> Tensor:
        """Ask an exit, or the final exit (None). `hidden`: `[n, h]` at its stop. Returns `[n, vocab_size]`, fp32."""
        ...
