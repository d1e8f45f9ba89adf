# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A run killed with SIGKILL and resumed ends with the losses of one that was not (DESIGN invariant 10).

PP = 2 and DP = 2 at once: optimizer state, learning rate, data order and every stage's exits have to come back.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.resume_program import KILL_AFTER, STEPS
from tests.distributed.test_layouts import run_module

# The module's fixture does the work of all its tests.
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """Run -> its steps in the order in which they were made, repeated ones included."""
    folder = tmp_path_factory.mktemp("resume")
    run_module("tests.helpers.tiny_run", str(folder), timeout=300)
    run_module("tests.distributed.resume_program", str(folder), "1,2,2", timeout=900)
    read = {}
    for name in ("whole", "step", "save"):
        lines = Path(folder / f"{name}.jsonl").read_text().splitlines()
        read[name] = [json.loads(line) for line in lines]
        read[f"{name} events"] = logged(folder / name)
        made = (folder / name / "checkpoints").iterdir()
        read[f"{name} checkpoints"] = sorted(path.name for path in made if path.suffix != ".nemo")
    read["events"] = sorted(path.name for path in (folder / "whole").glob("events.out.*"))
    return read


def logged(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value of all TensorBoard files of a run; a step that was made again counts as it was last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.rglob("events.out.*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update((event.step, event.value) for event in events.Scalars(tag))
    return found


def test_the_undisturbed_run_makes_every_step_once(runs) -> None:
    assert [step["step"] for step in runs["whole"]] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("step", [*range(1, KILL_AFTER + 1), *range(5, STEPS + 1)]),  # resumes at the checkpoint of step 4
        ("save", [*range(1, 5), *range(3, STEPS + 1)]),  # step 4's was never whole: resumes at step 2
    ],
)
def test_a_killed_run_resumes_from_its_last_whole_checkpoint(runs, name: str, expected: list[int]) -> None:
    assert [step["step"] for step in runs[name]] == expected


@pytest.mark.parametrize("name", ["step", "save"])
def test_every_loss_is_bitwise_that_of_the_undisturbed_run(runs, name: str) -> None:
    whole = {step["step"]: step["losses"] for step in runs["whole"]}
    assert len(whole[1]) > 7
    for step in runs[name]:
        assert step["losses"] == whole[step["step"]], f"step {step['step']}"


def test_one_tensorboard_for_all_stages(runs) -> None:
    assert len(runs["events"]) == 1


@pytest.mark.parametrize("name", ["step", "save"])
def test_tensorboard_has_every_value_under_the_step_of_the_undisturbed_run(runs, name: str) -> None:
    """Resumed after step 4 and after step 2, both written while validating, where Lightning counts one step less."""
    whole = runs["whole events"]
    assert list(whole["global_step"]) == list(range(STEPS)) and list(whole["val_loss"]) == [1, 3, 5]
    assert all(step == value for step, value in whole["global_step"].items()), "the axis is that of the steps"
    assert runs[f"{name} events"] == whole


@pytest.mark.parametrize("name", ["whole", "step", "save"])
def test_the_checkpoints_are_those_of_the_undisturbed_run(runs, name: str) -> None:
    """One best and one last, named alike; nothing that was superseded, and no marker of an unfinished one."""
    assert runs[f"{name} checkpoints"] == runs["whole checkpoints"]
    best, last = sorted(runs["whole checkpoints"], key=len)
    assert last.endswith("-last") and f"step={STEPS}-" in last and last.startswith("exits--val_loss=")
    assert not best.endswith("-last") and "val_loss=0.0000" not in best + last
