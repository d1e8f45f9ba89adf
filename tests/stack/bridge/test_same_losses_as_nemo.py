# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Five tuning steps on Megatron-Bridge have the losses of the NeMo host, from the exits of one `.nemo`.

tests/data/stack/nemo_losses.json has the batches and losses of the NeMo host; write_nemo_losses.py wrote it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("megatron.bridge", reason="megatron-bridge is not installed")

import torch

from nemo_ee.checkpoint.exits_file import stored_exits
from nemo_ee.checkpoint.huggingface import HuggingFaceSource
from nemo_ee.megatron.pipeline.exit_tuner import ExitTuner
from tests.stack.bridge.bridge_models import COMPLETE, ROOT, build, export, microbatch

NEMO = json.loads((ROOT / "tests" / "data" / "stack" / "nemo_losses.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-5  # relative


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(COMPLETE, tmp_path_factory.mktemp("source") / "export", "full") / "hf_full"


def close(ours: float, theirs: float) -> bool:
    return abs(ours - theirs) <= TOLERANCE * abs(theirs)


@pytest.mark.parametrize("case", NEMO["cases"])
def test_losses_and_weights(case: str, source: Path) -> None:
    expected = NEMO["cases"][case]
    with stored_exits(COMPLETE, HuggingFaceSource(source)) as (_, exits):
        model, provider = build(source, expected["early_exit"], exits)
    run = {"optim": NEMO["optim"], "num_steps": len(expected["steps"]), "max_norm": NEMO["clip"]}
    tuner = ExitTuner(model, provider.exit_config, provider.placements, **run)
    before = {name: value.clone() for name, value in model.backbone_named_parameters()}
    for step in expected["steps"]:
        batches = [
            microbatch(*(torch.tensor(batch[key]) for key in ("tokens", "labels", "loss_mask")))
            for batch in step["batches"]
        ]
        losses = {name: result["loss"] for name, result in tuner.tune(batches).items()}
        assert losses.keys() == step["losses"].keys()
        assert all(close(losses[name], loss) for name, loss in step["losses"].items()), (losses, step["losses"])
    for name, norms in expected["norms_after"].items():
        ours = {key: value.double().norm().item() for key, value in model.exits[name].named_parameters()}
        assert ours.keys() == norms.keys()
        assert all(close(ours[key], norm) for key, norm in norms.items()), name
    assert all(torch.equal(value, before[name]) for name, value in model.backbone_named_parameters())


def test_control_the_losses_depend_on_step_and_exit() -> None:
    for case in NEMO["cases"].values():
        losses = [loss for step in case["steps"] for loss in step["losses"].values()]
        assert len(case["steps"]) == 5 and len({round(loss, 5) for loss in losses}) == len(losses)
