# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Lightning strategy and trainer builder: NeMo's own, without the parts that join pipeline stages or need one whole
model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning.pytorch import Trainer
from megatron.core import dist_checkpointing
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
from nemo.collections.nlp.parts.nlp_overrides import (
    MegatronHalfPrecisionPlugin,
    NLPDDPStrategy,
    PipelineMixedPrecisionPlugin,
)
from omegaconf import AnyNode, DictConfig, ListConfig
from omegaconf.base import ContainerMetadata, Metadata

from nemo_ee import cpu_host
from nemo_ee.checkpoint.restricted_pickle import refuse_unsafe_pickles
from nemo_ee.models.progress_bar import TuningProgressBar
from nemo_ee.models.training_checkpoints import StepsOfTheWholeRun

# The model's config in a training checkpoint: Lightning stores it with the hyperparameters. It holds data only.
_CONFIG_CLASSES = (
    DictConfig, ListConfig, ContainerMetadata, Metadata, AnyNode, Any, defaultdict, dict, list, int, float, bool, str
)  # fmt: skip


class EarlyExitStrategy(NLPDDPStrategy):
    """NeMo's strategy without a DDP wrapper: exits synchronise their own gradients, and a stage may have none.

    Attributes:
        trust_checkpoint: a training checkpoint is unpickled without a check of the code it would run.
    """

    trust_checkpoint = False

    def configure_ddp(self) -> None:
        """The bare model. torch DDP refuses a stage that has nothing to train."""
        self._model = self.model

    def optimizer_sharded_state_dict(self, unsharded_optim_state: Any = None, is_loading: bool = False) -> dict:
        """The optimizer states, keyed by exit name."""
        optimizer = self.lightning_module.optimizers(use_pl_optimizer=False)
        return optimizer.sharded_state_dict(self.lightning_module.sharded_state_dict())

    def load_checkpoint(self, checkpoint_path: str | Path, load_optimizer_states: bool = True) -> dict[str, Any]:
        """Load a training checkpoint: the trained parameters, their optimizers, and Lightning's loop state."""
        if not Path(checkpoint_path).is_dir():
            raise ValueError(
                f"training checkpoint {checkpoint_path} is not a directory: exit tuning writes Megatron's distributed "
                "checkpoints (directories); point at one of those, or start anew: exp_manager.resume_if_exists=False"
            )
        # Megatron-core and PyTorch unpickle every part of it without restrictions.
        refuse_unsafe_pickles(checkpoint_path, trust_checkpoint=self.trust_checkpoint, known=_CONFIG_CLASSES)
        common = dist_checkpointing.load_common_state_dict(str(checkpoint_path))
        trains, ours = common.get("trains", "exits"), self.lightning_module.early_exit.trains
        if trains != ours:
            raise ValueError(
                f"training checkpoint {checkpoint_path} was made by a run that trains {trains}, this one trains "
                f"{ours} (model.early_exit.train); resume as it began, or start anew: "
                "exp_manager.resume_if_exists=False"
            )
        saved = common.get("exit_names")
        names = list(self.lightning_module.early_exit.names)
        if saved is not None and sorted(saved) != sorted(names):
            raise ValueError(
                f"training checkpoint {checkpoint_path} holds the exits {', '.join(saved)}, this run tunes "
                f"{', '.join(names)}; tune the same exits, or start anew: exp_manager.resume_if_exists=False"
            )
        main_weights = self.lightning_module.main_weights
        if common.get("main_weights", False) != main_weights:
            raise ValueError(
                f"training checkpoint {checkpoint_path} was saved with model.megatron_amp_O2={not main_weights}, this "
                f"run has {main_weights}; resume with the same, or start anew: exp_manager.resume_if_exists=False"
            )
        wanted: dict[str, Any] = {"state_dict": self.lightning_module.sharded_state_dict()}
        if load_optimizer_states:
            wanted["optimizer_states"] = [self.optimizer_sharded_state_dict(is_loading=True)]
        return self.checkpoint_io.load_checkpoint(checkpoint_path, sharded_state_dict=wanted)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Does nothing: the model loads its trained parameters in `on_load_checkpoint`."""


def check_accelerator(cfg: DictConfig) -> None:
    """Raises ValueError for `trainer.accelerator=gpu` on a machine without a GPU."""
    if cfg.trainer.get("accelerator") in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"trainer.accelerator={cfg.trainer.accelerator}, but this machine has no CUDA device; add "
            f"trainer.accelerator=cpu"
        )


class EarlyExitTrainerBuilder(MegatronTrainerBuilder):
    """NeMo's builder with our strategy. Runs on the CPU host too.

    Args:
        cfg: the script's config.
        console: where the progress bar is drawn; None: the standard error.
    """

    def __init__(self, cfg: DictConfig, console: TextIO | None = None) -> None:
        super().__init__(cfg)
        self._console = console

    def _training_strategy(self) -> EarlyExitStrategy:
        check_accelerator(self.cfg)
        minutes = self.cfg.model.get("distributed_timeout_minutes", 30)
        return EarlyExitStrategy(
            no_ddp_communication_hook=True,
            find_unused_parameters=False,
            nccl_communicator_config_path=self.cfg.model.get("nccl_communicator_config_path", None),
            sharp=self.cfg.model.get("sharp", False),
            timeout=timedelta(minutes=minutes),
        )

    def _plugins(self) -> list:
        plugins = [_without_nemo_main_weights(plugin) for plugin in super()._plugins()]
        if cpu_host.enabled():
            for plugin in plugins:
                if getattr(plugin, "device", None) == "cuda":
                    plugin.device = "cpu"
        return plugins

    def _callbacks(self, callbacks: list | None) -> list:
        # NeMo adds a FLOPs callback that supports neither exits nor truncated models.
        callbacks = [*(callbacks or []), StepsOfTheWholeRun()]
        if self.cfg.trainer.get("enable_progress_bar", True):
            callbacks.append(TuningProgressBar(self._console))
        return callbacks


def _without_nemo_main_weights(plugin: Any) -> Any:
    """Under `megatron_amp_O2` NeMo's plugin needs NeMo's own optimizer wrapper; here each exit has its own
    optimizer."""
    if not isinstance(plugin, MegatronHalfPrecisionPlugin):
        return plugin
    return PipelineMixedPrecisionPlugin(precision=plugin.precision, device="cuda", scaler=plugin.scaler)


def single_run_trainer(cfg: DictConfig) -> Trainer:
    """A trainer for conversion, evaluation and generation: no logger, no checkpoints, no callbacks.

    Args:
        cfg: the script's config; `trainer` is handed to Lightning, `model.distributed_timeout_minutes` is read.
    """
    check_accelerator(cfg)
    minutes = cfg.model.get("distributed_timeout_minutes", 30)
    strategy = EarlyExitStrategy(no_ddp_communication_hook=True, timeout=timedelta(minutes=minutes))
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "use_distributed_sampler": False,
    }
    return Trainer(strategy=strategy, **{**options, **cfg.trainer})
