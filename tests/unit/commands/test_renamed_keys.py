# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Retired names: an error that names the new one, on the command line and in Python; stored files use both."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_ee.commands.command import refuse_renamed_overrides
from nemo_ee.exits.block_reader import RENAMED_KEYS

ROOT = Path(__file__).parents[3]


def test_a_retired_key_names_the_new_one(capsys):
    refuse_renamed_overrides(["threshold=0.5", "max_pending_tokens=3", "--cfg=job"])
    for override in ("max_waiting=3", "+max_waiting=3", "~max_waiting"):
        with pytest.raises(SystemExit, match="2"):
            refuse_renamed_overrides([override])
        assert re.search("max_waiting is now max_pending_tokens .*num_draft_tokens", capsys.readouterr().err)


def test_no_yaml_uses_a_retired_key():
    for path in (ROOT / "conf").glob("*.yaml"):
        keys = {line.strip().partition(":")[0] for line in path.read_text(encoding="utf-8").splitlines()}
        assert not keys & set(RENAMED_KEYS), path


@pytest.mark.parametrize("script", ["examples/megatron_gpt_early_exit_generate.py", "scripts/sweep_thresholds.py"])
def test_a_script_ends_with_one_line(script):
    ran = subprocess.run([sys.executable, script, "max_waiting=3"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1
    assert ran.stderr.startswith("error: max_waiting=3: max_waiting is now max_pending_tokens")
