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
collect_ignore_glob = [] if VARIABLE in os.environ else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test."""
    return torch.device(os.environ[VARIABLE])
