# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A Megatron-Bridge model provider that builds the early-exit GPT.

    bridge = AutoBridge.from_hf_pretrained(directory)
    provider = EarlyExitModelProvider.of(bridge.to_megatron_provider(), {"every": "1/4"}, source=directory)
    provider.finalize()
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False)

`AutoBridge` reads the config and loads the backbone in a pre-wrap hook. The provider's own hook runs it, then loads
the exits and each parameter for which `AutoBridge` has no mapping (see `exit_weights`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from nemo_ee import cpu_host
from nemo_ee.bridge.exit_weights import fill_stage
from nemo_ee.bridge.upstream import GPTModelProvider, calculate_padded_vocab_size
from nemo_ee.checkpoint.chunk_reader import WeightSource
from nemo_ee.checkpoint.huggingface import HuggingFaceSource
from nemo_ee.checkpoint.megatron_model import build_stage
from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.exits.placement import StagePlacement, place_exits
from nemo_ee.families.architecture import Architecture
from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel, set_layer_split

# Megatron-core's constants of Llama 3's rotary scaling; a provider carries the factor alone.
_LLAMA3_CONSTANTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# field -> (value that is supported, way out)
_ONLY = {
    "context_parallel_size": (1, "use tensor and pipeline parallelism"),
    "virtual_pipeline_model_parallel_size": (None, "use one chunk of layers per stage"),
    "expert_model_parallel_size": (1, "use tensor and pipeline parallelism"),
    "num_moe_experts": (None, "mixture-of-experts models are not supported"),
    "multi_latent_attention": (False, "multi-latent attention is not supported"),
    "mtp_num_layers": (None, "multi-token prediction is not supported"),
    "fp8": (None, "tune in bfloat16"),
    "fp16": (False, "tune in bfloat16 or float32"),
}

# Without CUDA kernels; see nemo_ee.cpu_host.
_CPU_FIELDS = {
    "use_cpu_initialization": True,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
}


@dataclasses.dataclass
class EarlyExitModelProvider(GPTModelProvider):
    """Config and provider of an early-exit GPT. Its backbone is frozen.

    Attributes:
        early_exit: the `early_exit` block, as in the yaml of the NeMo host (`nemo_ee.exits.config`).
        full_depth: build the layers past the deepest exit and the final exit, also if nothing needs them.
        transformer_engine: build layers on Transformer Engine, else on Megatron's local modules.
        seed: seed of random initialisation, for exits without a seed of their own.
    """

    early_exit: dict[str, Any] | None = None
    full_depth: bool = False
    transformer_engine: bool = True
    seed: int = 1234

    @classmethod
    def of(
        cls,
        provider: GPTModelProvider,
        early_exit: Mapping[str, Any],
        *,
        source: str | Path | HuggingFaceSource,
        exits: WeightSource | None = None,
        **fields: Any,
    ) -> EarlyExitModelProvider:
        """An early-exit provider with the fields and hooks of a provider of `AutoBridge`.

        Args:
            provider: result of `AutoBridge.to_megatron_provider`.
            early_exit: the `early_exit` block.
            source: the Hugging Face directory that `provider` was made from.
            exits: tuned exits, keys `<exit name>.<parameter>`. Other exits are initialised by their `init`.
            fields: further fields (`full_depth`, `transformer_engine`, parallel sizes, dtypes).

        Raises:
            ValueError: the model, the block or a field is not supported; one message lists all problems.
        """
        source = source if isinstance(source, HuggingFaceSource) else HuggingFaceSource(source)
        if type(provider).provide is not GPTModelProvider.provide:
            raise ValueError(
                f"{type(provider).__name__} builds a model of its own, which has no place for exits; supported are "
                "the models that Megatron-Bridge builds with GPTModelProvider: Llama, Qwen2, Qwen3, Mistral"
            )
        names = [field.name for field in dataclasses.fields(GPTModelProvider) if field.init]
        copied = {name: getattr(provider, name) for name in names}
        if cpu_host.enabled():
            copied |= {**_CPU_FIELDS, "transformer_engine": False}
        ours = cls(**{**copied, "early_exit": dict(early_exit), **fields})
        # The reader of the source refuses windows that are shorter than a sequence.
        ours.window_size = None
        ours.refuse_unsupported(source.backbone)
        auto_bridge = list(getattr(provider, "_pre_wrap_hooks", ()))
        fill = partial(fill_stage, auto_bridge=auto_bridge, backbone=source, exits=exits, seed=ours.seed)
        ours.register_pre_wrap_hook(fill)
        return ours

    def refuse_unsupported(self, backbone: Architecture) -> None:
        """Raises ValueError with every setting that the early-exit model does not support."""
        problems = [
            f"{field}={getattr(self, field)!r}: {way_out}"
            for field, (only, way_out) in _ONLY.items()
            if getattr(self, field, only) != only and getattr(self, field)
        ]
        scaling = backbone.rotary_scaling or {}
        if scaling.get("type") == "llama3":
            problems += [
                f"rope_scaling.{key}={scaling[key]}: Megatron-core has {value} built in, and Megatron-Bridge passes "
                "on the factor only; tune this model with the NeMo host"
                for key, value in _LLAMA3_CONSTANTS.items()
                if scaling[key] != value
            ]
        carried = {
            "llama3": self.rope_scaling and self.rope_scaling_factor,
            "linear": self.seq_len_interpolation_factor,
        }
        if scaling and carried[scaling["type"]] != scaling["factor"]:
            problems.append(
                f"rope_scaling {scaling['type']} with factor {scaling['factor']}: Megatron-Bridge does not pass it on "
                "for this family; tune this model with the NeMo host"
            )
        try:
            config = self.exit_config
        except ValueError as problem:
            problems.append(str(problem))
        else:
            if config.train != "exits":
                problems.append(f"early_exit.train={config.train!r}: this host tunes exits only; use the NeMo host")
            if not config.exits:
                problems.append("early_exit names no exits; add every: 1/4 or exits: [{layer: 3}]")
            try:
                place_exits(config.exits, **self._sizes)
            except ValueError as problem:
                problems.append(str(problem))
        if problems:
            raise ValueError("the early-exit model was not built:\n" + "\n".join(f"  {one}" for one in problems))

    @cached_property
    def exit_config(self) -> EarlyExitConfig:
        """The `early_exit` block."""
        return EarlyExitConfig.from_mapping(self.early_exit, num_layers=self.num_layers)

    @property
    def builds_all_layers(self) -> bool:
        """Whether the layers past the deepest exit and the final exit are built."""
        return self.full_depth or self.exit_config.needs_final_exit

    @property
    def _sizes(self) -> dict[str, Any]:
        return {
            "num_layers": self.num_layers,
            "num_stages": self.pipeline_model_parallel_size,
            "full_depth": self.builds_all_layers,
        }

    @property
    def placements(self) -> tuple[StagePlacement, ...]:
        """Layers and exits of every pipeline stage."""
        return place_exits(self.exit_config.exits, **self._sizes)

    def finalize(self) -> None:
        """Megatron-Bridge's, for any number of layers per stage: `provide` sets the split of the layers that run."""
        stages, self.pipeline_model_parallel_layout = self.pipeline_model_parallel_size, None
        if stages > 1 and self.pipeline_dtype is None:
            self.pipeline_dtype = self.params_dtype
        self.pipeline_model_parallel_size = 1
        try:
            super().finalize()
        finally:
            self.pipeline_model_parallel_size = stages

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> EarlyExitGPTModel:
        """Build this rank's stage. See `GPTModelProvider.provide`."""
        set_layer_split(self, self.placements)
        return build_stage(
            self,
            self.exit_config,
            self.placements,
            full_depth=self.builds_all_layers,
            transformer_engine=self.transformer_engine,
            vocab_size=self.vocab_size,
            padded_vocab_size=calculate_padded_vocab_size(
                self.vocab_size, self.make_vocab_size_divisible_by, self.tensor_model_parallel_size
            ),
            max_sequence_length=self.seq_length,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            position_embedding_type=self.position_embedding_type,
            rotary_percent=self.rotary_percent,
            rotary_base=self.rotary_base,
            rope_scaling=self.rope_scaling,
            rope_scaling_factor=self.rope_scaling_factor,
            seq_len_interpolation_factor=self.seq_len_interpolation_factor,
        )
