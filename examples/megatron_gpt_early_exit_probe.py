# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Fit the probes of criterion=probe and store them in the .nemo: conf/megatron_gpt_early_exit_probe.yaml.

python examples/megatron_gpt_early_exit_probe.py checkpoint=tuned.nemo data=prompts.jsonl
"""

import hydra
from omegaconf import DictConfig

from nemo_ee.commands.command import command
from nemo_ee.commands.console import show


@hydra.main(version_base="1.3", config_path="../conf", config_name="megatron_gpt_early_exit_probe")
def main(cfg: DictConfig) -> None:
    """Check, load, answer, fit, store, print."""
    with command(cfg):
        from nemo_ee.calibration.probe_fitting import ProbeSettings

        settings = ProbeSettings.from_config(cfg)
        import torch

        from nemo_ee.calibration.probe_fitting import fit_probes
        from nemo_ee.certificates.exit_probes import store_probes
        from nemo_ee.certificates.validity import identify
        from nemo_ee.export.measured_checkpoint import exported
        from nemo_ee.runtime.loader import load_model, load_tokenizer
        from nemo_ee.text.special_tokens import end_of_text_of

        torch.set_num_threads(settings.threads)
        fitted_to = identify(settings.checkpoint)
        with exported(settings.checkpoint, settings.backbone) as directory:
            model, tokenizer = load_model(directory), load_tokenizer(directory)
            end = end_of_text_of(directory, tokenizer.eos_token_id, vocab_size=model.vocab_size)
            fitted = fit_probes(model, tokenizer, end.ids, settings)
        show(f"\n{fitted.table()}\n")
        show("on prompts that no probe was fitted on; leave: share of tokens, of which 5 % of all tokens disagree")
        where = store_probes(settings.checkpoint, fitted.probes, fitted.data, fitted_to, settings.save_to)
        show(f"{len(fitted.probes)} probes: {where}")


if __name__ == "__main__":
    main()
