# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The example of docs/python-api.md on plain Megatron-core runs as it is written, on the reference model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from nemo_ee.checkpoint.exits_file import stored_exits
from nemo_ee.checkpoint.huggingface import HuggingFaceSource
from tests.helpers.core_models import microbatch

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.usefixtures("one_rank")
def test_the_example_tunes_saves_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8").split("## On plain Megatron-core")[1]
    program = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    model = ROOT / "assets" / "reference-model"
    assert '"model/"' in program and "checkpoint/" in program
    monkeypatch.chdir(tmp_path)
    tokens = torch.arange(4 * 16).view(4, 16)
    names = {"global_batches": [[microbatch(tokens[:2]), microbatch(tokens[2:])]] * 2}
    program = program.replace('"model/"', repr(str(model)))
    exec(program.replace("early_exit, stages)", "early_exit, stages, use_cpu_initialization=True)"), names)
    assert {path.name for path in (tmp_path / "checkpoint").iterdir()} >= {".metadata", "metadata.json"}
    with stored_exits(tmp_path / "tuned.nemo", HuggingFaceSource(model)) as (block, exits):
        assert [exit["name"] for exit in block["exits"]] == ["layer4-mlp", "layer8-norm"]
        assert {key.split(".")[0] for key in exits.keys()} == {"layer4-mlp", "layer8-norm"}
    losses = names["losses"]
    assert losses.keys() == {"layer4-mlp", "layer8-norm"}
    assert all(0.0 < values["loss"] < 20.0 for values in losses.values())
