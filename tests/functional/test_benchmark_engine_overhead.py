# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/engine_overhead.py` with few tokens: the numbers arrive. What they are is not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_its_numbers_are_printed_and_written(tmp_path: Path) -> None:
    file = tmp_path / "engine.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "engine_overhead.py"), "--quick", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(file.read_text())
    names = [name for name in found if name.endswith("_us")]
    assert len(names) == 7 and {"cpu", "commit", "vocab_size"} <= found.keys()
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for name in names:
        assert found[name] > 0 and f"{name} {found[name]:.1f}" in done.stdout
    assert "benchmarks/engine_overhead.py" in text
