# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Numbers of exit tuning on this machine's CPU, each beside its baseline. docs/benchmarks.md explains them.

    python benchmarks/tuning.py --json tuning.json        # all of it, up to 20 minutes on two idle cores
    python benchmarks/tuning.py --only step_over_floor    # one number; may be given several times

Real NeMo, Lightning and Megatron-core on gloo. The two sides of a ratio take turns in one run; ratios are medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a command, not an installed package

from benchmarks.measure import provenance  # noqa: E402

if TYPE_CHECKING:
    from benchmarks.workload import Sizes

MIB = 2**20
POINT_TIMEOUT = 600.0


@dataclasses.dataclass(frozen=True)
class Measure:
    """One number of the table.

    Attributes:
        text: numerator / denominator of the ratio.
        target: the target value.
        at_least: the target is a lower bound, otherwise an upper one.
        run: name of the function in `runs` that measures it, maybe with others.
    """

    text: str
    target: float
    at_least: bool
    run: str

    def verdict(self, value: float) -> str:
        """The target and whether it is met."""
        met = value >= self.target if self.at_least else value <= self.target
        return f"target {'>=' if self.at_least else '<='} {self.target:.2f}, {'met' if met else 'MISSED'}"


def _at_most(target: float, run: str, text: str) -> Measure:
    return Measure(text, target, False, run)


def _at_least(target: float, run: str, text: str) -> Measure:
    return Measure(text, target, True, run)


MEASURES = {
    "step_over_floor": _at_most(1.10, "step", "step in Lightning's loop / partial forward and each exit's work alone"),
    "step_over_matmul": _at_most(1.25, "step", "step in Lightning's loop / its matrix products alone"),
    "distill_step_over_floor": _at_most(
        1.10, "distill", "step of distilled exits / forward, each exit's work alone, the teacher once"
    ),
    "time_over_plain": _at_most(0.85, "plain", "time of a step / of a plain one"),
    "memory_over_plain": _at_most(0.10, "memory", "temporary memory / of a plain step"),
    "memory_8_over_1_exits": _at_most(1.05, "memory", "temporary memory less taps, all exits / one exit"),
    "memory_128k_over_32k_vocab": _at_most(1.05, "memory", "temporary memory, large / small vocabulary"),
    "decoupled_over_drained_mb1": _at_least(
        1.70, "decoupled_1", "throughput, decoupled / drained stages, 1 microbatch"
    ),
    "decoupled_over_drained_mb2": _at_least(
        1.30, "decoupled_2", "throughput, decoupled / drained stages, 2 microbatches"
    ),
    "decoupled_mb1_over_bound": _at_least(0.97, "decoupled_1", "the same / the most there is: drained / slower stage"),
    "decoupled_mb2_over_bound": _at_least(0.97, "decoupled_2", "the same / the most there is: drained / slower stage"),
    "decoupled_over_bound": _at_least(0.88, "bound", "throughput, decoupled / slower stage alone"),
    "cost_split_over_even_half": _at_least(
        1.20, "split_half", "throughput, split by cost / evenly, exit at half depth"
    ),
    "cost_split_over_even_quarter": _at_least(
        0.97, "split_quarter", "throughput, split by cost / evenly, exit at a quarter"
    ),
    "sweep_over_separate": _at_most(0.35, "sweep", "time of nine variants in one pass / in nine runs"),
}


def runs(sizes: Sizes, folder: Path) -> dict[str, Callable[[], dict[str, float]]]:
    """The measurement of each number, in processes of its own."""
    from benchmarks import pipeline, single_process, workload
    from benchmarks.processes import run_in_processes

    run_in_processes(lambda rank: workload.write_data(folder), threads=1, timeout=POINT_TIMEOUT)

    def alone(function: Callable, *args, **kwargs):
        own = Path(tempfile.mkdtemp(dir=folder))
        return run_in_processes(
            lambda rank: function(sizes, own, *args, **kwargs), threads=sizes.threads, timeout=POINT_TIMEOUT
        )[0]

    def two_stages(function: Callable, **kwargs):
        own = Path(tempfile.mkdtemp(dir=folder))
        return run_in_processes(
            lambda rank: function(sizes, own, **kwargs), pipeline.RANKS, threads=1, timeout=POINT_TIMEOUT
        )[-1]

    def memory() -> dict[str, float]:
        small, large, many = sizes.vocabulary, sizes.large_vocabulary, sizes.exits
        points = {
            "ours": {"plain": False, "vocabulary": small, "exits": many},
            "plain": {"plain": True, "vocabulary": small, "exits": many},
            "one_exit": {"plain": False, "vocabulary": small, "exits": 1},
            "large_vocabulary": {"plain": False, "vocabulary": large, "exits": many},
        }
        # The allocator's layout differs from process to process by a few per cent, which matters for the two sides
        # whose ratio is about 1. The plain step takes minutes and gigabytes.
        times = {"ours": sizes.processes, "one_exit": sizes.processes}
        each = {
            name: [alone(single_process.temporary_memory, **point) for _ in range(times.get(name, 1))]
            for name, point in points.items()
        }
        found = {name: statistics.median(values) for name, values in each.items()}
        tap = 4 * sizes.batch * sizes.length * sizes.hidden
        return {
            "memory_over_plain": found["ours"] / found["plain"],
            "memory_8_over_1_exits": (found["ours"] - many * tap) / (found["one_exit"] - tap),
            "memory_128k_over_32k_vocab": found["large_vocabulary"] / found["ours"],
            **{f"memory.{name}_mib": value / MIB for name, value in found.items()},
            **{f"memory.{name}_mib.{i}": value / MIB for name in times for i, value in enumerate(each[name])},
            "memory.tap_mib": tap / MIB,
        }

    return {
        "step": lambda: alone(single_process.step_against_floor),
        "distill": lambda: alone(single_process.distill_against_floor),
        "plain": lambda: alone(single_process.time_against_plain),
        "memory": memory,
        "decoupled_1": lambda: two_stages(pipeline.decoupled_against_drained, microbatches=1),
        "decoupled_2": lambda: two_stages(pipeline.decoupled_against_drained, microbatches=2),
        "bound": lambda: two_stages(pipeline.decoupled_against_bound),
        "split_half": lambda: two_stages(pipeline.cost_split_against_even, layer=6, name="half"),
        "split_quarter": lambda: two_stages(pipeline.cost_split_against_even, layer=3, name="quarter"),
        "sweep": lambda: alone(single_process.sweep_against_separate),
    }


def line(name: str, found: dict[str, float], *, meaningful: bool = True) -> str:
    """One line of the report: the number, its target, and the numbers on both sides of the ratio."""
    measure = MEASURES[name]
    verdict = measure.verdict(found[name]) if meaningful else "tiny sizes, no result"
    prefix = "memory." if name.startswith("memory") else f"{name}."
    sides = ", ".join(f"{key.removeprefix(prefix)} {value:.4g}" for key, value in found.items() if prefix in key)
    return f"{name:29s} {found[name]:7.3f}  {verdict}; {measure.text} ({sides})"


def heading(result: Mapping[str, str | int | float]) -> str:
    """Hardware, commit and sizes, before the numbers."""
    return (
        "{cpu}, {cores} cores, {memory_gib} GiB, load {load_before} at the start; torch {torch}, commit {commit}\n"
        "microbatch {batch} x {length} tokens, fp32; {microbatches} microbatches a step on one process with {threads} "
        "threads, {pipeline_microbatches} on two stages\nwith one thread each, unless said otherwise; {rounds} "
        "interleaved rounds after a warm-up, medians\n"
        "reference model: 12 layers, hidden 256, vocabulary 4096, exits at 3 6 9 unless said otherwise\n"
        "plain, distill, memory: {layers} layers, hidden {hidden}, {exits} mlp exits, vocabulary {vocabulary} (large: "
        "{large_vocabulary})\n"
    ).format(**result)


def report(names: Sequence[str], sizes: Sizes, *, quick: bool = False) -> dict[str, str | int | float]:
    """Measure, print as it goes, and return the flat object of `--json`."""
    result: dict[str, str | int | float] = {**provenance(), **dataclasses.asdict(sizes)}
    print(heading(result), flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nemo_ee_benchmark_") as folder:
        measure = runs(sizes, Path(folder))
        for run in dict.fromkeys(MEASURES[name].run for name in names):
            found = measure[run]()
            result.update(found)
            for name in names:
                if MEASURES[name].run == run:
                    print(line(name, found, meaningful=not quick), flush=True)
    result["total_s"] = round(time.monotonic() - start, 1)
    print(f"{result['total_s']:.0f} s")
    return result


def arguments() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description="Measure exit tuning on this machine's CPU.")
    parser.add_argument("--json", type=Path, help="file for the numbers, one flat object")
    parser.add_argument("--only", action="append", choices=list(MEASURES), help="measure this; may be repeated")
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)  # tiny sizes, for tests only
    return parser.parse_args()


def main() -> None:
    """Measure the chosen numbers."""
    options = arguments()
    from nemo_ee import cpu_host

    cpu_host.enable()
    import nemo_ee.models  # noqa: F401 -- sets NeMo's Apex guards; imported once, before the forks
    from benchmarks.workload import QUICK, Sizes

    result = report(options.only or list(MEASURES), QUICK if options.quick else Sizes(), quick=options.quick)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
