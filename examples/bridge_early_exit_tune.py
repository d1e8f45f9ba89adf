# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Tune exits on Megatron-Bridge, without NeMo. See conf/bridge_early_exit_tune.yaml and docs/megatron-bridge.md.

python examples/bridge_early_exit_tune.py source=llama/ output=tuned.nemo model.early_exit.every=1/4 \
    model.data.train=data/train model.data.validation=data/heldout
"""

import hydra
from omegaconf import DictConfig

from nemo_ee.commands.command import command
from nemo_ee.commands.console import show


@hydra.main(version_base="1.3", config_path="../conf", config_name="bridge_early_exit_tune")
def main(cfg: DictConfig) -> None:
    """Build, tune, save."""
    with command(cfg):
        # Imported here because the CPU host is on by now, and a checkpoint writer imports this file again.
        from nemo_ee.bridge.bridge_settings import BridgeTuneSettings
        from nemo_ee.bridge.tuning_run import run

        settings = BridgeTuneSettings.from_config(cfg)
        for line in run(settings):
            show(line)


if __name__ == "__main__":
    main()
