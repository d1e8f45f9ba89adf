# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What this package does on a GPU, checked and measured in at most eight minutes.

    python scripts/gpu_check.py --json gpu.json
    python scripts/gpu_check.py --only tests             # machine | tests | tuning | decoding; may be repeated
    python scripts/gpu_check.py --device cpu --quick     # tiny sizes without a GPU, to try it

    machine    device, versions, rates of a copy and of a matrix product: the ceilings of what follows
    tests      tests/gpu: losses, tuning steps and decoding against the CPU, transformers and fp64; NCCL, one rank
    tuning     a step on a model of 1.1B parameters (benchmarks/gpu_tuning.py)
    decoding   tokens per second on it, at batch 1, 16, 64 (benchmarks/gpu_decoding.py)

Needs torch, Megatron-core 0.13 to 0.19, transformers, pydantic and pytest; neither NeMo nor a network. Each part runs
in a process of its own; one that fails or takes too long is named in the JSON, and the others run. The exit status is
1 if a part failed. It was written for one H100 or H200, and has run on CPUs only. SmolLM2's exits are tuned by
experiments/smollm2_on_gpu.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a command, not an installed package

from benchmarks.measure import provenance, wait_for  # noqa: E402

PARTS = ("machine", "tests", "tuning", "decoding")
MINUTES = 8.0  # for all parts
LIMIT = 240.0  # seconds of a part
SHOWN = 3000  # characters of a failed part's output
GIB = 2**30


def machine(device: str, quick: bool) -> dict[str, Any]:
    """Device, versions and ceilings."""
    import importlib.metadata

    import torch

    versions = {name: importlib.metadata.version(name) for name in ("megatron-core", "transformers")}
    found: dict[str, Any] = {**provenance(), **versions, "device": "cpu"}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "device_memory_gib": round(properties.total_memory / GIB, 1)}
        found |= {"cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    size = 256 if quick else 8192
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    found["matmul_tflops"] = 2 * size**3 / _seconds(lambda: left @ right, device) / 1e12
    source = torch.empty((1 << 20) if quick else (4 << 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy_gb_s"] = 2 * source.numel() / _seconds(lambda: target.copy_(source), device) / 1e9
    return found


def _seconds(work: Any, device: str, repeats: int = 10) -> float:
    for _ in range(3):
        work()
    wait_for(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    wait_for(device)
    return (time.perf_counter() - start) / repeats


def tests(device: str, quick: bool) -> dict[str, Any]:
    """tests/gpu on the device."""
    environment = {**os.environ, "NEMO_EE_GPU_CHECK": device}
    # Without pyproject.toml, whose settings need plugins.
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs", "-p", "no:cacheprovider", "-c", os.devnull]
    command += ["--rootdir", str(ROOT), "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    found = {"result": lines[-1] if lines else "no output", "passed": done.returncode == 0}
    return found if found["passed"] else {**found, "output": (done.stdout + done.stderr)[-SHOWN:]}


def tuning(device: str, quick: bool) -> dict[str, Any]:
    """A step of exit tuning."""
    if device == "cpu":
        from nemo_ee import cpu_host

        cpu_host.enable()
    from benchmarks import gpu_tuning
    from benchmarks.gpu_groups import one_rank

    one_rank(device)
    return gpu_tuning.measure(gpu_tuning.TINY if quick else gpu_tuning.Sizes(), device)


def decoding(device: str, quick: bool) -> dict[str, Any]:
    """Tokens per second."""
    from benchmarks import gpu_decoding, gpu_tuning

    sizes = gpu_tuning.TINY if quick else gpu_tuning.Sizes()
    return gpu_decoding.measure(sizes, device, machine(device, quick)["copy_gb_s"])


def run_part(name: str, options: argparse.Namespace, folder: Path, limit: float) -> dict[str, Any]:
    """A part in a process of its own: its numbers, or `failed` with the end of its output."""
    result = folder / f"{name}.json"
    command = [sys.executable, __file__, "--part", name, "--json", str(result), "--device", options.device]
    command += ["--quick"] if options.quick else []
    with (folder / f"{name}.log").open("w+", encoding="utf-8", errors="replace") as log:
        part = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = part.wait(limit)
        except subprocess.TimeoutExpired:
            code = f"no result after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(part.pid, signal.SIGKILL)  # its own processes too: they would run beside the next part
        if code == 0:
            return json.loads(result.read_text(encoding="utf-8"))
        log.seek(0)
        return {"failed": code, "output": log.read()[-SHOWN:]}


def failed(found: dict[str, Any]) -> bool:
    """Whether a part failed."""
    return "failed" in found or not found.get("passed", True)


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--only", action="append", choices=PARTS, help="run this part; may be repeated")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try it")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch.cuda.is_available() is False here; --device cpu --quick tries the script without a GPU")
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu takes --quick: a model of 1.1B parameters would take hours")
    if options.part:
        found = globals()[options.part](options.device, options.quick)
        options.json.write_text(json.dumps(found), encoding="utf-8")
        return
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json} lies in no existing folder")
    results: dict[str, Any] = {"quick": options.quick}
    end = time.monotonic() + 60 * MINUTES
    with tempfile.TemporaryDirectory(prefix="nemo_ee_gpu_check_") as folder:
        for name in options.only or PARTS:
            start = time.monotonic()
            results[name] = found = run_part(name, options, Path(folder), max(1.0, min(LIMIT, end - start)))
            found["seconds"] = round(time.monotonic() - start, 1)
            print(f"{name}: {'FAILED' if failed(found) else 'done'}\n{json.dumps(found, indent=1)}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if any(failed(results[name]) for name in options.only or PARTS):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
