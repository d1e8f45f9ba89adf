# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The cost rule: its estimate against a naive simulation, its decisions on scripted models and scripted tables."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest

from nemo_ee.generation.cost_rule import CostRule, CostTable, measure_costs
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy, plan_exits
from nemo_ee.generation.request import Request
from tests.helpers.stub_models import ScriptedModel, TinyTransformer, exit_points
from tests.unit.generation.test_against_reference import ALL_KINDS

LAYERS = 6
EXITS = exit_points(("a", 2, 3), ("b", 4, 8))
POLICY = ExitPolicy(0.5)
PLAN = plan_exits("early_exit", POLICY, EXITS, LAYERS)
FREE = dict.fromkeys(("a", "b"), ((1, 0.0),))


def table(num_sequences=1, *, per_row=0.0, exit_seconds=0.0):
    """A half layer takes 1 s and `per_row` for each row of a sequence beyond the first, whatever their number."""
    rows = ((1, 1.0), (2, 1.0 + per_row), (8, 1.0 + 7 * per_row))
    exits = {name: ((1, exit_seconds), (2, exit_seconds)) for name in ("a", "b")}
    return CostTable(num_sequences, ((1, rows), (2, rows)), exits, ((1, 0.0),))


def model(when=lambda *_: True):
    """Exits say the final exit's token and are sure where `when(name, token, position)`."""

    def script(name, token, position):
        return (token * 7 + position * 3 + 1) % 50, 0.9 if name is None or when(name, token, position) else 0.1

    return ScriptedModel(LAYERS, EXITS, script, max_positions=128)


def decode(cost_rule, prompts, *, num_slots=None, length=20, mode="early_exit", when=lambda *_: True, policy=POLICY):
    """Events by sequence, and stats."""
    session = EarlyExitEngine(model(when), cost_rule=cost_rule).start(
        [Request(tuple(prompt), length) for prompt in prompts], mode=mode, policy=policy, num_slots=num_slots
    )
    events = []
    while not session.finished:
        events += session.step()
    return [[own for own in events if own.sequence == i] for i in range(len(prompts))], session.stats(events)


def simulate(costs, shares, halves, passes=20000):
    """Seconds of a forward pass in which each of B sequences goes past each stop with these chances, with what is
    pending of its own; the rows of those that go are spread evenly."""
    rng, count, total = random.Random(1), costs.num_sequences, 0.0
    waiting = [[0] * count for _ in halves]  # rows of each sequence, before each segment
    for _ in range(passes):
        going = [rng.random() for _ in range(count)]
        for rows, share, size in zip(waiting, shares, halves, strict=True):
            passing = [index for index, own in enumerate(going) if own < share]
            for index in range(count):
                rows[index] += 1
            if passing:
                each = sum(rows[index] for index in passing) / len(passing)
                total += size * costs.of_rows(each, costs.context)(len(passing))
            for index in passing:
                rows[index] = 0
    return total / passes


GRID = ((1, ((1, 1.0), (16, 3.0))), (4, ((1, 2.0), (16, 9.0))))  # caches cost more than rows do


@pytest.mark.parametrize(
    "costs",
    [table(), table(per_row=0.3), table(3), table(3, per_row=0.8), CostTable(4, GRID, FREE, ((1, 0.0),))],
    ids=["one", "one-by-row", "three", "three-by-row", "four-by-cache"],
)
def test_estimate_is_that_of_a_simulation(costs):
    """Within 2 % of the time at which the rule turns; statistical."""
    simulated = simulate(costs, (1.0, 0.5, 0.2), (3, 5, 4))
    left = {"a": 50, "b": 30, None: 20}
    full = 12 * costs.of_rows(1, costs.context)(costs.num_sequences)
    for factor, expected in ((1.02, True), (0.98, False)):
        emitted = 100 * simulated * factor / full
        assert CostRule(costs).pays(PLAN, LAYERS, left, emitted, costs.context) == expected


def test_seconds_between_and_beyond_what_was_measured():
    costs = CostTable(1, ((1, ((1, 1.0), (2, 3.0), (4, 4.0))),), FREE, ((1, 0.0),))
    assert [costs.of_rows(rows, 96)(1) for rows in (1, 1.5, 2, 3, 4, 6)] == [1.0, 2.0, 3.0, 3.5, 4.0, 5.0]
    assert CostTable(1, ((1, ((1, 2.0),)),), FREE, ((1, 0.0),)).of_rows(3, 96)(1) == 6.0
    grid = CostTable(4, GRID, FREE, ((1, 0.0),), context=100, attention=0.01)
    found = [grid.of_rows(rows, 100)(count) for count, rows in ((1, 1), (4, 16), (2, 1), (2, 8.5))]
    assert found == pytest.approx([1, 9, 4 / 3, 2 + 7 / 6])
    assert grid.of_rows(1, 150)(4) == pytest.approx(2.0 + 4 * 50 * 0.01)


def test_exits_that_save_caches_pay_in_a_batch():
    """Four sequences of which one in four goes deep: one cache is read instead of four, for as many rows."""
    left = {"a": 75, None: 25}
    assert CostRule(CostTable(4, GRID, FREE, ((1, 0.0),))).pays(PLAN, LAYERS, left, 100, 96)
    flat = tuple((count, ((1, float(count)), (16, 16.0 * count))) for count in (1, 4))  # rows cost all there is
    asked = {name: ((1, 0.1), (4, 0.4)) for name in ("a", "b")}
    assert not CostRule(CostTable(4, flat, asked, ((1, 0.0),))).pays(PLAN, LAYERS, left, 100, 96), "control"


def test_a_verification_reads_its_drafts_in_one_product():
    """One token in four goes deep; the final exit on four rows takes as long as on one, a fifth of a pass."""
    costs = CostTable(1, ((1, ((1, 1.0), (16, 1.0))),), FREE, ((1, 3.0), (8, 3.0)))
    plan, left = plan_exits("self_speculative", POLICY, EXITS, LAYERS), {"a": 75, None: 25}
    # Three half layers for every token, the other nine and the final exit for every fourth: 6 s of 15.
    assert CostRule(costs).pays(plan, LAYERS, left, 100 * 6.1 / 15, 96)
    assert not CostRule(costs).pays(plan, LAYERS, left, 100 * 5.9 / 15, 96)


def test_a_verdict_comes_after_the_last_trial_at_the_latest():
    rule = CostRule(table(), trial_tokens=16)
    assert [rule.next_after(run) for run in (0, 16, 40, 50, 63, 70)] == [16, 32, 56, 64, 64, 86]


@pytest.mark.parametrize("count", [1, 64, 3000])
def test_hundreds_of_slots(count):
    costs = dataclasses.replace(table(), num_sequences=count)
    assert CostRule(costs).pays(PLAN, LAYERS, {"a": 50, None: 50}, 100, 96)


def test_a_table_can_be_stored():
    costs = CostTable(4, GRID, {"a": ((1, 0.5), (4, 1.0))}, ((1, 0.25),), 0.125, 64, 1e-6)
    assert CostTable.from_mapping(json.loads(json.dumps(dataclasses.asdict(costs)))) == costs
    good = dataclasses.asdict(costs)
    wrongs = ({"final": [[2, 0.1], [1, 0.1]]}, {"final": []}, {"final": 3}, {"more": 1}, {"exits": {"a": [[2, 1.0]]}})
    for wrong in ({}, *({**good, **change} for change in wrongs)):
        with pytest.raises(ValueError, match="not a table of costs"):
            CostTable.from_mapping(wrong)


def test_falls_back_where_asking_is_dear_and_not_where_it_is_free():
    _, stats = decode(CostRule(table(exit_seconds=1.0), trial_tokens=5), [[1, 2]], when=lambda *_: False)
    assert stats.num_fallbacks == 1 and stats.evaluations["a"] == 5, "nothing is saved where nobody leaves"
    (events,), stats = decode(CostRule(table(exit_seconds=10.0), trial_tokens=5), [[1, 2]])
    # The first comes with the prompt, then the trial's, then nobody leaves.
    assert [event.exit for event in events] == [None] + ["a"] * 5 + [None] * 14
    assert stats.num_fallbacks == 1 and stats.evaluations["a"] == 5
    # Half layers of every position but the newest, which nobody needs: what waited was taken along, once.
    assert stats.computed_layers == LAYERS * 21
    (events,), stats = decode(CostRule(table(), trial_tokens=5), [[1, 2]])
    assert [event.exit for event in events] == [None] + ["a"] * 19 and stats.num_fallbacks == 0, "control"


def test_what_is_not_clear_is_decided_later():
    """A token with exits takes 1 % more than the 12 seconds of full depth, 10 % more, or as long."""
    verdicts = {}
    for exit_seconds in (0.12, 1.2, 0.0):
        rule = CostRule(table(exit_seconds=exit_seconds / 2), trial_tokens=5)
        verdicts[exit_seconds] = [rule.verdict(PLAN, LAYERS, {None: run}, run, 96) for run in (4, 5, 19, 20)]
    assert verdicts == {
        0.12: [None, None, None, False],
        1.2: [None, False, False, False],
        0.0: [None, None, None, True],
    }


def test_a_sequence_that_has_fallen_back_runs_in_one_piece():
    engine = EarlyExitEngine(model(), cost_rule=CostRule(table(exit_seconds=10.0), trial_tokens=3))
    engine.generate([[1, 2]], max_new_tokens=10, policy=POLICY)
    pieces = engine.model.cache.rows_per_run
    assert pieces[-5:] == [(0, 12, 1)] * 5 and (0, 12, 1) not in pieces[:-5]


def test_a_batch_gives_each_what_it_gets_alone_in_as_many_places():
    """Sure of some tokens, so that some sequences fall back and others do not."""

    def some(name, token, position):
        return random.Random(f"{token}/{position}").random() < 0.5

    rule = CostRule(table(3, exit_seconds=1.2), trial_tokens=4)
    prompts = [[1, 2], [5], [9, 4, 7]]
    together, stats = decode(rule, prompts, when=some)
    alone = [decode(rule, [prompt], num_slots=3, when=some) for prompt in prompts]
    assert [[own.exit for own in events] for events in together] == [
        [own.exit for own in events] for (events,), _ in alone
    ]
    assert stats.num_fallbacks == sum(own.num_fallbacks for _, own in alone)
    assert 0 < stats.num_fallbacks < 3, "control: both happen"


def test_self_speculation_stops_drafting_and_its_text_stays():
    prompts = [[1, 2], [7]]
    full, _ = decode("none", prompts, mode="full")
    drafted, stats = decode(
        CostRule(table(2, per_row=1.0, exit_seconds=3.0), trial_tokens=5), prompts, mode="self_speculative"
    )
    assert [[own.token for own in events] for events in drafted] == [[own.token for own in events] for events in full]
    assert stats.num_fallbacks == 2 and 0 < stats.drafted <= 10
    _, free = decode("none", prompts, mode="self_speculative")
    assert free.drafted > 20, "control"


@pytest.mark.parametrize("cap", [None, 8, 11, 15, 32])
def test_drafting_that_pays_goes_on(cap):
    """Every draft stays. Exit b alone saves a third of the half layers, less a check for every `cap` tokens."""
    free, dear = (CostRule(table(exit_seconds=exit_seconds)) for exit_seconds in (0.0, 6.0))
    for active, rule, fallbacks in ((None, free, 0), (("b",), free, 0), (("b",), dear, 1)):
        policy = ExitPolicy(0.5, active=active, num_draft_tokens=cap)
        _, stats = decode(rule, [[1, 2]], length=100, mode="self_speculative", policy=policy)
        assert stats.num_fallbacks == fallbacks and stats.accepted == stats.drafted, (active, "the last: control")
        assert stats.drafted > 80 if not fallbacks else stats.drafted <= 16


def test_drafts_that_nobody_checks_are_checked_for_the_verdict():
    """Exits are wrong and sure, without a cap: after the trial's five drafts comes a check that keeps none of them."""
    wrong = model()
    script = wrong.script
    wrong.script = lambda name, *at: script(name, *at) if name is None else (49, 0.9)
    call = {"max_new_tokens": 60, "mode": "self_speculative", "policy": POLICY}
    result = EarlyExitEngine(wrong, cost_rule=CostRule(table(), trial_tokens=5)).generate([[1, 2]], **call)
    assert (result.stats.num_fallbacks, result.stats.drafted, result.stats.accepted) == (1, 5, 0)
    assert result.tokens == EarlyExitEngine(wrong).generate([[1, 2]], max_new_tokens=60, mode="full").tokens


def test_a_check_that_feeds_no_token_counts_none():
    """A draft that would end the sequence is checked at once; `ends` takes it back for a draft that stays."""
    seen = []

    def ends(tokens):
        seen.append(len(tokens))
        return seen.count(len(tokens)) == 1 and len(tokens) % 4 == 0

    rule = CostRule(table(), trial_tokens=10**6)
    session = EarlyExitEngine(model(), cost_rule=rule).start(
        [Request((1, 2), 30, ends=ends)], mode="self_speculative", policy=POLICY
    )
    (sequence,) = session._running.values()
    while not session.finished:
        session.step()
    assert session.stats([]).num_verifications > 5, "control: there were such checks"
    assert sum(sequence.left.values()) == len(sequence.answer) - 1


def test_measured_table_of_a_real_model():
    """With exits of every architecture, one of which attends; times themselves are not judged."""
    tiny = TinyTransformer(ALL_KINDS)
    names = [point.name for point in tiny.exits]
    costs = measure_costs(tiny, names, 2)
    assert costs.num_sequences == 2 and set(costs.exits) == set(names)
    points = [*costs.exits.values(), costs.final, *(own for _, own in costs.half_layer)]
    assert all(seconds > 0 for own in points for _, seconds in own) and costs.attention >= 0
    assert [count for count, _ in costs.half_layer] == [1, 2] and [count for count, _ in costs.final] == [1, 2, 4, 8]


def test_refusals():
    with pytest.raises(ValueError, match="cost_rule = 'quick' is unknown; use one of none, fallback"):
        EarlyExitEngine(model(), cost_rule="quick")
    with pytest.raises(ValueError, match="num_sequences = 2, the session has 1 slots"):
        decode(CostRule(table(2)), [[1]])
    for trial_tokens in (0, 1.5):
        with pytest.raises(ValueError, match="trial_tokens = .* must be a whole number from 1"):
            decode(CostRule(table(), trial_tokens), [[1]])
    staged = model()
    staged.run_pending_after = 8
    with pytest.raises(ValueError, match="several ranks; use 'none'"):
        EarlyExitEngine(staged, cost_rule="fallback").generate([[1]], max_new_tokens=2, policy=POLICY)


def test_an_explicit_table_has_every_exit_that_is_asked():
    """Refused before anything runs, when a session starts and when a request joins it."""
    only_a = dataclasses.replace(table(), exits={"a": ((1, 0.0),)})
    engine = EarlyExitEngine(model(), cost_rule=CostRule(only_a, trial_tokens=3))
    with pytest.raises(ValueError, match="no seconds of evaluating exit b, only of a"):
        engine.start([Request((1, 2), 9)], policy=POLICY)
    assert engine.model.cache is None
    with pytest.raises(ValueError, match="no seconds of evaluating exit b"):
        engine.start([], policy=ExitPolicy(0.5, active=("a",)), exits=("a", "b"), num_slots=1)
    a, b = (ExitPolicy(0.5, active=(name,)) for name in "ab")
    requests = [Request((1, 2), 9, mode="static_depth", policy=b), Request((1, 2), 9)]
    both = EarlyExitEngine(model(), cost_rule=CostRule(dataclasses.replace(only_a, num_sequences=2)))
    session = both.start(requests, policy=a)
    session.cancel(0)
    with pytest.raises(ValueError, match="no seconds of evaluating exit b"):
        session.add(Request((1, 2), 5, policy=b))
    session.add(Request((1, 2), 5, mode="static_depth", policy=b))


def test_without_exits_to_ask_there_is_no_rule(monkeypatch):
    """A table that nothing would look at is neither judged nor measured."""
    measured = []
    monkeypatch.setattr("nemo_ee.generation.engine.measure_costs", lambda *how: measured.append(how) or table())
    for rule in (CostRule(table(5)), "fallback"):
        engine = EarlyExitEngine(model(), cost_rule=rule)
        for mode, policy in (("full", None), ("static_depth", ExitPolicy(0.5, active=("a",)))):
            engine.generate([[1, 2]], max_new_tokens=20, mode=mode, policy=policy)
    assert not measured
    engine.generate([[1, 2]], max_new_tokens=20, policy=POLICY)
    assert len(measured) == 1, "control"
