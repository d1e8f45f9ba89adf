# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Tune the exits of an early-exit model with a frozen backbone. See conf/megatron_gpt_early_exit_tune.yaml.

python examples/megatron_gpt_early_exit_tune.py model.restore_from_path=ee.nemo save_to=tuned.nemo \
    model.data.data_prefix='{train: [data/train], validation: [data/heldout], test: [data/heldout]}'
"""

import hydra
from omegaconf import DictConfig, OmegaConf

from nemo_ee.commands.command import command


@hydra.main(version_base="1.3", config_path="../conf", config_name="megatron_gpt_early_exit_tune")
def main(cfg: DictConfig) -> None:
    """Restore, tune, save."""
    with command(cfg):
        # NeMo is imported here because Megatron's checkpoint writer starts a process that imports this file again.
        from nemo.utils import logging
        from nemo.utils.exp_manager import exp_manager

        from nemo_ee.models.connector import EarlyExitSaveRestoreConnector, read_config
        from nemo_ee.models.megatron_early_exit_gpt_model import MegatronEarlyExitGPTModel
        from nemo_ee.models.run_config import check_run, merge_model_config
        from nemo_ee.models.trainer import EarlyExitTrainerBuilder

        logging.info(f"\n\n************** Experiment configuration ***********\n{OmegaConf.to_yaml(cfg)}")
        model_config = merge_model_config(read_config(cfg.model.restore_from_path), cfg.model)
        check_run(cfg, model_config)
        trainer = EarlyExitTrainerBuilder(OmegaConf.create({**cfg, "model": model_config})).create_trainer()
        exp_manager(trainer, cfg.exp_manager)
        model = MegatronEarlyExitGPTModel.restore_from(
            cfg.model.restore_from_path,
            override_config_path=model_config,
            trainer=trainer,
            save_restore_connector=EarlyExitSaveRestoreConnector(verify=cfg.model.verify, exits_only=cfg.exits_only),
        )
        trainer.fit(model)
        if cfg.save_to:
            model.save_to(cfg.save_to)


if __name__ == "__main__":
    main()
