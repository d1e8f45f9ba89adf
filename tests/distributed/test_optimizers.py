# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Distributed optimizer and fp32 main weights: same losses as plain AdamW, half the state at DP = 2, any resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.optimizer_program import PLAN, SAVE_AFTER, STEPS, layout_name
from tests.distributed.test_layouts import relative_difference, run_module

# The module's fixture does the work of all its tests.
pytestmark = pytest.mark.timeout(900)

RESUMED = [
    (f"{layout_name(layout)} {kind}", resumed)
    for layout, runs in PLAN
    for kind, resumed in runs
    if resumed not in (None, "alone", "1110 half") or (resumed == "1110 half" and kind.startswith("half"))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program's folder, after it has run."""
    folder = tmp_path_factory.mktemp("optimizers")
    run_module("tests.helpers.tiny_run", str(folder), timeout=300)
    run_module("tests.distributed.optimizer_program", str(folder), timeout=600)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict]:
    """Run -> what it wrote."""
    return {file.stem: json.loads(file.read_text()) for file in (folder / "results").glob("*.json")}


def differences(ours: list[dict], theirs: list[dict]) -> list[float]:
    """Largest relative difference of the exits' losses, step by step."""
    return [relative_difference(a, b) for a, b in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize("run", ["1120 adamw", "1120 distributed", "2121 distributed", "1220 distributed"])
def test_fp32_losses_are_those_of_adamw_on_one_rank(results, run: str) -> None:
    losses = results[run]["losses"]
    assert len(losses) == STEPS and len(losses[0]) == 7
    assert max(differences(losses, results["1110 adamw"]["losses"])) < 1e-6


@pytest.mark.parametrize("run", ["1120 half-distributed", "2121 half-distributed"])
def test_half_losses_are_those_of_one_rank_up_to_rounding(results, run: str) -> None:
    """Tensor parallelism rounds partial sums to bf16; data parallelism alone sums in fp32."""
    limit = 1e-6 if run.startswith("11") else 5e-3
    assert max(differences(results[run]["losses"], results["1110 half"]["losses"])) < limit


def test_the_comparison_can_fail(results) -> None:
    """Control: bf16 is not fp32, and one step is not another."""
    plain = results["1110 adamw"]["losses"]
    assert min(differences(results["1110 half"]["losses"], plain)) > 1e-5
    assert relative_difference(plain[0], plain[1]) > 1e-3


@pytest.mark.parametrize(("run", "resumed"), RESUMED)
def test_what_is_loaded_is_what_was_saved(results, run: str, resumed: str) -> None:
    """Bitwise, under another layout and by another kind of optimizer: moments, main weights, rates, steps, exits."""
    saved = results[resumed]["saved"]
    assert results[f"{run} from {resumed}"]["loaded"] == saved
    kinds = {key.split(".")[1] for key in saved if key.startswith("optimizer.")}
    assert {"exp_avg", "exp_avg_sq"} <= kinds
    assert ("fp32_param" in kinds) == ("half" in run)
    scalars = {key: value for key, value in saved.items() if key.endswith(".scalars")}
    assert len(scalars) == 7 and scalars["optimizer.layer4-mlp.scalars"] != scalars["optimizer.layer1-mlp.scalars"]


@pytest.mark.parametrize(("run", "resumed"), RESUMED)
def test_a_resumed_run_goes_on_with_the_losses_it_would_have_had(results, run: str, resumed: str) -> None:
    """Bitwise in the layout and with the kind that saved; otherwise as close as whole runs are to each other."""
    ours, theirs = results[f"{run} from {resumed}"]["losses"], results[resumed]["losses"][SAVE_AFTER:]
    if run == resumed:
        assert ours == theirs
    else:
        assert max(differences(ours, theirs)) < (5e-3 if "half" in run else 1e-6)


def test_state_is_shared_out_over_data_parallelism(results) -> None:
    """Elements, counted: two moments of everything on each rank for AdamW, of half of it for the distributed one."""
    for facts in results["1120 adamw"]["facts"]:
        assert facts["stepped"] == facts["trained"] and facts["moments"] == 2 * facts["trained"]
    for run in ("1120 distributed", "1120 half-distributed"):
        every = results[run]["facts"]
        assert sum(facts["stepped"] for facts in every) == every[0]["trained"]
        for facts in every:
            assert facts["moments"] == 2 * facts["stepped"]
            assert facts["stepped"] < 0.51 * facts["trained"]  # buffers are padded to multiples of 128


@pytest.mark.parametrize("run", ["1110 half", "1120 half-distributed", "2121 half-distributed"])
def test_bf16_weights_with_fp32_copies_of_what_trains_only(results, run: str) -> None:
    for facts in results[run]["facts"]:
        assert facts["dtypes"] == ["torch.bfloat16"], "the frozen backbone is bf16 too"
        assert facts["stepped dtypes"] == facts["main gradients"] == ["torch.float32"]
        assert facts["frozen"] > 0 and facts["gradients of frozen"] == facts["copies of frozen"] == 0
    assert results["1110 adamw"]["facts"][0]["dtypes"] == ["torch.float32"], "control"


def test_a_stage_without_exits_and_an_exit_alone(results) -> None:
    """Stage 0 trains nothing; the exit's losses are bitwise those it has among others."""
    alone, together = results["1220 distributed from alone"], results["1220 distributed"]
    assert [facts["trained"] > 0 for facts in alone["facts"]] == [False, False, True, True]
    key = "exit/layer4-mlp/loss"
    assert [step[key] for step in alone["losses"]] == [step[key] for step in together["losses"]]
    assert set(alone["losses"][0]) == {key}


def test_main_weights_are_not_made_up_on_resume(results) -> None:
    message = results["1110 adamw from 1110 half"]["refused"]
    assert "was saved with model.megatron_amp_O2=True, this run has False; resume with the same" in message


def test_a_tuned_file_forces_neither_on_whoever_loads_it(folder: Path) -> None:
    from nemo_ee.checkpoint.nemo_archive import NemoArchive

    for file in ("1120-half-distributed.nemo", "2121-half-distributed.nemo"):
        with NemoArchive(folder / file) as archive:
            text = archive.config_text()
        assert "megatron_amp_O2" not in text and "mcore_distributed_optim" not in text
        assert "name: adamw" in text
