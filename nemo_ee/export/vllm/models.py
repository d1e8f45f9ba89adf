# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""vLLM's classes with exits, one for each architecture that the plugin has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from nemo_ee.export.vllm.exit_heads import ExitHeads
from nemo_ee.export.vllm.requests import RequestThresholds
from nemo_ee.export.vllm.served_model import ServedModel
from nemo_ee.export.vllm.skipped_layers import SkippedLayers
from nemo_ee.export.vllm.step import DecodingStep

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class _WithExits:
    """What the classes share; goes before the stock class."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.served = ServedModel.of(vllm_config)
        self.exit_heads = ExitHeads(self.served.exits, self.config)
        self._vllm_config = vllm_config
        self._logits: Tensor | None = None
        self.outcomes: list[Any] = []

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the directory; the stock loader finds `exit_heads` by its name."""
        loaded = super().load_weights(weights)
        if self.served.exits:
            first = (self.served.exits[0].point.stop + 1) // 2
            skipped = SkippedLayers(self.model.layers, first)
            self._step = DecodingStep(self, self.exit_heads, self.served.exits, skipped, self.served.criterion)
        return loaded

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """vLLM's forward pass; a decoding step leaves its logits for `compute_logits`."""
        self._logits = None
        thresholds = RequestThresholds.of(self._vllm_config).thresholds()
        if thresholds is None or thresholds.shape[1] != positions.shape[0]:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        outcome = self._step.run(hidden, positions, thresholds, range(len(self.served.exits)))
        self._logits = outcome.logits
        self.outcomes.append(outcome.read_at)
        return hidden

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The logits of the step's rows."""
        logits, self._logits = self._logits, None
        return super().compute_logits(hidden_states) if logits is None else logits


class EarlyExitLlamaForCausalLM(_WithExits, LlamaForCausalLM):
    """Llama with exits."""


class EarlyExitMistralForCausalLM(_WithExits, MistralForCausalLM):
    """Mistral with exits."""


class EarlyExitQwen2ForCausalLM(_WithExits, Qwen2ForCausalLM):
    """Qwen2 with exits."""


class EarlyExitQwen3ForCausalLM(_WithExits, Qwen3ForCausalLM):
    """Qwen3 with exits."""
