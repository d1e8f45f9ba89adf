# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""One run of the tuning program for all tests of this folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers.core_models import set_up_groups
from tests.helpers.huggingface_models import save_tiny_model
from tests.stack.megatron import tuning_program

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The backbone's directory, and the folder in which every layout left its losses and checkpoints.

    The folder is `$NEMO_EE_STACK/megatron/<version>/`, so that other versions can read it; where `$NEMO_EE_READ_ALL`
    is set it is there already, and only read.
    """
    if "NEMO_EE_STACK" in os.environ:
        output = Path(os.environ["NEMO_EE_STACK"], "megatron", version("megatron-core"))
    else:
        output = tmp_path_factory.mktemp("tuned")
    if "NEMO_EE_READ_ALL" not in os.environ:
        # Whole or not at all: the other versions read every folder that is there.
        partial = tmp_path_factory.mktemp("partial")
        (partial / "backbone").mkdir()
        save_tiny_model(partial / "backbone", "llama-llama3")
        command = [sys.executable, "-m", tuning_program.__name__, str(partial / "backbone"), str(partial)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, done.stderr[-4000:]
        shutil.rmtree(output, ignore_errors=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(partial, output)
    return SimpleNamespace(backbone=output / "backbone", output=output)


@pytest.fixture
def one_rank() -> None:
    """Megatron's groups of this process alone."""
    set_up_groups()
