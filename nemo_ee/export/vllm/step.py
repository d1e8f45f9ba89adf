# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""One decoding step: each row is read from the first exit that is confident in it; the step ends with the last row.

The rows that are read early still go through the layers until the step ends, since the cache has one length for all
layers. The layers after that are skipped for all rows. `nemo_ee.runtime.propagation` is the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_ee.exits.confidence import confidence
from nemo_ee.exits.criteria import SMALLER_IS_CONFIDENT
from nemo_ee.export.vllm.skipped_layers import SkippedLayers
from nemo_ee.runtime.exported_model import ExitEntry

if TYPE_CHECKING:
    from nemo_ee.export.vllm.exit_heads import ExitHeads


class DecodingStep:
    """Runs steps of one model.

    Args:
        model: vLLM's model, with `model.layers`, `model.norm`, `lm_head`, `logits_processor`.
        heads: the heads of the exits.
        exits: the exits, in the order of their taps.
        skipped: the projections of the layers behind the first exit.
        criterion: criterion of the confidence.
    """

    def __init__(
        self, model: Any, heads: ExitHeads, exits: Sequence[ExitEntry], skipped: SkippedLayers, criterion: str
    ) -> None:
        self.model, self.heads, self.skipped, self.criterion = model, heads, skipped, criterion
        self.taps = [(index, exit, exit.point.stop) for index, exit in enumerate(exits)]

    def run(self, hidden: Tensor, positions: Tensor, thresholds: Tensor, evaluated: Sequence[int]) -> Outcome:
        """Run the step.

        Args:
            hidden: embeddings of the new tokens, `[rows, h]`.
            positions: `[rows]`.
            thresholds: `[exits, rows]`, fp32.
            evaluated: indices of the exits to evaluate, ascending.
        """
        layers, logits, read_at = self.model.model.layers, None, torch.full_like(positions, -1)
        state, residual, half = hidden, None, 0
        rows = torch.arange(len(hidden), device=hidden.device)
        for index in evaluated:
            _, exit, stop = self.taps[index]
            state, residual = self._run_layers(state, residual, positions, half, stop)
            half, at_tap = stop, state + residual
            own = self._exit_logits(exit, at_tap[rows])
            if logits is None:
                logits = own.new_empty(len(hidden), own.shape[-1])
            leaves = self._leave(own, thresholds[index, rows])
            left = rows[leaves]
            logits[left], read_at[left] = own[leaves], index
            rows = rows[~leaves]
            if not len(rows):
                self.skipped.write(at_tap, positions, (stop + 1) // 2)
                return Outcome(logits, read_at, stop)
        state, residual = self._run_layers(state, residual, positions, half, 2 * len(layers))
        final, _ = self.model.model.norm(state, residual)
        own = self.model.logits_processor(self.model.lm_head, final[rows])
        if logits is None:
            logits = own
        else:
            logits[rows] = own
        return Outcome(logits, read_at, 2 * len(layers))

    def _run_layers(
        self, state: Tensor, residual: Tensor | None, positions: Tensor, begin: int, end: int
    ) -> tuple[Tensor, Tensor]:
        """Half layers `begin` to `end`; the hidden state is `state + residual`, as in vLLM's layers."""
        layers = self.model.model.layers
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

    def _exit_logits(self, exit: ExitEntry, hidden: Tensor) -> Tensor:
        head = self.heads[exit.name]
        return self.model.logits_processor(head.unembed if exit.own_output else self.model.lm_head, head(hidden))

    def _leave(self, logits: Tensor, thresholds: Tensor) -> Tensor:
        own = confidence(logits, self.criterion)
        return own < thresholds if self.criterion in SMALLER_IS_CONFIDENT else own > thresholds


class Outcome:
    """Logits `[rows, v]`, the index of the exit of each row (-1 = final), and the tap at which the step ended."""

    def __init__(self, logits: Tensor, read_at: Tensor, stop: int) -> None:
        self.logits, self.read_at, self.stop = logits, read_at, stop
