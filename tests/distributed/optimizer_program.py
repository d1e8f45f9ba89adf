# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Tune a tiny model with every kind of optimizer, resume under other layouts and kinds, and write JSON.

    python -m tests.distributed.optimizer_program <folder>

Imports NeMo once and forks the ranks of one layout after the other. `<folder>/start.nemo` and the data are those of
the layout tests. Every run takes four steps and saves after two; a resumed one takes the last two.
The module's top level stays light: Megatron's checkpoint writer imports it again in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

STEPS, SAVE_AFTER, BATCH = 4, 2, 4
# kind -> (model.optim.name, model.megatron_amp_O2)
KINDS = {
    "adamw": ("adamw", False),
    "distributed": ("mcore_distributed_optim", False),
    "half": ("adamw", True),
    "half-distributed": ("mcore_distributed_optim", True),
}
# ((tp, pp, dp, sequence parallel), [(kind, run whose checkpoint is resumed or None)]); a run is "<layout> <kind>".
# "alone" begins anew with one exit, on the last stage: the stages before it have nothing to train.
PLAN = [
    ((1, 1, 1, 0), [("adamw", None), ("half", None)]),
    (
        (1, 1, 2, 0),
        [
            ("adamw", None),
            ("distributed", None),
            ("half-distributed", None),
            ("distributed", "1120 distributed"),
            ("distributed", "1110 adamw"),
            ("half-distributed", "1120 half-distributed"),
        ],
    ),
    (
        (2, 1, 2, 1),
        [("distributed", None), ("half-distributed", None), ("half-distributed", "1110 half")],
    ),
    ((1, 2, 2, 0), [("distributed", None), ("distributed", "2121 distributed"), ("distributed", "alone")]),
    (
        (1, 1, 1, 0),
        [
            ("adamw", "1120 distributed"),
            ("half", "2121 half-distributed"),
            ("adamw", "1220 distributed"),
            ("adamw", "1110 half"),
        ],
    ),
]


def layout_name(layout: tuple[int, int, int, int]) -> str:
    """Digits of (tp, pp, dp, sequence parallel)."""
    return "".join(map(str, layout))


def checkpoint(folder: Path, run: str) -> Path:
    """Where a run saves; NeMo reads the number of consumed samples off the name."""
    return folder / f"{run.replace(' ', '-')}-consumed_samples={SAVE_AFTER * BATCH}.0"


def whole_digests(sharded: dict, vocabulary: int) -> dict[str, str]:
    """sha256 of every whole tensor of a sharded state dict (true vocabulary rows only), the same on every rank.

    Every element has to be saved by exactly one rank.
    """
    import torch
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

    shards = list(nested_values(sharded))
    for value in [value for value in shards if isinstance(value, ShardedTensorFactory)]:
        shards += nested_values(value.build())
    chunks = [
        (shard.key, tuple(shard.global_shape), tuple(shard.global_offset), shard.data.detach().float().clone())
        for shard in shards
        if isinstance(shard, ShardedTensor) and is_main_replica(shard.replica_id)
    ]
    everything: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everything, chunks)
    whole: dict[str, torch.Tensor] = {}
    times: dict[str, torch.Tensor] = {}
    for key, shape, offset, data in (chunk for rank in everything for chunk in rank):
        data = data.reshape(data.shape[-len(shape) :]) if data.dim() > len(shape) else data
        where = tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))
        whole.setdefault(key, torch.zeros(shape))[where] = data
        times.setdefault(key, torch.zeros(shape, dtype=torch.int))[where] += 1
    digests = {}
    for key, tensor in sorted(whole.items()):
        rows = slice(0, vocabulary) if "output" in key and not key.endswith("low_rank_a") else slice(None)
        assert (times[key][rows] == 1).all(), f"{key}: some element is saved by no rank or by several"
        digests[key] = hashlib.sha256(tensor[rows].contiguous().numpy().tobytes()).hexdigest()
    return digests


def facts(model) -> dict:
    """What this rank's optimizers hold, in elements."""
    from nemo_ee.megatron.optim.exit_optimizers import tensor_state

    exits = model._optimizer.exits
    trained = [parameter for exit in exits for parameter in exit.parameters.values()]
    stepped = [p for exit in exits for group in exit.optimizer.param_groups for p in group["params"]]
    moments = [t for exit in exits for p in exit.optimizer.state for t in tensor_state(exit.optimizer, p).values()]
    frozen = [parameter for parameter in model.model.parameters() if not parameter.requires_grad]
    return {
        "trained": sum(p.numel() for p in trained),
        "stepped": sum(p.numel() for p in stepped),
        "moments": sum(t.numel() for t in moments),
        "dtypes": sorted({str(p.dtype) for p in model.model.parameters()}),
        "stepped dtypes": sorted({str(p.dtype) for p in stepped}),
        "main gradients": sorted({str(p.main_grad.dtype) for p in trained if hasattr(p, "main_grad")}),
        "gradients of frozen": sum(hasattr(p, "main_grad") or p.grad is not None for p in frozen),
        "copies of frozen": sum(hasattr(p, "main_param") for p in frozen),
        "frozen": sum(p.numel() for p in frozen),
    }


def run(folder: Path, layout: tuple[int, int, int, int], rank: int, kind: str, resumed: str | None) -> None:
    """One run on one rank."""
    import torch
    from lightning.pytorch.callbacks import Callback

    from tests.distributed.layout_program import VOCABULARY, model_config, restore, trainer_for

    torch.set_num_threads(1)
    tp, pp, dp, sp = layout
    name, half = KINDS[kind]
    alone = resumed == "alone"
    result: dict = {}

    class Watch(Callback):
        """Digests of the exits and their optimizers when a run starts from a checkpoint and when it saves one."""

        def look(self, model) -> dict:
            shards = model.sharded_state_dict()
            exits = {} if half else whole_digests(shards, VOCABULARY)
            return {**exits, **whole_digests(model._optimizer.sharded_state_dict(shards), VOCABULARY)}

        def on_train_start(self, trainer, model) -> None:
            if resumed and not alone:
                result["loaded"] = self.look(model)

        def on_train_batch_end(self, trainer, model, *args) -> None:
            if trainer.global_step == SAVE_AFTER and not resumed:
                result["saved"] = self.look(model)
                trainer.save_checkpoint(f"{checkpoint(folder, f'{layout_name(layout)} {kind}')}.ckpt")

    block = {"early_exit": {"exits": [{"name": "layer4-mlp"}], "every": None}} if alone else {}
    config = model_config(folder, tp, pp, bool(sp), megatron_amp_O2=half, **block)
    config["optim"]["name"] = name
    settings = {"precision": "bf16" if half else 32}
    trainer, recorder = trainer_for(tp * pp * dp, max_steps=STEPS, callbacks=[Watch()], settings=settings, **config)
    model = restore(folder / "start.nemo", trainer, config)
    if resumed and not alone:
        trainer.ckpt_path = str(checkpoint(folder, resumed))  # as exp_manager does; NeMo looks for the samples there
    try:
        trainer.fit(model)
    except ValueError as problem:
        result["refused"] = str(problem)
    result["losses"] = recorder.steps
    result["facts"] = facts(model)
    if kind == "half-distributed" and not resumed:
        model.save_to(str(folder / f"{layout_name(layout)}-{kind}.nemo"))
    every: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, result["facts"])
    result["facts"] = every
    if rank == 0:
        title = f"{layout_name(layout)} {kind}" + (f" from {resumed}" if resumed else "")
        (folder / "results").mkdir(exist_ok=True)
        (folder / "results" / f"{title}.json").write_text(json.dumps(result))
        print(title, "done", flush=True)


def main(folder: Path) -> None:
    """Fork the ranks of one layout after the other."""
    from nemo_ee import cpu_host

    cpu_host.enable()
    import nemo_ee.models.megatron_early_exit_gpt_model  # noqa: F401 -- imported once, before the forks
    from tests.helpers.ranks import run_ranks

    def runs_of(rank: int, layout: tuple[int, int, int, int], runs: list) -> None:
        for kind, resumed in runs:
            run(folder, layout, rank, kind, resumed)

    for index, (layout, runs) in enumerate(PLAN):
        log = str(folder / f"{index}-{layout_name(layout)}")
        size = layout[0] * layout[1] * layout[2]
        run_ranks(lambda rank, layout=layout, runs=runs: runs_of(rank, layout, runs), size, timeout=240, log=log)
        print(f"layout {layout} done", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
