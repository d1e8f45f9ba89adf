# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/serving.py` on a small model: every number arrives. What the numbers are is not looked at."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from benchmarks import serving
from tests.helpers.served_model import write_exported_model


def test_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, file = write_exported_model(tmp_path / "hf_early_exit"), tmp_path / "serving.json"
    monkeypatch.setattr(serving, "QUIET", 0.05)
    lengths = {"prompt-tokens": 8, "new-tokens": 6, "long": 100, "gap-tokens": 380, "rounds": 1}
    given = [part for name, value in lengths.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["serving.py", str(directory), *given, "--json", str(file)])
    serving.main()
    found = json.loads(file.read_text())
    names = {"server_over_engine_1", "server_over_engine_16", "server_gap_p99_over_median", "loop_ms_per_token_16"}
    assert all(found[name] > 0 for name in (*names, "server_gap_p99_over_median.whole", "first_token_s"))
    assert found["gap_longest_s"] >= found["gap_p99_s"] >= found["gap_median_beside_prompts_s"]
    assert found["lengths"]["long"] == 100


def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="(?s)the server did not start: .*is not a directory"):
        serving.RunningServer(tmp_path / "absent")
