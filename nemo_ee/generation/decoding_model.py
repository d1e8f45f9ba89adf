# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The interface between the engine and a model: token positions, exit points, `DecodingModel` and its cache.

Depth is counted in half layers ("stops"): 0 = after the embedding; 2k-1 = after layer k's attention and residual,
before its MLP; 2k = after layer k; 2 num_layers = the end of the stack, before the final norm. An `mlp` exit at layer
k taps stop 2k-1, every other exit stop 2k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import LongTensor, Tensor

from nemo_ee.exits.probe import ExitProbe

_CPU = torch.device("cpu")


class SequenceRows(NamedTuple):
    """The rows `first_row` to `last_row` of a `TokenPositions`, which all belong to one sequence.

    Attributes:
        sequence: slot of the sequence in the cache.
        first_row, last_row: first and last row, both included.
        length: the last position + 1.
        positions: position of each row; a range where they are consecutive, as all of the engine's are.
    """

    sequence: int
    first_row: int
    last_row: int
    length: int
    positions: range | tuple[int, ...]


class TokenPositions:
    """n (sequence, position) pairs, ordered by sequence, then by position.

    Row i of every tensor that accompanies a `TokenPositions` belongs to pair i. A batch of ragged sequences, some with
    pending tokens and some without, is a longer list of pairs; nothing is padded.

    Args:
        sequence: `[n]`, int64, slot of the sequence in the cache, from 0.
        position: `[n]`, int64, position in the sequence, from 0.
        on_host: the same two tensors in host memory, where they exist already.
        groups: the rows of each sequence in row order, where they are known already.

    Attributes:
        sequence, position: as above, on the model's device.
    """

    __slots__ = ("sequence", "position", "_on_host", "_groups", "__weakref__")

    def __init__(
        self,
        sequence: LongTensor,
        position: LongTensor,
        on_host: tuple[LongTensor, LongTensor] | None = None,
        groups: tuple[SequenceRows, ...] | None = None,
    ) -> None:
        assert sequence.ndim == 1 and len(sequence) == len(position), "TokenPositions are two [n] tensors"
        self.sequence, self.position = sequence, position
        self._on_host, self._groups = on_host, groups

    @classmethod
    def of(cls, positions: Mapping[int, Sequence[int]], device: torch.device | str = "cpu") -> TokenPositions:
        """Make one from the positions of each sequence; sequences and their positions ascend."""
        return cls.with_tokens(positions, None, device)[0]

    @classmethod
    def with_tokens(
        cls, positions: Mapping[int, Sequence[int]], tokens: Sequence[int] | None, device: torch.device | str = "cpu"
    ) -> tuple[TokenPositions, LongTensor]:
        """`of`, and the token ids as a tensor `[n]` (zeros for None); one transfer brings both to the device."""
        sequence: list[int] = []
        position: list[int] = []
        groups = []
        for index, own in positions.items():
            first, start, length = len(sequence), own[0], own[-1] + 1
            consecutive = range(start, length)
            if len(own) != length - start:
                assert all(a < b for a, b in pairwise(own)), "TokenPositions ascend by sequence, then position"
                consecutive = tuple(own)
            sequence += [index] * len(own)
            position += own
            groups.append(SequenceRows(index, first, len(sequence) - 1, length, consecutive))
        last = [0] * len(sequence) if tokens is None else tokens
        on_host = torch.tensor([sequence, position, last], dtype=torch.long)
        rows = on_host.unbind()
        on_device = rows if device == _CPU or device == "cpu" else on_host.to(device).unbind()
        # The host's copy is kept, so that grouping by sequence never waits for the device.
        return cls(on_device[0], on_device[1], rows[:2], tuple(groups)), on_device[2]

    def __len__(self) -> int:
        return self.sequence.shape[0]

    def select(self, rows: LongTensor) -> TokenPositions:
        """The pairs at these rows, which ascend. `rows`: `[m]`, int64, on the host."""
        sequence, position = self.on_host
        own = rows.to(self.sequence.device)
        return TokenPositions(self.sequence[own], self.position[own], (sequence[rows], position[rows]))

    @property
    def on_host(self) -> tuple[LongTensor, LongTensor]:
        """`sequence` and `position` in host memory."""
        if self._on_host is None:
            self._on_host = self.sequence.cpu(), self.position.cpu()
        return self._on_host

    @property
    def groups(self) -> tuple[SequenceRows, ...]:
        """The rows of each sequence, in row order."""
        if self._groups is None:
            self._groups = tuple(_groups(*(side.tolist() for side in self.on_host)))
        return self._groups


def _groups(sequences: list[int], positions: list[int]) -> list[SequenceRows]:
    pairs = list(zip(sequences, positions, strict=True))
    assert all(a < b for a, b in pairwise(pairs)), "TokenPositions ascend by sequence, then position"
    last_rows = [row for row in range(len(pairs)) if row + 1 == len(pairs) or sequences[row + 1] != sequences[row]]
    first_rows = [0, *(row + 1 for row in last_rows[:-1])]
    groups = []
    for first, last in zip(first_rows, last_rows, strict=False):
        own: range | tuple[int, ...] = range(positions[first], positions[last] + 1)
        if len(own) != last + 1 - first:
            own = tuple(positions[first : last + 1])
        groups.append(SequenceRows(sequences[last], first, last, positions[last] + 1, own))
    return groups


@dataclasses.dataclass(frozen=True)
class ExitPoint:
    """An exit as the engine sees it: its name, the number of layers below it, its tap in half layers, and the probe
    of `criterion: probe`, if one was fitted."""

    name: str
    layer: int
    stop: int
    probe: ExitProbe | None = dataclasses.field(default=None, compare=False, repr=False)


def with_probes(
    exits: Iterable[ExitPoint], probes: Mapping[str, ExitProbe], device: torch.device = _CPU
) -> tuple[ExitPoint, ...]:
    """The exits, those with a probe of their name with it, on a device."""
    moved = {name: dataclasses.replace(own, weight=own.weight.to(device)) for name, own in probes.items()}
    return tuple(dataclasses.replace(point, probe=moved.get(point.name)) for point in exits)


class DecodingCache(Protocol):
    """Keys and values of some sequences. Only `truncate` is called by the engine; the rest is the model's own."""

    def truncate(self, sequence: int, length: int) -> None:
        """Keep the first `length` positions of one sequence in every layer; later ones may be written again."""
        ...


class DecodingModel(Protocol):
    """A model that runs piece by piece. Implementations inherit from it. n = number of rows, h = hidden size.

    The result of each row must not depend on the other rows of the call, except through attention within its sequence.

    Attributes:
        num_layers, vocab_size: size of the model.
        max_positions: largest number of tokens in a sequence.
        exits: the exits, sorted by stop; exits at one stop are evaluated in this order.
        device: device of hidden states and logits.
        run_pending_after: run a sequence's pending tokens through the deeper layers as soon as it has this many,
            instead of together with the next token that goes deeper. None = never. For models whose deeper layers are
            on other ranks, which then work while the first rank decodes on.
        exits_with_kv: names of the exits that have keys and values of their own, which `write_exit_kv` writes; None =
            any exit may. A forward pass does not halt at the others where nothing is evaluated.
    """

    num_layers: int
    vocab_size: int
    max_positions: int
    exits: tuple[ExitPoint, ...]
    device: torch.device = _CPU
    run_pending_after: int | None = None
    exits_with_kv: Collection[str] | None = None

    def new_cache(self, num_sequences: int, max_length: int, active_exits: tuple[str, ...]) -> DecodingCache:
        """Storage of keys and values for sequences 0..num_sequences-1 of at most max_length positions."""
        ...

    def embed(self, tokens: LongTensor, positions: TokenPositions) -> Tensor:
        """The hidden states at stop 0. `tokens`: `[n]`, int64. Returns `[n, h]`."""
        ...

    def run(self, hidden: Tensor, positions: TokenPositions, start: int, stop: int, cache: DecodingCache) -> Tensor:
        """Run the half layers (start, stop] on `hidden` `[n, h]` and write their keys and values. Returns `[n, h]`."""
        ...

    def write_exit_kv(self, name: str, hidden: Tensor, positions: TokenPositions, cache: DecodingCache) -> None:
        """Write an exit's own keys and values for rows that reach its tap but are not evaluated.

        Only a `layer` exit has keys and values; other exits do nothing. `hidden`: `[n, h]` at the exit's stop.
        """
        ...

    def exit_logits(self, name: str | None, hidden: Tensor, positions: TokenPositions, cache: DecodingCache) -> Tensor:
        """Logits of an exit, or of the final exit (None). `hidden`: `[n, h]` at its stop. Returns `[n, v]`, fp32."""
        ...
