# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Add exits to a Hugging Face model or a `.nemo`. See conf/megatron_gpt_early_exit_convert.yaml.

python examples/megatron_gpt_early_exit_convert.py source=assets/reference-model output=ee.nemo \
    model.early_exit.every=1/4 trainer.accelerator=cpu
"""

import hydra
from omegaconf import DictConfig

from nemo_ee.commands.command import command
from nemo_ee.commands.console import show


@hydra.main(version_base="1.3", config_path="../conf", config_name="megatron_gpt_early_exit_convert")
def main(cfg: DictConfig) -> None:
    """Convert and print the result."""
    with command(cfg):
        # NeMo is imported here because Megatron's checkpoint writer starts a process that imports this file again.
        from nemo_ee.commands.convert import convert

        result = convert(cfg)
        show(f"{result.output}: exits {', '.join(result.exits)} (new: {', '.join(result.added) or 'none'})")


if __name__ == "__main__":
    main()
