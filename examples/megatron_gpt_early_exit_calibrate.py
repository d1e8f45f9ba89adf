# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Find exit thresholds with a guarantee and store them in the `.nemo`: conf/megatron_gpt_early_exit_calibrate.yaml.

python examples/megatron_gpt_early_exit_calibrate.py model.restore_from_path=tuned.nemo data=heldout.jsonl \
    epsilon=0.1 delta=0.1 trainer.accelerator=cpu
"""

import hydra
from omegaconf import DictConfig

from nemo_ee.commands.command import command, refuse_renamed_overrides
from nemo_ee.commands.console import show


@hydra.main(version_base="1.3", config_path="../conf", config_name="megatron_gpt_early_exit_calibrate")
def main(cfg: DictConfig) -> None:
    """Check, load, measure, test, store, print."""
    with command(cfg):
        from nemo_ee.calibration.calibration_request import CalibrationRequest

        request = CalibrationRequest.from_config(cfg)
        # NeMo is imported here because Megatron's checkpoint writer starts a process that imports this file again.
        from nemo.utils.get_rank import is_global_rank_zero

        from nemo_ee.calibration.calibrate import calibrate
        from nemo_ee.calibration.calibration_report import policy_table, summary

        report = calibrate(cfg, request)
        if is_global_rank_zero():
            show(f"\n{policy_table(report)}\n\n{summary(report)}")
            where = f"certificate {request.certificate!r} in {request.save_to or request.path}"
            stored = where if request.certificate else "no certificate stored (certificate=null)"
            show(f"calibration.json, calibration.png: {request.output}; {stored}")


if __name__ == "__main__":
    refuse_renamed_overrides()
    main()
