# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The tuning script's run: every layout has the same losses and writes the same exits, and problems end it in time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("megatron.bridge", reason="megatron-bridge is not installed")

import torch
import yaml

from nemo_ee.bridge.bridge_settings import BridgeTuneSettings
from nemo_ee.bridge.tuning_run import run
from tests.stack.bridge.bridge_models import COMPLETE, EARLIER, ROOT, exit_weights_in, export

LAYOUTS = {
    "one": {},
    "tensor": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "data": {},
}
EXITS = [
    {"layer": 1},
    {"layer": 2, "architecture": "layer"},
    {"layer": 3, "architecture": "norm", "output": "shared"},
    {"layer": 3, "architecture": "layer", "init": "lora", "rank": 2, "output": "low_rank"},
]


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """conf/bridge_early_exit_tune.yaml for a few steps on the CPU."""
    config = yaml.safe_load((ROOT / "conf" / "bridge_early_exit_tune.yaml").read_text(encoding="utf-8"))
    del config["hydra"], config["defaults"]
    data = str(EARLIER / "data")
    config |= {"source": str(folder / "export" / "hf_full"), "output": str(folder / "out")} | changes
    config["trainer"] |= {"accelerator": "cpu", "max_steps": 4, "log_every_n_steps": 1, "val_check_interval": 4}
    config["model"] |= {"encoder_seq_length": 32, "micro_batch_size": 1, "global_batch_size": 4}
    config["model"]["data"] = {"train": data, "validation": data}
    config["model"]["optim"]["lr"] = 1e-2
    config["model"]["early_exit"]["exits"] = EXITS
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Folder with the outputs of all layouts."""
    folder = tmp_path_factory.mktemp("runs")
    export(COMPLETE, folder / "export", "full")
    layouts: dict[str, Any] = {}
    for name, changes in LAYOUTS.items():
        config = settings(folder, output=str(folder / f"{name}.nemo"), complete=name == "tensor")
        config["model"] |= changes
        layouts[name] = {"ranks": 1 if name == "one" else 2, "settings": config}
    file = folder / "layouts.json"
    file.write_text(json.dumps(layouts), encoding="utf-8")
    program = [sys.executable, "-m", "tests.stack.bridge.layout_program", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    return SimpleNamespace(folder=folder, lines={name: (folder / f"{name}.txt").read_text() for name in LAYOUTS})


def losses(lines: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for name, value in re.findall(r"(\S+)/loss ([\d.]+)", lines):
        found.setdefault(name, []).append(float(value))
    return found


def test_losses_fall(runs: SimpleNamespace) -> None:
    """Each step has another batch, and the exits at layer 3 train few numbers: four steps show little there."""
    found = losses(runs.lines["one"])
    for name in ("exit/layer1-mlp", "exit/layer2-layer"):
        assert len(found[name]) == 4 and found[name][-1] < found[name][0], (name, found[name])
    assert sum(name.startswith("val/") for name in losses(runs.lines["one"])) == len(EXITS)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_every_layout_has_the_same_losses_and_exits(layout: str, runs: SimpleNamespace) -> None:
    ours, theirs = losses(runs.lines[layout]), losses(runs.lines["one"])
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():  # four digits are printed
        assert ours[name] == pytest.approx(values, rel=1e-3), name
    ours, theirs = (exit_weights_in(runs.folder / f"{name}.nemo") for name in (layout, "one"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        rows = min(len(tensor), len(ours[key]))  # the padding of the vocabulary depends on the layout
        # Adam divides by the size of a gradient, so that small differences in small gradients show.
        assert torch.allclose(ours[key][:rows], tensor[:rows], atol=2e-4), key


def test_a_run_goes_on_with_the_exits_of_a_file(runs: SimpleNamespace, tmp_path: Path) -> None:
    config = settings(runs.folder, exits=str(runs.folder / "pipeline.nemo"), output=str(tmp_path / "more"))
    config["model"]["early_exit"]["exits"] = []
    config["trainer"]["max_steps"] = 1
    lines = "\n".join(run(BridgeTuneSettings.from_config(config)))
    first, last = losses(lines), losses(runs.lines["one"])
    assert {name for name in first if not name.startswith("val/")} == {n for n in last if not n.startswith("val/")}
    assert all(first[name][0] < last[name][0] for name in first if not name.startswith("val/"))
    assert (tmp_path / "more" / "exit_weights" / ".metadata").is_file()


def test_problems_end_the_run_before_anything_is_built(runs: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists; name another directory"):
        list(run(BridgeTuneSettings.from_config(settings(runs.folder, output=str(tmp_path / "there")))))
    config = settings(runs.folder)
    config["model"]["global_batch_size"] = 10_000
    with pytest.raises(ValueError, match="one step needs\\s+model.global_batch_size=10000"):
        list(run(BridgeTuneSettings.from_config(config)))
    chat = str(tmp_path / "chat")
    for ending in (".bin", ".idx"):
        (tmp_path / f"chat{ending}").symlink_to(f"{EARLIER / 'data'}{ending}")
        (tmp_path / f"chat.mask{ending}").symlink_to(f"{EARLIER / 'data'}{ending}")
    config = settings(runs.folder)
    config["model"]["data"]["validation"] = f"{chat}.bin"
    with pytest.raises(
        ValueError, match="model.data.validation=.* is chat data, and this host does not read its mask"
    ):
        list(run(BridgeTuneSettings.from_config(config)))
    with pytest.raises(ValueError, match="trainer.max_steps=0"):
        BridgeTuneSettings.from_config({**config, "trainer": {**config["trainer"], "max_steps": 0}})
