# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""An early-exit model on plain Megatron-core: one stage from an architecture, its weights from checkpoints.

    HuggingFaceSource -> Architecture -> stage_of ------> EarlyExitGPTModel <- load_stage <- backbone, exits
    a host's config -------------------> build_stage ---^

`build_stage` and `load_stage` are what every host needs (NeMo, Bridge, none). `stage_of` adds what a host's config
says otherwise. Megatron's process groups exist before a model is built.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import Embedding, functional

from nemo_ee.checkpoint.chunk_reader import WeightSource
from nemo_ee.checkpoint.low_rank_weights import load_low_rank
from nemo_ee.checkpoint.module_weights import load_exits, load_shards
from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.exits.placement import StagePlacement
from nemo_ee.families.architecture import QKV, Architecture
from nemo_ee.megatron.model.backbone_training import prepare_backbone
from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel, set_layer_split
from nemo_ee.megatron.model.layer_spec import backbone_specs
from nemo_ee.megatron.pipeline.teacher_channel import keeps_output_weight

_ACTIVATIONS = {
    "silu": functional.silu,
    "relu": functional.relu,
    "gelu": partial(functional.gelu, approximate="tanh"),
    "gelu_erf": functional.gelu,
}


def transformer_config(a: Architecture, **settings) -> TransformerConfig:
    """Megatron's config of an architecture on the layout that is set up.

    Args:
        a: the backbone.
        settings: further fields of Megatron's config, e.g. `sequence_parallel`, `params_dtype`, `bf16`, fusions. They
            win over those that follow from the architecture.
    """
    fields = {
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "ffn_hidden_size": a.ffn_hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "num_query_groups": a.num_query_groups,
        "kv_channels": a.kv_channels,
        "normalization": "LayerNorm" if a.layer_norm else "RMSNorm",
        "layernorm_epsilon": a.norm_epsilon,
        "qk_layernorm": a.qk_norm,
        "activation_func": _ACTIVATIONS[a.hidden_act],
        "gated_linear_unit": a.gated,
        "add_bias_linear": a.bias,
        "add_qkv_bias": QKV in a.biases,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": a.init_method_std,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
    }
    fields["pipeline_dtype"] = settings.get("params_dtype", TransformerConfig.params_dtype)
    return TransformerConfig(**fields | settings)


def build_stage(
    config: TransformerConfig,
    early_exit: EarlyExitConfig,
    placements: Sequence[StagePlacement],
    *,
    full_depth: bool,
    transformer_engine: bool,
    **model_options,
) -> EarlyExitGPTModel:
    """This rank's stage, its weights not set. Every rank must call it.

    Args:
        config: Megatron's config, its layer split set by `set_layer_split`.
        early_exit: exits and `train`.
        placements: all stages.
        full_depth: the layers past the deepest exit and the final exit are built too.
        transformer_engine: build on Transformer Engine. `train: lora` builds on Megatron's own modules all the same.
        model_options: `vocab_size`, `padded_vocab_size`, `max_sequence_length` and options of Megatron's `GPTModel`.
    """
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return EarlyExitGPTModel(
        config,
        specs=backbone_specs(config, transformer_engine=transformer_engine and early_exit.train != "lora"),
        placement=placements[stage],
        full_depth=full_depth,
        pre_process=stage == 0,
        post_process=stage == len(placements) - 1,
        keep_output_weight=keeps_output_weight(early_exit, placements[stage]),
        **model_options,
    )


def stage_of(
    a: Architecture,
    early_exit: EarlyExitConfig,
    placements: Sequence[StagePlacement],
    *,
    full_depth: bool = True,
    transformer_engine: bool = False,
    vocab_multiple: int = 128,
    **settings,
) -> EarlyExitGPTModel:
    """This rank's stage of an architecture, what trains in it prepared, its weights not set. Every rank must call it.

    Args:
        a: the backbone.
        early_exit, placements, full_depth, transformer_engine: see `build_stage`.
        vocab_multiple: each tensor-parallel rank's share of the padded vocabulary is a multiple of it.
        settings: see `transformer_config`.
    """
    config = transformer_config(a, **settings)
    set_layer_split(config, placements)
    multiple = vocab_multiple * config.tensor_model_parallel_size
    scaling = a.rotary_scaling or {}
    model = build_stage(
        config,
        early_exit,
        placements,
        full_depth=full_depth,
        transformer_engine=transformer_engine,
        vocab_size=a.vocab_size,
        padded_vocab_size=math.ceil(a.vocab_size / multiple) * multiple,
        max_sequence_length=a.max_position_embeddings,
        share_embeddings_and_output_weights=a.tied,
        position_embedding_type="learned_absolute" if a.learned_positions else "rope",
        rotary_base=a.rotary_base,
        seq_len_interpolation_factor=scaling["factor"] if scaling.get("type") == "linear" else None,
    )
    if scaling.get("type") == "llama3":  # GPTModel's own option has Llama 3.1's numbers only
        rotary = model.rotary_pos_emb
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rotary.inv_freq = rotary._apply_scaling(rotary.inv_freq, *(scaling[key] for key in keys))
    positions = getattr(getattr(model, "embedding", None), "position_embeddings", None)
    if positions is not None and config.params_dtype is not torch.float32:  # Megatron's are fp32 whatever the dtype
        like = {"dtype": config.params_dtype, "device": positions.weight.device}
        model.embedding.position_embeddings = Embedding(*positions.weight.shape, **like).requires_grad_(False)
    if early_exit.train != "exits":
        prepare_backbone(model, early_exit)
    return model


def load_stage(
    model: EarlyExitGPTModel,
    backbone: WeightSource,
    exits: WeightSource | None,
    *,
    early_exit: EarlyExitConfig,
    seed: int,
    updates: WeightSource | None = None,
) -> None:
    """Fill a stage from checkpoints; exits that are not in `exits` are initialised by their `init`.

    Args:
        model: the stage, on whatever layout.
        backbone: the backbone's tensors under canonical keys.
        exits: tuned exits, keys `<exit name>.<parameter>`, or None.
        early_exit: the model's exits and `train`.
        seed: seed of random first values, the same for every layout.
        updates: low-rank updates of the backbone to train on, read with `train: lora`; None starts new ones.

    Raises:
        ValueError: model and weights do not belong together.
    """
    load_shards(model.backbone_sharded_state_dict(), backbone)
    if early_exit.train == "lora":
        load_low_rank(model, updates, seed=seed)
    load_exits(model, backbone, exits, seed=seed)
