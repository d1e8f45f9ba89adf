# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The modules of exit heads, made of vLLM's tensor-parallel layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.llama import LlamaMLP, LlamaModel
from vllm.model_executor.models.utils import AutoWeightsLoader

from nemo_ee.runtime.exported_model import ExitEntry


class ExitHead(nn.Module):
    """One exit; its submodules' paths are the names in the directory."""

    def __init__(self, exit: ExitEntry, config: Any) -> None:
        super().__init__()
        if exit.architecture == "mlp":
            self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = LlamaMLP(
                config.hidden_size,
                config.intermediate_size,
                config.hidden_act,
                bias=getattr(config, "mlp_bias", False),
            )
        if exit.architecture != "embedding":
            self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if exit.own_output:
            self.unembed = ParallelLMHead(config.vocab_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """From the hidden state at the exit's tap, `[rows, h]`, to the input of the output projection."""
        if hasattr(self, "mlp"):
            hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return self.norm(hidden) if hasattr(self, "norm") else hidden


class ExitHeads(nn.ModuleDict):
    """The loaded exits, by name."""

    def __init__(self, exits: Sequence[ExitEntry], config: Any) -> None:
        super().__init__({exit.name: ExitHead(exit, config) for exit in exits})

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the exits that are here; weights of other exits are left out."""
        own = ((name, tensor) for name, tensor in weights if name.partition(".")[0] in self)
        return AutoWeightsLoader(self).load_weights(own, mapper=LlamaModel.hf_to_vllm_mapper)
