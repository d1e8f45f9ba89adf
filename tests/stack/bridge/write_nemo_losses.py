# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes tests/data/stack/nemo_losses.json: five tuning steps of the NeMo host, batches and losses of every step.

python tests/stack/bridge/write_nemo_losses.py        in the environment of `make venv`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))

from tests.helpers.megatron_models import cpu_trainer, reset_batch_sizes  # noqa: E402

import torch  # isort: skip  # noqa: E402  after the CPU host is on
from lightning.pytorch.callbacks import Callback  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

START = ROOT / "tests" / "data" / "earlier" / "complete.nemo"
DATA = ROOT / "tests" / "data" / "earlier" / "data"
OUTPUT = ROOT / "tests" / "data" / "stack" / "nemo_losses.json"
STEPS, CLIP = 5, 0.5

STORED = [{"name": "layer2-mlp"}, {"name": "layer3-norm"}, {"name": "layer3-layer"}]
NEW = [
    {
        "name": "new-mlp",
        "layer": 1,
        "architecture": "mlp",
        "init": "copy",
        "lr": 3e-3,
        "loss_weight_schedule": "cosine",
    },
    {"name": "new-layer", "layer": 2, "architecture": "layer", "init": "random"},
]
CASES = {
    "labels": {"exits": [*STORED, *NEW]},
    "taught": {
        "exits": [*STORED, {**NEW[0], "objective": "mixed"}],
        "distillation": {"temperature": 2.0, "top_k": 16},
    },
}
OPTIM = {
    "name": "adamw",
    "lr": 1e-2,
    "betas": [0.9, 0.95],
    "eps": 1e-5,
    "weight_decay": 0.01,
    "sched": {"name": "LinearAnnealing", "warmup_steps": 1, "min_lr": 1e-3},
}


class Recorder(Callback):
    """The batches and every exit's losses of every step."""

    def __init__(self, model: Any) -> None:
        self.steps: list[dict[str, Any]] = []
        read = model._global_batch

        def recorded(iterator: Any) -> list:
            batches = read(iterator)
            kept = [{key: getattr(one, key).tolist() for key in ("tokens", "labels", "loss_mask")} for one in batches]
            self.steps.append({"batches": kept})
            return batches

        model._global_batch = recorded

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        found = trainer.callback_metrics.items()
        self.steps[-1]["losses"] = {
            key.split("/")[1]: float(value)
            for key, value in found
            if key.startswith("exit/") and key.endswith("/loss")
        }


def run(block: dict[str, Any]) -> dict[str, Any]:
    """The steps of one case, with the `early_exit` block as the model read it."""
    import nemo_ee.models  # noqa: F401
    from nemo_ee.models.connector import read_config
    from nemo_ee.models.megatron_early_exit_gpt_model import MegatronEarlyExitGPTModel
    from nemo_ee.models.run_config import merge_model_config

    reset_batch_sizes()
    data = {"data_impl": "mmap", "data_prefix": {"train": [str(DATA)], "validation": [str(DATA)], "test": None}}
    data |= {
        "index_mapping_dir": "/tmp/nemo_ee-index",
        "seq_length": 32,
        "dataloader_type": "single",
        "num_workers": 0,
    }
    changes = {"micro_batch_size": 2, "global_batch_size": 4, "early_exit": block, "data": data, "optim": OPTIM}
    config = merge_model_config(read_config(START), OmegaConf.create(changes))
    trainer = cpu_trainer(STEPS, gradient_clip_val=CLIP)
    model = MegatronEarlyExitGPTModel.restore_from(str(START), override_config_path=config, trainer=trainer)
    recorder = Recorder(model)
    trainer.callbacks.append(recorder)
    trainer.fit(model)
    norms = {
        name: {key: value.double().norm().item() for key, value in model.model.exits[name].named_parameters()}
        for name in model.early_exit.names
    }
    return {"early_exit": model.early_exit.to_mapping(), "steps": recorder.steps, "norms_after": norms}


def main() -> None:
    """Run every case and write the file."""
    cases = {name: run(block) for name, block in CASES.items()}
    written = {
        "made_by": "tests/stack/bridge/write_nemo_losses.py",
        "torch": torch.__version__,
        "optim": OPTIM,
        "clip": CLIP,
        "cases": cases,
    }
    OUTPUT.write_text(json.dumps(written) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
