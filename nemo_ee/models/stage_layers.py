# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The layer split of a NeMo model: prices this model's parts, splits its layers, and logs the split.

Costs from FLOPs are the same on every rank by themselves. Measured ones are not: world rank 0 measures, and its
numbers are broadcast before any module is built.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from omegaconf import DictConfig, OmegaConf

from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.exits.placement import StagePlacement, layers_that_run, place_exits, skips_last_mlp
from nemo_ee.families.architecture import Architecture
from nemo_ee.megatron.loss.vocab_parallel import chunk_bytes_on, num_buffers
from nemo_ee.planning.cost_measurement import stopwatch
from nemo_ee.planning.cost_model import ModelShape, StageCosts, count_flops
from nemo_ee.planning.layer_split import LayerSplitConfig, describe_split, layers_per_stage

if TYPE_CHECKING:
    from nemo_ee.models.megatron_early_exit_gpt_model import MegatronEarlyExitGPTModel

logger = logging.getLogger(__name__)

_CHOSEN_BY = {"parameters": "FLOPs", "measured": "measured times", "even": "number of layers"}


def read_layer_split(model: MegatronEarlyExitGPTModel, cfg: DictConfig) -> LayerSplitConfig:
    """Read `model.layer_split`; nothing has been built yet.

    Raises:
        ValueError: nothing to run, more stages than layers that run, or problems of the block.
    """
    sizes = _sizes(model, cfg)
    place_exits(model.early_exit.exits, **sizes)
    block = OmegaConf.to_container(cfg, resolve=True).get("layer_split")
    return LayerSplitConfig.from_mapping(block, exits=model.early_exit.exits, **sizes)


def _sizes(model: MegatronEarlyExitGPTModel, cfg: DictConfig) -> dict[str, Any]:
    return {
        "num_layers": cfg.num_layers,
        "num_stages": cfg.get("pipeline_model_parallel_size", 1),
        "full_depth": model.full_depth or not model.early_exit.exits,
    }


def model_shape(cfg: DictConfig, config: TransformerConfig, *, padded_vocab_size: int) -> ModelShape:
    """The sizes that products depend on, from NeMo's and Megatron's config."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Architecture(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        hidden_act="silu" if config.gated_linear_unit else "gelu",  # only the gate counts
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups or config.num_attention_heads,
        kv_channels=config.kv_channels,
        vocab_size=padded_vocab_size,
        max_position_embeddings=cfg.encoder_seq_length,
    )
    return ModelShape(
        model,
        sequence=cfg.encoder_seq_length,
        micro_batch=cfg.get("micro_batch_size") or 1,
        fused_attention=True,
        tensor_parallel=config.tensor_model_parallel_size,
        chunk_bytes=chunk_bytes_on(
            torch.device(device),
            padded_vocab_size // config.tensor_model_parallel_size,
            buffers=num_buffers(torch.bfloat16 if config.bf16 else config.params_dtype),
        ),
        transformer_engine=bool(cfg.get("transformer_engine")),
    )


def choose_placements(model: MegatronEarlyExitGPTModel, config: TransformerConfig) -> tuple[StagePlacement, ...]:
    """Layers and exits of every stage; logs them on world rank 0. Every rank must call it, before modules are built.

    Args:
        model: has read its configs and its vocabulary; process groups are set up here if they are needed and missing.
        config: Megatron's transformer config, for its sizes.
    """
    cfg, exits, split = model.cfg, model.early_exit.exits, model.layer_split
    sizes = _sizes(model, cfg)
    if sizes["num_stages"] == 1:
        return place_exits(exits, **sizes)
    layer_costs = _layer_costs(model, config, full_depth=sizes["full_depth"])
    counts = layers_per_stage(split, sizes["num_stages"], layer_costs)
    placements = place_exits(exits, **sizes, layers_per_stage=counts)
    if model.trainer.global_rank == 0:
        chosen_by = "model.layer_split.layers" if split.layers is not None else _CHOSEN_BY[split.cost]
        logger.info(describe_split(placements, layer_costs, chosen_by))
    return placements


def _layer_costs(model: MegatronEarlyExitGPTModel, config: TransformerConfig, *, full_depth: bool) -> list[float]:
    """Cost of every layer that runs, with its exits, embedding or final exit, in units of one layer's forward."""
    cfg, exits, split = model.cfg, model.early_exit.exits, model.layer_split
    shape = model_shape(cfg, config, padded_vocab_size=model.padded_vocab_size)
    measured = split.layers is None and split.cost == "measured"
    costs = _measured_costs(model, shape) if measured else _costs(model, shape, count_flops)
    layers_to_run = layers_that_run(exits, num_layers=cfg.num_layers, full_depth=full_depth)
    # With full depth for validation alone, the last layers run in every step, but the final output only in validation.
    final_exit = bool(cfg.get("full_depth")) or not exits or _step_runs_final_exit(model.early_exit)
    return split.costs.over(costs).per_layer(
        exits,
        layers_to_run=layers_to_run,
        skip_last_mlp=skips_last_mlp(exits, layers_to_run=layers_to_run, full_depth=full_depth),
        final_exit=full_depth and final_exit,
    )


def _step_runs_final_exit(early_exit: EarlyExitConfig) -> bool:
    """Whether a training step forms the final exit's logits on the last stage: to train it, or for its top-k."""
    return early_exit.train != "exits" or (early_exit.has_teacher and early_exit.distillation.top_k is not None)


def _costs(model: MegatronEarlyExitGPTModel, shape: ModelShape, price) -> StageCosts:
    early_exit = model.early_exit
    whole = early_exit.has_teacher and early_exit.distillation.top_k is None
    taught = [name for name in early_exit.names if whole and early_exit.objective_of(name) != "cross_entropy"]
    mixed = model.torch_dtype is torch.bfloat16 and not model.cfg.get("megatron_amp_O2")  # see `exits_in_turn`
    stages = None if mixed else model.cfg.get("pipeline_model_parallel_size", 1)
    return StageCosts.of(shape, early_exit.exits, price, train=early_exit.train, taught=taught, num_stages=stages)


def _measured_costs(model: MegatronEarlyExitGPTModel, shape: ModelShape) -> StageCosts:
    """World rank 0's measurement, or the reason why it failed, on every rank."""
    if not parallel_state.is_initialized():
        model.set_up_process_groups()
    outcome: list[StageCosts | str] = [""]
    if torch.distributed.get_rank() == 0:
        dtype = torch.bfloat16 if model.torch_dtype is torch.bfloat16 else torch.float32
        try:
            outcome = [_costs(model, shape, stopwatch(model.trainer.strategy.root_device, dtype))]
        except RuntimeError as problem:  # out of memory, an operation that the device lacks
            outcome = [str(problem)]
    torch.distributed.broadcast_object_list(outcome, src=0)
    (costs,) = outcome
    if isinstance(costs, str):
        raise ValueError(
            f"model.layer_split.cost=measured: timing the model's products on rank 0 failed ({costs}); use "
            "model.layer_split.cost=parameters"
        )
    return costs
