# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""scripts/estimate_tuning.py: its table, its JSON, and the table in the docs that names its command."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "estimate_tuning.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("estimate_tuning", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_assumption_is_an_option_and_is_printed(script, capsys, tmp_path: Path) -> None:
    command = ["--model", "13B", "--exits", "1", "--gpus", "8", "--json", str(tmp_path / "e.json")]
    assert script.main(command) == 0
    before = json.loads((tmp_path / "e.json").read_text())
    output = capsys.readouterr().out
    assert all(f"{name}={value}" in output for name, value in before["assumptions"].items())
    assert script.main([*command, "--peak-tflops", "156", "--distributed-optimizer"]) == 0
    after = json.loads((tmp_path / "e.json").read_text())
    assert after["assumptions"] == {**before["assumptions"], "peak_tflops": 156.0, "distributed_optimizer": True}
    (old,), (new,) = before["rows"], after["rows"]
    assert old["model"] == "13B" and old["gpus"] == 8 and old["estimate"]["fits"]
    assert 1.5 < new["estimate"]["hours"] / old["estimate"]["hours"] < 2.0, "half the peak, the same links"


def test_the_table_in_the_docs_is_the_one_it_prints(script, capsys) -> None:
    assert script.main([]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 24
    assert "\n".join(table) in (ROOT / "docs" / "tuning-at-scale.md").read_text(encoding="utf-8")


def test_given_layouts_and_what_does_not_go(script, capsys) -> None:
    assert script.main(["--model", "70B", "--exits", "8", "--layout", "8,8,16", "--layout", "1,1,1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("| 70B | 8 | 1024 | 8 x 8 x 16 |") and "too much" in lines[-1]
    assert script.main(["--model", "7B", "--layout", "1,1,32"]) == 2
    assert "16 sequences per step are not a multiple" in capsys.readouterr().err
    for bad in (["--layout", "1,2"], ["--exits", "0"], ["--utilisation", "0"], ["--peak", "1"], ["--model", "8B"]):
        with pytest.raises(SystemExit):
            script.main(bad)
