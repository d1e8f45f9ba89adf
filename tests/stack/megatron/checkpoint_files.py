# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What one version of Megatron-core writes and every other reads.

training/         distributed checkpoint: what trains, with the state of its optimizers
weights.nemo      model_weights/ (backbone) and exit_weights/
<part>.<rank>.pt  the tensors of both as the writing rank had them: "<key> <offset>" -> tensor
next.json         losses of the step after the checkpoint
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def write_checkpoints(run: Any, folder: Path) -> None:
    """Write a run's checkpoints, then make one step more. Every rank must call it."""
    from nemo_ee.checkpoint.distributed_checkpoint import save_distributed
    from nemo_ee.checkpoint.nemo_archive import write_nemo
    from nemo_ee.megatron.model.backbone_training import merged_backbone_to_save

    rank, model = torch.distributed.get_rank(), run.model.model
    state = run.state()
    save_distributed(state, folder / "training")
    torch.save(tensors_of(run.state()["model"]), folder / f"training.{rank}.pt")
    parts = {
        "model_weights": merged_backbone_to_save(model, "model."),
        "exit_weights": model.exit_sharded_state_dict(),
    }
    for part, shards in parts.items():
        torch.save(tensors_of(shards), folder / f"{part}.{rank}.pt")
        save_distributed(shards, folder / part)
    torch.distributed.barrier()
    if rank == 0:
        config = f"num_layers: {model.config.num_layers}\n"
        write_nemo(folder / "weights.nemo", {"model_config.yaml": config, **{part: folder / part for part in parts}})
    losses = run.step()
    if rank == 0:
        (folder / "next.json").write_text(json.dumps(losses))


def tensors_of(shards: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """This rank's tensors of a sharded state dict by key and offset, in the shape of the parameter."""
    from nemo_ee.megatron.model.exit_head_init import global_chunk, local_shards

    return {
        f"{shard.key} {global_chunk(shard)[0]}": shard.data.detach().clone().view(shard.local_shape)
        for shard in local_shards(dict(shards))
    }


def stored_tensors(folder: Path, part: str) -> dict[str, torch.Tensor]:
    """What `tensors_of` gave on all writing ranks."""
    paths = sorted(folder.glob(f"{part}.[0-9].pt"))
    assert paths, folder
    return {key: value for path in paths for key, value in torch.load(path, weights_only=True).items()}
