# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A two-rank Megatron-core save; `test_chunk_reader.py` starts it, and it forks its ranks.

Usage: python -m tests.unit.checkpoint.save_as_rank <checkpoint directory> <path prefix of the ranks' output>
"""

from __future__ import annotations

import sys
from functools import partial

import torch

from tests.helpers.ranks import run_ranks

NUM_LAYERS, FFN, HIDDEN, VOCAB = 3, 6, 5, 10


def global_tensors() -> dict[str, torch.Tensor]:
    """The whole tensors that the two ranks share out, drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(5)
    return {
        "decoder.layers.mlp.linear_fc1.weight": torch.randn(NUM_LAYERS, 2 * FFN, HIDDEN, generator=generator),
        "decoder.layers.mlp.linear_fc2.weight": torch.randn(NUM_LAYERS, HIDDEN, FFN, generator=generator).half(),
        "embedding.word_embeddings.weight": torch.randn(VOCAB, HIDDEN, generator=generator).bfloat16(),
        "decoder.final_layernorm.weight": torch.randn(HIDDEN, generator=generator),
    }


def sharded_state(rank: int, size: int) -> dict[str, object]:
    """This rank's tensor-parallel shards: fc1 and embedding by rows, fc2 by columns, norm replicated."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    whole = global_tensors()
    state: dict[str, object] = {}
    for layer in range(NUM_LAYERS):
        for key, axis in (("decoder.layers.mlp.linear_fc1.weight", 0), ("decoder.layers.mlp.linear_fc2.weight", 1)):
            shard = whole[key][layer].chunk(size, axis)[rank].contiguous()
            state[f"{key}{layer}"] = ShardedTensor.from_rank_offsets(
                f"model.{key}", shard, (0, layer, NUM_LAYERS), (1 + axis, rank, size), prepend_axis_num=1
            )
    embedding = "embedding.word_embeddings.weight"
    state[embedding] = ShardedTensor.from_rank_offsets(
        f"model.{embedding}", whole[embedding].chunk(size, 0)[rank].contiguous(), (0, rank, size)
    )
    norm = "decoder.final_layernorm.weight"
    state[norm] = ShardedTensor.from_rank_offsets(f"model.{norm}", whole[norm], replica_id=rank)
    state["extra"] = ShardedObject("model.decoder.layers._extra_state", None, (1,), (0,), replica_id=rank)
    state["other"] = ShardedTensor.from_rank_offsets("optimizer.step", torch.ones(2), replica_id=rank)
    return state


def save(rank: int, directory: str) -> None:
    """Saves as rank `rank` of two."""
    from megatron.core import dist_checkpointing

    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    dist_checkpointing.save(sharded_state(rank, 2), directory)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    import megatron.core.dist_checkpointing  # noqa: F401 -- once, before the ranks are forked

    run_ranks(partial(save, directory=sys.argv[1]), 2, timeout=120, log=sys.argv[2])
