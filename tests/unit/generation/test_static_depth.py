# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Mode `static_depth`: every token from one exit, against a decoder that recomputes everything, and by script."""

from __future__ import annotations

import pytest

from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.sampling import SamplingParams
from tests.helpers.reference_decoder import hidden_by_stop, logits_at
from tests.helpers.stub_models import ScriptedModel, TinyTransformer, exit_points
from tests.unit.generation.test_against_reference import ALL_KINDS

EXITS = exit_points(("a", 2, 3), ("b", 4, 8), ("b2", 4, 8))


def only(name):
    return {"mode": "static_depth", "policy": ExitPolicy(1.0, active=(name,))}


def naive(model, name, prompt, count):
    """Greedy tokens of an exit as a stand-alone model, and the logits they were read from."""
    tokens, rows = list(prompt), []
    for _ in range(count):
        rows.append(logits_at(model, name, hidden_by_stop(model, tokens))[-1])
        tokens.append(int(rows[-1].argmax()))
    return tokens[len(prompt) :], rows


@pytest.mark.parametrize("name", ["a", "b", "b2"])
def test_nothing_below_the_exit_ever_runs(name):
    model = ScriptedModel(6, EXITS, lambda exit, token, position: ((token + 1) % 50, 0.9))
    result = EarlyExitEngine(model).generate([[1, 2, 3], [7]], max_new_tokens=5, **only(name))
    point = next(exit for exit in EXITS if exit.name == name)
    assert [half for half, done in model.cache.computed.items() if done] == list(range(point.stop + 1))
    assert set(model.cache.evaluations) == {name} and model.cache.active_exits == (name,)
    assert model.cache.exit_kv[name] == model.cache.computed[point.stop]
    assert {(event.exit, event.layer) for event in result.events} == {(name, point.layer)}
    assert result.stats.computed_layers == (3 + 1 + 4 + 4) * point.stop / 2
    assert result.stats.mean_depth == point.layer


@pytest.mark.parametrize("exit", ALL_KINDS, ids=lambda exit: exit.name)
def test_tokens_equal_the_stand_alone_models(exit):
    model = TinyTransformer(ALL_KINDS, seed=5)
    prompts = [[1, 2, 3], [9], [30, 4, 4, 8, 1]]
    result = EarlyExitEngine(model).generate(prompts, max_new_tokens=12, **only(exit.name))
    for index, prompt in enumerate(prompts):
        tokens, rows = naive(model, exit.name, prompt, 12)
        assert list(result.tokens[index]) == tokens
        expected = [float(row.log_softmax(0)[token]) for row, token in zip(rows, tokens, strict=True)]
        assert [event.logprob for event in result.events_of(index)] == pytest.approx(expected, abs=1e-4)
    # The control: the full model says something else.
    assert EarlyExitEngine(model).generate(prompts, max_new_tokens=12, mode="full").tokens != result.tokens


@pytest.mark.parametrize("exit", ALL_KINDS, ids=lambda exit: exit.name)
def test_scoring_reads_every_token_from_the_exit(exit):
    model = TinyTransformer(ALL_KINDS, seed=6)
    text = [3, 1, 4, 1, 5, 9, 2, 6]
    result = EarlyExitEngine(model).score([text, text[:5]], [1, 3], **only(exit.name))
    rows = logits_at(model, exit.name, hidden_by_stop(model, text)).log_softmax(1)
    expected = [float(rows[position, token]) for position, token in enumerate(text[1:])]
    assert list(result.logprobs[0]) == pytest.approx(expected, abs=1e-4)
    assert list(result.logprobs[1]) == pytest.approx(expected[2:4], abs=1e-4)
    assert result.exits[0] == (exit.name,) * 7
    assert result.stats.computed_layers == (7 + 4) * exit.stop / 2
    # The rows before the first scored token are never asked about.
    assert result.stats.evaluations[exit.name] == 7 + 2 and result.stats.evaluations["final"] == 0


def test_a_models_only_exit_need_not_be_named_and_sampling_is_the_exits():
    model = TinyTransformer(ALL_KINDS[1:2], seed=1)
    sampling = SamplingParams(greedy=False, seed=4)
    calls = [{"mode": "static_depth", "policy": ExitPolicy(0.3)}, only(ALL_KINDS[1].name)]
    results = [EarlyExitEngine(model).generate([[1]], max_new_tokens=9, sampling=sampling, **own) for own in calls]
    assert results[0].events == results[1].events
    assert len(set(results[0].tokens[0])) > 2
