# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Early exit inside real vLLM, against `nemo_ee.runtime` and transformers on the same weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.runtime.loader import load_model
from nemo_ee.runtime.propagation import generate_propagating
from tests.engines.vllm.engine import FAMILIES, generate, greedy, model_of, save_model, served

PROMPTS = [[5, 71, 13, 9, 0, 44], [3], [100, 99, 98, 97], [1, 2, 3]]
NEW_TOKENS = [19, 24, 14, 30]
NAMES = ("layer1-mlp", "layer1-norm-shared", "layer2-embedding", "layer3-mlp-shared")


# Families whose tests run with vLLM's compiler too, which takes a minute or two for each.
COMPILED = ("qwen3",)
KINDS = [*((name, True) for name in FAMILIES), *((name, False) for name in COMPILED)]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind[0] + ("" if kind[1] else "-compiled"))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path, Any]]:
    name, eager = request.param
    folder = tmp_path_factory.mktemp(name)
    stock = save_model(folder, name)
    with served(folder, {"only_if_faster": False}, enforce_eager=eager) as llm:
        assert model_of(llm)._step.is_warm or eager, "every part is compiled before the first request"
        yield llm, folder, stock


def policies(folder: Path) -> list[ExitPolicy]:
    """Thresholds that some of the tokens pass."""
    low = dict(zip(NAMES, (0.05, 0.04, 0.06, 0.05), strict=True))
    chosen = [low, dict.fromkeys(NAMES, 0.12), {NAMES[1]: 0.03, NAMES[3]: 0.05}, dict.fromkeys(NAMES[2:], 0.08)]
    return [ExitPolicy(own, active=tuple(own)) for own in chosen]


def test_tokens_and_exits_are_the_runtime_s(made: tuple[Any, Path, Any]) -> None:
    llm, folder, _ = made
    model, steps = model_of(llm), []
    original = model._step.run

    def recording(*arguments: Any) -> Any:
        outcome = original(*arguments)
        steps.append(list(outcome.read_at))
        return outcome

    model._step.run = recording
    try:
        given = policies(folder)
        tokens = generate(llm, PROMPTS, NEW_TOKENS, [json.dumps(own.thresholds) for own in given])
    finally:
        del model._step.run
    expected = generate_propagating(
        load_model(folder), PROMPTS, max_new_tokens=NEW_TOKENS, policy=given, row_by_row=True
    )
    assert tokens == [list(own) for own in expected.tokens]
    names = [*NAMES, None]
    rows = [[exit for exit in step if exit != "ended"] for step in _by_step(expected.exits)]
    assert [sorted(map(str, step)) for step in rows] == [sorted(str(names[i]) for i in step) for step in steps]
    assert len({exit for own in expected.exits for exit in own}) >= 3, "control: several exits are used"
    assert any(len(set(step)) > 1 for step in rows), "control: rows of one step are read at several exits"


def _by_step(exits: tuple[tuple[str | None, ...], ...]) -> list[list[Any]]:
    """Exits of each step after the first token."""
    longest = max(map(len, exits))
    return [[own[i] if i < len(own) else "ended" for own in exits] for i in range(1, longest)]


def test_without_thresholds_the_tokens_are_the_stock_model_s(made: tuple[Any, Path, Any]) -> None:
    llm, _, stock = made
    expected = [greedy(stock, prompt, new) for prompt, new in zip(PROMPTS, NEW_TOKENS, strict=True)]
    counted = dict(model_of(llm).counts.by_exit(1))
    assert generate(llm, PROMPTS, NEW_TOKENS, [None, "off", None, "off"]) == expected
    assert model_of(llm).counts.by_exit(1) == counted, "control: no step evaluates exits"
    assert generate(llm, PROMPTS, NEW_TOKENS, [0.999999] * 4) == expected, "exits that are never confident"
    assert model_of(llm).counts.by_exit(1)["final"] > counted["final"], "control: exits are evaluated"


def test_a_request_without_thresholds_keeps_the_batch_at_full_depth(made: tuple[Any, Path, Any]) -> None:
    llm, _, stock = made
    expected = [greedy(stock, prompt, 12) for prompt in PROMPTS]
    assert generate(llm, PROMPTS, [12] * 4, [0.0, 0.0, "off", 0.0]) == expected
    assert generate(llm, PROMPTS, [12] * 4, [0.0] * 4) != expected, "control"


def test_an_exit_on_the_last_layer_alone(tmp_path: Path) -> None:
    stock = save_model(tmp_path, "llama", [("norm", 4, True)])
    expected = [greedy(stock, prompt, 12) for prompt in PROMPTS]
    with served(tmp_path, {"only_if_faster": False}) as llm:
        tokens = generate(llm, PROMPTS, [12] * 4, [0.0] * 4)
    policy = ExitPolicy(0.0)
    ours = generate_propagating(load_model(tmp_path), PROMPTS, max_new_tokens=[12] * 4, policy=policy, row_by_row=True)
    assert tokens == [list(own) for own in ours.tokens] and tokens != expected, "the exit's tokens, not the model's"
