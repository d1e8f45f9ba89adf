# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Joint and LoRA training of tiny models under several layouts; writes what came out as JSON.

    python -m tests.distributed.joint_program <folder> <tp,pp,dp,sp> [<tp,pp,dp,sp> ...]

Imports NeMo once; each layout forks its ranks. `<folder>/<case>.nemo` and the data are there already (`write_starts`).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

STEPS, SAVED_AT = 4, 3
# A shared exit on the first and one on a middle stage: copies of the output weight that have to stay one weight.
EXITS = [
    {"layer": 1, "architecture": "mlp", "loss_weight": 0.5},
    {"layer": 2, "architecture": "norm", "output": "shared"},
    {"layer": 2, "architecture": "layer", "init": "lora", "rank": 2},
    {"layer": 3, "architecture": "mlp", "loss_weight": 2.0, "loss_weight_schedule": "linear"},
    {"layer": 4, "architecture": "norm", "output": "low_rank", "rank": 3},
]
# name -> (model, mode, further settings)
FULL = {
    "activations_checkpoint_granularity": "full",
    "activations_checkpoint_method": "uniform",
    "activations_checkpoint_num_layers": 1,
}
CASES = {
    "qwen3 joint": ("qwen3", "joint", {}),
    "gpt2 joint recomputed": ("gpt2", "joint", FULL),
    "qwen3 lora": ("qwen3", "lora", {}),
}
# One rank only: dropout draws differ between layouts.
DROPOUT = "qwen3 joint with dropout"
CASES_OF_ONE_RANK = {**CASES, DROPOUT: ("qwen3", "joint", {"hidden_dropout": 0.3, "attention_dropout": 0.3})}
LENGTH = 16


def write_starts(folder: Path) -> None:
    """`qwen3.nemo`, `gpt2.nemo` (tied, learned positions) of four layers, and `data.{bin,idx}`."""
    import torch

    from tests.helpers.huggingface_models import save_tiny_model
    from tests.helpers.megatron_models import write_data
    from tests.helpers.nemo_files import run_convert, with_tokenizer

    depth = {"qwen3": {"num_hidden_layers": 4}, "gpt2": {"n_layer": 4}}
    for name, changes in depth.items():
        save_tiny_model(folder / name, name, **changes)
        run_convert(with_tokenizer(folder / name), folder / f"{name}.nemo", EXITS)
    generator = torch.Generator().manual_seed(7)
    documents = [torch.randint(1, 130, (20 + 3 * index,), generator=generator).tolist() + [0] for index in range(12)]
    write_data(folder / "data", documents)


def settings(folder: Path, layout: tuple[int, int, int, int], mode: str, **options) -> dict:
    """The script's `model` block."""
    from tests.distributed.layout_program import model_config

    tp, pp, _, sp = layout
    config = model_config(folder, tp, pp, bool(sp), **options)
    config["early_exit"] = {"exits": [], "every": None, "train": mode, "lora": {"rank": 4, "merge": True}}
    return {"hidden_dropout": 0.0, "attention_dropout": 0.0, **config}


def run_case(folder: Path, layout: tuple[int, int, int, int], case: str) -> dict:
    """Train one case, then resume it at step 3 from what the first layout saved there."""
    import torch

    from tests.distributed.layout_program import restore, trainer_for
    from tests.helpers.megatron_models import reset_batch_sizes

    name, mode, options = CASES_OF_ONE_RANK[case]
    world_size = layout[0] * layout[1] * layout[2]
    checkpoint = folder / f"{case.replace(' ', '-')}--step={SAVED_AT}-consumed_samples={4 * SAVED_AT}.0"
    config = settings(folder, layout, mode, **options)

    def fit(resume: bool) -> tuple[list[dict[str, float]], dict[str, float], object]:
        reset_batch_sizes()
        recorder = _recorder(world_size, None if resume or checkpoint.exists() else checkpoint)
        trainer, validation = trainer_for(world_size, max_steps=STEPS, callbacks=[recorder], **config)
        trainer.val_check_interval = STEPS
        model = restore(folder / f"{name}.nemo", trainer, config)
        trainer.ckpt_path = str(checkpoint) if resume else None  # as NeMo's exp_manager does
        trainer.fit(model)
        return recorder.steps, validation.validation, model

    steps, validation, model = fit(resume=False)
    result = {"steps": steps, "validation": validation, "copies": None}
    weight = model._joint.output_weight
    if weight._group is not None:  # the copies of the output weight, after all steps
        low, high = weight._weight.detach().clone(), weight._weight.detach().clone()
        torch.distributed.all_reduce(low, op=torch.distributed.ReduceOp.MIN, group=weight._group)
        torch.distributed.all_reduce(high, op=torch.distributed.ReduceOp.MAX, group=weight._group)
        result["copies"] = float((high - low).abs().max())
    model.save_to(str(folder / f"{''.join(map(str, layout))}-{case.replace(' ', '-')}.nemo"))
    result["resumed"] = fit(resume=True)[0]
    return result


def _recorder(world_size: int, checkpoint: Path | None):
    """A callback that keeps losses and gradient norms of every step and saves once."""
    import torch
    from lightning.pytorch.callbacks import Callback

    class Recorder(Callback):
        """See above."""

        def __init__(self) -> None:
            self.steps: list[dict[str, float]] = []

        def on_train_batch_end(self, trainer, module, *args) -> None:
            metrics = trainer.callback_metrics
            losses = {k: float(v) for k, v in metrics.items() if k.endswith("/loss") and not k.startswith("val/")}
            norms: list = [None] * world_size
            torch.distributed.all_gather_object(norms, dict(module._optimizer.grad_norms))
            self.steps.append(losses | {f"norm {key}": value for rank in norms for key, value in rank.items()})
            if checkpoint is not None and trainer.global_step == SAVED_AT:
                trainer.save_checkpoint(str(checkpoint) + ".ckpt")

    return Recorder()


def main(folder: Path, layouts: list[tuple[int, int, int, int]]) -> None:
    """Write the starts, then fork the ranks of one layout after the other."""
    from nemo_ee import cpu_host

    cpu_host.enable()
    import nemo_ee.models.megatron_early_exit_gpt_model  # noqa: F401 -- imported once, before the forks
    from tests.helpers.ranks import run_ranks

    def run(rank: int, layout: tuple[int, int, int, int]) -> None:
        import torch

        torch.set_num_threads(1)
        cases = CASES_OF_ONE_RANK if layout[:3] == (1, 1, 1) else CASES
        results = {case: run_case(folder, layout, case) for case in cases}
        if rank == 0:
            (folder / f"{''.join(map(str, layout))}.json").write_text(json.dumps(results))

    run_ranks(lambda _: write_starts(folder), 1, timeout=240, log=str(folder / "starts"))
    for layout in layouts:
        name = "".join(map(str, layout))
        run_ranks(
            lambda rank, layout=layout: run(rank, layout),
            layout[0] * layout[1] * layout[2],
            timeout=240,
            log=str(folder / name),
        )
        print(f"layout {name} done", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [tuple(map(int, text.split(","))) for text in sys.argv[2:]])
