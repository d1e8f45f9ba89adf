# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""`make demo` with tiny settings: every step is the command a user would type."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.megatron_models import user_environment

ROOT = Path(__file__).parents[2]
SMALL = "--layers 3 9 --steps 4 --batch 4 --length 128 --heldout-tokens 1280 --new-tokens 12".split()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's output directory."""
    output = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(ROOT / "examples" / "run_demo.py"), "--output", str(output), *SMALL]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=580, env=user_environment())
    assert ran.returncode == 0, ran.stderr[-3000:] + ran.stdout[-3000:]
    return output


def test_the_report_has_every_number(demo: Path) -> None:
    report = json.loads((demo / "report.json").read_text())
    assert [exit["name"] for exit in report["exits"]] == ["layer3-mlp", "layer9-mlp"]
    for exit in report["exits"]:
        assert set(exit) == {
            "name", "layer", "architecture", "loss_before", "loss_after", "agreement_before", "agreement_after",
            "trainable_parameters",
        }  # fmt: skip
        assert 0 <= exit["agreement_after"] <= 1
        assert exit["trainable_parameters"] > 1_000_000
    assert {"loss", "perplexity"} <= set(report["full_model"])
    assert {"convert", "tune", "total"} <= set(report["seconds"])


def test_tuned_exits_are_better_than_at_step_0(demo: Path) -> None:
    report = json.loads((demo / "report.json").read_text())
    for exit in report["exits"]:
        assert exit["loss_after"] < exit["loss_before"] - 0.2


def test_everything_a_user_looks_for_is_there(demo: Path) -> None:
    for name in ("early_exit.nemo", "tuned.nemo", "losses.png", "sample.txt"):
        assert (demo / name).stat().st_size > 0
    sample = (demo / "sample.txt").read_text()
    assert sample.startswith("def test_add(self):")
    assert "layer3-mlp" in sample
    assert "mean depth" in sample


def test_a_failing_step_ends_the_demo_with_its_last_lines(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "examples" / "run_demo.py"),
        "--output",
        str(tmp_path / "demo"),
        "--layers",
        "99",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=user_environment())
    assert ran.returncode == 1
    assert "convert failed" in ran.stderr
    assert "layer = 99" in ran.stderr
