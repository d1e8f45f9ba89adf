# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/decoding_pipeline.py` with few tokens: the numbers arrive. What they are is not looked at."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.functional.test_generate import model  # noqa: F401  (fixture)
from tests.helpers.megatron_models import ROOT, user_environment


def test_its_numbers_are_printed_and_written(model, tmp_path) -> None:  # noqa: F811
    file = tmp_path / "stages.json"
    command = [
        sys.executable, str(ROOT / "benchmarks" / "decoding_pipeline.py"), str(model.path), "--json", str(file),
        "--rounds", "1", "--prompt-tokens", "6", "--new-tokens", "8", "--thresholds", "0.0", "0.9",
    ]  # fmt: skip
    done = subprocess.run(command, env=user_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(file.read_text())
    assert {"cpu", "commit", "full_tokens_per_s"} <= found.keys() and found["full_over_full"] == 1.0
    assert found["pp2_early_exit_over_full"] == max(found["early_exit_0_over_full"], found["early_exit_0.9_over_full"])
    assert f"pp2_early_exit_over_full {found['pp2_early_exit_over_full']:.3f}" in done.stdout
    assert found["early_exit_0_depth"] < found["full_depth"] == 3
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert "benchmarks/decoding_pipeline.py" in text and "pp2_early_exit_over_full" in text
