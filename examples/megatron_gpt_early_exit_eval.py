# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure every exit's loss, perplexity and agreement on a text. See conf/megatron_gpt_early_exit_eval.yaml.

python examples/megatron_gpt_early_exit_eval.py model.restore_from_path=tuned.nemo data=data/heldout \
    output=outputs/eval trainer.accelerator=cpu
"""

import hydra
from omegaconf import DictConfig

from nemo_ee.commands.command import command
from nemo_ee.commands.console import show


@hydra.main(version_base="1.3", config_path="../conf", config_name="megatron_gpt_early_exit_eval")
def main(cfg: DictConfig) -> None:
    """Check, load, measure, write, print."""
    with command(cfg):
        # NeMo is imported here because Megatron's checkpoint writer starts a process that imports this file again.
        from nemo.utils.get_rank import is_global_rank_zero

        from nemo_ee.evaluation.evaluate import evaluate
        from nemo_ee.evaluation.report import quality_table

        report = evaluate(cfg)
        if is_global_rank_zero():
            show(f"\n{quality_table(report)}\n")
            show(f"{report['tokens']:,} tokens of {cfg.data}; exits.json, exits.png: {cfg.output}")


if __name__ == "__main__":
    main()
