# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Drafts by value: the decisions against brute force and a closed form, decoding on scripted models and tables."""

from __future__ import annotations

import dataclasses
import random
from functools import partial

import pytest
import torch

from nemo_ee.generation import draft_value, engine
from nemo_ee.generation.cost_rule import CostRule, CostTable
from nemo_ee.generation.draft_value import DraftCosts, DraftValue, decide
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy, plan_exits
from nemo_ee.generation.request import Request
from nemo_ee.generation.sampling import SamplingParams
from tests.helpers.stub_models import ScriptedModel, TinyTransformer, exit_points
from tests.unit.generation.test_against_reference import ALL_KINDS

LAYERS, CELLS = 6, draft_value._CELLS
EXITS = exit_points(("a", 2, 3), ("b", 4, 8))
VALUE = ExitPolicy(1.0, draft_rule="value")  # by its threshold no token would leave
PLAN = plan_exits("self_speculative", VALUE, EXITS, LAYERS)


def table(names=("a", "b"), *, exit_seconds=0.1, row=0.05):
    """A half layer takes 1 s, and `row` more for each further row."""
    rows = ((1, 1.0), (8, 1.0 + 7 * row))
    return CostTable(1, ((1, rows),), dict.fromkeys(names, ((1, exit_seconds),)), ((1, 0.5), (8, 0.7)), 0.25)


def test_costs():
    costs = DraftCosts.of(table(), PLAN, LAYERS, 96)
    assert costs.step == 0.25
    assert costs.segments == pytest.approx([0.25 + 3 + 0.1, 0.25 + 5 + 0.1])
    assert costs.ends == pytest.approx([0.25 + 12 + 0.5, 0.25 + 9 + 0.5, 0.25 + 4 + 0.5])
    assert costs.rows == pytest.approx([9 * 0.05 + 0.2 / 7, 4 * 0.05 + 0.2 / 7])
    longer = dataclasses.replace(table(), attention=0.01)
    assert DraftCosts.of(longer, PLAN, LAYERS, 196).ends[0] == pytest.approx(0.75 + 12 * 2.0)
    # Two exits at one stop: the second one costs its evaluation alone.
    same = plan_exits("self_speculative", VALUE, exit_points(("a", 2, 4), ("b", 2, 4)), LAYERS)
    assert DraftCosts.of(table(), same, LAYERS, 96).segments == pytest.approx([0.25 + 4 + 0.1, 0.1])


def best_gain(acceptance, following, costs, price, survival, drafts):
    """What the rest of a cycle gains, by trying every decision at every outcome."""
    if drafts == 0:
        return -price * (costs.ends[0] + costs.step)

    def reach(exit, before):
        to_the_end = -price * costs.ends[exit]
        if exit == len(acceptance):
            return to_the_end
        evaluated = -price * costs.segments[exit]
        for own, chance in enumerate(following[exit][before]):
            after = survival * acceptance[exit][own]
            left = after - price * costs.rows[exit]
            left += best_gain(acceptance, following, costs, price, after, drafts - 1)
            evaluated += chance * max(left, reach(exit + 1, own))
        return max(evaluated, to_the_end)

    return reach(0, 0) - price * costs.step


@pytest.mark.parametrize("seed", range(12))
def test_decisions_are_those_of_brute_force(seed):
    """Acceptances of 0, 1/2 and 1 keep S on the cells for two drafts, so the two agree to the last digit."""
    rng = random.Random(seed)
    acceptance = [[rng.choice((0.0, 0.5, 1.0)) for _ in range(3)] for _ in range(2)]
    following = []
    for exit in range(2):
        rows = [[rng.random() for _ in range(3)] for _ in range(3)]
        rows = [[own / sum(row) for own in row] for row in (rows[:1] * 3 if exit == 0 else rows)]
        following.append(rows)
    costs = DraftCosts(0.3, [rng.uniform(1, 4), rng.uniform(1, 4)], [12.0, 8.0, rng.uniform(3, 6)], [0.6, 0.3])
    tensors = [torch.tensor(own, dtype=torch.float64) for own in (acceptance, following)]
    for price in (0.02, 0.1, 0.2, 0.4):
        values, decisions = decide(*tensors, costs, torch.tensor([price, 2 * price], dtype=torch.float64), 2)
        for value, own in zip(values.tolist(), (price, 2 * price), strict=True):
            assert value == pytest.approx(1 + best_gain(acceptance, following, costs, own, 1.0, 2), abs=1e-12)
        # The first decision of a cycle, at S = 1: leave, or the best of what follows.
        for own in range(3):
            after = acceptance[1][own]
            left = after - price * costs.rows[1] + best_gain(acceptance, following, costs, price, after, 1)
            if abs(left + price * costs.ends[2]) > 1e-9:
                assert decisions.leaves[1][own][CELLS] == (left > -price * costs.ends[2])


@pytest.mark.parametrize("draft_seconds", [1.0, 4.0, 6.4, 7.0])
def test_the_price_is_the_rate_of_the_best_length(draft_seconds):
    """One exit whose drafts are accepted half of the time: k drafts and a check give 1 + 1/2 + ... tokens."""
    costs = DraftCosts(0.0, [draft_seconds], [12.0, 12.1 - draft_seconds], [0.25])
    acceptance, following = torch.tensor([[0.5]], dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)
    rates = [sum(0.5**i for i in range(k + 1)) / (k * (draft_seconds + 0.25) + 12) for k in range(3)]
    value, decisions = decide(acceptance, following, costs, torch.tensor([max(rates)], dtype=torch.float64), 2)
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert decisions.evaluates[0][0][CELLS] == (max(rates) > rates[0])
    value, _ = decide(acceptance, following, costs, torch.tensor([1.01 * max(rates)], dtype=torch.float64), 2)
    assert value.item() < 0, "control"


def truth(token, position):
    return (token * 7 + position * 3 + 1) % 50


def scripted(agrees, sure=lambda *_: 0.9, exits=EXITS):
    """Exits say the final exit's token where `agrees(name, token, position)`, with the confidence of `sure`."""

    def script(name, token, position):
        right = name is None or agrees(name, token, position)
        token_of = truth(token, position) if right else (truth(token, position) + 1) % 50
        return token_of, 0.9 if name is None else sure(name, token, position)

    return ScriptedModel(LAYERS, exits, script, max_positions=256)


def decode(model, prompts, policy=VALUE, *, length=100, costs=None, mode="self_speculative", sampling=None, **options):
    """Events by sequence, and stats."""
    names = tuple(point.name for point in model.exits)
    session = EarlyExitEngine(model, cost_tables={(1, names): costs or table(names)}, **options).start(
        [Request(tuple(own), length, sampling or SamplingParams()) for own in prompts], mode=mode, policy=policy
    )
    events = []
    while not session.finished:
        events += session.step()
    return [[own for own in events if own.sequence == i] for i in range(len(prompts))], session.stats(events)


def tokens_of(events):
    return [event.token for event in events]


CASES = {
    "always": lambda *_: True,
    "never": lambda *_: False,
    "deeper": lambda name, *_: name == "b",
    "sometimes": lambda name, token, position: (token + position) % 3 > 0,
}


@pytest.mark.parametrize("case", CASES)
def test_greedy_output_is_the_full_models(case):
    model = scripted(CASES[case])
    (full,), _ = decode(model, [[1, 2]], None, mode="full")
    (drafted,), _ = decode(model, [[1, 2]])
    assert tokens_of(drafted) == tokens_of(full) and len(full) == 100


def test_it_drafts_where_drafts_are_accepted_and_not_elsewhere():
    _, always = decode(scripted(CASES["always"]), [[1, 2]])
    assert always.accepted == always.drafted > 70 and always.mean_accepted_length > 4
    _, deeper = decode(scripted(CASES["deeper"]), [[1, 2]])
    assert deeper.tokens_per_exit["b"] > 60 and deeper.tokens_per_exit["a"] < 5, "it learns which exit is right"
    _, never = decode(scripted(CASES["never"]), [[1, 2]])
    assert never.drafted < 30 and sum(never.evaluations[name] for name in "ab") < 90
    assert never.computed_layers < 1.3 * 101 * LAYERS


def test_it_follows_confidence():
    """Where the exit is right exactly if its confidence is high, nearly all drafts are accepted."""
    right = CASES["sometimes"]
    model = scripted(right, lambda *key: 0.9 if right(*key) else 0.3)
    _, stats = decode(model, [[1, 2]])
    assert stats.acceptance_rate > 0.9 and stats.accepted > 40
    _, blind = decode(scripted(right), [[1, 2]])
    assert blind.acceptance_rate < stats.acceptance_rate - 0.1, "control: one confidence for all"


def test_exits_that_cost_more_than_they_save_are_not_used():
    _, stats = decode(scripted(CASES["always"]), [[1, 2]], costs=table(exit_seconds=20.0))
    # No decision evaluates one; a token at a trial does.
    assert stats.drafted <= 1 and 0 < sum(stats.evaluations[name] for name in "ab") <= 4
    _, free = decode(scripted(CASES["always"]), [[1, 2]])
    assert free.drafted > 70, "control"


def test_the_cap_holds():
    model = scripted(CASES["always"])
    (events,), stats = decode(model, [[1, 2]], dataclasses.replace(VALUE, num_draft_tokens=2))
    assert 1 < stats.mean_accepted_length <= 2
    (full,), stats = decode(model, [[1, 2]], dataclasses.replace(VALUE, num_draft_tokens=0))
    assert stats.drafted == 0 and tokens_of(full) == tokens_of(events)


def test_a_batch_gives_each_sequence_what_it_gets_alone():
    model = scripted(CASES["sometimes"], lambda name, token, position: (token * position % 10) / 10)
    prompts = [[1, 2], [5], [7, 7, 7], [9]]
    together, _ = decode(model, prompts, length=60)
    for prompt, own in zip(prompts, together, strict=True):
        (alone,), _ = decode(model, [prompt], length=60)
        assert [dataclasses.replace(event, sequence=0) for event in own] == alone
    assert len({tuple(event.exit for event in own) for own in together}) == len(prompts), "they do differ"


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(repetition_penalty=1.3)], ids=["plain", "penalty"]
)
def test_with_exits_of_every_kind(sampling, monkeypatch):
    """A model with attention: a `layer` exit must write its keys and values where it is not evaluated, too."""
    monkeypatch.setattr(draft_value, "_MIDDLES", (0.9,) * 9)  # random weights are never confident
    model = TinyTransformer(ALL_KINDS)
    prompts = [[1, 2, 3], [4]]
    costs = table(tuple(point.name for point in model.exits))
    full, _ = decode(model, prompts, None, mode="full", length=40, sampling=sampling)
    drafted, stats = decode(model, prompts, length=40, costs=costs, sampling=sampling)
    assert [tokens_of(own) for own in drafted] == [tokens_of(own) for own in full]
    assert stats.num_verifications > 0


class WithoutKeys(ScriptedModel):
    """Some exits have no keys and values, so nobody has to write any."""

    def exit_logits(self, name, hidden, positions, cache):
        if name not in self.exits_with_kv:
            cache.exit_kv = {**cache.exit_kv, name: {(0, position) for position in range(self.max_positions)}}
        return super().exit_logits(name, hidden, positions, cache)

    def _write_kv(self, name, positions, cache):
        if name in self.exits_with_kv:
            super()._write_kv(name, positions, cache)


def test_nothing_halts_where_nothing_is_evaluated():
    """A check after drafts at a runs straight to the end, unless rows have to write keys at b."""
    policy, prompts = ExitPolicy(0.5, num_draft_tokens=2), [[1, 2]]
    halting = scripted(CASES["always"])
    expected, _ = decode(halting, prompts, policy, length=20)
    assert (3, 8, 3) in halting.cache.rows_per_run and (3, 12, 3) not in halting.cache.rows_per_run
    for with_keys, segments in (((), [(3, 12, 3)]), (("b",), [(3, 8, 3), (8, 12, 3)]), (("a",), [(3, 12, 3)])):
        model = WithoutKeys(LAYERS, EXITS, halting.script, max_positions=256)
        model.exits_with_kv = with_keys
        found, _ = decode(model, prompts, policy, length=20)
        assert found == expected
        assert {run for run in model.cache.rows_per_run if run[2] == 3} == {*segments}


def test_costs_are_measured_when_they_are_needed(monkeypatch):
    measured = []

    def measure(model, exits, num_sequences):
        measured.append((exits, num_sequences))
        return table(exits)

    monkeypatch.setattr(engine, "measure_costs", measure)
    own = EarlyExitEngine(scripted(CASES["always"]))
    start = partial(own.start, [], num_slots=2, max_length=32, mode="self_speculative", policy=ExitPolicy(0.5))
    session = start()
    session.add(Request((1,), 4))
    assert measured == []
    for _ in range(2):
        session.add(Request((1,), 4, policy=VALUE))
        assert measured == [(("a", "b"), 1)], "once, of one sequence"
        while not session.finished:
            session.step()
    start(policy=dataclasses.replace(VALUE, active=("a",)))
    assert measured[1:] == [(("a",), 1)], "at the start, where the session's own policy needs them"


def test_costs_are_those_of_the_sequence_s_own_exits(monkeypatch):
    """Also beside a sequence with other exits, so that it drafts what it drafts alone."""
    measured = []
    monkeypatch.setattr(engine, "measure_costs", lambda _, exits, count: measured.append(exits) or table(exits))
    policies = [dataclasses.replace(VALUE, active=(name,)) for name in "ab"]
    requests = [Request((1,), 4, mode="self_speculative", policy=own) for own in policies]
    EarlyExitEngine(scripted(CASES["always"])).start(requests, mode="full")
    assert measured == [("a",), ("b",)]


def test_thresholds_are_checked_and_not_needed():
    with pytest.raises(ValueError, match="thresholds names the exit 'c', which the model does not have"):
        plan_exits("self_speculative", dataclasses.replace(VALUE, thresholds={"c": 0.5}), EXITS, LAYERS)
    plan = plan_exits("self_speculative", dataclasses.replace(VALUE, thresholds={"a": 0.5}), EXITS, LAYERS)
    assert [(exit.point.name, exit.threshold) for exit in plan.exits] == [("a", 0.0), ("b", 0.0)]


def test_a_model_that_cannot_be_timed_refuses_the_request_alone(monkeypatch):
    model = scripted(CASES["always"])
    model.run_pending_after = 8  # as on several ranks
    session = EarlyExitEngine(model).start([], num_slots=1, max_length=32, policy=ExitPolicy(0.5))
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot time a model on several ranks; use 'none' and 'fixed'"):
            session.add(Request((1,), 4, mode="self_speculative", policy=VALUE))
        assert session.finished and session.num_free_slots == 1


def test_the_cost_rule_leaves_them_alone():
    rule = CostRule(table(exit_seconds=50.0), trial_tokens=4)
    _, stats = decode(scripted(CASES["always"]), [[1, 2]], cost_rule=rule)
    assert stats.num_fallbacks == 0 and stats.drafted > 70
    _, fixed = decode(scripted(CASES["always"]), [[1, 2]], ExitPolicy(0.5), cost_rule=rule)
    assert fixed.num_fallbacks == 1, "control"


def test_counts_ignore_what_follows_a_rejected_draft():
    own = DraftValue(table(), PLAN, LAYERS, 4)
    right, wrong = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    before = [list(row) for row in own._drafted]
    for _ in range(3):
        own.start_token()
        own.leaves("a", 0.99, wrong)
    own.learn(torch.stack([right, right]), [True, False], 6)
    assert [after - old for after, old in zip(own._drafted[0], before[0], strict=True)] == [0] * 8 + [2]
    assert own._drafted[1] == before[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"draft_rule": "worth"}, "draft_rule = 'worth' is unknown, use one of fixed, value"),
        ({"draft_rule": "value", "criterion": "entropy"}, "needs the head's confidence .*'entropy' is not"),
        ({"draft_rule": "value", "criterion": "probe"}, "needs the head's confidence .*'probe' is not"),
    ],
)
def test_problems_of_the_setting(changes, words):
    with pytest.raises(ValueError, match=words):
        ExitPolicy(0.5, **changes)


def test_other_modes_do_not_use_it():
    assert plan_exits("early_exit", dataclasses.replace(VALUE, thresholds=0.5), EXITS, LAYERS).by_value is False
    assert plan_exits("early_exit", VALUE, EXITS, LAYERS).exits == ()
    assert [exit.point.name for exit in PLAN.exits] == ["a", "b"] and PLAN.by_value
