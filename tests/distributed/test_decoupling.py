# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Between two log steps nothing joins the pipeline's stages but the hidden states; agreement happens where it must.

Counted inside Lightning's loop with NeMo's experiment manager, below torch.distributed's functions.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.decoupling_program import LOG_EVERY, STEPS, VALIDATE_EVERY
from tests.distributed.test_layouts import run_module

# The module's fixture does the work of all its tests.
pytestmark = pytest.mark.timeout(900)

LAYOUTS = {"121": 2, "122": 4}  # (tp, pp, dp) -> ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """Layout -> what each rank wrote."""
    folder = tmp_path_factory.mktemp("decoupling")
    run_module("tests.helpers.tiny_run", str(folder), timeout=300)
    run_module("tests.distributed.decoupling_program", str(folder), *(",".join(name) for name in LAYOUTS), timeout=600)
    return {
        name: [json.loads(Path(folder / f"{name}.rank{rank}.json").read_text()) for rank in range(size)]
        for name, size in LAYOUTS.items()
    }


def joining_stages(result: dict, layout: str) -> dict[int, list[str]]:
    """Step -> collectives of a rank over groups that hold ranks of both stages, start and end of the run left out."""
    per_stage = LAYOUTS[layout] // 2
    found: dict[int, list[str]] = {}
    for step, operation, ranks in result["calls"]:
        if len({rank // per_stage for rank in ranks}) > 1 and operation not in ("send", "recv"):
            found.setdefault(step, []).append(operation)
    found.pop(-1, None)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_collective_joins_the_stages_between_log_steps(results, layout: str) -> None:
    # 0-based: logs after steps 3 and 7, validation and a checkpoint after step 5, the end of the run after step 9.
    agree = {*range(LOG_EVERY - 1, STEPS, LOG_EVERY), VALIDATE_EVERY - 1, STEPS - 1}
    for result in results[layout]:
        found = joining_stages(result["sparse"], layout)
        assert set(found) == agree
        for step in range(LOG_EVERY - 1, STEPS, LOG_EVERY):
            assert found[step] == ["allreduce"], "one sum puts every exit's numbers on every rank"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_control_a_log_at_every_step_is_counted_at_every_step(results, layout: str) -> None:
    for result in results[layout]:
        assert set(joining_stages(result["every"], layout)) == set(range(8))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_teacher_on_the_last_stage_joins_nothing_either(results, layout: str) -> None:
    """With distillation only transfers are added: token ids and probabilities, back from the last stage."""
    size = LAYOUTS[layout]
    for rank, result in enumerate(results[layout]):
        found = joining_stages(result["taught"], layout)
        assert set(found) == {0, LOG_EVERY - 1, 8 - 1}, "and once at the start, to make the group of its traffic"
        step = [operation for at, operation, _ in result["taught"]["calls"] if at == 1]
        ways = (step.count("send"), step.count("recv"))
        assert ways == ((2, 4) if rank < size // 2 else (4, 2)), "two microbatches of one state; of two tensors back"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hidden_states_go_one_way_and_nothing_else_travels_between_stages(results, layout: str) -> None:
    """Two microbatches a step; gradients are summed within a stage, over data parallelism."""
    size = LAYOUTS[layout]
    for rank, result in enumerate(results[layout]):
        step = [(operation, ranks) for at, operation, ranks in result["sparse"]["calls"] if at == 1]
        way = "send" if rank < size // 2 else "recv"
        assert [operation for operation, _ in step if operation in ("send", "recv")] == [way, way]
        others = {tuple(ranks) for operation, ranks in step if operation != way}
        peers = tuple(range(size // 2)) if rank < size // 2 else tuple(range(size // 2, size))
        assert others <= {(rank,), peers} and (size == 2 or peers in others)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_stage_begins_steps_that_the_last_one_has_not_come_to(results, layout: str) -> None:
    """The last stage stood still after step 0 until the first one began step 2. Control: a log step holds it back."""
    waited = [result for result in results[layout] if result["sparse"]["ahead"]]
    assert len(waited) == LAYOUTS[layout] // 2
    assert all(result["sparse"]["ahead"] == [True] and result["every"]["ahead"] == [False] for result in waited)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_stage_ends_validates_and_saves_together(results, layout: str) -> None:
    first = results[layout][0]["sparse"]
    for result in results[layout]:
        assert result["sparse"]["ended_at"] == STEPS and result["every"]["ended_at"] == 8
        assert result["sparse"]["validation"] == first["validation"] and first["validation"]
        assert result["sparse"]["saved"] == first["saved"] and any(f"step={STEPS}" in name for name in first["saved"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_early_stopping_ends_every_stage_at_the_same_step(results, layout: str) -> None:
    """Validation after steps 2, 4, 6; two without an improvement of 100 nats; 20 steps were allowed."""
    assert {result["early"]["ended_at"] for result in results[layout]} == {6}
