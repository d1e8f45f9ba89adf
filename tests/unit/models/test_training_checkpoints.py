# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Names of training checkpoints, and which of them a start goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nemo")

import torch
from nemo.utils.callbacks import NeMoModelCheckpoint

from nemo_ee.models.training_checkpoints import TrainingCheckpoints, finished, is_last, mark_superseded

FILENAME = "exits--{val_loss:.4f}-{step}-{consumed_samples}"
BEST, LAST = (
    "exits--val_loss=1.5000-step=4-consumed_samples=16.0",
    "exits--val_loss=1.5000-step=4-consumed_samples=16.0-last",
)


def checkpoint(folder: Path, name: str, *, whole: bool = True) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / "metadata.json").touch()
    if not whole:
        NeMoModelCheckpoint.format_checkpoint_unfinished_marker_path(path).touch()
    return path


def callback(folder: Path, **params: Any) -> TrainingCheckpoints:
    given = {"filename": FILENAME, "dirpath": str(folder), "monitor": "val_loss", "mode": "min", "save_last": True}
    return TrainingCheckpoints({"save_top_k": 1, **given, **params}, resume=True)


def test_a_name_holds_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    """Lightning alone writes val_loss=0.0000 where nothing was validated."""
    measured = {"val_loss": torch.tensor(1.5), "step": torch.tensor(4), "consumed_samples": torch.tensor(16.0)}
    ours = callback(tmp_path)
    for metrics, name in (
        (measured, BEST),
        ({key: measured[key] for key in ("step", "consumed_samples")}, "exits--step=4-consumed_samples=16.0"),
        ({key: measured[key] for key in ("val_loss", "step")}, "exits--val_loss=1.5000-step=4"),
    ):
        assert Path(ours.format_checkpoint_name(dict(metrics))).name == f"{name}.ckpt"
        last = ours.format_checkpoint_name(dict(metrics), ours.CHECKPOINT_NAME_LAST)
        assert Path(last).name == f"{name}-last.ckpt"
    theirs = super(TrainingCheckpoints, ours).format_checkpoint_name({"step": torch.tensor(4)})
    assert "val_loss=0.0000" in theirs, "control: what Lightning writes"


def test_a_resumed_run_goes_on_with_what_was_measured_before(tmp_path: Path) -> None:
    ours, resumed = callback(tmp_path), callback(tmp_path)
    ours._measured = {"val_loss": 1.5}
    resumed.load_state_dict(ours.state_dict())
    trainer = type("Trainer", (), {"callback_metrics": {}, "current_epoch": 0, "global_step": 5})
    assert resumed._monitor_candidates(trainer)["val_loss"] == 1.5
    trainer.callback_metrics = {"val_loss": torch.tensor(1.25)}
    assert resumed._monitor_candidates(trainer)["val_loss"] == 1.25, "a new value counts"


@pytest.mark.parametrize(("mode", "best"), [("min", "1.2500"), ("max", "nan")])
def test_the_best_of_an_earlier_start_are_read_from_their_names(tmp_path: Path, mode: str, best: str) -> None:
    """In a folder whose own name holds the metric's; a loss that is not a number is no reason to stop."""
    folder = tmp_path / "val_loss=low"
    for name in ("exits--val_loss=1.2500-step=2-x=1.0", "exits--val_loss=1.5000-step=4-x=1.0", "notes"):
        checkpoint(folder, name)
    checkpoint(folder, "exits--val_loss=1.5000-step=6-x=1.0-last")
    if mode == "max":
        checkpoint(folder, "exits--val_loss=nan-step=8-x=1.0")
    found = callback(folder, mode=mode).best_k_models
    assert len(found) == 1 and (mode == "max" or best in next(iter(found)))
    assert callback(folder, save_top_k=0).best_k_models == {}, "none is kept"
    assert len(callback(folder, save_top_k=5).best_k_models) == 2 + (mode == "max")


def test_what_a_killed_run_left_is_marked(tmp_path: Path) -> None:
    """Two last ones: killed between writing the new and removing the old. NeMo alone refuses to resume from two."""
    old = checkpoint(tmp_path, "exits--val_loss=1.6000-step=2-x=1.0-last")
    new, best = checkpoint(tmp_path, LAST), checkpoint(tmp_path, BEST)
    later = checkpoint(tmp_path, "exits--val_loss=1.4000-step=6-x=1.0")
    cut_off = checkpoint(tmp_path, "exits--val_loss=1.4000-step=6-x=1.0-last", whole=False)
    for _ in range(2):  # every rank does it
        mark_superseded(tmp_path)
        assert finished(tmp_path) == sorted([new, best])
    NeMoModelCheckpoint._remove_unfinished_checkpoints(tmp_path)
    assert [path.exists() for path in (old, later, cut_off)] == [False] * 3 and new.exists() and best.exists()


def test_without_a_last_one_nothing_is_marked(tmp_path: Path) -> None:
    best = checkpoint(tmp_path, BEST)
    mark_superseded(tmp_path)
    mark_superseded(tmp_path / "none")
    assert finished(tmp_path) == [best]


@pytest.mark.parametrize("resume", [True, False])
def test_checkpoints_of_others_stay(resume: bool, tmp_path: Path, monkeypatch) -> None:
    """A run that starts anew in a folder leaves what lies there; a resumed one removes only names of its own form."""
    earlier, copy = checkpoint(tmp_path, BEST), checkpoint(tmp_path, "my-copy")
    params = {"filename": FILENAME, "dirpath": str(tmp_path), "monitor": "val_loss", "save_last": True}
    ours = TrainingCheckpoints({"save_top_k": 1, **params}, resume=resume)
    ours.best_k_models.clear()
    superseded = checkpoint(tmp_path, LAST)
    removed: list[str] = []
    monkeypatch.setattr(NeMoModelCheckpoint, "_save_last_checkpoint", lambda *_: None)
    monkeypatch.setattr(ours, "_remove_checkpoint", lambda _, path: removed.append(Path(path).stem))
    strategy = type("Strategy", (), {"broadcast": staticmethod(lambda paths: paths)})
    ours._save_last_checkpoint(type("Trainer", (), {"ckpt_path": None, "strategy": strategy}), {})
    assert set(removed) == {superseded.name, *([earlier.name] if resume else [])} and copy.exists()


def test_a_name_without_a_measured_field_is_the_step(tmp_path: Path) -> None:
    ours = callback(tmp_path, filename="{val_loss:.4f}")
    metrics = {"step": torch.tensor(4)}
    assert Path(ours.format_checkpoint_name(dict(metrics))).name == "step=4.ckpt"
    last = Path(ours.format_checkpoint_name(dict(metrics), ours.CHECKPOINT_NAME_LAST))
    assert is_last(last.with_suffix(""))
