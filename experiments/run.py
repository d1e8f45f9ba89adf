# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Run an experiment on tuning: python experiments/run.py architectures

    experiments/<name>.yaml -> data -> convert -> evaluate -> tune and evaluate, run by run -> <name>.json, <name>.png

Every step is the command that a user would type, on the CPU; its output goes to <output>/<name>/logs. A step that the
same command has finished is not repeated, so an experiment that was stopped goes on where it was. Exits of one run see
the same tokens in the same order, and none changes another, so most comparisons are within one run. docs/results.md
says what was seen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from omegaconf import OmegaConf
from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from run_demo import ROOT, end_on_sigterm, quoted, run_step
from run_demo_chat import fetch

from benchmarks.measure import provenance
from experiments.pictures import draw_result
from nemo_ee.checkpoint.atomic import write_json
from nemo_ee.evaluation.report import format_table
from nemo_ee.settings.fields import Texts
from nemo_ee.settings.script_input import ScriptInput
from nemo_ee.settings.user_input import Positive, Text

QUICK = ("trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.limit_val_batches=1",
         "model.global_batch_size=2", "model.micro_batch_size=2", "model.optim.sched.warmup_steps=1")  # fmt: skip
CPU = ("trainer.accelerator=cpu", "trainer.precision=32")


class Experiment(ScriptInput):
    """An experiment's yaml, a field for each key.

    Attributes:
        base: name of a yaml below experiments/base/ with the keys that are not here.
        title: title of the picture.
        fetch_smollm2: whether the GGUF file of SmolLM2-135M-Instruct is fetched first.
        prepare: last file that a step makes, below the output -> its command; `{out}` stands for the output.
        convert: overrides of the conversion.
        exits: entries of `model.early_exit.exits`. Where values are lists, there is an exit for each combination, and
            `name` holds the settings in braces.
        tune: overrides of every tuning run.
        runs: name of a run -> its further overrides.
        evaluate: name of a text -> its tokens below the output.
        length: tokens of a window in the evaluation.
        max_tokens: tokens of an evaluation.
        series: settings of an exit, or `run`, `text`, `name`; a line of the picture for each combination.
    """

    headline: ClassVar = "nothing was run"

    base: Text | None = None
    title: Text
    fetch_smollm2: bool = False
    prepare: dict[str, list[Text]]
    convert: Texts
    exits: tuple[dict[str, Any], ...]
    tune: Texts
    runs: Annotated[dict[str, list[Text]], Field(min_length=1)]
    evaluate: Annotated[dict[str, Text], Field(min_length=1)]
    length: Positive
    max_tokens: Positive
    series: tuple[Text, ...]


def read(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        SystemExit: there is none.
        ValueError: its yaml has problems.
    """
    path = ROOT / "experiments" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise SystemExit(f"there is no experiment {name!r}; the experiments are: {known}")
    config = OmegaConf.load(path)
    if config.get("base"):
        config = OmegaConf.merge(OmegaConf.load(path.parent / "base" / f"{config.base}.yaml"), config)
    experiment = Experiment.from_config(config)
    for exit in exits_of(experiment.exits):
        if unknown := set(experiment.series) - {"run", "text", *exit}:
            raise ValueError(f"{path}: series: the exit {exit['name']} has no {', '.join(sorted(unknown))}")
    return experiment


def exits_of(entries: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """One exit for each combination of listed settings."""
    for entry in entries:
        lists = {key: value if isinstance(value, list) else [value] for key, value in entry.items() if key != "name"}
        for values in itertools.product(*lists.values()):
            exit = dict(zip(lists, values, strict=True))
            yield {"name": entry["name"].format(**exit).replace("_", "-"), **exit}


def rows_of(experiment: Experiment, evaluations: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for every exit of every run on every text.

    Args:
        evaluations: (run, text) -> content of exits.json; the run "before" is the conversion.
    """
    settings = {exit["name"]: exit for exit in exits_of(experiment.exits)}
    rows = []
    for (run, text), found in evaluations.items():
        if run == "before":
            continue
        before = {one["name"]: one for one in evaluations["before", text]["exits"]}
        for one in found["exits"]:
            own = {"run": run, "text": text, **settings[one["name"]]}
            for key in ("loss", "agreement"):
                own |= {f"{key}_before": round(before[one["name"]][key], 4), key: round(one[key], 4)}
            rows.append(
                {**own, "parameters": one["trainable_parameters"], "full_loss": round(found["full_model"]["loss"], 4)}
            )
    return rows


class Runner:
    """Runs the steps of an experiment.

    Args:
        experiment: what to run.
        output: folder of its files.
        quick: two steps on few tokens, to try it.
    """

    def __init__(self, experiment: Experiment, output: Path, quick: bool) -> None:
        self.experiment, self.output, self.quick = experiment, output, quick
        self.logs = output / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.steps: dict[str, dict[str, Any]] = {}

    def run(self) -> dict[str, Any]:
        """All steps. Returns the result.

        Raises:
            SystemExit: a step failed, or another command made its result.
        """
        own, machine, converted = self.experiment, provenance(), self.output / "converted.nemo"
        if own.fetch_smollm2:
            fetch(self.output)
        for file, command in own.prepare.items():
            self.step(f"prepare {Path(file).stem}", self.output / file, self.filled(command))
        exits = json.dumps(list(exits_of(own.exits))).replace('"', "")
        convert = [*CPU, *self.filled(own.convert), f"model.early_exit.exits={exits}", f"output={quoted(converted)}"]
        self.step("convert", converted, [_EXAMPLE.format("convert"), *convert])
        found = {("before", text): self.evaluated("before", converted, text) for text in own.evaluate}
        for run, overrides in own.runs.items():
            tuned = self.output / f"{run}.nemo"
            command = [
                _EXAMPLE.format("tune"), *CPU, f"save_to={quoted(tuned)}",
                f"model.restore_from_path={quoted(converted)}",
                f"exp_manager.explicit_log_dir={quoted(self.output / 'runs' / run)}",
                *self.filled([*own.tune, *overrides]), *(QUICK if self.quick else ()),
            ]  # fmt: skip
            self.step(f"tune {run}", tuned, command)
            found |= {(run, text): self.evaluated(run, tuned, text) for text in own.evaluate}
        plain = json.dumps({"steps": self.steps}).replace(f"{self.output}/", "")  # no path of this machine
        return {"title": own.title, "quick": self.quick, **machine, "rows": rows_of(own, found), **json.loads(plain)}

    def filled(self, parts: Sequence[str]) -> list[str]:
        """A command with the output's path in the place of `{out}`."""
        path = quoted(self.output)[1:-1]  # the yaml has the quotes
        return [part.format(out=path) for part in parts]

    def evaluated(self, run: str, model: Path, text: str) -> dict[str, Any]:
        """The content of exits.json of a model on a text."""
        folder = self.output / "evaluations" / f"{run}-{text}"
        tokens = 2 * self.experiment.length if self.quick else self.experiment.max_tokens
        command = [
            _EXAMPLE.format("eval"), *CPU, f"model.restore_from_path={quoted(model)}", f"output={quoted(folder)}",
            f"data={quoted(self.output / self.experiment.evaluate[text])}", f"max_tokens={tokens}",
            f"model.encoder_seq_length={self.experiment.length}", "model.global_batch_size=4",
        ]  # fmt: skip
        self.step(f"evaluate {run} {text}", folder / "exits.json", command)
        return json.loads((folder / "exits.json").read_text())

    def step(self, name: str, result: Path, command: Sequence[str]) -> None:
        """One step, unless the same command has finished it."""
        record = self.logs / f"{name.replace(' ', '-')}.json"
        if record.is_file() and result.exists():
            self.steps[name] = json.loads(record.read_text())
            if self.steps[name]["command"] != list(command):
                raise SystemExit(f"another command made {result}; delete {self.output} to run it anew, see {record}")
            return
        seconds = round(run_step(name, list(command), self.logs)[0], 1)
        self.steps[name] = {"command": list(command), "seconds": seconds}
        write_json(record, self.steps[name])


_EXAMPLE = "examples/megatron_gpt_early_exit_{}.py"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text."""
    lines = [("exit", "run", "text", "loss before", "after", "full model", "agreement before", "after", "parameters")]
    for row in rows:
        losses = (f"{row['loss_before']:.3f}", f"{row['loss']:.3f}", f"{row['full_loss']:.3f}")
        agreements = (f"{row['agreement_before']:.1%}", f"{row['agreement']:.1%}")
        lines.append((row["name"], row["run"], row["text"], *losses, *agreements, f"{row['parameters']:,}"))
    return format_table(lines)


def main() -> None:
    """Run one experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="name of a yaml file beside this script")
    parser.add_argument("--output", type=Path, default=Path("outputs/experiments"), help="folder of all experiments")
    parser.add_argument("--quick", action="store_true", help="two steps of tuning, to try it")
    options = parser.parse_args()
    end_on_sigterm()
    output = options.output.resolve() / f"{options.name}{'-quick' if options.quick else ''}"
    os.chdir(ROOT)  # the files of a yaml are those of the repository
    experiment = read(options.name)
    start = time.monotonic()
    result = Runner(experiment, output, options.quick).run()
    file = output / f"{options.name}.json"
    write_json(file, result)
    draw_result(file.with_suffix(".png"), result, experiment.series)
    print(f"\n{table(result['rows'])}\n\n{time.monotonic() - start:.0f} s; {file} and .png")


if __name__ == "__main__":
    main()
