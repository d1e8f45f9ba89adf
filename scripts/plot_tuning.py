# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Draw the logged metrics of every exit of a tuning run. See conf/plot_tuning.yaml.

python scripts/plot_tuning.py run=outputs/megatron_gpt_early_exit_sweep output=sweep.png
"""

from pathlib import Path
from typing import ClassVar

import hydra
from omegaconf import DictConfig, OmegaConf

from nemo_ee.commands.command import command
from nemo_ee.commands.console import show
from nemo_ee.evaluation.tuning_curves import Curve, draw_tuning_curves
from nemo_ee.settings.script_input import ScriptInput
from nemo_ee.settings.user_input import Text

_LOSS = "loss in nats per token, lower is better"


class PlotSettings(ScriptInput):
    """The settings of conf/plot_tuning.yaml, a field for each key."""

    headline: ClassVar = "nothing was drawn"

    run: Text
    output: Text
    metric: Text
    validation: bool
    panels: Text | None
    colours: Text | None
    styles: Text | None
    quantity: Text | None
    title: str
    caption: str


def read_run(folder: str | Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, dict]]:
    """The TensorBoard data of a run: (tag -> [(step, value)], exit name -> settings).

    Of a run that was resumed, the later start's numbers count where two starts made the same step.

    Raises:
        ValueError: no logs, or none of exit tuning.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = sorted(Path(folder).rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ValueError(
            f"run={folder} has no TensorBoard logs below it; name the run's folder, "
            "and tune with exp_manager.create_tensorboard_logger=True"
        )
    numbers: dict[str, dict[int, float]] = {}
    exits: dict[str, dict] = {}
    for file in files:
        settings = file.parent / "hparams.yaml"
        if settings.is_file():
            model = OmegaConf.load(settings).get("cfg") or {}
            if OmegaConf.is_config(model) and model.get("num_layers"):  # another program's otherwise
                exits |= _settings_of(OmegaConf.to_container(model).get("early_exit") or {}, model)
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            numbers.setdefault(tag, {}).update((event.step, event.value) for event in events.Scalars(tag))
    logged = {tag.split("/")[1] for tag in numbers if tag.startswith("exit/")}
    if not logged & exits.keys():
        raise ValueError(f"run={folder}: its logs hold no numbers of exits, or hparams.yaml beside them is missing")
    return {tag: sorted(values.items()) for tag, values in numbers.items()}, exits


def _settings_of(block: dict, model: DictConfig) -> dict[str, dict]:
    from nemo_ee.exits.config import EarlyExitConfig

    config = EarlyExitConfig.from_mapping(block, num_layers=model.num_layers)
    return {entry["name"]: entry for entry in config.to_mapping()["exits"]}


def of_metric(numbers: dict[str, list[tuple[int, float]]], prefix: str, metric: str) -> dict[str, Curve]:
    """Exit name -> curve of the tags `<prefix>exit/<name>/<metric>`."""
    parts = {tag: tag.removeprefix(prefix).split("/") for tag in numbers if tag.startswith(f"{prefix}exit/")}
    return {name: numbers[tag] for tag, (_, name, last) in parts.items() if last == metric}


@hydra.main(version_base="1.3", config_path="../conf", config_name="plot_tuning")
def main(cfg: DictConfig) -> None:
    """Read, draw, and print the last value of every exit."""
    with command(cfg):
        settings = PlotSettings.from_config(cfg)
        numbers, exits = read_run(settings.run)
        trained, validated = of_metric(numbers, "", settings.metric), of_metric(numbers, "val/", settings.metric)
        curves = trained or validated  # agreement and entropy are measured in validation only
        if not curves:
            known = sorted({tag.split("/")[-1] for tag in numbers if tag.startswith(("exit/", "val/exit/"))})
            raise ValueError(f"metric={settings.metric!r} is not logged; the run has {', '.join(known)}")
        validation = validated if settings.validation and trained else {}
        quantity = settings.quantity or (_LOSS if settings.metric == "loss" else settings.metric)
        draw_tuning_curves(
            settings.output, curves, exits, validation=validation, panels=settings.panels, colours=settings.colours,
            styles=settings.styles, quantity=quantity, title=settings.title, caption=settings.caption,
        )  # fmt: skip
        for name in (name for name in exits if name in curves):
            step, value = curves[name][-1]
            show(f"{name:32s} {settings.metric} {value:.4f} after step {step}")
        show(f"drawn: {settings.output}")


if __name__ == "__main__":
    main()
