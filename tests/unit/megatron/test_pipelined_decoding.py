# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Decoding over pipeline stages (gloo) against one stage, and its caches against those of transformers."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_ee.generation.decoding_model import TokenPositions
from tests.unit.checkpoint.conftest import megatron  # noqa: F401  (fixture)
from tests.unit.megatron import decode_over_stages
from tests.unit.megatron.test_decoding_adapter import (  # noqa: F401  (`directory` is a fixture)
    EXITS,
    VARIED,
    build,
    directory,
    engine_of,
    often_met,
    some_prompts,
)

pytestmark = [pytest.mark.usefixtures("megatron"), pytest.mark.timeout(400), pytest.mark.slow_unit]

WORKING = ("exits on both stages", "three stages", "tensor parallel")
GREEDY = {"greedy": True}
NUM_NEW = 16


@pytest.fixture(scope="module")
def ran(directory, tmp_path_factory) -> SimpleNamespace:  # noqa: F811
    """What one stage says, and the folder with what every layout said; all layouts run once."""
    tiny, folder = directory("llama"), tmp_path_factory.mktemp("stages")
    exits = [exit if exit.get("init") == "lora" else {**exit, "init": "random"} for exit in EXITS]
    model = build(tiny.path, exits, drawn=False)
    engine = engine_of(model)
    thresholds = often_met(model, [exit["name"] for exit in EXITS]).thresholds
    three, one = some_prompts(133), some_prompts(133, (6,))
    options = {"thresholds": thresholds, "max_new_tokens": NUM_NEW, "sampling": dataclasses.asdict(VARIED)}
    modes = ("early_exit", "self_speculative", "full")
    calls = [{**options, "prompts": prompts, "mode": mode} for prompts in (three, one) for mode in modes]
    calls += [{**calls[1], "thresholds": 0.0, "num_draft_tokens": 2, "sampling": GREEDY}]
    calls += [{**calls[0], "max_pending_tokens": 2}]
    # Twelve sequences do not fit into a command's first message.
    calls += [{**calls[0], "prompts": some_prompts(133, (1, 2, 3) * 4)}]
    calls += [{**calls[0], "mode": "static_depth", "active": [name]} for name in ("norm1", "layer2")]
    calls += [{**calls[0], "mode": "early_exit", "num_context": 1, "prompts": some_prompts(133, (9, 14))}]
    # A token that one of them says in the middle, and not at once, ends a sequence.
    first = decode_over_stages.decode(engine, calls[:1])[0]
    calls += [{**calls[0], "stop_tokens": [next(row[2] for row in first if row[0] == 1 and row[1] == 6)]}]
    request = {"exits": exits, "calls": calls, "broken_calls": [calls[0], calls[6]]}
    (folder / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-m", decode_over_stages.__name__, tiny.path, folder / "request.json", folder]
    process = subprocess.run(list(map(str, command)), cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    expected = decode_over_stages.decode(engine, calls)
    broken = decode_over_stages.decode(engine, request["broken_calls"])
    return SimpleNamespace(folder=folder, expected=expected, broken=broken, calls=calls, reference=tiny.reference)


@pytest.mark.parametrize(
    "spans",
    [
        {0: range(4)},
        {2: range(5, 6), 7: range(3)},
        {0: (1, 2, 5), 3: (0, 4, 6, 7)},
        {n: range(n + 1) for n in range(12)},
    ],
)
def test_positions_arrive_as_they_left(spans):
    from nemo_ee.megatron.decoding.stage_lines import decode_positions, encode_positions

    positions = TokenPositions.of(spans)
    numbers = encode_positions(positions)
    found = decode_positions(numbers, torch.device("cpu"))
    assert torch.equal(found.sequence, positions.sequence) and torch.equal(found.position, positions.position)
    assert found.groups == positions.groups
    assert len(numbers) == 3 * sum(1 if isinstance(own, range) else 2 + (own[0] == 0) for own in spans.values())


def said(ran: SimpleNamespace, layout: str, rank: int = 0) -> dict[str, Any]:
    return json.loads((ran.folder / f"{layout}.0.{rank}.json").read_text())


def assert_same(found: list[Any], expected: list[Any]) -> None:
    """Tokens and exits are equal, confidences and ln p within 1e-5 and 1e-4."""
    assert [row[:4] for row in found] == [row[:4] for row in expected]
    assert [row[4] for row in found] == pytest.approx([row[4] for row in expected], abs=1e-5)
    assert [row[5] for row in found] == pytest.approx([row[5] for row in expected], abs=1e-4)


@pytest.mark.parametrize("layout", WORKING)
def test_stages_say_what_one_stage_says(ran, layout):
    """Batches of three and one, every mode, exits on either stage, a cap, an end in the middle, known text."""
    for rank in range(decode_over_stages.LAYOUTS[layout][0]):
        for found, expected in zip(said(ran, layout, rank)["events"], ran.expected, strict=True):
            assert_same(found, expected)


def test_what_is_compared_says_something(ran):
    left = {row[3] for row in ran.expected[0]}
    assert len(left & {"mlp1", "norm1", "layer1"}) and len(left & {"mlp2", "embedding2", "layer2"}) and None in left
    assert [row[3] for row in ran.expected[7]] != [row[3] for row in ran.expected[0]], "the cap makes a difference"
    ended = [row for row in ran.expected[-1] if row[0] == 1]
    assert 1 < len(ended) < NUM_NEW and len(ran.expected[-1]) > len(ended) + NUM_NEW


@pytest.mark.parametrize("layout", WORKING[:2])
def test_after_flush_the_caches_are_those_of_transformers(ran, layout):
    """Whatever was sent ahead has run through every layer, once."""
    caches: dict[int, Any] = {}
    for stage in range(len(decode_over_stages.LAYOUTS[layout][1])):
        caches |= torch.load(ran.folder / f"{layout}.{stage}.0.pt")
    assert sorted(caches) == [1, 2, 3]
    for index, fed in enumerate(said(ran, layout)["fed"]):
        reference = ran.reference(torch.tensor([fed]), use_cache=True).past_key_values
        for layer, expected in enumerate(reference, start=1):
            for ours, theirs in zip(caches[layer], expected, strict=True):
                torch.testing.assert_close(ours[index, :, : len(fed)], theirs[0], atol=1e-5, rtol=1e-5)


def test_half_precision_decodes_over_stages(ran):
    """In bf16 no equality is promised; the prompt and the lengths are those asked for."""
    for found, expected in zip(said(ran, "bf16")["events"][:-1], ran.expected[:-1], strict=True):
        assert [row[:2] for row in found] == [row[:2] for row in expected]


def test_control_the_state_of_another_position_is_noticed(ran):
    with pytest.raises(AssertionError):
        for found, expected in zip(said(ran, "control: the state before")["events"], ran.broken, strict=True):
            assert_same(found, expected)


def test_control_a_cut_that_a_stage_does_not_hear_of_ends_the_run(ran):
    assert "written for the second time" in (ran.folder / "control: a cut is not told.1.0.error").read_text()


@pytest.mark.parametrize("layout", ["a stage dies", "a stage raises", "control: a cut is not told"])
def test_a_stage_that_ends_ends_the_first_with_a_message(ran, layout):
    message = (ran.folder / f"{layout}.0.0.error").read_text()
    assert message.startswith("decoding: pipeline stage 0 (rank 0)") and "stage 1 (rank 1), which has ended" in message
    assert "look at the end of rank 1's own output" in message


def test_a_first_stage_that_dies_ends_the_others(ran):
    message = (ran.folder / "the first stage dies.1.0.error").read_text()
    assert message.startswith("decoding: pipeline stage 1 (rank 1) waits for") and "stage 0 (rank 0)" in message
