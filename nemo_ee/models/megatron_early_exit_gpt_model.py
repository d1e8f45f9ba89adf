# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""`MegatronEarlyExitGPTModel`: NeMo's `MegatronGPTModel` with exit heads. Overrides only; the work is done below.

The module path of this class is stored in every `.nemo` as its `target`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from megatron.core import parallel_state, tensor_parallel
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.transformer_config import TransformerConfig
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel, mcore_model_customize
from nemo.collections.nlp.parts.nlp_overrides import init_model_parallel
from nemo.utils import logging as nemo_logging
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from nemo_ee import cpu_host
from nemo_ee.checkpoint.chunk_reader import WeightSource
from nemo_ee.checkpoint.megatron_model import build_stage, load_stage
from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.exits.loss_weights import loss_weights_at
from nemo_ee.exits.objective import Objective
from nemo_ee.exits.placement import StagePlacement
from nemo_ee.megatron.loss.exit_metrics import ExitSums, mean_loss, named_metrics
from nemo_ee.megatron.model.backbone_training import prepare_backbone, trained_backbone_shards, what_trains
from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel, set_layer_split
from nemo_ee.megatron.model.microbatch import MicroBatch
from nemo_ee.megatron.optim.exit_optimizers import exit_parameter_groups
from nemo_ee.megatron.optim.learning_rate import ExitLearningRates, LearningRateSchedule
from nemo_ee.megatron.optim.stage_optimizers import stage_optimizers
from nemo_ee.megatron.pipeline.joint_training import JointTraining
from nemo_ee.megatron.pipeline.stage_context import StageContext
from nemo_ee.megatron.pipeline.stage_forward import hidden_state_transport
from nemo_ee.megatron.pipeline.teacher_channel import TeacherChannel
from nemo_ee.megatron.pipeline.tuning_step import evaluate_global_batch, tune_global_batch
from nemo_ee.models.connector import EarlyExitSaveRestoreConnector
from nemo_ee.models.datasets import DatasetHooks
from nemo_ee.models.nemo_overrides import WholeModelHooks
from nemo_ee.models.stage_layers import choose_placements, read_layer_split
from nemo_ee.models.supported import needs_full_depth, refuse_large_top_k, refuse_unsupported

logger = logging.getLogger(__name__)

# Logged values are summed over all ranks already. Lightning has no way to see that and advises sync_dist for every
# metric.
warnings.filterwarnings("ignore", message=".*sync_dist=True.*")


class MegatronEarlyExitGPTModel(WholeModelHooks, DatasetHooks, MegatronGPTModel):
    """A Megatron GPT with early-exit heads; its backbone is frozen with `early_exit.train: exits`, the default.

    Args:
        cfg: NeMo's GPT model config with an `early_exit` block (DESIGN: `nemo_ee.exits.config`). Further keys:
            `vocab_size` (true size, default the tokenizer's), `full_depth` (build the layers past the deepest exit and
            the final exit; null: only if something needs them), `val_agreement` (log agreement with the full model).
        trainer: Lightning trainer with `EarlyExitStrategy`.

    Raises:
        ValueError: an unsupported or contradictory setting; one message lists all of them.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer) -> None:
        if trainer is None:
            raise ValueError("MegatronEarlyExitGPTModel needs a Trainer; build one with EarlyExitTrainerBuilder(cfg)")
        with open_dict(cfg):
            cfg.target = f"{type(self).__module__}.{type(self).__qualname__}"
            if cfg.get("optim") is None:
                cfg.optim = {"name": "adamw", "lr": 0.0}
            self.config_to_store = OmegaConf.to_container(cfg, resolve=True)
            if cpu_host.enabled():
                cfg.update(cpu_host.MODEL_SETTINGS)
        precision = cfg.get("precision") or trainer.precision
        refuse_unsupported(cfg, world_size=trainer.world_size, precision=precision)
        self.early_exit = EarlyExitConfig.from_mapping(
            OmegaConf.to_container(cfg.early_exit, resolve=True), num_layers=cfg.num_layers
        )
        self.objectives = {name: Objective.of(self.early_exit, name) for name in self.early_exit.names}
        self.trains_backbone = self.early_exit.train != "exits"
        self.full_depth = needs_full_depth(cfg, self.early_exit)
        self.layer_split = read_layer_split(self, cfg)
        self.main_weights = bool(cfg.get("megatron_amp_O2", False))
        super().__init__(cfg, trainer=trainer)
        if isinstance(self.model, list):  # NeMo's distributed optimizer wraps a list; ours wraps the exits
            self.model = self.model[0]
        self._save_restore_connector = EarlyExitSaveRestoreConnector()
        # Sources of the parts of a saved file; set by the code that fills the model.
        self.backbone_path: str | None = None  # the .nemo that holds the backbone
        self.restored_path: str | None = None  # the .nemo the model was restored from
        self.backbone_dtypes: dict[str, torch.dtype] = {}  # canonical name -> dtype in the source
        self.bundled_files: dict[str, Path] = {}  # member of the .nemo -> file
        self._joint: JointTraining | None = None
        self._train_sums: ExitSums | None = None
        self._val_sums: ExitSums | None = None

    def build_transformer_config(self) -> TransformerConfig:
        """Megatron's config with the real layer split; NeMo itself supports only equal splits of all layers."""
        stages = self.cfg.get("pipeline_model_parallel_size", 1)
        activation = self.cfg.get("activation", "gelu")
        with open_dict(self.cfg):
            self.cfg.pipeline_model_parallel_size = 1
            if activation == "relu":
                self.cfg.activation = "gelu"
        try:
            # NeMo warns about every field of Megatron's config that a model config leaves at its default: over 200
            # lines.
            with nemo_logging.temp_verbosity(nemo_logging.ERROR):
                config = super().build_transformer_config()
        finally:
            with open_dict(self.cfg):
                self.cfg.pipeline_model_parallel_size = stages
                self.cfg.activation = activation
        config.pipeline_model_parallel_size = stages
        if activation == "relu":  # OPT; NeMo's table of activations has none
            config.activation_func = torch.nn.functional.relu
        self.placements = choose_placements(self, config)
        set_layer_split(config, self.placements)
        return config

    def build_model_parallel_config(self):
        """NeMo's, without a warning for every field left at its default."""
        with nemo_logging.temp_verbosity(nemo_logging.ERROR):
            return super().build_model_parallel_config()

    def model_provider_func(self, pre_process: bool, post_process: bool) -> EarlyExitGPTModel:
        """Build this rank's stage. Megatron-core needs its process groups when modules are built."""
        if not parallel_state.is_initialized():
            self.set_up_process_groups()
        cfg = self.cfg
        model = build_stage(
            self.transformer_config,
            self.early_exit,
            self.placements,
            full_depth=self.full_depth or not self.early_exit.exits,
            transformer_engine=bool(cfg.get("transformer_engine", False)),
            vocab_size=self.vocab_size,
            padded_vocab_size=self.padded_vocab_size,
            max_sequence_length=cfg.get("max_position_embeddings") or cfg.encoder_seq_length,
            share_embeddings_and_output_weights=cfg.get("share_embeddings_and_output_weights", True),
            position_embedding_type=cfg.get("position_embedding_type", "learned_absolute"),
            rotary_percent=cfg.get("rotary_percentage", 1.0),
            rotary_base=cfg.get("rotary_base", 10000),
            seq_len_interpolation_factor=cfg.get("seq_len_interpolation_factor", None),
        )
        mcore_model_customize(cfg, model)
        if self.trains_backbone:
            prepare_backbone(model, self.early_exit)
        return model

    def set_up_process_groups(self) -> None:
        """Start the ranks where Lightning's strategy has a launcher for them, and make Megatron's groups."""
        strategy = self.trainer.strategy
        if strategy.launcher is not None:
            strategy.launcher.launch(lambda: None, trainer=self.trainer)
        strategy.setup_environment()
        if not parallel_state.is_initialized():
            init_model_parallel(
                sharp=False, distributed_timeout_minutes=self.cfg.get("distributed_timeout_minutes", 30)
            )
        if cpu_host.enabled():  # NeMo seeds Megatron's generator only where it counts a GPU
            tensor_parallel.model_parallel_cuda_manual_seed(self.cfg.get("seed", 1234))

    @property
    def placement(self) -> StagePlacement:
        """This stage's layers and exits."""
        return self.placements[parallel_state.get_pipeline_model_parallel_rank()]

    def _build_vocab(self) -> None:
        """True and padded vocabulary size. The padding depends on the layout, the true size does not."""
        self.vocab_size = self.cfg.get("vocab_size") or self.tokenizer.vocab_size
        refuse_large_top_k(self.early_exit.distillation.top_k, self.vocab_size)
        self.padded_vocab_size = self._vocab_size_with_padding(
            orig_vocab_size=self.vocab_size,
            make_vocab_size_divisible_by=self.cfg.get("make_vocab_size_divisible_by", 128),
            tensor_model_parallel_size=self.cfg.get("tensor_model_parallel_size", 1),
        )

    def load_weights(
        self,
        backbone: WeightSource,
        exits: WeightSource | None,
        *,
        updates: WeightSource | None = None,
        logged: bool = True,
    ) -> None:
        """Fill backbone and exits from checkpoints; exits that are not in `exits` are initialised by their `init`.

        Args:
            backbone: the backbone's tensors under canonical keys.
            exits: tuned exits, keys `<exit name>.<parameter>`, or None.
            updates: low-rank updates of the backbone to train on, read with `train: lora`; None starts new ones.

        Raises:
            ValueError: model and weights do not belong together.
        """
        load_stage(
            self.model,
            backbone,
            exits,
            early_exit=self.early_exit,
            seed=self.cfg.get("seed", 1234),
            updates=updates,
        )
        if logged:
            self.log_what_trains()

    def freeze_backbone(self) -> None:
        """Freeze everything but the exits. The constructor has done so already."""
        self.model.freeze_backbone()

    def exit_parameter_groups(self) -> dict[str, list[dict[str, Any]]]:
        """Parameter groups per exit of this stage: exit name -> [{params, lr, weight_decay, ...}], for torch.optim."""
        optim = OmegaConf.to_container(self.cfg.optim, resolve=True)
        return {head.exit.name: exit_parameter_groups(head, optim) for head in self.model.exits}

    def log_what_trains(self) -> None:
        """Log, once per stage, how many parameters train and how many are frozen."""
        if parallel_state.get_data_parallel_rank() or parallel_state.get_tensor_model_parallel_rank():
            return
        logger.info(what_trains(self.model))

    def configure_optimizers(self):
        """One optimizer per exit, and one for what trains in the backbone, handed to Lightning as one."""
        optim = OmegaConf.to_container(self.cfg.optim, resolve=True)
        if self.trains_backbone:
            self._joint = JointTraining(self.context, self.placements, seed=self.cfg.get("seed", 1234))
        self._optimizer = stage_optimizers(
            self.model,
            optim,
            main_weights=self.main_weights,
            max_norm=float(self.trainer.gradient_clip_val or 0.0),
            trains_backbone=self.trains_backbone,
        )
        schedule = LearningRateSchedule.of(optim.get("sched") or {}, num_steps=self._get_max_steps())
        self._scheduler = ExitLearningRates(self._optimizer, schedule, optim)
        return [self._optimizer], [{"scheduler": self._scheduler, "interval": "step", "frequency": 1}]

    @cached_property
    def context(self) -> StageContext:
        """The context of this stage, without teachers."""
        mixed = self.torch_dtype is torch.bfloat16 and not self.main_weights
        autocast = torch.bfloat16 if mixed else None
        return StageContext(self.model, hidden_state_transport(), self.objectives, autocast)

    @cached_property
    def tuning_context(self) -> StageContext:
        """`context` with the teachers that the exits learn from. Every rank must read it at the same time."""
        if not self.early_exit.has_teacher:
            return self.context
        teachers = TeacherChannel(
            self.model,
            self.early_exit,
            self.placements,
            autocast=self.context.autocast,
            casts=self.context.casts,
            timeout=timedelta(minutes=self.cfg.get("distributed_timeout_minutes", 30)),
        )
        return replace(self.context, teachers=teachers)

    def training_step(self, dataloader_iter: Iterator) -> Tensor:
        """One global batch on this stage: gradients of its exits, averaged over tokens and data-parallel ranks."""
        self._optimizer.zero_grad()
        step = self.trainer.global_step
        weights = loss_weights_at(self.placement.exits, step=step, num_steps=max(1, self.trainer.max_steps))
        if self._train_sums is None:
            self._train_sums = ExitSums(self.early_exit.names, self.device)
        batches = self._global_batch(dataloader_iter)
        shared = {"optimizers": self._optimizer, "sums": self._train_sums, "loss_weights": weights}
        if self._joint is None:
            loss = tune_global_batch(self.tuning_context, batches, **shared)
        else:
            loss = self._joint.train_global_batch(batches, step=step, **shared)
        if (step + 1) % max(1, self.trainer.log_every_n_steps) == 0:
            values = self._optimizer.step_values(weights)
            self._log_exits(self._train_sums.reduce(over_data=False, step_values=values), validation=False)
        for name, value in (
            ("lr", self._scheduler.common_lr),
            ("global_step", float(step)),
            ("consumed_samples", float(self._compute_consumed_samples_after_training_step())),
        ):
            self.log(name, value, batch_size=1)
        return loss

    def validation_step(self, dataloader_iter: Iterator, dataloader_idx: int = 0) -> None:
        """One global batch without gradients; sums are kept until the epoch ends."""
        self.tuning_context.drain()
        if self._val_sums is None:
            self._val_sums = ExitSums(self.early_exit.names, self.device)
        agreement = self.trains_backbone or (self.full_depth and bool(self.cfg.get("val_agreement", False)))
        batches = self._global_batch(dataloader_iter)
        evaluate_global_batch(self.tuning_context, batches, sums=self._val_sums, agreement=agreement)

    def on_validation_epoch_end(self) -> Tensor | None:
        """Log every exit's validation loss from every stage; `val_loss` is their mean, a trained backbone's included.

        Every rank logs the same numbers, so callbacks that stop or save on one agree everywhere.
        """
        if self._val_sums is None:
            return None
        results = self._val_sums.reduce()
        self._log_exits(results, validation=True)
        mean = torch.tensor(mean_loss(results, full_model=self.trains_backbone), dtype=torch.float32)
        self.log("val_loss", mean, prog_bar=True, batch_size=1)
        return mean

    def _log_exits(self, results: dict[str, dict[str, float]], *, validation: bool) -> None:
        for name, value in named_metrics(results, self.objectives, validation=validation):
            self.log(name, value, batch_size=1)

    def _global_batch(self, dataloader_iter: Iterator) -> list[MicroBatch]:
        """This rank's microbatches of the next global batch."""
        return [
            MicroBatch.of(self.get_batch(dataloader_iter, tuning=False), self.device)
            for _ in range(get_num_microbatches())
        ]

    def on_train_end(self) -> None:
        """Wait for the last transfers before the process groups are destroyed."""
        super().on_train_end()
        self.tuning_context.drain()

    def sharded_state_dict(self, prefix: str = "") -> dict[str, Any]:
        """Training checkpoints hold the trained parameters; a frozen backbone is in the `.nemo` it came from."""
        backbone = trained_backbone_shards(self.model) if self.trains_backbone else {}
        return {**self.model.exit_sharded_state_dict(f"{prefix}exits."), **backbone}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Shards of the trained parameters, and the fingerprint of the backbone that the run began with."""
        self.tuning_context.drain()
        checkpoint["sharded_state_dict"] = self.sharded_state_dict()
        checkpoint["exit_names"] = list(self.early_exit.names)
        checkpoint["trains"] = self.early_exit.trains
        checkpoint["main_weights"] = self.main_weights
        checkpoint["backbone_fingerprint"] = self.cfg.get("backbone_fingerprint")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Copy the loaded parameters in place; refuse those of another backbone."""
        saved, ours = checkpoint.get("backbone_fingerprint"), self.cfg.get("backbone_fingerprint")
        if saved != ours:
            raise ValueError(
                f"the training checkpoint was made on another backbone (fingerprint {saved}, this model has {ours}); "
                "resume with the .nemo the run began with, or start anew with exp_manager.resume_if_exists=False"
            )
        loaded = checkpoint.get("state_dict") or {}
        with torch.no_grad():
            for key, shard in self.sharded_state_dict().items():
                shard.data.copy_(loaded[key].view(shard.data.shape))
        checkpoint["state_dict"] = {}

    @classmethod
    def restore_from(cls, restore_path: str, *args, save_restore_connector=None, **kwargs):
        """NeMo's `restore_from`; reads a plain GPT `.nemo`, a complete early-exit one or an exits-only one."""
        connector = save_restore_connector or EarlyExitSaveRestoreConnector()
        return super().restore_from(restore_path, *args, save_restore_connector=connector, **kwargs)
