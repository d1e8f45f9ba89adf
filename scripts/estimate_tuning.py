# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Time and memory of exit tuning on paper: Llama-2 7B, 13B and 70B, 1 and 8 `mlp` exits, up to 1,024 GPUs.

    python scripts/estimate_tuning.py                            # the fastest layout that fits on 1, 8, 64, 1024 GPUs
    python scripts/estimate_tuning.py --model 13B --exits 8 --layout 2,4,8 --layout 4,2,8 --sequences 256
    python scripts/estimate_tuning.py --peak-tflops 989 --data-link-gb-s 50 --json estimate.json           # H100

The default run is that of EE-Tuning's scripts (arXiv 2402.00518): 40,000 steps of 16 x 2048 tokens, 1.31e9 in
all. Every assumption is an option; the JSON holds them beside the results, stage by stage. Nothing here was measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from nemo_ee.planning.tuning_estimate import (
    LLAMA_2,
    Assumptions,
    Estimate,
    Layout,
    estimate,
    fastest_layout,
    mlp_exits,
)

_HELP = {
    "peak_tflops": "dense bf16 TFLOP/s of one GPU",
    "utilisation": "share of the peak that matrix products reach",
    "memory_gb": "memory of one GPU, 1e9 bytes",
    "memory_bandwidth_gb_s": "memory bandwidth of one GPU",
    "tensor_link_gb_s": "per GPU and direction inside a node",
    "data_link_gb_s": "per GPU and direction between nodes",
    "bytes_backbone": "per parameter of the backbone",
    "bytes_weight": "per trained parameter",
    "bytes_gradient": "per trained parameter",
    "bytes_optimizer": "per trained parameter: master weight and moments",
    "bytes_activation": "per number in a hidden state",
    "distributed_optimizer": "share optimizer state out over data-parallel ranks",
    "chunk_mb": "fp32 logits of one loss chunk, 2**20 bytes",
    "fixed_gb": "CUDA context, communication buffers, fragmentation",
    "steps": "optimizer steps",
    "sequences": "sequences per step over all ranks",
    "sequence_length": "tokens per sequence",
    "micro_batch": "sequences per microbatch",
    "fused_attention": "attention skips the masked half of the square",
    "full_depth": "the layers past the deepest exit run too, and the final exit, as a teacher needs them",
    "transformer_engine": "its modules; torch's norms, without it, keep two fp32 copies of a hidden state",
}


def _layout(text: str) -> Layout:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not TP,PP,DP; write 4,2,8")
    return Layout(*sizes)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; one option per field of `Assumptions`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", action="append", choices=list(LLAMA_2), help="repeatable; default all")
    parser.add_argument("--exits", action="append", type=int, help="number of mlp exits; repeatable; default 1 and 8")
    parser.add_argument("--gpus", action="append", type=int, help="repeatable; default 1, 8, 64 and 1024")
    parser.add_argument("--layout", action="append", type=_layout, help="TP,PP,DP instead of the fastest; repeatable")
    parser.add_argument("--json", type=Path, help="file for assumptions and results")
    for field in dataclasses.fields(Assumptions):
        name, text = f"--{field.name.replace('_', '-')}", f"{_HELP[field.name]} (default {field.default})"
        if isinstance(field.default, bool):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        else:
            parser.add_argument(name, type=type(field.default), default=field.default, help=text)
    options = parser.parse_args(arguments)
    problems = [f"--exits {count}: at least 1" for count in options.exits or () if count < 1]
    problems += [f"--gpus {count}: at least 1" for count in options.gpus or () if count < 1]
    for field in dataclasses.fields(Assumptions):
        value = getattr(options, field.name)
        if not isinstance(value, bool) and value < 0 or (field.name in _POSITIVE and value <= 0):
            problems.append(f"--{field.name.replace('_', '-')} {value}: must be greater than 0")
    if problems:
        parser.error("; ".join(problems))
    return options


_POSITIVE = (
    "peak_tflops utilisation memory_gb memory_bandwidth_gb_s tensor_link_gb_s data_link_gb_s chunk_mb steps sequences "
    "sequence_length micro_batch"
).split()


def estimates(options: argparse.Namespace, assumptions: Assumptions) -> list[tuple[str, int, int, Estimate | None]]:
    """(model, number of exits, GPUs, estimate or None where no layout fits) for the options.

    Raises:
        ValueError: a given layout does not go with a model or the batch.
    """
    rows: list[tuple[str, int, int, Estimate | None]] = []
    for name in options.model or LLAMA_2:
        model = LLAMA_2[name]
        for count in options.exits or (1, 8):
            exits = mlp_exits(model, count)
            if options.layout:
                rows += [
                    (name, count, layout.gpus, estimate(model, exits, layout, assumptions))
                    for layout in options.layout
                ]
                continue
            for gpus in options.gpus or (1, 8, 64, 1024):
                rows.append((name, count, gpus, fastest_layout(model, exits, gpus, assumptions)))
    return rows


def table(rows: list[tuple[str, int, int, Estimate | None]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| Llama-2 | exits | GPUs | TP x PP x DP | layers per stage | hours | GPU-hours | tokens/s | GB per GPU "
        "| slowest stage (even split) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, count, gpus, result in rows:
        if result is None:
            lines.append(f"| {name} | {count} | {gpus} | none fits | | | | | | |")
            continue
        layout = result.layout
        fits = "" if result.fits else " (too much)"
        lines.append(
            f"| {name} | {count} | {gpus} | {layout.tensor} x {layout.pipeline} x {layout.data} "
            f"| {' '.join(str(stage.layers) for stage in result.stages)} | {result.hours:.3g} "
            f"| {result.gpu_hours:.0f} | {result.tokens_per_second:,.0f} | {result.peak_gb:.1f}{fits} "
            f"| {result.slowest_share:.0%} ({result.even_slowest_share:.0%}) |"
        )
    return "\n".join(lines)


def as_json(rows: list[tuple[str, int, int, Estimate | None]], assumptions: Assumptions) -> dict:
    """Assumptions and results as plain containers; memory in bytes, times in seconds per step."""
    return {
        "assumptions": dataclasses.asdict(assumptions),
        "rows": [
            {"model": name, "exits": count, "gpus": gpus, "estimate": result and dataclasses.asdict(result)}
            for name, count, gpus, result in rows
        ],
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the table, write the JSON."""
    options = parse(arguments)
    assumptions = Assumptions(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(Assumptions)}
    )
    try:
        rows = estimates(options, assumptions)
    except ValueError as problem:
        sys.stderr.write(f"error: {problem}\n")
        return 2
    tokens = assumptions.steps * assumptions.sequences * assumptions.sequence_length
    print(f"{tokens:.3g} tokens; assumed: {', '.join(f'{k}={v}' for k, v in dataclasses.asdict(assumptions).items())}")
    print(
        "1 exit: at a quarter of the depth; only those layers run. 8 exits: at every eighth, down to the full depth."
    )
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(as_json(rows, assumptions), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
