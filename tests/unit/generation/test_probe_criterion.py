# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""`criterion: probe` in the engine. test_against_reference.py compares it with the naive decoder."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nemo_ee.exits.config import ExitConfig
from nemo_ee.exits.probe import ExitProbe
from nemo_ee.generation.cost_rule import CostRule, CostTable
from nemo_ee.generation.decoding_model import TokenPositions, with_probes
from nemo_ee.generation.engine import EarlyExitEngine, Request
from nemo_ee.generation.exit_trace import TracePass
from nemo_ee.generation.policy import ExitPolicy, plan_exits
from tests.helpers.stub_models import ScriptedModel, TinyTransformer, exit_points, random_probes

POLICY = ExitPolicy(0.5, criterion="probe")


def tiny():
    exits = [ExitConfig(name, layer, kind, "random", "own") for name, layer, kind in
             (("a", 1, "mlp"), ("b", 2, "layer"), ("c", 3, "norm"))]  # fmt: skip
    model = TinyTransformer(exits, seed=3)
    model.exits = random_probes(model.exits, model.hidden_size, seed=3)
    return model


def test_the_head_runs_only_for_tokens_that_leave():
    model = tiny()
    result = EarlyExitEngine(model).generate([[1, 2, 3], [4]], max_new_tokens=20, policy=POLICY)
    left = [event.exit for event in result.events]
    assert {"a", "b", "c"} & set(left), "no token left early: the test shows nothing"
    for name in "abc":
        assert result.stats.evaluations[name] == left.count(name)
    # The control: by the largest probability every exit is evaluated at every token that reaches it.
    by_head = EarlyExitEngine(model).generate([[1, 2, 3], [4]], max_new_tokens=20, policy=ExitPolicy(0.5))
    assert by_head.stats.evaluations["a"] == 2 * 19 > [event.exit for event in by_head.events].count("a")


def test_rows_with_other_criteria_in_one_batch():
    model, prompts = tiny(), ([1, 2, 3], [4], [9, 9])
    policies = (POLICY, ExitPolicy(0.4), ExitPolicy(1.5, criterion="entropy"))
    engine = EarlyExitEngine(model)
    alone = [engine.generate([p], max_new_tokens=15, policy=own) for p, own in zip(prompts, policies, strict=True)]
    requests = [Request(tuple(p), 15, policy=own, mode="early_exit") for p, own in zip(prompts, policies, strict=True)]
    session = engine.start(requests, mode="full")
    events = []
    while not session.finished:
        events += session.step()
    for index, one in enumerate(alone):
        ours = [event for event in events if event.sequence == index]
        assert [(e.token, e.exit) for e in ours] == [(e.token, e.exit) for e in one.events]
        assert [e.confidence for e in ours] == pytest.approx([e.confidence for e in one.events], abs=1e-6)


def test_drafts_by_a_probe_are_lossless():
    model = tiny()
    full = EarlyExitEngine(model).generate([[1, 2, 3]], max_new_tokens=25, mode="full")
    ours = EarlyExitEngine(model).generate([[1, 2, 3]], max_new_tokens=25, mode="self_speculative", policy=POLICY)
    assert ours.tokens == full.tokens and ours.stats.drafted > 0


def test_traces_and_scores_have_the_probes_confidences():
    model, text = tiny(), [1, 2, 3, 7, 8, 9, 10]
    trace = TracePass(model, None, "probe").run([text], [2])
    cache = model.new_cache(1, 6, ("a", "b", "c"))
    rows = TokenPositions.of({0: range(6)})
    hidden, depth = model.embed(torch.tensor(text[:-1]), rows), 0
    for index, point in enumerate(model.exits):
        hidden, depth = model.run(hidden, rows, depth, point.stop, cache), point.stop
        torch.testing.assert_close(trace.confidences[0, :, index], point.probe(hidden[1:]))
    scored = EarlyExitEngine(model).score([text], 2, policy=POLICY)
    for event in scored.events[1:]:  # the first token is the final exit's
        if event.exit is not None:
            index = [point.name for point in model.exits].index(event.exit)
            assert event.confidence == pytest.approx(float(trace.confidences[0, event.position - 2, index]), abs=1e-6)


@pytest.mark.parametrize("policy", [POLICY, ExitPolicy(0.5)])
def test_scoring_evaluates_what_decoding_evaluates(policy):
    engine = EarlyExitEngine(tiny())
    made = engine.generate([[1, 2, 3]], max_new_tokens=20, policy=policy)
    scored = engine.score([[1, 2, 3, *made.tokens[0]]], 3, policy=policy)
    assert scored.stats.evaluations == made.stats.evaluations
    assert scored.exits[0] == tuple(event.exit for event in made.events)


def test_one_exit_alone_reports_the_largest_probability():
    engine, policy = EarlyExitEngine(tiny()), ExitPolicy(0.0, criterion="probe", active=("b",))
    made = engine.generate([[1, 2, 3]], max_new_tokens=6, mode="static_depth", policy=policy)
    scored = engine.score([[1, 2, 3, *made.tokens[0]]], 3, mode="static_depth", policy=policy)
    ours = [event.confidence for event in made.events]
    assert ours == pytest.approx([event.confidence for event in scored.events], abs=1e-5)
    by_head = dataclasses.replace(policy, criterion="max_probability")
    theirs = engine.generate([[1, 2, 3]], max_new_tokens=6, mode="static_depth", policy=by_head)
    assert ours == [event.confidence for event in theirs.events]


def test_an_exit_without_probe_is_refused():
    model = tiny()
    model.exits = with_probes(model.exits, {"a": model.exits[0].probe})
    with pytest.raises(ValueError, match="criterion = 'probe': b, c have no probe; fit probes with .*_probe.py"):
        EarlyExitEngine(model).generate([[1]], max_new_tokens=2, policy=POLICY)
    with pytest.raises(ValueError, match="b, c have no probe"):
        TracePass(model, None, "probe")
    only = ExitPolicy(0.5, criterion="probe", active=("a",))
    assert EarlyExitEngine(model).generate([[1]], max_new_tokens=4, policy=only).tokens
    # The other criteria need none.
    assert plan_exits("early_exit", ExitPolicy(0.5), model.exits, model.num_layers).exits


def test_the_cost_rule_counts_heads_of_leaving_tokens_only():
    exits = with_probes(exit_points(("a", 2, 4)), {"a": ExitProbe(torch.zeros(3), 0.0)})
    model = ScriptedModel(4, exits, lambda *_: (1, 0.9))
    table = CostTable(1, ((1, ((1, 1.0), (2, 1.0))),), {"a": ((1, 3.0),)}, ((1, 3.0),))
    # Half of the tokens leave after half of the layers. Full depth: 8 + 3. By heads: 4 + 3 + (4 + 3) / 2 = 10.5 and
    # by probes 4 + 3 / 2 + (4 + 3) / 2 = 9.
    left = {"a": 32, None: 32}
    for criterion, emitted, pays in (("max_probability", 61, False), ("probe", 61, True), ("probe", 52, False)):
        plan = plan_exits("early_exit", ExitPolicy(0.5, criterion=criterion), model.exits, 4)
        assert CostRule(table).pays(plan, 4, left, emitted, 10) is pays
