# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The search for a placement on the reference model: its probes beside the logit lens, its command, its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_ee.evaluation.exit_report import text_windows
from nemo_ee.evaluation.layer_probes import (
    exits_override,
    fastest_within,
    placement_table,
    probe_tables,
    thresholds_text,
    verdict,
)
from nemo_ee.generation.decoding_model import TokenPositions
from nemo_ee.planning.placement_search import Placement, ProbeTable
from nemo_ee.planning.threshold_search import DecodingCosts
from nemo_ee.runtime.loader import load_model, load_tokenizer
from nemo_ee.runtime.model import RuntimeModel
from tests.helpers.megatron_models import user_environment
from tests.helpers.served_model import REFERENCE_MODEL

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT = REFERENCE_MODEL / "corpus" / "heldout.jsonl.gz"


@pytest.fixture(scope="module")
def model() -> RuntimeModel:
    return load_model(REFERENCE_MODEL)


@pytest.fixture(scope="module")
def windows() -> list[list[int]]:
    return text_windows(HELD_OUT, load_tokenizer(REFERENCE_MODEL), 130, 24, None)


@pytest.fixture(scope="module")
def table(model: RuntimeModel, windows: list[list[int]]) -> ProbeTable:
    choosing, holding = probe_tables(model, windows)
    assert len(choosing.nats) == len(holding.nats) == 6 * 128
    return holding


def test_probes_are_better_than_the_logit_lens(
    model: RuntimeModel, windows: list[list[int]], table: ProbeTable
) -> None:
    """The lens reads the hidden state with the final norm and output, without a map in front of them."""
    assert table.layers == tuple(range(1, 12))
    assert table.nats[:, -1].abs().max() == 0 == table.differs[:, -1].max()
    assert table.agreement[11] > table.agreement[6] > table.agreement[1]
    for layer in (3, 6, 9):
        agreed = total = 0
        for window in windows[18:]:
            positions = TokenPositions.of({0: range(129)})
            cache = model.new_cache(1, 129, ())
            hidden = model.run(model.embed(torch.tensor(window[:-1]), positions), positions, 0, 2 * layer, cache)
            lens = model.exit_logits(None, hidden, positions, cache).argmax(-1)[1:]
            hidden = model.run(hidden, positions, 2 * layer, 24, cache)
            agreed += int((lens == model.exit_logits(None, hidden, positions, cache).argmax(-1)[1:]).sum())
            total += 128
        assert table.agreement[layer] > agreed / total, layer


def run(*overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / "megatron_gpt_early_exit_place.py"), *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=user_environment())


def test_the_command_and_costs_of_another_machine(tmp_path: Path) -> None:
    """Cheap heads beside slow layers make exits worth it; with the opposite nothing is."""
    given = [f"checkpoint={REFERENCE_MODEL}", f"data={HELD_OUT}", "window_tokens=129", "max_windows=16"]
    given += ["most_exits=[2]", "limits=[0.9]", "architecture=norm", f"hydra.run.dir={tmp_path}"]
    for head, found in ((1e-6, True), (1.0, False)):
        file = tmp_path / f"{found}.json"
        costs = [f"costs.half=1e-3 costs.row=1e-5 costs.head={head}".split()]
        done = run(*given, *costs[0], f"output={file}")
        assert done.returncode == 0, done.stderr[-3000:]
        values = json.loads(file.read_text())
        assert values["costs"] == {"half": 1e-3, "row": 1e-5, "head": head}
        assert values["verdict"] in done.stdout and len(values["agreement"]) == 11
        assert (max(one["speed"] for one in values["placements"]) > 1.2) is found
        assert ("Not worth it" in values["verdict"]) is not ("for megatron" in done.stdout)
        assert found or "Not worth it: no placement within 5% of perplexity is faster" in values["verdict"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("max_windows=3", "3 windows of 64 tokens are too few, at least 4"),
        ("max_windows=6", "186 tokens are too few to fit a probe on"),
        ("limits=[5]", "limits[0]=5"),
        ("architecture=layer", "architecture='layer'"),
        ("output=placement.txt", "must end in .json"),
        ("most_exits=[0]", "most_exits"),
        ("costs.half=0", "costs.half=0 must be"),
        ("limits=[]", "a list of numbers above 0"),
    ],
)
def test_wrong_input_is_one_error(changed: str, message: str, tmp_path: Path) -> None:
    given = {"checkpoint": REFERENCE_MODEL, "data": HELD_OUT, "window_tokens": 64, "output": tmp_path / "out.json"}
    done = run(*(f"{key}={value}" for key, value in given.items()), changed, f"hydra.run.dir={tmp_path / 'log'}")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out.json").exists()


def placement(speed: float, perplexity: float, criterion: str = "max_probability") -> Placement:
    return Placement("mlp", criterion, {3: 0.5, 9: 0.25}, perplexity, 0.9, 0.8, speed, 1.5)


def test_what_is_said(table: ProbeTable) -> None:
    costs = DecodingCosts(1e-3, 1e-3, 1e-6, {None: 4e-3})
    full = Placement("mlp", "margin", {}, 1.0, 1.0, 1.0, 1.0, 1.0)
    for found, worth, text in (
        (
            [full, placement(1.2, 1.04), placement(1.9, 1.2)],
            True,
            "Worth it: 1.20 times the speed at +4.0%",
        ),
        ([full, placement(1.05, 1.04)], None, "Little to gain: 1.05"),
        ([full, placement(1.01, 1.04)], False, "Not worth it: 1.01"),
        ([full, placement(1.9, 1.2)], False, "no placement within 5% of perplexity is faster"),
    ):
        said = verdict(found, table, costs)
        assert said[0] is worth and text in said[1], said
        assert "One output layer costs 14% of a token (2.0 layers)" in said[1]
    assert fastest_within([full]) is None and thresholds_text(full) == "full depth"
    assert thresholds_text(placement(1.2, 1.0, "entropy")) == "3 below 0.50 nats, 9 below 0.25 nats"
    assert placement_table([full, placement(1.2, 1.04)]).count("\n") == 3
    wanted = "'model.early_exit.exits=[{layer: 3, architecture: mlp}, {layer: 9, architecture: mlp}]'"
    assert exits_override(placement(1.2, 1.04)) == wanted
