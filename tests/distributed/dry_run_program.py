# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""One rank of a real gloo run, watched as a dry run watches it: its counts go to <output>/<name>.<rank>.json.

tests/unit/planning/test_operation_trace.py compares the trace itself with counts by hand and by torch.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.exits.placement import place_exits
from nemo_ee.families.architecture import ALL_LINEARS, Architecture
from nemo_ee.planning.tuning_estimate import Layout

MODEL = Architecture(
    num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, kv_channels=8,
    vocab_size=200, max_position_embeddings=64, family="llama",
)  # fmt: skip
EXITS = [
    {"name": "norm1", "layer": 1, "architecture": "norm", "output": "shared"},
    {"name": "mlp2", "layer": 2, "architecture": "mlp"},
    {"name": "layer3", "layer": 3, "architecture": "layer", "output": "low_rank", "rank": 4},
    {"name": "lora4", "layer": 4, "architecture": "mlp", "init": "lora", "rank": 4},
]
GPT2 = replace(
    MODEL, num_query_groups=4, layer_norm=True, hidden_act="gelu", biases=ALL_LINEARS, learned_positions=True,
    tied=True, family="gpt2",
)  # fmt: skip
# name -> layout, further fields of the run, further keys of the `early_exit` block
RUNS: dict[str, tuple[Layout, dict[str, Any], dict[str, Any]]] = {
    "one": (Layout(1, 1, 1), {"half": False}, {"objective": "distillation"}),
    "tp2-half": (Layout(2, 1, 1), {}, {}),
    "tp2-sequence": (Layout(2, 1, 1), {"half": False, "sequence_parallel": True}, {}),
    "pp2-teacher": (Layout(1, 2, 1), {"half": False}, {"objective": "mixed", "distillation": {"top_k": 4}}),
    "dp2-sharded": (Layout(1, 1, 2), {"optimizer": "mcore_distributed_optim"}, {}),
    "gpt2-half": (Layout(1, 1, 1), {"model": GPT2}, {}),
    "tp2-pp2-dp2": (Layout(2, 2, 2), {}, {"objective": "distillation"}),
}


LARGE = replace(
    MODEL, hidden_size=512, ffn_hidden_size=1376, kv_channels=128, vocab_size=16000, max_position_embeddings=512
)  # fmt: skip


def run_of(name: str) -> Any:
    """The `Run` of that name; `large` is on one rank."""
    from nemo_ee.commands.dry_ranks import Run

    if name == "large":
        return replace(run_of("one"), model=LARGE, sequence_length=256)
    layout, fields, block = RUNS[name]
    early_exit = EarlyExitConfig.from_mapping({"exits": EXITS, **block}, num_layers=MODEL.num_layers)
    placements = place_exits(
        early_exit.exits, num_layers=MODEL.num_layers, num_stages=layout.pipeline, full_depth=True
    )
    fields = {"model": MODEL, "sequence_length": 16, "micro_batch": 2, **fields}
    return Run(early_exit=early_exit, placements=placements, layout=layout, **fields)


def rank_program(rank: int, name: str, output: Path) -> None:
    """Watch a step and write its counts."""
    import os

    import torch

    from nemo_ee.commands.dry_ranks import as_mapping, watched_step
    from nemo_ee.planning.operation_trace import OperationTrace
    from tests.helpers.core_models import set_up_groups

    os.environ["RANK"] = str(rank)
    run = run_of(name)
    set_up_groups(tensor=run.layout.tensor, pipeline=run.layout.pipeline, data=run.layout.data)
    with OperationTrace(dry=False) as trace:
        counts = as_mapping(watched_step(run, trace))
    (output / f"{name}.{rank}.json").write_text(json.dumps(counts), encoding="utf-8")
    torch.distributed.barrier()


class ResidentPeak:
    """Takes the place of a trace: the system's count of this process's memory between two calls of `reset`."""

    events: tuple = ()
    peak = 0.0

    def reset(self) -> None:
        """Keep the peak, and measure it from now on."""
        from benchmarks.measure import peak_bytes, reset_peak, resident_bytes

        self.peak = max(self.peak, float(peak_bytes()) if self.peak else 1.0)
        resident_bytes()  # gives free memory back
        reset_peak()

    def bytes_at_peak(self, _: Any) -> dict[str, int]:
        """Nothing is known by kind."""
        return {}


def resident_growth() -> float:
    """Peak of the resident bytes in a step of the large run, over those of a process that made a small one."""
    import torch

    from benchmarks.measure import resident_bytes
    from nemo_ee.commands.dry_ranks import watched_step
    from tests.helpers.core_models import set_up_groups

    set_up_groups()
    torch.set_num_threads(1)
    watched_step(run_of("one"), ResidentPeak())  # what libraries allocate once
    before, peak = resident_bytes(), ResidentPeak()
    watched_step(run_of("large"), peak)
    return peak.peak - before


def main(output: str) -> None:
    """All real runs, one after the other."""
    from functools import partial

    from tests.helpers import core_models  # noqa: F401  (switches the CPU host on)
    from tests.helpers.ranks import run_ranks

    for name, (layout, _, _) in RUNS.items():
        program = partial(rank_program, name=name, output=Path(output))
        run_ranks(program, layout.gpus, timeout=300, log=str(Path(output, name)))


if __name__ == "__main__":
    import sys

    main(*sys.argv[1:])
