# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What NeMo does to one whole model in training, answered for a stage whose backbone is frozen."""

from __future__ import annotations


class WholeModelHooks:
    """Mixin in front of `MegatronGPTModel`: overrides that leave something out."""

    def _wrap_model_for_O2(self) -> None:
        """Every parameter in bf16. NeMo's wrapper would hide the stage behind a `forward` that nothing calls."""
        for module in self.model if isinstance(self.model, list) else [self.model]:
            module.bfloat16()

    def initialize_last_rank_embeddings(self) -> None:
        """Nothing: tied weights are read from the checkpoint on every stage that needs them."""

    def setup_transformer_engine_cp_groups(self) -> None:
        """Nothing: there is no context parallelism."""

    def _get_total_params_across_model_parallel_groups_gpt_bert(self) -> tuple[int, int]:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        return count, count
