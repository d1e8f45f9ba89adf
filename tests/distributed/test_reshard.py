# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings of one exit: they arrive, are logged from every stage, and survive a resume under another layout."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.distributed.reshard_program import EXITS, LEGS, STEPS
from tests.distributed.test_layouts import relative_difference, run_module

# The module's fixture does the work of all its tests.
pytestmark = pytest.mark.timeout(900)

RUN = {"lr": 1e-3, "min_lr": 1e-4, "weight_decay": 0.01, "loss_weight": 1.0, "loss_weight_schedule": "constant"}
STORED = {"layer4-mlp": {"lr": 2e-3}}  # in start.nemo; what the run does not say of a stored exit stays
NOTHING = "nothing"  # the exit with nothing to train
SETTINGS = {exit["name"]: {**RUN, **STORED.get(exit["name"], {}), **exit} for exit in EXITS}


@pytest.fixture(scope="module")
def legs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """Run -> what its legs recorded."""
    folder = tmp_path_factory.mktemp("reshard")
    run_module("tests.helpers.tiny_run", str(folder), timeout=300)
    run_module("tests.distributed.reshard_program", str(folder), timeout=400)
    read = {
        name: [json.loads(Path(folder / f"{name}-{index}.json").read_text()) for index in range(len(starts))]
        for name, starts in LEGS.items()
    }
    read["events"] = {name: [str(path) for path in (folder / name).glob("events.out.*")] for name in LEGS}
    return read


def steps_of(legs: list[dict]) -> dict[int, dict[str, float]]:
    return {int(step): values for leg in legs for step, values in leg["steps"].items()}


def rate(step: int, lr: float, min_lr: float) -> float:
    """Linear annealing with one step of warm-up, steps counted from 0."""
    return lr / 2 if step == 0 else min_lr + (lr - min_lr) * (STEPS - step) / (STEPS - 1)


def test_every_number_survives_every_change_of_layout_bitwise(legs) -> None:
    """Learning rates, weight decays, steps, weights and both moments of every exit."""
    before = legs["moved"][0]
    for after in legs["moved"][1:]:
        assert after["start"] == before["end"]
        before = after
    held = legs["moved"][0]["end"]
    assert set(held) == set(SETTINGS) - {NOTHING}
    assert all(any("exp_avg_sq" in key for key in exit["digests"]) for exit in held.values())
    assert [leg["end"]["dice"]["step"] for leg in legs["moved"]] == [[2.0], [4.0], [6.0]]


def test_control_a_leg_changes_what_is_compared(legs) -> None:
    first, second = legs["moved"][:2]
    for name, exit in first["end"].items():
        other = second["end"][name]
        assert exit["lr"] != other["lr"]
        changed = [key for key in exit["digests"] if exit["digests"][key] != other["digests"][key]]
        assert {key.split(" ")[1] for key in changed} == {"weight", "exp_avg", "exp_avg_sq"}


def test_the_losses_are_those_of_a_run_that_kept_its_layout(legs) -> None:
    moved, whole = steps_of(legs["moved"]), steps_of(legs["whole"])
    assert list(moved) == list(whole) == list(range(1, STEPS + 1))

    def losses(step: dict[str, float]) -> dict[str, float]:
        return {key: value for key, value in step.items() if key.endswith("/loss")}

    for step in whole:
        assert len(losses(whole[step])) == len(SETTINGS)
        assert relative_difference(losses(moved[step]), losses(whole[step])) < 1e-6, step
    assert relative_difference(losses(moved[1]), losses(moved[2])) > 1e-3, "control: steps differ"


@pytest.mark.parametrize("name", SETTINGS)
def test_each_exit_s_settings_arrive_and_are_logged(legs, name: str) -> None:
    settings = SETTINGS[name]
    for step, logged in steps_of(legs["moved"]).items():
        done = (step - 1) / STEPS
        share = {"constant": 1.0, "linear": done, "cosine": (1 - math.cos(math.pi * done)) / 2}
        weight = settings["loss_weight"] * share[settings["loss_weight_schedule"]]
        assert logged[f"exit/{name}/loss_weight"] == pytest.approx(weight, rel=1e-6)
        if name == NOTHING:
            assert f"exit/{name}/lr" not in logged and f"exit/{name}/grad_norm" not in logged
            continue
        expected = rate(step - 1, settings["lr"], settings["min_lr"])
        assert logged[f"exit/{name}/lr"] == pytest.approx(expected, rel=1e-6)
        assert (logged[f"exit/{name}/grad_norm"] > 0) == (weight > 0)
    if name != NOTHING:
        decays = legs["moved"][0]["end"][name]["weight_decay"]
        has_matrices = name != "layer2-norm"  # its output is the backbone's; a norm's weight does not decay
        assert max(decays) == (settings["weight_decay"] if has_matrices else 0.0)
        assert set(decays) <= {settings["weight_decay"], 0.0}


def test_a_stage_without_exits_reports_what_the_others_train(legs) -> None:
    """Rank 0, on the first stage, wrote this."""
    logged = steps_of(legs["deep"])[3]
    assert logged["exit/dice/lr"] == pytest.approx(rate(2, 2e-3, 1e-4), rel=1e-6)
    assert logged["exit/dice/grad_norm"] > 0
    assert logged["lr"] == pytest.approx(rate(2, RUN["lr"], RUN["min_lr"]), rel=1e-6), "model.optim's, on any stage"
    assert {key.split("/")[1] for key in logged if key.startswith("exit/")} == {"layer4-mlp", "dice"}
    whole = steps_of(legs["whole"])[3]
    for key in logged:
        assert logged[key] == pytest.approx(whole[key], rel=1e-6), "exits do not know of each other"


def test_one_tensorboard_holds_the_step_s_values(legs) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = legs["events"]["deep"]
    events = EventAccumulator(file)
    events.Reload()
    tags = {f"exit/dice/{metric}" for metric in ("loss", "lr", "grad_norm", "loss_weight")}
    assert tags <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("exit/dice/grad_norm")] == [0, 1, 2]
