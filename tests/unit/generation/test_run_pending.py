# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A model that has waiting tokens sent on early gets them early, and every token and exit stays what it was."""

from __future__ import annotations

import pytest

from nemo_ee.generation.engine import EarlyExitEngine, Request
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.staged_forward import StagedForward
from tests.helpers.stub_models import ScriptedModel, exit_points
from tests.unit.generation.test_against_reference import random_case, reference


def assert_as_the_reference(seed: int, run_pending_after: int) -> None:
    model, policy, prompts, lengths = random_case(seed)
    model.run_pending_after = run_pending_after
    result = EarlyExitEngine(model).generate(prompts, max_new_tokens=lengths, policy=policy)
    for index, (prompt, count) in enumerate(zip(prompts, lengths, strict=True)):
        tokens, exits, rows = reference(model, policy, prompt, count)
        events = result.events_of(index)
        assert list(result.tokens[index]) == tokens
        assert [event.exit for event in events] == exits
        expected = [float(row.log_softmax(0)[token]) for row, token in zip(rows, tokens, strict=True)]
        assert [event.logprob for event in events] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("seed", range(24))
def test_tokens_exits_and_logprobs_equal_the_naive_decoder(seed):
    assert_as_the_reference(seed, 1 + seed % 3)


@pytest.mark.slow_unit
def test_control_a_cap_that_forgets_what_was_sent_ahead_is_noticed(monkeypatch):
    monkeypatch.setattr(StagedForward, "num_pending", lambda self, slot: self._num_pending[slot])
    with pytest.raises(AssertionError):
        for seed in range(24):
            assert_as_the_reference(seed, 1 + seed % 3)


def always_early(run_pending_after: int | None) -> ScriptedModel:
    model = ScriptedModel(4, exit_points(("early", 2, 4)), lambda exit, token, position: (token + 1, 0.9), 128)
    model.run_pending_after, model.deep = run_pending_after, []
    run = model.run

    def watched(hidden, positions, start, stop, cache):
        if start == 4:
            model.deep.append(len(positions))
        return run(hidden, positions, start, stop, cache)

    model.run = watched
    return model


@pytest.mark.parametrize(("run_pending_after", "batches"), [(None, []), (1, [1] * 11), (3, [3] * 3), (20, [])])
def test_waiting_tokens_go_on_in_batches_of_that_size(run_pending_after, batches):
    """13 tokens: the prompt's, then twelve that leave early, the last of which nobody comes after."""
    model = always_early(run_pending_after)
    EarlyExitEngine(model).generate([[1, 2]], max_new_tokens=13, policy=ExitPolicy(0.5))
    assert model.deep == [2, *batches]


def test_drafts_stay_where_they_are_and_static_depth_owes_nothing():
    model = always_early(1)
    drafted = EarlyExitEngine(model).generate(
        [[1, 2]], max_new_tokens=12, mode="self_speculative", policy=ExitPolicy(0.5, num_draft_tokens=4)
    )
    # A check takes the drafts along together, with the token that is asked nothing.
    assert drafted.stats.accepted and max(model.deep[1:]) == 5
    model.deep.clear()
    EarlyExitEngine(model).generate([[1, 2]], max_new_tokens=12, mode="static_depth", policy=ExitPolicy(0.5))
    assert model.deep == []


def test_a_flush_takes_the_rest_along_and_starts_the_count_anew():
    model = always_early(3)
    session = EarlyExitEngine(model).start([Request((1, 2), 13)], policy=ExitPolicy(0.5))
    for _ in range(6):
        session.step()
    assert session.num_pending(0) == 5, "three were sent ahead, two wait: five since the last one that went deep"
    session.flush()
    assert session.num_pending(0) == 0 and model.deep == [2, 3, 2]
