# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints: names, pruning and resuming, the same in a killed run as in an undisturbed one.

A checkpoint is a directory `<name>` (one of the best) or `<name>-last`. Where a run is killed between the writing of a
checkpoint and the removal of the one it replaces, both are there: the next start resumes from the newer, and removes
what is neither the last one nor among the best.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from nemo.utils import logging
from nemo.utils.callbacks import NeMoModelCheckpoint, PreemptionCallback
from nemo.utils.exp_manager import CallbackParams, exp_manager, get_log_dir
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, tensor

_LAST = "-last"
_FIELD = re.compile(r"\{([^:}]+)[^}]*\}-?")  # a metric's value in a file name, with the hyphen that ends it
_STEP = re.compile(r"\bstep=(\d+)")


class TrainingCheckpoints(NeMoModelCheckpoint):
    """NeMo's checkpoint callback. Names hold only measured metrics, and superseded checkpoints are removed.

    Args:
        params: fields of NeMo's `CallbackParams`; `filename` and `dirpath` are given.
        resume: take over the best ones of an earlier start; otherwise the checkpoints in the folder are another run's
            and stay.
    """

    def __init__(self, params: Mapping[str, Any], *, resume: bool) -> None:
        self.CHECKPOINT_NAME_LAST = params["filename"] + _LAST
        self._measured: dict[str, float] = {}  # metrics in the names, when the last checkpoint was written
        self._earlier: dict[str, float] = {}  # the same of an earlier start
        self._foreign = set() if resume else {path.name for path in finished(Path(params["dirpath"]))}
        super().__init__(n_resume=resume, **params)

    def nemo_topk_check_previous_run(self) -> None:
        """Find the best checkpoints of earlier starts by their names; the state of a loaded checkpoint replaces
        them."""
        scores = {path: _named(path.name, str(self.monitor)) for path in finished(Path(self.dirpath))}
        scores = {path: score for path, score in scores.items() if score is not None and not is_last(path)}
        best = sorted(scores, key=scores.get, reverse=self.mode == "max")[: self.save_top_k]
        self.best_k_models = {f"{path}{self.FILE_EXTENSION}": tensor(scores[path]) for path in best}
        self._remove_invalid_entries_from_topk()

    def format_checkpoint_name(
        self, metrics: dict[str, Tensor], filename: str | None = None, ver: int | None = None
    ) -> str:
        """Lightning's, without the fields of metrics that were not measured (which it writes as 0)."""
        pattern = _FIELD.sub(lambda field: field[0] if field[1] in metrics else "", filename or self.filename)
        return super().format_checkpoint_name(metrics, pattern.rstrip("-") or "{step}", ver)

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        earlier = {name: tensor(value) for name, value in self._earlier.items()}
        return earlier | super()._monitor_candidates(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Lightning's, and the last values of the metrics in the names."""
        return {**super().state_dict(), "measured": dict(self._measured)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning's, and the metrics of an earlier start."""
        super().load_state_dict(state_dict)
        self._earlier = dict(state_dict.get("measured") or {})

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Mark the step at which a run resumes as saved."""
        super().on_train_start(trainer, pl_module)
        if trainer.ckpt_path is not None:
            self._last_global_step_saved = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save the last step, whatever the interval."""
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        super().on_train_end(trainer, pl_module)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        candidates = self._monitor_candidates(trainer)
        fields = {field[1] for field in _FIELD.finditer(self.filename)} | {str(self.monitor)} - {"step", "epoch"}
        self._measured = {name: float(candidates[name]) for name in fields if name in candidates}
        super()._save_checkpoint(trainer, filepath)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        super()._save_last_checkpoint(trainer, monitor_candidates)
        if self.async_save or not self.save_last or self.save_top_k == -1:
            return  # written and removed later, by NeMo
        names = [Path(path).name for path in (self.last_model_path, *self.best_k_models)]
        kept = {name.removesuffix(self.FILE_EXTENSION) for name in names}
        resumed = Path(trainer.ckpt_path or "")
        kept |= set() if is_last(resumed) else {resumed.name}
        for path in trainer.strategy.broadcast([str(path) for path in finished(Path(self.dirpath))]):
            name = Path(path).name
            if name not in kept | self._foreign and name.startswith(self.filename.partition("{")[0]):
                self._remove_checkpoint(trainer, f"{path}{self.FILE_EXTENSION}")


class StepsOfTheWholeRun(Callback):
    """Logs a resumed run under the same steps as an undisturbed run.

    Lightning counts the steps for its loggers after validation, where checkpoints are written: the count in them is
    one short.
    """

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Set the loggers' count to that of the optimizer."""
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def finished(folder: Path) -> list[Path]:
    """The training checkpoints in a folder that were written to their end, by name."""
    found = sorted(path for path in folder.glob("*") if (path / "metadata.json").is_file())
    return [path for path in found if not NeMoModelCheckpoint.is_checkpoint_unfinished(path)]


def is_last(checkpoint: Path) -> bool:
    """Whether a checkpoint is one to resume from."""
    return f"-{checkpoint.name}".endswith(_LAST)


def _step(checkpoint: Path) -> int:
    found = _STEP.search(checkpoint.name)
    return int(found[1]) if found else -1


def mark_superseded(folder: Path) -> None:
    """Mark the checkpoints that a killed run left beside its newest last one as unfinished; NeMo's set-up removes
    them.

    These are older last ones, and those written after the newest one, which the run will write again. Every rank must
    call it before NeMo searches for the checkpoint to resume from, because NeMo refuses two.
    """
    found = finished(folder)
    last = [checkpoint for checkpoint in found if is_last(checkpoint)]
    if not last:
        return
    newest = max(last, key=_step)
    for checkpoint in found:
        if checkpoint != newest and (is_last(checkpoint) or _step(checkpoint) > _step(newest)):
            NeMoModelCheckpoint.format_checkpoint_unfinished_marker_path(checkpoint).touch()


def _named(name: str, metric: str) -> float | None:
    """The value of a metric in a checkpoint's name; None where it is not there."""
    found = re.search(rf"(?:^|-){re.escape(metric)}=(-?[\d.]+(?:e[-+]?\d+)?|-?inf|nan)(?:-|$)", name)
    return float(found[1]) if found else None


def manage_experiment(trainer: Trainer, cfg: DictConfig) -> Path | None:
    """NeMo's `exp_manager` with our checkpoints. Every rank must call it.

    Args:
        cfg: the script's `exp_manager` block.

    Returns:
        The run's folder.
    """
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    given = cfg.get("checkpoint_callback_params") or {}
    if cfg.get("resume_if_exists"):
        with logging.temp_verbosity(logging.ERROR):
            keys = ("exp_dir", "name", "version", "explicit_log_dir")
            log_dir, *_ = get_log_dir(trainer, **{key: cfg.get(key) for key in keys}, resume_if_exists=True)
        mark_superseded(Path(given.get("dirpath") or Path(log_dir) / "checkpoints"))
    wanted = cfg.get("create_checkpoint_callback", True)
    log_dir = exp_manager(trainer, OmegaConf.merge(cfg, {"create_checkpoint_callback": False}))
    if not wanted or log_dir is None:
        return log_dir
    params = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(CallbackParams), given))
    params.pop("filepath")
    params["dirpath"] = params["dirpath"] or str(log_dir / "checkpoints")
    params["prefix"] = params["prefix"] or cfg.get("name") or "default"
    params["filename"] = params["filename"] or f"{params['prefix']}--{{{params['monitor']}:.4f}}-{{step}}"
    if params["every_n_train_steps"] or params["train_time_interval"]:
        params["every_n_epochs"] = None  # Lightning takes one of the three
    checkpoints = TrainingCheckpoints(params, resume=bool(cfg.get("resume_if_exists")))
    checkpoints.last_model_path = trainer.ckpt_path or ""
    trainer.callbacks.append(checkpoints)
    if cfg.get("create_preemption_callback", True) and torch.cuda.is_available():
        trainer.callbacks.append(PreemptionCallback(checkpoints))
    return log_dir
