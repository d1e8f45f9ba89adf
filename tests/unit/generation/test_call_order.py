# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The order in which a model is called does not depend on the process: ranks that share a model must call alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

# Six sequences that end at six exits on one stop, in the reverse order of the model.
PROGRAM = """
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.request import Request
from tests.helpers.stub_models import ScriptedModel, exit_points

names = ["one", "two", "three", "four", "five", "six"]
model = ScriptedModel(4, exit_points(*((name, 2, 4) for name in names)), lambda *_: (1, 0.9))
asked, exit_logits = [], model.exit_logits
model.exit_logits = lambda name, *rest: asked.append(name) or exit_logits(name, *rest)
policies = [ExitPolicy(0.5, active=(name,)) for name in reversed(names)]
EarlyExitEngine(model).start([Request((1,), 1, mode="static_depth", policy=own) for own in policies]).step()
print(*asked)
"""


@pytest.mark.slow_unit
def test_exits_are_asked_in_the_order_of_the_sequences_under_any_hash_seed():
    """A set of exits has the right order by chance once in 720 times."""
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
        assert ran.stdout.split() == ["six", "five", "four", "three", "two", "one"], ran.stderr[-2000:]
