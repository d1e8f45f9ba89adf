# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""One decoding step: each row is read from the first exit that is confident in it; the step ends with the last row.

The rows that are read early still go through the layers until the step ends, since the cache has one length for all
layers. The layers after that are skipped for all rows. `nemo_ee.runtime.propagation` is the reference.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from nemo_ee.exits.confidence import confidence, leaves
from nemo_ee.exits.criteria import NEVER_LEAVES
from nemo_ee.export.vllm.compiled import compiled
from nemo_ee.export.vllm.faster_exits import Measured
from nemo_ee.export.vllm.skipped_layers import SkippedLayers
from nemo_ee.runtime.exported_model import ExitEntry

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from nemo_ee.export.vllm.exit_heads import ExitHeads


class DecodingStep:
    """Runs steps of one model.

    Args:
        model: vLLM's model, with `model.layers`, `model.norm`, `lm_head`, `logits_processor`.
        heads: the heads of the exits.
        exits: the exits, in the order of their taps.
        skipped: the projections of the layers behind the first exit.
        criterion: criterion of the confidence.
        config: the configuration of the engine.
    """

    def __init__(
        self,
        model: Any,
        heads: ExitHeads,
        exits: Sequence[ExitEntry],
        skipped: SkippedLayers,
        criterion: str,
        config: VllmConfig,
    ) -> None:
        self.model, self.skipped, self.criterion, self.exits = model, skipped, criterion, tuple(exits)
        self.end = 2 * len(model.model.layers)
        taps = sorted({0, *(exit.point.stop for exit in self.exits), self.end})
        self._segments = {
            begin: (end, compiled(_segment(model.model.layers, begin, end), config))
            for begin, end in itertools.pairwise(taps)
        }
        self._heads = [compiled(_decision(model, heads[exit.name], criterion), config) for exit in self.exits]
        self.is_warm = False

    def warm_up(self, hidden: Tensor, positions: Tensor) -> None:
        """Run every part once, in a dummy run of vLLM, so that no request waits for the compiler."""
        self.is_warm = True
        never = torch.full((len(self.exits), len(hidden)), NEVER_LEAVES[self.criterion], device=hidden.device)
        self.run(hidden, positions, never, range(len(self.exits)), Clock())
        for exit in self.exits:
            self.skipped.write(hidden, positions, (exit.point.stop + 1) // 2)

    def run(
        self, hidden: Tensor, positions: Tensor, thresholds: Tensor, evaluated: Sequence[int], clock: Clock
    ) -> Outcome:
        """Run the step.

        Args:
            hidden: embeddings of the new tokens, `[rows, h]`.
            positions: `[rows]`.
            thresholds: `[exits, rows]`, fp32.
            evaluated: indices of the exits to evaluate, ascending.
            clock: takes the times of the parts.
        """
        end = self.end
        read_at = [len(self.exits)] * len(hidden)
        remaining, rows, logits = list(range(len(hidden))), slice(None), None
        state, residual, half = hidden, None, 0
        for index in evaluated:
            exit = self.exits[index]
            state, residual = self._run_layers(state, residual, positions, half, exit.point.stop)
            half, at_tap = exit.point.stop, state + residual
            clock.layers(half)
            own, confident = self._heads[index](at_tap[rows], thresholds[index, rows])
            leaving = confident.tolist()  # every rank has the same logits, and the same code for them
            clock.head(index)
            logits = self._placed(logits, own, rows, leaving, len(hidden))
            for row, ends in zip(remaining, leaving, strict=True):
                if ends:
                    read_at[row] = index
            remaining = [row for row, ends in zip(remaining, leaving, strict=True) if not ends]
            if not remaining:
                self.skipped.write(at_tap, positions, (half + 1) // 2)
                clock.skipped((end - half) // 2)
                return Outcome(logits, read_at)
            if any(leaving):
                rows = torch.tensor(remaining, device=hidden.device)
        state, residual = self._run_layers(state, residual, positions, half, end)
        clock.layers(end)
        final, _ = self.model.model.norm(state, residual)
        own = self.model.logits_processor(self.model.lm_head, final[rows])
        return Outcome(self._placed(logits, own, rows, [True] * len(remaining), len(hidden)), read_at)

    def _placed(
        self, logits: Tensor | None, own: Tensor, rows: Tensor | slice, leaving: list[bool], count: int
    ) -> Tensor | None:
        """`logits` `[count, v]` with the rows that leave, of `own`, which has the logits of `rows`."""
        if not any(leaving):
            return logits
        if logits is None and len(own) == count:
            return own  # the other rows are overwritten later
        logits[rows] = own
        return logits

    def _run_layers(
        self, state: Tensor, residual: Tensor | None, positions: Tensor, begin: int, end: int
    ) -> tuple[Tensor, Tensor]:
        """Half layers `begin` to `end`; the hidden state is `state + residual`, as in vLLM's layers."""
        while begin < end:
            begin, segment = self._segments[begin]
            state, residual = segment(positions, state, residual)
        return state, residual


def _segment(layers: Any, begin: int, end: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """Half layers `begin` to `end`."""

    def run(positions: Tensor, state: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        half = begin
        while half < end:
            layer = layers[half // 2]
            if half % 2 == 0 and half + 2 <= end:
                state, residual = layer(positions, state, residual)
                half += 2
                continue
            if half % 2 == 0:
                if residual is None:
                    state, residual = layer.input_layernorm(state), state
                else:
                    state, residual = layer.input_layernorm(state, residual)
                state = layer.self_attn(positions=positions, hidden_states=state)
            else:
                state, residual = layer.post_attention_layernorm(state, residual)
                state = layer.mlp(state)
            half += 1
        return state, residual

    return run


def _decision(model: Any, head: Any, criterion: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """From the hidden state at an exit's tap and the rows' thresholds to its logits, and whether each row leaves."""

    def run(hidden: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
        logits = model.logits_processor(head.unembed if hasattr(head, "unembed") else model.lm_head, head(hidden))
        return logits, leaves(confidence(logits, criterion), thresholds, criterion)

    return run


class Clock:
    """Takes no times."""

    def layers(self, half: int) -> None:
        """The half layers before `half` have run."""

    def head(self, index: int) -> None:
        """The exit has been evaluated."""

    def skipped(self, layers: int) -> None:
        """Keys and values of this many skipped layers have been written."""


class StopWatch(Clock):
    """Takes the times of the parts of a step. `synchronize`: waits for the device."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.measured, self._synchronize, self._half, self._layer_seconds = Measured(), synchronize, 0, 0.0
        self._last = self._now()

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()

    def _lap(self) -> float:
        last, self._last = self._last, self._now()
        return self._last - last

    def layers(self, half: int) -> None:
        self._layer_seconds += self._lap()
        self._half = half
        self.measured.half_layer = self._layer_seconds / half

    def head(self, index: int) -> None:
        self.measured.heads[index] = self._lap()

    def skipped(self, layers: int) -> None:
        seconds = self._lap()
        self.measured.skipped_layer = seconds / layers if layers else None


class Outcome(NamedTuple):
    """Logits `[rows, v]`, and the index of the exit at which each row was read (number of exits = final)."""

    logits: Tensor
    read_at: list[int]
