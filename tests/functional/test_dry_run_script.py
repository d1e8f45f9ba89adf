# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""scripts/dry_run.py on the reference model's shape: its table, its answers to layouts that cannot be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "assets" / "reference-model"


def run(*overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "dry_run.py"), *overrides]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    output = tmp_path_factory.mktemp("dry") / "dry.json"
    done = run(
        f"model={MODEL}", "layout=[2,2,2]", "exits=4", "sequence_length=64", "memory_gb=0.001", "fixed_gb=0",
        "objective=distillation", "top_k=4", f"output={output}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {"text": done.stdout, **json.loads(output.read_text(encoding="utf-8"))}


def test_every_stage_has_its_counts(found: dict) -> None:
    first, last = found["stages"]
    assert (first["stage"], last["stage"]) == (0, 1) and first["layers"] + last["layers"] == 12
    assert first["exits"] == ["layer3-mlp", "layer6-mlp"] and last["exits"] == ["layer9-mlp", "layer12-mlp"]
    # Hidden states go forward, the teacher's tokens and probabilities come back.
    for stage in (first, last):
        assert {"allreduce_", "recv_", "send"} <= {one["kind"] for one in stage["transfers"]}
    assert not any("tokens_per_s" in key for key in found), "the way back of the teacher is not simulated"


def test_the_table_says_what_is_where_and_what_would_fit(found: dict) -> None:
    assert "layer3-mlp layer6-mlp" in found["text"] and "allreduce_" in found["text"]
    assert "DOES NOT FIT; it would with" in found["text"]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            "[3,1,1]",
            "heads are not a multiple of the tensor-parallel size 3; the nearest that works is layout=[4,1,1]",
        ),
        ("[1,13,1]", "13 stages are more than the 12 layers that run; the nearest that works is layout="),
        ("[1,1,3]", "16 sequences per step are not a multiple of micro batch 1 x data-parallel size 3"),
        ("[1,2]", "three sizes, [TP, PP, DP]"),
    ],
)
def test_layouts_that_cannot_be(layout: str, message: str) -> None:
    done = run(f"model={MODEL}", f"layout={layout}", "exits=4")
    assert done.returncode != 0 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_speed_is_simulated_without_a_teacher(tmp_path: Path) -> None:
    output = tmp_path / "dry.json"
    done = run(f"model={MODEL}", "layout=[1,2,1]", "exits=2", "sequence_length=64", f"output={output}")
    assert done.returncode == 0 and "simulated: decoupled" in done.stdout, done.stderr
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["decoupled_tokens_per_s_per_gpu"] >= found["drained_tokens_per_s_per_gpu"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["top_k=5"], "top_k=5 needs objective=distillation or mixed"),
        (["objective=mixed", "top_k=100000"], "top_k=100000 is more than the"),
        (
            ["layout=[2,1,1]", "sequence_parallel=True", "sequence_length=65"],
            "must be a multiple of the tensor-parallel",
        ),
    ],
)
def test_settings_that_cannot_be(overrides: list[str], message: str) -> None:
    done = run(f"model={MODEL}", "layout=[1,1,1]", *overrides)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_no_model() -> None:
    done = run("model=7C", "layout=[1,1,1]")
    assert done.returncode != 0 and "model=7C is neither 7B, 13B, 70B nor a directory" in done.stderr
