# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What a step of exit tuning computes, sends and holds on the ranks of a layout, without its hardware.

python scripts/dry_run.py model=70B layout=[8,8,16]

The first rank of every pipeline stage is built by the real code, on torch's `fake` process groups and fake tensors,
and makes a step. The table has parameters, TFLOPs of a microbatch, gigabytes handed to transfers in a step with one
microbatch, and bytes at the peak by kind, with the estimate of scripts/estimate_tuning.py beside them. Speeds are
simulated from the stated ones, with stages decoupled and drained.

Options: conf/dry_run.yaml.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from nemo_ee.checkpoint.atomic import write_json
from nemo_ee.commands.command import command
from nemo_ee.commands.console import show
from nemo_ee.evaluation.dry_run import DryRunSettings, dry, table, transfers_of, verdict


@hydra.main(version_base="1.3", config_path="../conf", config_name="dry_run")
def main(cfg: DictConfig) -> None:
    """Run with the options of conf/dry_run.yaml."""
    with command(cfg):
        settings = DryRunSettings.from_config(cfg)
        found = dry(settings)
        show(table(found))
        show(transfers_of(found["stages"]))
        show(verdict(found, settings))
        speeds = {name: found.get(f"{name}_tokens_per_s_per_gpu") for name in ("decoupled", "drained")}
        if all(speeds.values()):
            show("simulated: " + ", ".join(f"{name} {own:,.0f} tokens/s per GPU" for name, own in speeds.items()))
        else:
            show("speed is not simulated: a teacher's way back is not modelled")
        if settings.output:
            write_json(settings.output, found)


if __name__ == "__main__":
    main()
