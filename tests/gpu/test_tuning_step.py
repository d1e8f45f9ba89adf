# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Steps of exit tuning on a device against the same steps on the CPU, groups of one rank on NCCL."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import step_numbers
from tests.helpers.huggingface_models import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}
SAME_DIRECTION = {"float32": 0.999, "bfloat16": 0.8}  # cosine; Adam's steps have one size, so signs make it


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    save_tiny_model(folder, "llama-llama3")
    return folder


def numbers(backbone: Path, device: str, dtype: str, output: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", step_numbers.__name__, str(backbone), device, dtype, str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(output, weights_only=True)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_cpus_numbers(backbone: Path, device: torch.device, dtype: str, tmp_path: Path) -> None:
    tolerance = TOLERANCES[dtype]
    expected = numbers(backbone, "cpu", "float32", tmp_path / "cpu.pt")
    found = numbers(backbone, device.type, dtype, tmp_path / "device.pt")
    scale = expected["logits"].abs().max()
    assert (found["logits"] - expected["logits"]).abs().max() <= tolerance * scale
    assert len(found["losses"]) == step_numbers.STEPS
    for ours, theirs in zip(found["losses"], expected["losses"], strict=True):
        for name, loss in theirs.items():
            assert ours[name] == pytest.approx(loss, rel=tolerance), name
    first, last = expected["losses"][0], expected["losses"][-1]
    assert all(last[name] < first[name] - 2 * TOLERANCES["float32"] * first[name] for name in first)  # steps count
    if dtype == "float32":
        for name, value in expected["exits"].items():
            assert (found["exits"][name] - value).abs().max() <= tolerance * value.abs().max(), name
    ours, theirs = _update(found), _update(expected)
    assert torch.cosine_similarity(ours, theirs, dim=0) > SAME_DIRECTION[dtype]


def _update(found: dict[str, Any]) -> torch.Tensor:
    """What the steps changed, all exits in one vector."""
    return torch.cat([(found["exits"][name] - start).flatten() for name, start in found["start"].items()])
