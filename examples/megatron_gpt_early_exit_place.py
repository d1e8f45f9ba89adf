# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Find where exits would pay, before any is tuned: conf/megatron_gpt_early_exit_place.yaml.

python examples/megatron_gpt_early_exit_place.py checkpoint=<Hugging Face directory> data=heldout.jsonl
"""

import hydra
from omegaconf import DictConfig

from nemo_ee.commands.command import command
from nemo_ee.commands.console import show


@hydra.main(version_base="1.3", config_path="../conf", config_name="megatron_gpt_early_exit_place")
def main(cfg: DictConfig) -> None:
    """Check, load, fit probes, search, write."""
    with command(cfg):
        from nemo_ee.evaluation.text_settings import PlacementSettings

        settings = PlacementSettings.from_config(cfg)
        from nemo_ee.checkpoint.atomic import write_json
        from nemo_ee.evaluation.layer_probes import (
            exits_override,
            fastest_within,
            place,
            placement_table,
            to_mapping,
            verdict,
        )
        from nemo_ee.export.measured_checkpoint import facts_of, loaded

        with loaded(settings) as own:
            table, costs, found = place(own.model, own.windows, settings)
        worth, text = verdict(found, table, costs)
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(settings.output, {**to_mapping(table, costs, found, text), "measured": facts_of(settings, own)})
        show(f"{placement_table(found)}\n\n{text}")
        best = fastest_within(found)
        if worth is not False and best is not None:
            show(f"for megatron_gpt_early_exit_convert.py: {exits_override(best)}")
        show(f"all numbers: {settings.output}")


if __name__ == "__main__":
    main()
