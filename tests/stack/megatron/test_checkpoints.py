# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of every version of Megatron-core load on this one, bitwise, and a resumed run goes on as it did.

They were written by two pipeline stages and are read on one rank. Each version reads its own; `make test-stack` runs
this file once more with `NEMO_EE_READ_ALL` when every version has written.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.core_models import core_model
from tests.stack.megatron.checkpoint_files import stored_tensors, tensors_of
from tests.stack.megatron.tuning_program import EXITS, STEPS, WAYS, Training

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def folders(tuned: SimpleNamespace) -> list[Path]:
    """The checkpoints of this version; where `$NEMO_EE_READ_ALL` is set also those of the others, after it."""
    if "NEMO_EE_READ_ALL" not in os.environ:
        return [tuned.output]
    return sorted(tuned.output.parent.iterdir(), key=lambda folder: folder != tuned.output)


@pytest.mark.parametrize("way", WAYS)
def test_a_nemo_file_has_the_same_weights(tuned: SimpleNamespace, folders: list[Path], way: str) -> None:
    from nemo_ee.checkpoint.chunk_reader import ChunkReader
    from nemo_ee.checkpoint.unpacked import open_nemo

    for folder in (own / way for own in folders):
        with open_nemo(folder / "weights.nemo") as archive:
            backbone = ChunkReader(archive.folder("model_weights"))
            exits = ChunkReader(archive.folder("exit_weights"), prefix="exits.")
            model = core_model(tuned.backbone, EXITS, source=backbone, stored_exits=exits).model
        for part, shards in {
            "model_weights": model.sharded_backbone_to_save("model."),
            "exit_weights": model.exit_sharded_state_dict(),
        }.items():
            assert_same(tensors_of(shards), stored_tensors(folder, part))


@pytest.mark.parametrize("way", WAYS)
def test_a_training_checkpoint_resumes(tuned: SimpleNamespace, folders: list[Path], way: str) -> None:
    from nemo_ee.checkpoint.distributed_checkpoint import load_distributed

    for folder in (own / way for own in folders):
        run = Training(tuned.backbone, way)
        loaded = load_distributed(run.state(), folder / "training")
        assert_same(tensors_of(run.state()["model"]), stored_tensors(folder, "training"))
        run.optimizers.load_state_dict(loaded["optimizer"])
        run.rates.load_state_dict({"last_epoch": STEPS})
        run.steps = STEPS
        assert run.step() == pytest.approx(json.loads((folder / "next.json").read_text()), rel=1e-5)


def test_control_a_step_without_the_optimizers_state_leads_elsewhere(
    tuned: SimpleNamespace, folders: list[Path]
) -> None:
    from nemo_ee.checkpoint.distributed_checkpoint import load_distributed

    after = []
    for with_state in (True, False):
        run = Training(tuned.backbone, "adamw")
        loaded = load_distributed(run.state(), folders[0] / "adamw" / "training")
        if with_state:
            run.optimizers.load_state_dict(loaded["optimizer"])
        else:
            run = Training(tuned.backbone, "adamw")
            load_distributed({"model": run.state()["model"]}, folders[0] / "adamw" / "training")
        run.rates.load_state_dict({"last_epoch": STEPS})
        run.steps = STEPS
        run.step()
        after.append(run.step())
    assert after[0] != pytest.approx(after[1], rel=1e-4)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bitwise, with the same keys."""
    assert found.keys() == expected.keys()
    assert [key for key, value in found.items() if not torch.equal(value, expected[key])] == []
