# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The models, batches, data and trainers that the tuning benchmarks run on.

Everything is real: NeMo's model class, Lightning's loop, Megatron-core's modules and data sets, gloo. `Sizes` holds
the sizes; the reference model keeps its own shape.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
from omegaconf import OmegaConf

from benchmarks.measure import ROOT
from nemo_ee.checkpoint.huggingface import HuggingFaceSource, read_backbone
from nemo_ee.checkpoint.nemo_config import nemo_config
from nemo_ee.megatron.loss.exit_metrics import ExitSums
from nemo_ee.megatron.model.microbatch import MicroBatch
from nemo_ee.megatron.pipeline.tuning_step import tune_global_batch
from nemo_ee.models.megatron_early_exit_gpt_model import MegatronEarlyExitGPTModel
from nemo_ee.models.trainer import EarlyExitTrainerBuilder

REFERENCE_MODEL = ROOT / "assets" / "reference-model"
OPTIMIZER = {"name": "adamw", "lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-5, "weight_decay": 0.01}
CLIP = 1.0
REFERENCE_VOCABULARY = 4096


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of the benchmarks.

    Attributes:
        batch, length: sequences of a microbatch and tokens of a sequence.
        microbatches: microbatches of a step on one process, unless the table has another number.
        pipeline_microbatches: microbatches of a step on two stages, unless the table has another number.
        vocabulary, large_vocabulary: vocabulary sizes of the wide model.
        hidden, ffn, layers: shape of the wide model.
        exits: exits of the wide model, evenly over its depth, the last one at its full depth.
        rounds: interleaved repetitions.
        processes: fresh processes for the memory of our own step with all exits and with one.
        steps: steps of a block in a pipeline.
        threads: threads of a process that runs alone; ranks of a pipeline have one each.
    """

    batch: int = 4
    length: int = 512
    microbatches: int = 4
    pipeline_microbatches: int = 2
    vocabulary: int = 32_000
    large_vocabulary: int = 128_000
    hidden: int = 256
    ffn: int = 704
    layers: int = 16
    exits: int = 8
    rounds: int = 5
    processes: int = 3
    steps: int = 10
    threads: int = 2


QUICK = Sizes(
    batch=1, length=16, microbatches=2, vocabulary=512, large_vocabulary=1024, hidden=64, ffn=128, layers=8, rounds=1,
    processes=1, steps=3, threads=1,
)  # fmt: skip


def data_prefix(folder: Path) -> Path:
    """Prefix of the data that `write_data` wrote into the parent of a run's own folder."""
    return folder.parent / "data"


def write_data(folder: Path, *, tokens: int = 300_000) -> None:
    """`<folder>/data.{bin,idx}` of about `tokens` tokens of the reference model's training text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(REFERENCE_MODEL / "tokenizer.json"))
    builder = IndexedDatasetBuilder(f"{folder / 'data'}.bin", dtype=numpy.uint16)
    written = 0
    with gzip.open(REFERENCE_MODEL / "corpus" / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            ids = tokenizer.encode(json.loads(line)["text"]).ids
            builder.add_document(torch.tensor(ids), [len(ids)])
            written += len(ids)
            if written >= tokens:
                break
    builder.finalize(f"{folder / 'data'}.idx")


def trainer(
    folder: Path, *, ranks: int = 1, steps: int = 1, log_every: int = 10, callbacks: Sequence[Callback] = ()
) -> Trainer:
    """A trainer as the tuning script makes one: our builder, TensorBoard, no validation."""
    settings = {
        "accelerator": "cpu", "devices": ranks, "num_nodes": 1, "precision": 32, "max_steps": steps, "max_epochs": -1,
        "log_every_n_steps": log_every, "val_check_interval": steps, "limit_val_batches": 0, "num_sanity_val_steps": 0,
        "gradient_clip_val": CLIP, "enable_progress_bar": False, "logger": False, "enable_checkpointing": False,
        "use_distributed_sampler": False,
    }  # fmt: skip
    model = {"mcore_gpt": True, "gradient_as_bucket_view": False, "distributed_timeout_minutes": 2}
    made = EarlyExitTrainerBuilder(OmegaConf.create({"trainer": settings, "model": model})).create_trainer(
        callbacks=list(callbacks)
    )
    made.logger = TensorBoardLogger(str(folder / "logs"))
    return made


def model_settings(sizes: Sizes, exits: Sequence[Mapping[str, Any]], **changes: Any) -> dict[str, Any]:
    """The reference model's config with exits; `changes` win."""
    micro = changes.pop("microbatches", sizes.microbatches)
    return {
        **nemo_config(read_backbone(REFERENCE_MODEL)),
        "tokenizer": {"library": "huggingface", "type": str(REFERENCE_MODEL), "use_fast": True},
        "micro_batch_size": sizes.batch,
        "global_batch_size": sizes.batch * micro,
        "encoder_seq_length": sizes.length,
        "seed": 1234,
        "distributed_timeout_minutes": 2,
        "gradient_as_bucket_view": False,
        "early_exit": {"exits": [dict(exit) for exit in exits]},
        "optim": {**OPTIMIZER, "sched": {"name": "Constant"}},
        **changes,
    }


def data_settings(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """The script's `model.data` block for a run whose own folder is `folder`."""
    prefix = data_prefix(folder)
    splits = {split: [str(prefix)] for split in ("train", "validation", "test")}
    return {
        "data_impl": "mmap", "data_prefix": splits, "index_mapping_dir": str(folder / "index"),
        "seq_length": sizes.length, "dataloader_type": "single", "num_workers": 0,
    }  # fmt: skip


def reference_model(settings: Mapping[str, Any], trainer: Trainer) -> MegatronEarlyExitGPTModel:
    """The reference model with its weights. Every rank must call it."""
    destroy_num_microbatches_calculator()  # NeMo keeps one per process
    model = MegatronEarlyExitGPTModel(OmegaConf.create(dict(settings)), trainer)
    model.load_weights(HuggingFaceSource(REFERENCE_MODEL), None, logged=False)
    return model


def wide_model(
    sizes: Sizes, trainer: Trainer, *, vocabulary: int, exits: int, full_depth: bool, objective: str = "cross_entropy"
) -> MegatronEarlyExitGPTModel:
    """A Llama of the wide shape with random weights and `exits` mlp exits evenly over its depth (one: the deepest)."""
    destroy_num_microbatches_calculator()
    layers = [sizes.layers * (index + 1) // exits for index in range(exits)]
    settings = model_settings(
        sizes, [{"layer": layer, "objective": objective} for layer in layers], num_layers=sizes.layers,
        hidden_size=sizes.hidden, ffn_hidden_size=sizes.ffn, vocab_size=vocabulary, full_depth=full_depth,
        microbatches=1,
    )  # fmt: skip
    model = MegatronEarlyExitGPTModel(OmegaConf.create(settings), trainer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02, generator=generator)
            else:
                parameter.fill_(1.0)
    return model


def random_batches(sizes: Sizes, count: int, *, vocabulary: int) -> list[MicroBatch]:
    """Microbatches of random tokens; every position counts."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        tokens = torch.randint(0, vocabulary, (sizes.batch, sizes.length + 1), generator=generator)
        positions = torch.arange(sizes.length).expand(sizes.batch, -1)
        mask = torch.ones(sizes.batch, sizes.length)
        batches.append(MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask, positions))
    return batches


class BareStep:
    """A tuning step without Lightning and data loading: gradients, clipping, optimizers."""

    def __init__(self, model: MegatronEarlyExitGPTModel) -> None:
        self.model = model
        model.configure_optimizers()
        self.sums = ExitSums(model.early_exit.names, torch.device("cpu"))

    def __call__(self, batches: Sequence[MicroBatch]) -> float:
        """One step; returns the sum of the exits' losses per token."""
        optimizers = self.model._optimizer
        optimizers.zero_grad()
        loss = tune_global_batch(
            self.model.tuning_context,
            batches,
            optimizers=optimizers,
            sums=self.sums,
            loss_weights={exit.name: exit.loss_weight for exit in self.model.placement.exits},
        )
        optimizers.step()
        return loss.item()
