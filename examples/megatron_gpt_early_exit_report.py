# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure a model's exits and write one HTML page: conf/megatron_gpt_early_exit_report.yaml.

python examples/megatron_gpt_early_exit_report.py checkpoint=tuned.nemo data=heldout.jsonl output=report.html
"""

import hydra
from omegaconf import DictConfig

from nemo_ee.commands.command import command
from nemo_ee.commands.console import show


@hydra.main(version_base="1.3", config_path="../conf", config_name="megatron_gpt_early_exit_report")
def main(cfg: DictConfig) -> None:
    """Check, load, measure, write."""
    with command(cfg):
        from nemo_ee.evaluation.text_settings import ReportSettings

        settings = ReportSettings.from_config(cfg)
        from nemo_ee.checkpoint.atomic import atomic_file
        from nemo_ee.evaluation.exit_report import measure_exits
        from nemo_ee.evaluation.report_page import report_page
        from nemo_ee.export.export_certificates import certificates_of
        from nemo_ee.export.measured_checkpoint import facts_of, loaded

        with loaded(settings) as own:
            report = measure_exits(own.model, own.tokenizer, own.windows, settings.measured_tokens)
            certificates = [one.to_mapping() for one in certificates_of(own.directory).values()]
            title = settings.title or f"Exits of {settings.checkpoint.name}"
            page = report_page(report, title=title, facts=facts_of(settings, own), certificates=certificates)
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(settings.output) as partial:
            partial.write_text(page, encoding="utf-8")
        show(f"{report.verdict[1]}\nreport: {settings.output}")


if __name__ == "__main__":
    main()
