# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Joint and LoRA training give the same losses and gradients on every layout, and resume under any of them.

One rank is the reference, whose gradients tests/functional/test_joint.py compares with transformers. Three stages put
copies of the output weight on stages that Megatron's own groups do not join.
"""

from __future__ import annotations

import json

import pytest

from tests.distributed.joint_program import CASES, CASES_OF_ONE_RANK, DROPOUT, SAVED_AT, STEPS
from tests.distributed.test_layouts import relative_difference, run_module

# The module's fixture does the work of all its tests.
pytestmark = pytest.mark.timeout(1200)

REFERENCE, *OTHERS = ("1110", "1310", "2111", "1120", "2210")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Layout -> case -> what came out."""
    folder = tmp_path_factory.mktemp("joint")
    layouts = [",".join(name) for name in (REFERENCE, *OTHERS)]
    run_module("tests.distributed.joint_program", str(folder), *layouts, timeout=1100)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in (REFERENCE, *OTHERS)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", OTHERS)
def test_losses_and_gradient_norms_agree_at_every_step(results, name: str, case: str) -> None:
    """1e-5 relative, fp32: every exit's loss, the full model's, and the norm of each entry's gradients."""
    ours, reference = results[name][case]["steps"], results[REFERENCE][case]["steps"]
    assert len(ours) == len(reference) == STEPS
    assert {"full_model/loss", "norm backbone", "norm layer2-norm"} <= set(reference[0]) and len(reference[0]) == 12
    for step, (found, wanted) in enumerate(zip(ours, reference, strict=True)):
        zero = {key for key, value in wanted.items() if value == 0.0}  # a linear loss weight starts at 0
        assert zero == ({"norm layer3-mlp"} if step == 0 else set()) and not any(found[key] for key in zero)
        kept = [{key: value for key, value in values.items() if key not in zero} for values in (found, wanted)]
        assert relative_difference(*kept) < 1e-5, f"step {step}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", OTHERS)
def test_validation_agrees(results, name: str, case: str) -> None:
    ours, reference = results[name][case]["validation"], results[REFERENCE][case]["validation"]
    losses = {key for key in reference if key.endswith("/loss")}
    assert "val/full_model/loss" in losses and len(losses) == 6
    for key in losses:
        assert ours[key] == pytest.approx(reference[key], rel=1e-5), key


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", OTHERS)
def test_copies_of_the_output_weight_stay_one(results, name: str, case: str) -> None:
    """Bitwise, after all steps."""
    copies = results[name][case]["copies"]  # of the first rank; None where its stage shares no weight with another
    assert copies in (0.0, None)
    assert copies == 0.0 or case != "gpt2 joint recomputed" or name[1] == "1", "tied weights: first and last stage"


@pytest.mark.parametrize("case", CASES_OF_ONE_RANK)
def test_a_resumed_run_is_bitwise_the_undisturbed_one(results, case: str) -> None:
    whole = results[REFERENCE][case]
    assert whole["resumed"] == whole["steps"][SAVED_AT:] and len(whole["resumed"]) == STEPS - SAVED_AT


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", OTHERS)
def test_a_run_resumes_under_another_layout(results, name: str, case: str) -> None:
    """Weights, optimizer states and learning rates come from what one rank saved."""
    (resumed,), (wanted,) = results[name][case]["resumed"], results[REFERENCE][case]["resumed"]
    assert relative_difference(resumed, wanted) < 1e-5


def test_dropout_was_on(results) -> None:
    """Control of the resumed run with dropout."""
    plain, dropped = results[REFERENCE]["qwen3 joint"]["steps"], results[REFERENCE][DROPOUT]["steps"]
    assert all(a["full_model/loss"] != b["full_model/loss"] for a, b in zip(plain, dropped, strict=True))


def test_the_comparisons_can_fail(results) -> None:
    """Control: another step, and another mode on the same data, are not within the tolerance."""
    joint, lora = results[REFERENCE]["qwen3 joint"]["steps"], results[REFERENCE]["qwen3 lora"]["steps"]
    assert relative_difference(joint[1], joint[2]) > 1e-3
    assert joint[0]["full_model/loss"] == pytest.approx(lora[0]["full_model/loss"], rel=1e-6)
    assert abs(joint[1]["full_model/loss"] / lora[1]["full_model/loss"] - 1) > 1e-4
