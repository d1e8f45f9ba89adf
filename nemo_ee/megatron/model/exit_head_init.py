# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""First values of an exit head: copied from the backbone's own modules, or random (EE-Tuning, section 2.2).

    output projection   <- the backbone's output layer (the word embeddings where they are tied)
    norm                <- the final norm
    own MLP             <- layer k's MLP, with the norm in front of it
    own layer           <- the last transformer layer

Every rank reads the slices it holds from the checkpoint itself, so no stage receives weights from another. Random
matrices are drawn whole from a generator seeded by (seed, exit name, parameter) and then sliced: the same for every
layout.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from nemo_ee.megatron.loss.vocab_parallel import output_weight_key
from nemo_ee.megatron.model.exit_head import ExitHead

# (canonical key, offset, shape) -> that chunk of the backbone's tensor; vocabulary rows past the end read as zeros.
ReadBackbone = Callable[[str, tuple[int, ...], tuple[int, ...]], Tensor]


def local_shards(sharded_state_dict: dict) -> list[ShardedTensor]:
    """The sharded tensors of a sharded state dict, gated MLPs split into their two halves; `.data` are live views."""
    built = [v.build() if isinstance(v, ShardedTensorFactory) else v for v in nested_values(sharded_state_dict)]
    return [value for value in nested_values(built) if isinstance(value, ShardedTensor)]


def global_chunk(shard: ShardedTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(offset, shape) of a shard in its global tensor, stacked axes in front included."""
    return tuple(shard.global_offset), (1,) * shard.prepend_axis_num + tuple(shard.local_shape)


def backbone_key(key: str, *, exit_layer: int, num_layers: int, tied: bool) -> tuple[str, int | None]:
    """Copy source of an exit's parameter: (canonical backbone key, layer index in the stacked tensor or None)."""
    if key == "output.weight":
        return output_weight_key(tied), None
    if key.startswith("norm."):
        return f"decoder.final_layernorm.{key[len('norm.') :]}", None
    if key.startswith("mlp."):
        return f"decoder.layers.{key}", exit_layer - 1
    assert key.startswith("layer."), key
    return f"decoder.layers.{key[len('layer.') :]}", num_layers - 1


@torch.no_grad()
def initialise_exit_head(
    head: ExitHead,
    read_backbone: ReadBackbone,
    *,
    num_layers: int,
    vocab_size: int,
    tied: bool,
    std: float,
    seed: int,
) -> None:
    """Fill a head's parameters in place, by its `init`.

    Args:
        head: the head, on whatever layout.
        read_backbone: reads chunks of the backbone's tensors.
        num_layers: L of the whole backbone.
        vocab_size: true vocabulary size; padded rows become zero.
        tied: the backbone's output layer is its word embeddings.
        std: standard deviation of random matrices (`init_method_std`).
        seed: used where the exit has no seed of its own.
    """
    exit = head.exit
    for shard in local_shards(head.sharded_state_dict()):
        offset, shape = global_chunk(shard)
        own_mlp_norm = exit.architecture == "mlp" and ".layer_norm_" in shard.key
        if "low_rank_" in shard.key or (exit.init == "random" and not own_mlp_norm):
            own_seed = seed if exit.seed is None else exit.seed
            drawn = _random_chunk(head, shard, offset, std=std, vocab_size=vocab_size, seed=own_seed)
            shard.data.copy_(drawn.view(shard.data.shape))
            continue
        key, layer = backbone_key(shard.key, exit_layer=exit.layer, num_layers=num_layers, tied=tied)
        if layer is not None:
            offset, shape = (layer, *offset), (1, *shape)
        shard.data.copy_(read_backbone(key, offset, shape).view(shard.data.shape))


def _random_chunk(
    head: ExitHead, shard: ShardedTensor, offset: tuple[int, ...], *, std: float, vocab_size: int, seed: int
) -> Tensor:
    """This rank's slice of a parameter's random first value.

    Matrices are N(0, std), those that write to the residual stream scaled by 1/sqrt(2k); norms are 1, biases 0;
    of a low-rank update A is N(0, 1/in) and B zero.
    """
    key, local_shape = shard.key, tuple(shard.data.shape)
    if key.endswith("bias") or key.endswith("low_rank_b"):
        return torch.zeros(local_shape)
    if len(local_shape) == 1:  # a norm; a zero-centred one adds 1 to its weight itself
        return torch.full(local_shape, 0.0 if head.config.layernorm_zero_centered_gamma else 1.0)
    global_shape = list(shard.global_shape)
    if key.startswith("output.") or key.startswith("output_update."):
        global_shape[0] = min(global_shape[0], vocab_size) if key.endswith("weight") else global_shape[0]
    scale = std
    if key.endswith("low_rank_a"):
        scale = 1.0 / math.sqrt(global_shape[-1])
    elif "linear_fc2." in key or "linear_proj." in key:
        scale = std / math.sqrt(2.0 * head.exit.layer)
    whole = seeded_normal(global_shape, f"{seed}/{head.exit.name}/{key}") * scale
    rows, columns = (slice(start, start + length) for start, length in zip(offset, local_shape, strict=True))
    chunk = torch.zeros(local_shape)
    part = whole[rows, columns]
    chunk[: part.shape[0], : part.shape[1]] = part
    return chunk


def seeded_normal(shape: list[int], seed: str) -> Tensor:
    """A whole N(0, 1) matrix from a generator of its own: every rank draws the same one and slices it."""
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator)
