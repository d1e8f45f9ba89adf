# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Convert a tiny model and evaluate it under several layouts; each writes `<folder>/<layout>/exits.json`.

    python -m tests.functional.eval_program <folder> <tp,pp,dp,sp> [<tp,pp,dp,sp> ...]

Imports NeMo once; the conversion and each layout fork their ranks. The module's top level stays light: Megatron's
checkpoint writer imports it again in a process of its own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

EXITS = [
    {"layer": 1, "architecture": "norm"},
    {"layer": 2, "architecture": "mlp"},
    {"layer": 3, "architecture": "mlp", "init": "random", "output": "shared", "name": "random"},
    {"layer": 4, "architecture": "norm", "init": "lora", "output": "low_rank", "rank": 3, "name": "lora"},
]
# A vocabulary and a number of windows that no layout divides.
NUM_LAYERS, VOCABULARY, LENGTH = 5, 4101, 16


def main(folder: Path, layouts: list[str]) -> None:
    """Make the model and the data, then run every layout."""
    from nemo_ee import cpu_host

    cpu_host.enable()
    import nemo_ee.commands.convert  # noqa: F401 -- imported before the forks
    from nemo_ee.evaluation.evaluate import evaluate
    from tests.helpers.megatron_models import script_config
    from tests.helpers.ranks import run_ranks
    from tests.helpers.tiny_run import write_start

    def convert(rank: int) -> None:
        write_start(folder, EXITS, num_layers=NUM_LAYERS, vocabulary=VOCABULARY, length=LENGTH)

    run_ranks(convert, 1, timeout=180, log=str(folder / "convert"))
    for layout in layouts:
        tp, pp, dp, sp = map(int, layout.split(","))
        output = folder / layout.replace(",", "")
        overrides = [
            f"model.restore_from_path={folder / 'start.nemo'}", f"data={folder / 'data'}", f"output={output}",
            f"trainer.devices={tp * pp * dp}", "trainer.precision=32", f"model.tensor_model_parallel_size={tp}",
            f"model.pipeline_model_parallel_size={pp}", f"model.sequence_parallel={bool(sp)}",
            f"model.micro_batch_size={2 if dp == 1 else 1}", "model.global_batch_size=12",
        ]  # fmt: skip

        def work(rank: int, overrides: list[str] = overrides) -> None:
            with script_config("megatron_gpt_early_exit_eval", overrides) as cfg:
                evaluate(cfg)

        run_ranks(work, tp * pp * dp, timeout=180, log=str(output))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
