# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Tune an exit on its own drafts. See conf/megatron_gpt_early_exit_on_policy.yaml and docs/tuning.md.

python examples/megatron_gpt_early_exit_on_policy.py source=export/hf_full exits=tuned.nemo \
    prompts=data/own-chats.jsonl.gz output=on-policy.nemo
"""

import hydra
from omegaconf import DictConfig

from nemo_ee.commands.command import command
from nemo_ee.commands.console import show


@hydra.main(version_base="1.3", config_path="../conf", config_name="megatron_gpt_early_exit_on_policy")
def main(cfg: DictConfig) -> None:
    """Answer, tune, again; save."""
    with command(cfg):
        # Imported here because the CPU host is on by now.
        from nemo_ee.commands.on_policy import run
        from nemo_ee.commands.on_policy_settings import OnPolicySettings

        for line in run(OnPolicySettings.from_config(cfg)):
            show(line)


if __name__ == "__main__":
    main()
