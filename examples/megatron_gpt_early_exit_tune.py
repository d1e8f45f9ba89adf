# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Tune the exits of an early-exit model with a frozen backbone. See conf/megatron_gpt_early_exit_tune.yaml.

python examples/megatron_gpt_early_exit_tune.py model.restore_from_path=ee.nemo save_to=tuned.nemo \
    model.data.data_prefix='{train: [data/train], validation: [data/heldout], test: [data/heldout]}'
"""

import logging

import hydra
from omegaconf import DictConfig, OmegaConf

from nemo_ee.commands.command import command
from nemo_ee.commands.console import messages, show

logger = logging.getLogger("nemo_ee.tune")


@hydra.main(version_base="1.3", config_path="../conf", config_name="megatron_gpt_early_exit_tune")
def main(cfg: DictConfig) -> None:
    """Restore, tune, save."""
    with command(cfg):
        import torch

        # NeMo is imported here because Megatron's checkpoint writer starts a process that imports this file again.
        from nemo_ee.models.connector import EarlyExitSaveRestoreConnector
        from nemo_ee.models.megatron_early_exit_gpt_model import MegatronEarlyExitGPTModel
        from nemo_ee.models.run_plan import plan_run
        from nemo_ee.models.trainer import EarlyExitTrainerBuilder
        from nemo_ee.models.training_checkpoints import manage_experiment

        logger.debug("settings:\n%s", OmegaConf.to_yaml(cfg))
        plan = plan_run(cfg)
        trainer = EarlyExitTrainerBuilder(plan, messages()).create_trainer()
        trainer.strategy.trust_checkpoint = bool(cfg.model.get("trust_checkpoint"))
        run_folder = manage_experiment(trainer, plan.exp_manager)
        model = MegatronEarlyExitGPTModel.restore_from(
            cfg.model.restore_from_path,
            override_config_path=plan.model,
            trainer=trainer,
            save_restore_connector=EarlyExitSaveRestoreConnector(
                verify=cfg.model.verify,
                exits_only=cfg.exits_only,
                exits_dtype=getattr(torch, cfg.exits_dtype) if cfg.exits_dtype else None,
            ),
        )
        trainer.fit(model)
        if cfg.save_to:
            model.save_to(cfg.save_to)
        show(f"tuned model: {cfg.save_to or 'not written (save_to=null)'}; checkpoints and TensorBoard: {run_folder}")


if __name__ == "__main__":
    main()
