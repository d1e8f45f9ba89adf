# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""`Calibrator` on a small reference transformer, with scripted scores."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("nemo")

from omegaconf import OmegaConf

from tests.helpers.megatron_models import script_config

from nemo_ee.exits.config import ExitConfig  # isort: skip  # after the CPU host is on
from tests.helpers.stub_models import TinyTransformer

NUM_PROMPTS = 40
EXITS = [ExitConfig("one", 1, "mlp", "random", "own"), ExitConfig("two", 2, "norm", "random", "own")]
GRID = [0.9, 0.6, 0.3, 0.1]
TOKENIZER = SimpleNamespace(eos_id=None, ids_to_text=lambda ids: " ".join(map(str, ids)))


def calibrator(tmp_path: Path, score=None, **changes: Any):
    """On 40 prompts of 3 tokens."""
    from nemo_ee.calibration.calibrate import Calibrator
    from nemo_ee.calibration.calibration_prompts import CalibrationPrompts
    from nemo_ee.calibration.calibration_request import CalibrationRequest

    (tmp_path / "model.nemo").touch()
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "x", "answer": "y"}\n')
    with script_config("megatron_gpt_early_exit_calibrate", []) as cfg:
        config = OmegaConf.to_container(cfg)
    config["model"]["restore_from_path"] = str(tmp_path / "model.nemo")
    config |= {"data": str(data), "output": str(tmp_path / "report"), "tokens_to_generate": 4, "grid": GRID}
    request = CalibrationRequest.from_config(config | {"epsilon": 0.2, "free_running": 5} | changes)
    ids = tuple((index % 37, index % 7, 5) for index in range(NUM_PROMPTS))
    prompts = CalibrationPrompts(ids, ("y",) * NUM_PROMPTS, {})
    return Calibrator(TinyTransformer(EXITS, num_layers=3), TOKENIZER, request, prompts, score)


def test_the_task_risk_decodes_nothing_after_the_first_failure(tmp_path):
    """A score of the first round is the full model's, of the second and third those of policies; a fourth never is."""
    seen = []

    def score(index: int, text: str) -> float:
        seen.append(index)
        policy = (len(seen) - 1) // NUM_PROMPTS
        return [1.0, 1.0, 0.5][policy]

    report = calibrator(tmp_path, score, risk="task").run()
    assert seen == [*range(NUM_PROMPTS)] * 3
    policies = report["policies"]
    assert [one["thresholds"]["one"] for one in policies] == GRID[:2]
    assert [one["risk"] for one in policies] == [0.0, 0.5]
    assert [one["certified"] for one in policies] == [one["chosen"] for one in policies] == [True, False]
    assert report["free_running"]["num_prompts"] == 5


@pytest.mark.parametrize("wrong", [1.5, -0.1, float("nan")])
def test_scores_out_of_bounds_are_refused(tmp_path, wrong):
    """Their differences may lie in 0..1 all the same."""
    with pytest.raises(ValueError, match=r"scores must lie in 0\.\.1, but one is .*scale them"):
        calibrator(tmp_path, lambda index, text: wrong, risk="task").run()


def test_a_split_tests_on_other_prompts_than_it_found_its_order_on(tmp_path, monkeypatch):
    from nemo_ee.generation.exit_trace import ExitTrace

    selected, whole = [], ExitTrace.select
    monkeypatch.setattr(ExitTrace, "select", lambda table, rows: selected.append(list(rows)) or whole(table, rows))
    report = calibrator(tmp_path, split=0.25, epsilon=0.3).run()
    found_on, tested = selected
    assert len(found_on) == 10 and report["num_tested"] == len(tested) == 30
    assert sorted(found_on + tested) == [*range(NUM_PROMPTS)], "no prompt on both sides"
    assert any(len(set(one["thresholds"].values())) == 2 for one in report["policies"])
