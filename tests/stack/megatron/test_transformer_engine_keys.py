# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine's layers store the keys that are read and recorded, by every version's own code for them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_ee.checkpoint.huggingface import HuggingFaceSource
from tests.helpers.huggingface_models import save_tiny_model
from tests.stack.megatron import transformer_engine_stand_in

ROOT = Path(__file__).resolve().parents[3]
RECORDED = ROOT / "tests" / "data" / "exit_checkpoint_keys.txt"


@pytest.mark.parametrize("family", transformer_engine_stand_in.SHAPES)
def test_keys_are_those_that_are_read(family: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", transformer_engine_stand_in.__name__, family]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    lines = [line.split(" ", 1) for line in RECORDED.read_text().splitlines() if line.startswith(f"{family}: ")]
    assert found["exits"] == sorted(rest for _, rest in lines) and len(lines) > 150
    save_tiny_model(tmp_path, family)
    source = HuggingFaceSource(tmp_path)
    padded = {f"{source.backbone.vocab_size}, ": "144, "}
    expected = []
    for key, info in source.keys().items():
        shape = str(list(info.shape))
        if key.endswith(("word_embeddings.weight", "output_layer.weight")):
            for rows, more in padded.items():
                shape = shape.replace(rows, more)
        expected.append(f"{key} {shape}")
    assert found["backbone"] == sorted(expected)
