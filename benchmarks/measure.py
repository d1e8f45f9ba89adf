# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Shared by all benchmarks: interleaved timing, peak memory of this process, and the facts of machine and commit."""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_RESET_PEAK = "5"  # written to clear_refs it sets the peak resident size to the current one, see proc(5)


def wait_for(device: object) -> None:
    """Wait until a device has done what it was given."""
    if str(device).startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved(sides: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every side in every round: A B C, A B C, ... so that a busy moment of the machine hits all of them.

    Args:
        sides: name -> call to time.
        rounds: timed rounds.
        warmup: rounds before them that are not kept.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + rounds):
        for name, work in sides.items():
            spent = seconds(work)
            if turn >= warmup:
                times[name].append(spent)
    return times


def median_of_ratios(upper: list[float], lower: list[float]) -> float:
    """Median over the rounds of upper / lower: the two were measured one after the other in each round."""
    return statistics.median(a / b for a, b in zip(upper, lower, strict=True))


def resident_bytes() -> int:
    """Resident memory of this process now, after free memory went back to the system."""
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def reset_peak() -> None:
    """Reset the peak to the memory that is resident now."""
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)


def peak_bytes() -> int:
    """Peak resident memory since `reset_peak`."""
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; peak memory is measured on Linux only")


def provenance() -> dict[str, str | int | float]:
    """Machine, versions and commit."""
    import torch

    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "cpu": cpu,
        "cores": os.cpu_count() or 1,
        "memory_gib": round(memory / 2**20, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.is_file() else []


def _commit() -> str:
    """Commit of the working tree, `-dirty` with uncommitted changes; `unknown` outside a clone."""
    try:
        run = [
            subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run[0] + ("-dirty" if run[1] else "")
