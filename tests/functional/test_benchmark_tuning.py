# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/tuning.py` at tiny sizes: every number arrives. What the numbers are is not looked at."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.megatron_models import ROOT, user_environment

SCRIPT = ROOT / "benchmarks" / "tuning.py"
NAMES = (
    "step_over_floor step_over_matmul distill_step_over_floor time_over_plain memory_over_plain memory_8_over_1_exits "
    "memory_128k_over_32k_vocab decoupled_over_drained_mb1 decoupled_over_drained_mb2 decoupled_over_bound "
    "decoupled_mb1_over_bound decoupled_mb2_over_bound cost_split_over_even_half cost_split_over_even_quarter "
    "sweep_over_separate"
).split()


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300, env=user_environment()
    )


def test_every_number_is_printed_and_written(tmp_path: Path) -> None:
    file = tmp_path / "tuning.json"
    done = run("--quick", "--json", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(file.read_text())
    assert all(not isinstance(value, (dict, list)) for value in found.values()), "one flat object"
    assert {"cpu", "cores", "commit", "torch", "batch", "length", "vocabulary", "threads"} <= found.keys()
    lines = done.stdout.splitlines()
    for name in NAMES:
        assert math.isfinite(found[name]) and found[name] > 0, name
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        assert f"{found[name]:.3f}" in line and re.search(r"\(\w+ [\d.]+", line), "its two sides stand on its line"
    sides = [key for key in found if "." in key]
    assert {key.split(".")[0] for key in sides} >= set(NAMES) - {name for name in NAMES if name.startswith("memory")}


def test_one_number_alone_and_an_unknown_one(tmp_path: Path) -> None:
    file = tmp_path / "tuning.json"
    done = run("--quick", "--only", "time_over_plain", "--json", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    assert [name for name in NAMES if name in json.loads(file.read_text())] == ["time_over_plain"]
    assert [line.split()[0] for line in done.stdout.splitlines() if "no result" in line] == ["time_over_plain"]
    unknown = run("--only", "time_over_nothing")
    assert unknown.returncode == 2 and "time_over_plain" in unknown.stderr


def test_the_documentation_names_every_number() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert [name for name in NAMES if f"`{name}`" not in text] == []


# -- what measures --------------------------------------------------------------------------------------------------


def test_a_process_that_fails_or_hangs_is_told_and_ended() -> None:
    import time

    from benchmarks.processes import run_in_processes

    def fail_on_rank_1(rank: int) -> int:
        if rank:
            raise LookupError("nothing here")
        time.sleep(60)
        return rank

    with pytest.raises(RuntimeError, match="rank 1 of 2 ended with code 1(.|\n)*nothing here"):
        run_in_processes(fail_on_rank_1, 2, threads=1, timeout=50)
    with pytest.raises(RuntimeError, match="rank 0 of 1 ran out of time"):
        run_in_processes(lambda rank: time.sleep(60), threads=1, timeout=0.5)
    assert run_in_processes(lambda rank: rank * 2, 2, threads=1, timeout=50) == [0, 2]


def test_peak_memory_is_what_was_allocated() -> None:
    """128 MiB that come and go show in the peak, and in nothing afterwards."""
    from benchmarks.measure import peak_bytes, reset_peak, resident_bytes
    from benchmarks.processes import run_in_processes

    def allocate(rank: int) -> tuple[int, int]:
        before = resident_bytes()
        reset_peak()
        block = bytearray(128 * 2**20)
        block[:: 2**12] = b"x" * len(block[:: 2**12])
        del block
        return peak_bytes() - before, resident_bytes() - before

    ((peak, left),) = run_in_processes(allocate, threads=1, timeout=50)
    assert 120 * 2**20 < peak < 140 * 2**20
    assert left < 8 * 2**20, "control: it is gone"


def test_matrix_products_are_counted() -> None:
    """Against a count by hand, gradients included."""
    import torch

    from benchmarks.matrix_products import MatrixProducts

    products = MatrixProducts()
    x, w = torch.randn(6, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    with products:
        torch.nn.functional.linear(x, w).sum().backward()
        torch.randn(3, 4, 5) @ torch.randn(3, 5, 2)
        torch.nn.functional.scaled_dot_product_attention(*torch.randn(3, 1, 2, 64, 16).unbind(), is_causal=True)
    assert products.flop() == 3 * 2 * 6 * 5 * 7 + 2 * 3 * 4 * 5 * 2 + 2 * (2 * 64 * 16) * 64
    assert len(products.counts) == 5, "forward, two gradients, a batch of products, attention"
    assert products.replay() > 0


def test_plain_tuning_gives_the_gradients_of_our_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The baseline computes the same: gradients of the summed loss within 1e-4 of the largest, fp32."""
    import torch

    from benchmarks import workload
    from benchmarks.plain_tuning import PlainTuning

    sizes, trainer = workload.QUICK, workload.trainer(tmp_path)
    model = workload.wide_model(sizes, trainer, vocabulary=sizes.vocabulary, exits=2, full_depth=True)
    batches = workload.random_batches(sizes, 2, vocabulary=sizes.vocabulary)
    ours, plain = workload.BareStep(model), PlainTuning(model.model, workload.OPTIMIZER, max_norm=0.0)
    model._optimizer.step = lambda: None
    losses = [ours(batches)]
    gradients = [p.grad.clone() for p in plain.parameters]
    plain.optimizer.step = lambda *args: None
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: None)
    losses.append(plain(batches))
    assert abs(losses[0] - losses[1]) < 1e-4 * losses[1]
    assert any(gradient.abs().max() > 1e-5 for gradient in gradients), "control: there are gradients"
    for parameter, gradient in zip(plain.parameters, gradients, strict=True):
        assert (parameter.grad - gradient).abs().max() < 1e-4 * gradient.abs().max()
