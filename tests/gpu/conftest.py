# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What `scripts/gpu_check.py` tests on a device, in a process where the CPU host is off. `make test` leaves it out and
runs the script at a tiny size on the CPU instead.
"""

from __future__ import annotations

import os

import pytest
import torch

VARIABLE = "NEMO_EE_GPU_CHECK"  # the device: cuda or cpu
# Transformer Engine has no layers for a CPU.
_IGNORED = {None: ["test_*.py"], "cpu": ["test_transformer_engine.py"], "cuda": []}
collect_ignore_glob = _IGNORED[os.environ.get(VARIABLE)]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test."""
    return torch.device(os.environ[VARIABLE])
