# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Exit policies: which exits are asked, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import EvaluatedExit, ExitPolicy, plan_exits, unused_cap
from tests.helpers.stub_models import ScriptedModel, exit_points

EXITS = exit_points(("early", 2, 3), ("middle", 4, 7), ("late", 6, 12))


def names(policy):
    return [exit.point.name for exit in policy.evaluated_exits(EXITS)]


def test_one_number_is_for_every_exit():
    assert ExitPolicy(0.5).evaluated_exits(EXITS) == tuple(EvaluatedExit(point, 0.5) for point in EXITS)


def test_thresholds_by_name_and_a_subset_keep_the_model_order():
    policy = ExitPolicy({"late": 0.3, "early": 0.2}, active=["late", "early"])
    assert policy.evaluated_exits(EXITS) == (EvaluatedExit(EXITS[0], 0.2), EvaluatedExit(EXITS[2], 0.3))
    assert names(ExitPolicy({"early": 0.1, "middle": 0.2, "late": 0.3}, active=("middle",))) == ["middle"]
    assert names(ExitPolicy(0.5, active=())) == []


def test_exits_that_no_token_can_leave_at_are_not_asked():
    assert names(ExitPolicy({"early": 1.0, "middle": 0.999, "late": 1})) == ["middle"]
    assert names(ExitPolicy(0.0, criterion="entropy")) == []
    assert names(ExitPolicy(1.0, criterion="entropy")) == ["early", "middle", "late"]


def test_it_is_frozen_and_keeps_its_own_copy():
    thresholds = {"early": 0.5}
    policy = ExitPolicy(thresholds, active=["early"])
    thresholds["early"] = 0.1
    assert policy.thresholds == {"early": 0.5} and policy.active == ("early",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.max_pending_tokens = 3


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf"), "0.5", None, True])
@pytest.mark.parametrize("criterion", ["max_probability", "margin"])
def test_threshold_range(value, criterion):
    with pytest.raises(ValueError, match=r"threshold = .* must be a number in 0\.\.1; 1\.0 never leaves"):
        ExitPolicy(value, criterion=criterion)


def test_entropy_thresholds_may_exceed_one():
    ExitPolicy(3.5, criterion="entropy")
    with pytest.raises(ValueError, match=r"threshold of exit 'early' = -1 must be a number at least 0 \(nats\)"):
        ExitPolicy({"early": -1}, criterion="entropy")


def test_all_problems_of_the_policy_in_one_message():
    with pytest.raises(ValueError) as caught:
        ExitPolicy({"a": 2, "b": -1}, active=("a", "a"), max_pending_tokens=-1)
    for part in (
        "exit 'a' = 2",
        "exit 'b' = -1",
        "names an exit twice",
        "max_pending_tokens = -1 must be a whole number",
    ):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="criterion = 'probability' is unknown, use one of max_probability"):
        ExitPolicy(0.5, criterion="probability")
    with pytest.raises(ValueError, match=r"active = 'early' must be a list of exit names, write \['early'\]"):
        ExitPolicy(0.5, active="early")


def test_all_problems_against_the_model_in_one_message():
    with pytest.raises(ValueError) as caught:
        ExitPolicy({"erly": 0.5, "late": 0.5}, active=("late", "middle", "none")).evaluated_exits(EXITS)
    for part in (
        "active names the exit 'none', which the model does not have; its exits are early, middle, late",
        "thresholds names the exit 'erly', which the model does not have (did you mean early?)",
        "thresholds has no number for the active exit middle; add one, or list the exits to evaluate under active",
    ):
        assert part in str(caught.value)


def test_each_mode_has_a_cap_of_its_own():
    both = ExitPolicy(0.5, max_pending_tokens=3, num_draft_tokens=4)
    assert plan_exits("early_exit", both, EXITS, 12).max_pending_tokens == 3
    assert plan_exits("self_speculative", both, EXITS, 12).max_pending_tokens == 4
    for mode, wrong, own in (
        ("early_exit", "num_draft_tokens", "max_pending_tokens"),
        ("self_speculative", "max_pending_tokens", "num_draft_tokens"),
    ):
        assert unused_cap(mode, **{wrong: 2, own: None}) == f"{wrong} = 2 has no effect in mode '{mode}'; use {own}"
        assert unused_cap(mode, **{wrong: 2, own: 3}) is None, "a policy for several modes"
        assert plan_exits(mode, ExitPolicy(0.5, **{wrong: 2}), EXITS, 12).max_pending_tokens is None
    assert unused_cap("static_depth", 2, 3) is None
    with pytest.raises(ValueError, match="num_draft_tokens = -1 must be a whole number"):
        ExitPolicy(0.5, num_draft_tokens=-1)


def test_a_call_with_the_cap_of_another_mode_alone_is_refused_and_a_session_is_not():
    policy = ExitPolicy(0.5, num_draft_tokens=2)
    engine = EarlyExitEngine(ScriptedModel(12, EXITS, lambda *_: (1, 0.9)))
    with pytest.raises(ValueError, match="num_draft_tokens = 2 has no effect in mode 'early_exit'"):
        engine.generate([[1]], max_new_tokens=1, policy=policy)
    with pytest.raises(ValueError, match="num_draft_tokens = 2 has no effect in mode 'early_exit'"):
        engine.score([[1, 2]], 1, policy=policy)
    engine.start([], policy=policy, num_slots=1, max_length=8)
