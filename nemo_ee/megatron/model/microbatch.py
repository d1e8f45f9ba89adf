# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A microbatch, and the hidden states that the layers of one pipeline stage compute for it.

Shapes: s sequence, b micro batch, h hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """The input of one microbatch on a pipeline stage.

    Attributes:
        tokens: [b, s] int64 input ids.
        labels: [b, s] int64 ids of the next tokens.
        loss_mask: [b, s] float, 0 where a position does not count.
        position_ids: [b, s] int64.
        attention_mask: None for plain causal attention, else Megatron's boolean [b or 1, 1, s, s], True = masked.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None = None

    @classmethod
    def of(cls, batch: Mapping[str, Tensor | None], device: torch.device) -> MicroBatch:
        """From a batch of Megatron's GPT data sets, moved to `device`."""
        moved = {k: None if v is None else v.to(device, non_blocking=True) for k, v in batch.items()}
        return cls(
            moved["tokens"],
            moved["labels"],
            moved["loss_mask"].float(),
            moved["position_ids"],
            moved["attention_mask"],
        )

    def at(self, positions: Tensor) -> MicroBatch:
        """The tokens at some positions, [n], for what works on each alone: without an attention mask."""
        tokens, labels, mask = (x[:, positions] for x in (self.tokens, self.labels, self.loss_mask))
        return MicroBatch(tokens, labels, mask, self.position_ids[:, positions])

    def flat_labels(self) -> tuple[Tensor, Tensor]:
        """Labels and mask in the order of [s, b] hidden states, each [s * b]."""
        return self.labels.t().reshape(-1), self.loss_mask.t().reshape(-1)


@dataclass(frozen=True)
class StageOutput:
    """The output of one stage's layers.

    Attributes:
        hidden: [s, b, h] state for the next stage; on the last stage of a full-depth model the final norm's output.
            None once it has been sent on.
        taps: stop -> [s, b, h] hidden state there.
        rotary_pos_emb: rotary embedding of the batch, None without RoPE.
    """

    hidden: Tensor | None
    taps: dict[int, Tensor]
    rotary_pos_emb: Tensor | None


class Taps:
    """Hidden states of a stage's taps, side by side in one piece of memory.

    Kept where they are made, they would lie between the layers' temporaries and leave holes that nothing fits into:
    peak memory would grow with the number of exits by more than their taps.

    Args:
        stops: the taps' depths in half layers.
        like: [s, b, h] hidden state in front of the layers.
    """

    def __init__(self, stops: set[int], like: Tensor) -> None:
        self.kept: dict[int, Tensor] = {}
        self._memory = iter(like.new_empty(len(stops), *like.shape))
        self._stops = stops

    def keep(self, stop: int, hidden: Tensor) -> None:
        """Copy a hidden state [s, b, h] if `stop` is a tap."""
        if stop in self._stops:
            self.kept[stop] = next(self._memory).copy_(hidden)
