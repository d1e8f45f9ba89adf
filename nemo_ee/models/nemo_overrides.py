# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Overrides of NeMo hooks that assume one whole model of which every parameter trains."""

from __future__ import annotations

import itertools
from pathlib import Path

from nemo.utils import AppState
from omegaconf import open_dict

from nemo_ee.checkpoint.members import TOKENIZER_FOLDER
from nemo_ee.text.tokenizer_directory import readable_tokenizer


class WholeModelHooks:
    """Mixin in front of `MegatronGPTModel`; uses none of the members that the early-exit model adds."""

    def _wrap_model_for_O2(self) -> None:
        """Convert every parameter to bf16. NeMo's wrapper would hide the stage behind a `forward` that is never
        called."""
        for module in self.model if isinstance(self.model, list) else [self.model]:
            module.bfloat16()

    def setup_validation_data(self, cfg) -> None:
        """NeMo's, which needs validation data. Does nothing without it."""
        if self._validation_ds is not None:
            super().setup_validation_data(cfg)

    def initialize_last_rank_embeddings(self) -> None:
        """Does nothing: tied weights are read from the checkpoint on every stage that needs them."""

    def setup_transformer_engine_cp_groups(self) -> None:
        """Does nothing: there is no context parallelism."""

    def _get_total_params_across_model_parallel_groups_gpt_bert(self) -> tuple[int, int]:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        return count, count

    def _build_tokenizer(self) -> None:
        """NeMo's; `type` is the folder bundled in the `.nemo` being restored, where there is one for Hugging Face."""
        block, bundled = self.cfg.tokenizer, Path(AppState().nemo_file_folder or "", TOKENIZER_FOLDER)
        named = block.get("type")
        with open_dict(block):
            block.trust_remote_code = False  # a config from a file must not run code
            if AppState().is_model_being_restored and block.library == "huggingface" and bundled.is_dir():
                block.update(type=str(bundled), use_fast=block.get("use_fast") is not False)
            with readable_tokenizer(str(block.get("type"))) as folder:
                block.type = str(folder) if block.library == "huggingface" else named
                super()._build_tokenizer()
            block.type = named

    def configure_gradient_clipping(self, *args, **kwargs) -> None:
        """Does nothing: each exit clips its own gradients in its step."""

    def parameters(self, recurse: bool = True):
        """All parameters of this stage."""
        return itertools.chain(self.model.parameters())

    @classmethod
    def list_available_models(cls) -> None:
        """No pre-trained models are published."""
