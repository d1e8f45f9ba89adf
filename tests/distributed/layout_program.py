# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Tune, save and load a tiny model under every layout, and write what came out as JSON.

    python -m tests.distributed.layout_program <folder> <tp,pp,dp,sp> [<tp,pp,dp,sp> ...]

Imports NeMo once; each layout forks its ranks, which run every case, save once, and load what earlier layouts saved.
The module's top level stays light: Megatron's checkpoint writer imports it again in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

EXITS = [
    {"layer": 1, "architecture": "mlp"},
    {"layer": 2, "architecture": "norm", "output": "shared"},
    {"layer": 2, "architecture": "layer", "init": "random"},
    {"layer": 3, "architecture": "mlp", "init": "lora", "output": "low_rank", "rank": 4},
    {"layer": 4, "architecture": "embedding"},
    {"layer": 4, "architecture": "mlp", "lr": 2.0e-3},
    {"layer": 4, "architecture": "layer", "init": "lora", "name": "lora-layer"},
]
# Embedding exits see the raw hidden state: with norm exits trained too, every kind of parameter has a gradient.
NUM_LAYERS, VOCABULARY, LENGTH, STEPS = 5, 4100, 16, 5

# Exits that learn from the final exit: on the first stage and on later ones, beside one that does not.
TAUGHT_EXITS = [
    {"name": "layer1-mlp", "objective": "distillation"},
    {"name": "layer2-norm", "objective": "mixed"},
    {"name": "layer2-layer"},
    {"name": "layer4-mlp", "objective": "distillation"},
]
TAUGHT = {
    "whole": {"distillation": {"temperature": 1.5, "weight": 0.4}},
    "top-k": {"distillation": {"temperature": 0.8, "weight": 0.4, "top_k": 6}, "token_weights": "confidence"},
}


def model_config(folder: Path, tp: int, pp: int, sequence_parallel: bool, **options) -> dict:
    """The script's `model` block of a tuning run."""
    data = {"train": [str(folder / "data")], "validation": [str(folder / "data")], "test": [str(folder / "data")]}
    return {
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "sequence_parallel": sequence_parallel,
        "distributed_timeout_minutes": 2,
        "gradient_as_bucket_view": False,
        "data": {
            "data_impl": "mmap",
            "data_prefix": data,
            "index_mapping_dir": str(folder / "index"),
            "seq_length": LENGTH,
            "dataloader_type": "single",
            "num_workers": 0,
            "eod_mask_loss": True,
        },
        "optim": {
            "name": "adamw",
            "lr": 1e-3,
            "betas": [0.9, 0.95],
            "eps": 1e-5,
            "weight_decay": 0.01,
            "sched": {"name": "LinearAnnealing", "warmup_steps": 1, "min_lr": 1e-4},
        },
        **options,
    }


def trainer_for(world_size: int, *, max_steps: int = STEPS, callbacks=(), settings: dict | None = None, **model):
    """A trainer without logger; returns (trainer, recorded losses by step). `settings` are laid over the trainer's."""
    from lightning.pytorch.callbacks import Callback
    from omegaconf import OmegaConf

    from nemo_ee.models.trainer import EarlyExitTrainerBuilder

    class Recorder(Callback):
        """Keeps every per-exit loss of every step."""

        def __init__(self) -> None:
            self.steps: list[dict[str, float]] = []
            self.validation: dict[str, float] = {}

        def on_train_batch_end(self, trainer, *args) -> None:
            metrics = trainer.callback_metrics
            self.steps.append(
                {k: float(v) for k, v in metrics.items() if k.startswith("exit/") and k.endswith("/loss")}
            )

        def on_validation_end(self, trainer, *args) -> None:
            metrics = trainer.callback_metrics
            self.validation = {k: float(v) for k, v in metrics.items() if k.startswith("val/")}

    recorder = Recorder()
    cfg = OmegaConf.create(
        {
            "trainer": {
                "accelerator": "cpu",
                "devices": world_size,
                "num_nodes": 1,
                "precision": 32,
                "max_steps": max_steps,
                "max_epochs": -1,
                "log_every_n_steps": 1,
                "val_check_interval": STEPS,
                "limit_val_batches": 2,
                "num_sanity_val_steps": 0,
                "gradient_clip_val": 1.0,
                "enable_progress_bar": False,
                "logger": False,
                "enable_checkpointing": False,
                "use_distributed_sampler": False,
                **(settings or {}),
            },
            "model": {"mcore_gpt": True, **model},
        }
    )
    return EarlyExitTrainerBuilder(cfg).create_trainer(callbacks=[recorder, *callbacks]), recorder


def restore(path: Path, trainer, config: dict, **connector):
    """Restore a `.nemo` with the script's settings over the stored ones."""
    from omegaconf import OmegaConf

    from nemo_ee.models.connector import EarlyExitSaveRestoreConnector, read_config
    from nemo_ee.models.megatron_early_exit_gpt_model import MegatronEarlyExitGPTModel
    from nemo_ee.models.run_config import merge_model_config

    return MegatronEarlyExitGPTModel.restore_from(
        str(path),
        override_config_path=merge_model_config(read_config(path), OmegaConf.create(config)),
        trainer=trainer,
        save_restore_connector=EarlyExitSaveRestoreConnector(**connector),
    )


def gathered_digests(model) -> dict[str, str]:
    """sha256 of every whole tensor of the exits (true vocabulary rows only), the same on every rank."""
    import torch

    from nemo_ee.megatron.model.exit_head_init import global_chunk, local_shards

    chunks = []
    for shard in local_shards(model.sharded_state_dict()):
        offset, shape = global_chunk(shard)
        chunks.append(
            (shard.key, tuple(shard.global_shape), offset, shape, shard.data.detach().reshape(shape).clone())
        )
    everything: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everything, chunks)
    whole: dict[str, torch.Tensor] = {}
    for key, global_shape, offset, shape, data in (chunk for rank in everything for chunk in rank):
        target = whole.setdefault(key, torch.full(global_shape, float("nan")))
        target[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))] = data
    digests = {}
    for key, tensor in sorted(whole.items()):
        rows = tensor[:VOCABULARY] if "output" in key and not key.endswith("low_rank_a") else tensor
        assert not torch.isnan(rows).any(), f"{key}: some part of it is on no rank"
        digests[key] = hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest()
    return digests


def run_layout(folder: Path, layout: tuple[int, int, int, int], rank: int, saved_by: list[str]) -> None:
    """Everything one rank does under one layout."""
    import torch

    from nemo_ee.models import stage_layers as layer_split
    from nemo_ee.models.connector import read_config

    if rank:
        layer_split.stopwatch = None  # only rank 0 may measure; the others take its numbers
    tp, pp, dp, sp = layout
    world_size, name = tp * pp * dp, "".join(map(str, layout))
    torch.set_num_threads(1)
    result: dict = {}
    split = {"layers": [1, 4] if pp == 2 and dp == 2 else None, "cost": "measured"}
    config = model_config(folder, tp, pp, bool(sp), val_agreement=True, layer_split=split)
    trainer, recorder = trainer_for(world_size, **config)
    model = restore(folder / "start.nemo", trainer, config)
    result["start"] = gathered_digests(model)
    result["layers"] = [stage.num_layers for stage in model.placements]
    trainer.fit(model)
    result["losses"], result["validation"] = recorder.steps, recorder.validation
    result["tuned"] = gathered_digests(model)
    model.save_to(str(folder / f"{name}.nemo"))
    result["stores its split"] = "layer_split" in read_config(folder / f"{name}.nemo")
    trainer.save_checkpoint(str(folder / f"{name}-end.ckpt"))
    for other in saved_by:
        other_split = {**config, "val_agreement": False, "layer_split": {"cost": "even"}}
        loaded = restore(folder / f"{other}.nemo", trainer, other_split)
        result[f"loaded {other}"] = gathered_digests(loaded)
    # A run truncated at its only exit: on two stages the first one has nothing to train.
    block = {"early_exit": {"exits": [{"name": "layer4-mlp"}], "every": None}}
    alone = model_config(folder, tp, pp, bool(sp), **block, layer_split={"layers": [1, 3] if pp == 2 else None})
    trainer, recorder = trainer_for(world_size, **alone)
    model = restore(folder / "start.nemo", trainer, alone)
    trainer.fit(model)
    result["alone"] = recorder.steps
    result["alone layers"] = len(model.model.decoder.layers)
    for kind, block in TAUGHT.items():
        block = {**block, "exits": TAUGHT_EXITS, "every": None}
        taught = model_config(folder, tp, pp, bool(sp), early_exit=block)
        trainer, recorder = trainer_for(world_size, **taught)
        trainer.fit(restore(folder / "start.nemo", trainer, taught))
        result[f"taught {kind}"] = {"losses": recorder.steps, "validation": recorder.validation}
    if rank == 0:
        (folder / f"{name}.json").write_text(json.dumps(result))


def main(folder: Path, layouts: list[tuple[int, int, int, int]]) -> None:
    """Fork the ranks of one layout after the other."""
    from nemo_ee import cpu_host

    cpu_host.enable()
    import nemo_ee.models.megatron_early_exit_gpt_model  # noqa: F401 -- imported once, before the forks
    from tests.helpers.ranks import run_ranks

    done: list[str] = []
    for layout in layouts:
        name = "".join(map(str, layout))
        run_ranks(
            lambda rank, layout=layout: run_layout(folder, layout, rank, list(done)),
            layout[0] * layout[1] * layout[2],
            timeout=240,
            log=str(folder / name),
        )
        done.append(name)
        print(f"layout {name} done", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [tuple(map(int, text.split(","))) for text in sys.argv[2:]])
