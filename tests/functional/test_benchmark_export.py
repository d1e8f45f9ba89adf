# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/export.py` at tiny sizes: the numbers arrive. What they are is not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nemo")

from tests.helpers.megatron_models import ROOT, user_environment


def test_its_numbers_are_printed_and_written(tmp_path: Path) -> None:
    file = tmp_path / "export.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "export.py"), "--quick", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=user_environment())
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(file.read_text())
    assert all(not isinstance(value, dict | list) for value in found.values()), "one flat object"
    assert {"cpu", "commit", "vocab_size", "seconds_1b.copy_s", "huggingface.growth_mib"} <= found.keys()
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for name in ("seconds_1b", "seconds_1b_huggingface", "peak_bytes_over_largest_tensor"):
        assert found[name] >= 0 and f"{name} {found[name]:.1f}" in done.stdout and f"`{name}`" in text
    assert found["tensorrt_llm.bytes_written"] > found["bytes_read"] > 0
