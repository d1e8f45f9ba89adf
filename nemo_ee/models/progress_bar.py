# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The progress bar of tuning: NeMo's, with the loss of each exit at the last log step."""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from nemo.collections.nlp.parts.nlp_overrides import CustomProgressBar

from nemo_ee.megatron.loss.exit_metrics import metric_name

logger = logging.getLogger(__name__)

_COLUMNS_OF_THE_BAR = 60  # columns of a terminal for percentage, steps, times and validation loss
_FORMAT = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def losses_that_fit(losses: Mapping[str, float], columns: int) -> dict[str, str]:
    """The first losses of a progress bar, as many as fit, and how many more are in the log file.

    Args:
        losses: exit name -> loss, nats per token.
        columns: characters for `name=loss` and what separates them.

    Returns:
        Exit name -> loss as text; `more` -> the number of those left out, where there are some.
    """
    shown, room = {}, columns
    for number, (name, loss) in enumerate(losses.items()):
        shown[name] = f"{loss:.3f}"
        room -= len(f"{name}={shown[name]}, ")
        if room < 0 and number:  # one is shown in any terminal
            del shown[name]
            return {**shown, "more": f"{len(losses) - number} in the log file"}
    return shown


class TuningProgressBar(CustomProgressBar):
    """Shows steps, the losses of the exits and the validation loss; writes the losses of every log step to the log.

    It reads what the log step has summed over all ranks already, so it adds no collective.

    Args:
        stream: where the bar is drawn; None: the standard error.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self._stream = stream or sys.stderr
        self._losses: dict[str, float] = {}

    def init_train_tqdm(self) -> Tqdm:
        """The bar of the steps."""
        with contextlib.redirect_stdout(self._stream):
            bar = super().init_train_tqdm()
        bar.bar_format = _FORMAT
        return bar

    def init_validation_tqdm(self) -> Tqdm:
        """The bar of a validation."""
        with contextlib.redirect_stdout(self._stream):
            return super().init_validation_tqdm()

    def init_sanity_tqdm(self) -> Tqdm:
        """The bar of the validation before the first step."""
        with contextlib.redirect_stdout(self._stream):
            return super().init_sanity_tqdm()

    def init_test_tqdm(self) -> Tqdm:
        """The bar of a test."""
        with contextlib.redirect_stdout(self._stream):
            return super().init_test_tqdm()

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Name the bar."""
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description("tune")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Take the losses of a log step."""
        if trainer.is_global_zero and trainer.global_step % max(1, trainer.log_every_n_steps) == 0:
            names = {name: metric_name(name, "loss", validation=False) for name in pl_module.early_exit.names}
            logged = trainer.callback_metrics
            self._losses = {name: float(logged[metric]) for name, metric in names.items() if metric in logged}
            losses = ", ".join(f"{name} {loss:.4f}" for name, loss in self._losses.items())
            logger.debug("step %d of %d: %s", trainer.global_step, trainer.max_steps, losses)
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        """The metrics behind the bar."""
        columns = shutil.get_terminal_size((120, 24)).columns - _COLUMNS_OF_THE_BAR
        others = super().get_metrics(trainer, pl_module)
        others.pop("v_num", None)
        return losses_that_fit(self._losses, columns) | others
