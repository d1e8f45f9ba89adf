# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""scripts/gpu_check.py on the CPU at tiny sizes, so that it works on the day there is a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.py"


def check(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)


def test_every_part_runs(tmp_path: Path) -> None:
    done = check("--device", "cpu", "--quick", "--json", str(tmp_path / "gpu.json"))
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert found["quick"] and found["tests"]["passed"] and "skipped" not in found["tests"]["result"]
    assert found["tuning"]["ours_s"] > 0 and found["tuning"]["step_over_matmul"] > 0
    assert found["decoding"]["early_exit_over_full_b1"] > 0 and found["decoding"]["mean_depth_b1"] < 3


def test_a_failed_part_is_named_and_ends_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the tests cannot start without pytest."""
    (tmp_path / "pytest.py").write_text("raise SystemExit('no pytest here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = check("--device", "cpu", "--quick", "--only", "tests", "--json", str(tmp_path / "gpu.json"))
    assert done.returncode == 1 and "tests: FAILED" in done.stdout
    assert not json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["tests"]["passed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--quick"], "--device cpu --quick tries the script without a GPU"), (["--device", "cpu"], "takes --quick")],
)
def test_what_cannot_run_is_refused(options: list[str], message: str) -> None:
    import torch

    if options == ["--quick"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = check(*options)
    assert done.returncode == 2 and message in done.stderr
