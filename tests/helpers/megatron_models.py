# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Early-exit models as NeMo builds them, in this process, made from tiny Hugging Face ones.

Importing this file switches the CPU host on for the rest of the process. NeMo is imported once, by the first model.
Tests that need the CPU host off run in a process of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.helpers.core_models import (  # noqa: F401 -- switches the CPU host on; most tests want these too
    ALL_ARCHITECTURES,
    exit_entry,
    exit_logits,
    microbatch,
    naive_logits,
    random_tokens,
    relative_difference,
    snapshot,
)
from tests.helpers.huggingface_models import save_tiny_model

ROOT = Path(__file__).parents[2]
REFERENCE_MODEL = ROOT / "assets" / "reference-model"
MICRO_BATCH, GLOBAL_BATCH = 2, 4


def reset_batch_sizes() -> None:
    """Forget the batch sizes of the last model: NeMo keeps them per process and refuses others."""
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    destroy_num_microbatches_calculator()


def cpu_trainer(max_steps: int = 1, callbacks: Sequence = (), **trainer: Any):
    """A trainer of our own builder on the CPU host, without logger and checkpoints."""
    from omegaconf import OmegaConf

    import nemo_ee.models  # noqa: F401 -- answers NeMo's Apex guards
    from nemo_ee.models.trainer import EarlyExitTrainerBuilder

    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "num_nodes": 1,
        "precision": 32,
        "max_steps": max_steps,
        "max_epochs": -1,
        "log_every_n_steps": 1,
        "val_check_interval": max_steps,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "gradient_clip_val": 1.0,
        "enable_progress_bar": False,
        "logger": False,
        "enable_checkpointing": False,
        "use_distributed_sampler": False,
        **trainer,
    }
    cfg = OmegaConf.create({"trainer": settings, "model": {"mcore_gpt": True, "gradient_as_bucket_view": False}})
    return EarlyExitTrainerBuilder(cfg).create_trainer(callbacks=list(callbacks))


def model_from_hugging_face(
    folder: Path, exits: Sequence[Mapping[str, Any]], *, trainer=None, full_depth: bool = True, **settings: Any
):
    """`MegatronEarlyExitGPTModel` with the weights of a Hugging Face directory, exits initialised as they say.

    Args:
        folder: the directory. The tokenizer is the reference model's: only token ids matter here.
        exits: entries of the `early_exit` block.
        trainer: default a fresh one.
        full_depth: build all layers and the final exit.
        settings: further keys of the model config.
    """
    from omegaconf import OmegaConf

    import nemo_ee.models  # noqa: F401 -- answers NeMo's Apex guards
    from nemo_ee.checkpoint.huggingface import HuggingFaceSource, read_backbone
    from nemo_ee.checkpoint.nemo_config import nemo_config
    from nemo_ee.models.megatron_early_exit_gpt_model import MegatronEarlyExitGPTModel

    reset_batch_sizes()
    config = {
        **nemo_config(read_backbone(folder)),
        "tokenizer": {"library": "huggingface", "type": str(REFERENCE_MODEL), "use_fast": True},
        "micro_batch_size": MICRO_BATCH,
        "global_batch_size": GLOBAL_BATCH,
        "make_vocab_size_divisible_by": 16,
        "gradient_as_bucket_view": False,
        "full_depth": full_depth,
        "early_exit": {"exits": [dict(exit) for exit in exits]},
        **settings,
    }
    model = MegatronEarlyExitGPTModel(OmegaConf.create(config), trainer or cpu_trainer())
    model.load_weights(HuggingFaceSource(folder), None, logged=False)
    return model


def tiny_pair(folder: Path, name: str, exits: Sequence[Mapping[str, Any]], **settings: Any):
    """(transformers model, early-exit model) on the same weights; see `TINY_MODELS` and `model_from_hugging_face`."""
    changes = settings.pop("changes", {})
    reference = save_tiny_model(folder, name, **changes)
    return reference, model_from_hugging_face(folder, exits, **settings)


def user_environment() -> dict[str, str]:
    """This environment as a user's shell has it: without what the CPU host and this process's groups left in it."""
    ours = "CUDA_VISIBLE_DEVICES NVIDIA_PYTORCH_VERSION CUDA_DEVICE_MAX_CONNECTIONS TORCHDYNAMO_DISABLE".split()
    ours += "MASTER_ADDR MASTER_PORT NODE_RANK RANK LOCAL_RANK WORLD_SIZE".split()
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@contextmanager
def script_config(name: str, overrides: Sequence[str]) -> Iterator[Any]:
    """conf/<name>.yaml with overrides, as Hydra gives it to the script; on the CPU, where the script has a trainer."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        on_cpu = ["trainer.accelerator=cpu"] if "trainer" in compose(name) else []
        yield compose(name, overrides=[*overrides, *on_cpu])


def write_data(prefix: Path, documents: Sequence[Sequence[int]]) -> Path:
    """`<prefix>.bin` and `.idx` in Megatron's format; returns the prefix."""
    import numpy
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix
