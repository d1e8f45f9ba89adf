# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The folder of exports that tests/stack/make_exports.py wrote with NeMo."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def exports() -> Path:
    """`exports/` of the folder in the environment variable NEMO_EE_STACK."""
    if "NEMO_EE_STACK" not in os.environ:
        pytest.skip("NEMO_EE_STACK names no folder with exports; tests/stack/make_exports.py writes one")
    folder = Path(os.environ["NEMO_EE_STACK"]) / "exports"
    assert folder.is_dir(), f"{folder} is missing; run tests/stack/make_exports.py {folder.parent}"
    return folder
