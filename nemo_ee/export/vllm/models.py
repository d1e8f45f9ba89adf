# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""vLLM's classes with exits, one for each architecture that the plugin has."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank, get_tp_group
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from nemo_ee.export.vllm.compiled import WARM_UP_ROWS
from nemo_ee.export.vllm.counts import ExitCounts
from nemo_ee.export.vllm.exit_heads import ExitHeads
from nemo_ee.export.vllm.faster_exits import FasterExits, Measured
from nemo_ee.export.vllm.requests import RequestThresholds
from nemo_ee.export.vllm.served_exits import ServedExits, ServerRecord
from nemo_ee.export.vllm.skipped_layers import SkippedLayers
from nemo_ee.export.vllm.step import Clock, DecodingStep, Outcome, StopWatch

if TYPE_CHECKING:
    from vllm.config import VllmConfig

EXIT_HEADS = "exit_heads."  # before the names of their weights


class _WithExits:
    """What the classes share; goes before the stock class."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.served = ServedExits.of(vllm_config)
        self.exit_heads = ExitHeads(self.served.exits, self.config)
        self.requests = RequestThresholds.of(vllm_config)
        record, rank = ServerRecord.read(), vllm_config.parallel_config.data_parallel_index
        names = [exit.name for exit in self.served.exits]
        self.counts = ExitCounts(names, "" if record is None else record.counts_file, rank)
        stops = [exit.point.stop for exit in self.served.exits]
        self.choice = FasterExits(stops, 2 * len(self.model.layers), _of_first_rank)
        self._config = vllm_config
        self._step: DecodingStep | None = None
        self._running: _Running | None = None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the backbone by the stock class, then the exits.

        Raises:
            RuntimeError: a second call. The projections of the skipped layers are made of weights as they are loaded.
        """
        if self._step is not None:
            raise RuntimeError("early exit: weights cannot be reloaded, start the server again")
        heads: list[tuple[str, Tensor]] = []

        def backbone() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name.startswith(EXIT_HEADS):
                    heads.append((name.removeprefix(EXIT_HEADS), tensor))
                else:
                    yield name, tensor

        # Mistral's loader renames by parts of a name, such as norm.
        loaded = super().load_weights(backbone())
        loaded |= {EXIT_HEADS + name for name in self.exit_heads.load_weights(heads)}
        if self.served.exits:
            first = (self.served.exits[0].point.stop + 1) // 2
            skipped = SkippedLayers(self.model.layers, first, self._config)
            self._step = DecodingStep(
                self, self.exit_heads, self.served.exits, skipped, self.served.criterion, self._config
            )
        return loaded

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """vLLM's forward pass. A decoding step with exits leaves its logits for `compute_logits`."""
        self._running, rows = None, positions.shape[0]
        thresholds = self.requests.thresholds()
        is_dummy = get_forward_context().attn_metadata is None
        if is_dummy and self._step is not None and not self._step.is_warm and rows >= WARM_UP_ROWS:
            embedded = self.embed_input_ids(input_ids[:WARM_UP_ROWS]) if inputs_embeds is None else inputs_embeds
            hidden = embedded[:WARM_UP_ROWS]
            self._step.warm_up(hidden, positions[:WARM_UP_ROWS])
        if thresholds is None or thresholds.shape[1] != rows or is_dummy:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        evaluated, timed = self.choice.next(rows) if self.served.only_if_faster else (self._all, False)
        watch = StopWatch(self._synchronize) if timed else Clock()  # synchronises
        self._running = running = _Running(rows, time.perf_counter(), timed)
        if not evaluated:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        running.outcome = self._step.run(hidden, positions, thresholds, evaluated, watch)
        running.measured = watch.measured if timed else None
        return hidden

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The logits of the step's rows."""
        running, self._running = self._running, None
        if running is None:
            return super().compute_logits(hidden_states)
        final = len(self.served.exits)
        if running.outcome is None:
            logits, read_at = super().compute_logits(hidden_states), [final] * running.rows
        else:
            logits, read_at = running.outcome
        if running.timed:
            self._synchronize()
            if running.measured is not None:
                running.measured.read_at = tuple(read_at)
            self.choice.record(running.rows, time.perf_counter() - running.start, running.measured)
        if get_tensor_model_parallel_rank() == 0:
            self.counts.add([read_at.count(index) for index in range(final + 1)], max(read_at))
        return logits

    @property
    def _all(self) -> range:
        return range(len(self.served.exits))

    def _synchronize(self) -> None:
        if self.requests.device.type != "cpu":
            torch.accelerator.synchronize()


@dataclass
class _Running:
    """A decoding step between `forward` and `compute_logits`."""

    rows: int
    start: float
    timed: bool
    outcome: Outcome | None = None
    measured: Measured | None = None


def _of_first_rank(chosen: tuple[int, ...]) -> tuple[int, ...]:
    """Ranks measure different times, and must run the same layers."""
    group = get_tp_group()
    return chosen if group.world_size == 1 else tuple(group.broadcast_object(chosen, src=0))


class EarlyExitLlamaForCausalLM(_WithExits, LlamaForCausalLM):
    """Llama with exits."""


class EarlyExitMistralForCausalLM(_WithExits, MistralForCausalLM):
    """Mistral with exits."""


class EarlyExitQwen2ForCausalLM(_WithExits, Qwen2ForCausalLM):
    """Qwen2 with exits."""


class EarlyExitQwen3ForCausalLM(_WithExits, Qwen3ForCausalLM):
    """Qwen3 with exits."""
