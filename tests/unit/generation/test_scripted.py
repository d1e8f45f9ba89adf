# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Decoding of scripted models: exits that are always, never and sometimes sure.

`ScriptedModel` itself fails the test when anything is computed twice, out of order, or before what it depends on.
"""

from __future__ import annotations

import random

import pytest
import torch

from nemo_ee.generation.decoding_model import TokenPositions
from nemo_ee.generation.engine import EarlyExitEngine, Request
from nemo_ee.generation.forward_rows import TokenInput
from nemo_ee.generation.policy import ExitPolicy
from tests.helpers.stub_models import ScriptedModel, exit_points

LAYERS = 6
EXITS = exit_points(("a", 2, 3), ("b", 4, 8), ("b2", 4, 8), ("c", 5, 9))
NAMES = tuple(point.name for point in EXITS)
NO_STOP = {"max_new_tokens": 12}


def next_token(token, position):
    return (token * 7 + position * 3 + 1) % 50


def model_that_is_sure(when):
    """Every exit says the same token; `when(name, token, position)` says whether an early one is sure."""

    def script(name, token, position):
        is_sure = name is None or when(name, token, position)
        return next_token(token, position), 0.9 if is_sure else 0.1

    return ScriptedModel(LAYERS, EXITS, script)


def sometimes(name, token, position):
    return random.Random(f"{name}/{token}/{position}").random() < 0.5


def depths(cache, sequence, length):
    """The deepest half layer computed at each position."""
    return [max(h for h, done in cache.computed.items() if (sequence, p) in done) for p in range(length)]


def run(model, prompts, policy, **options):
    return EarlyExitEngine(model).generate(prompts, policy=policy, **(NO_STOP | options))


def test_always_sure():
    model = model_that_is_sure(lambda *_: True)
    result = run(model, [[1, 2, 3]], ExitPolicy(0.5))
    assert [event.exit for event in result.events] == [None] + ["a"] * 11
    assert depths(model.cache, 0, 14) == [12] * 3 + [3] * 11
    assert model.cache.evaluations == {None: 1, "a": 11}  # no deeper head is ever asked
    assert result.stats.mean_depth == (6 + 11 * 2) / 12
    assert result.stats.computed_layers == 3 * 6 + 11 * 1.5
    assert result.stats.tokens_per_exit == {"a": 11, "b": 0, "b2": 0, "c": 0, "final": 1}
    assert result.stats.evaluations == {"a": 11, "b": 0, "b2": 0, "c": 0, "final": 1}


def test_never_sure_asks_everyone_and_waits_for_nothing():
    model = model_that_is_sure(lambda *_: False)
    result = run(model, [[1, 2, 3]], ExitPolicy(0.5))
    assert {event.exit for event in result.events} == {None}
    assert model.cache.evaluations == {None: 12, **dict.fromkeys(NAMES, 11)}
    assert depths(model.cache, 0, 14) == [12] * 14
    full = EarlyExitEngine(model_that_is_sure(lambda *_: False)).generate([[1, 2, 3]], mode="full", **NO_STOP)
    assert full.tokens == result.tokens


def test_full_mode_and_inactive_exits_cost_nothing():
    for options in (
        {"mode": "full", "policy": None},
        {"policy": ExitPolicy(0.5, active=())},
        {"policy": ExitPolicy(1.0)},  # nothing can leave at 1.0, so nothing is asked
    ):
        model = model_that_is_sure(lambda *_: True)
        run(model, [[1, 2, 3]], **options)
        assert model.cache.active_exits == () and model.cache.evaluations == {None: 12}
        assert {(start, stop) for start, stop, _ in model.cache.rows_per_run} == {(0, 12)}


def test_segments_lie_between_the_active_exits():
    model = model_that_is_sure(lambda *_: False)
    run(model, [[1, 2]], ExitPolicy(0.5, active=("a", "c")))
    assert model.cache.active_exits == ("a", "c")
    assert {(start, stop) for start, stop, _ in model.cache.rows_per_run} == {(0, 3), (3, 9), (9, 12)}
    assert set(model.cache.evaluations) == {None, "a", "c"}


def test_waiting_tokens_join_the_next_deeper_one_in_one_batch():
    # Fed positions 1, 2, 3 leave at a; 4 goes to c; 5 leaves at a; 6 goes all the way.
    where = {1: "a", 2: "a", 3: "a", 4: "c", 5: "a"}
    model = model_that_is_sure(lambda name, token, position: where.get(position) == name)
    session = EarlyExitEngine(model).start([Request((1,), 8)], policy=ExitPolicy(0.5))
    waiting = []
    while not session.finished:
        session.step()
        waiting.append(session.num_pending(0))
    assert waiting == [0, 1, 2, 3, 4, 5, 0, 0]
    runs = model.cache.rows_per_run
    prompt = [(0, 3, 1), (3, 8, 1), (8, 9, 1), (9, 12, 1)]
    leaves_at_a = [(0, 3, 1)]
    goes_to_c = [(0, 3, 1), (3, 8, 4), (8, 9, 4)]
    to_the_end = [(0, 3, 1), (3, 8, 2), (8, 9, 2), (9, 12, 6)]
    assert runs == prompt + leaves_at_a * 3 + goes_to_c + leaves_at_a + to_the_end + prompt


def test_the_first_sure_exit_of_a_shared_stop_wins_in_the_order_of_the_model():
    model = model_that_is_sure(lambda name, *_: name in ("b", "b2"))
    assert {event.exit for event in run(model, [[1]], ExitPolicy(0.5)).events[1:]} == {"b"}
    assert model.cache.evaluations["b2"] == 0
    model = model_that_is_sure(lambda name, *_: name == "b2")
    assert {event.exit for event in run(model, [[1]], ExitPolicy(0.5)).events[1:]} == {"b2"}
    assert model.cache.evaluations["b"] == model.cache.evaluations["b2"] == 11


def test_every_active_exit_hears_once_of_every_position_that_reaches_it():
    model = model_that_is_sure(sometimes)
    run(model, [[1, 2, 3], [4]], ExitPolicy(0.5), max_new_tokens=20)
    for point in EXITS:
        assert model.cache.exit_kv[point.name] == model.cache.computed[point.stop]


@pytest.mark.parametrize("cap", [0, 1, 2, 5])
def test_the_cap_forces_full_depth(cap):
    model = model_that_is_sure(lambda *_: True)
    session = EarlyExitEngine(model).start([Request((1, 2), 20)], policy=ExitPolicy(0.5, max_pending_tokens=cap))
    events, most = [], 0
    while not session.finished:
        events += session.step()
        most = max(most, session.num_pending(0))
    assert most == cap
    exits = [event.exit for event in events]
    period = [*["a"] * cap, None]
    assert exits == [None, *(period * 20)[:19]]
    # A token that is going to full depth anyway is not asked on the way.
    assert model.cache.evaluations["a"] == exits.count("a")


def test_an_exit_at_the_end_of_the_stack_leaves_nothing_waiting():
    exits = exit_points(("a", 2, 3), ("end", LAYERS, 2 * LAYERS))
    model = ScriptedModel(LAYERS, exits, lambda name, t, p: (next_token(t, p), 0.9 if p % 3 or name != "a" else 0.1))
    # Only "a" is unsure, at every third position, and then "end" is sure: the final exit is asked only for the prompt.
    session = EarlyExitEngine(model).start([Request((1,), 10)], policy=ExitPolicy({"a": 0.5, "end": 0.5}))
    events = []
    while not session.finished:
        events += session.step()
        assert (session.num_pending(0) == 0) == (events[-1].exit != "a")
    assert [event.exit for event in events[1:]] == ["a", "a", "end"] * 3
    assert model.cache.evaluations[None] == 1


def test_each_sequence_stops_by_itself():
    chain = [1]
    for position in range(10):
        chain.append(next_token(chain[-1], position))
    model = model_that_is_sure(sometimes)
    assert chain.index(chain[7]) == 7
    result = run(model, [[1], [1], chain[:3]], ExitPolicy(0.5), max_new_tokens=[10, 4, 10], stop_tokens=[chain[7]])
    assert [list(own) for own in result.tokens] == [chain[1:8], chain[1:5], chain[3:8]]
    assert result.finish_reasons == ("stop", "length", "stop")
    assert [event.finish_reason for event in result.events_of(0)] == [None] * 6 + ["stop"]
    assert [event.position for event in result.events_of(2)] == [3, 4, 5, 6, 7]
    # Nothing runs after a sequence's end.
    assert max(p for s, p in model.cache.computed[0] if s == 1) == 3


def test_ended_sequences_are_flushed_too():
    model = model_that_is_sure(sometimes)
    session = EarlyExitEngine(model).start(
        [Request((1, 2), 3), Request((5,), 17), Request((9, 9, 9), 9)], policy=ExitPolicy(0.5)
    )
    while not session.finished:
        session.step()
    assert sum(session.num_pending(i) for i in range(3)) > 0
    session.flush()
    assert [session.num_pending(i) for i in range(3)] == [0, 0, 0]
    assert all(done == model.cache.computed[0] for done in model.cache.computed.values())
    session.flush()  # nothing waits: nothing runs, or the model would complain


@pytest.mark.parametrize("seed", range(40))
def test_random_scripts_policies_and_batches(seed):
    """At most once and in order (asserted by the model), caps, and a batch equal to its sequences alone."""
    rng = random.Random(seed)
    share = rng.random()
    active = tuple(name for name in NAMES if rng.random() < 0.7)
    policy = ExitPolicy(0.5, active=active, max_pending_tokens=rng.choice([None, 0, 1, 2, 4]))

    def when(name, token, position):
        return random.Random(f"{seed}/{name}/{token}/{position}").random() < share

    prompts = [[rng.randrange(50) for _ in range(rng.randint(1, 6))] for _ in range(rng.randint(1, 5))]
    lengths = [rng.randint(1, 15) for _ in prompts]
    requests = [Request(tuple(p), n, stop_tokens=frozenset({13})) for p, n in zip(prompts, lengths, strict=True)]
    model = model_that_is_sure(when)
    session = EarlyExitEngine(model).start(requests, policy=policy)
    events = []
    while not session.finished:
        events += session.step()
        for index in range(len(prompts)):
            assert policy.max_pending_tokens is None or session.num_pending(index) <= policy.max_pending_tokens
    session.flush()
    expected = {(i, p) for i, own in enumerate(prompts) for p in range(len(own))}
    expected |= {(event.sequence, event.position) for event in events if event.finish_reason is None}
    assert all(done == expected for done in model.cache.computed.values())
    for index, request in enumerate(requests):
        alone = run(
            model_that_is_sure(when),
            [request.prompt],
            policy,
            max_new_tokens=request.max_new_tokens,
            stop_tokens={13},
        )
        ours = [event for event in events if event.sequence == index]
        assert [(e.position, e.token, e.exit, e.confidence, e.finish_reason) for e in ours] == [
            (e.position, e.token, e.exit, e.confidence, e.finish_reason) for e in alone.events
        ]


def test_stream_checks_at_once_and_yields_the_events_of_generate():
    engine = EarlyExitEngine(model_that_is_sure(sometimes))
    with pytest.raises(ValueError, match="is empty"):
        engine.stream([[]], policy=ExitPolicy(0.5), **NO_STOP)
    stream = engine.stream([[1], [2, 3]], policy=ExitPolicy(0.5), **NO_STOP)
    first = next(stream)
    assert (first.sequence, first.position, first.exit) == (0, 1, None)
    streamed = (first, *stream)
    assert streamed == engine.generate([[1], [2, 3]], policy=ExitPolicy(0.5), **NO_STOP).events


def test_broken_logits_are_reported_with_their_exit():
    model = model_that_is_sure(lambda *_: True)
    model._logits = lambda token, probability: torch.full((50,), float("nan"))
    with pytest.raises(RuntimeError, match="logits for position 1 from the final exit are not numbers"):
        run(model, [[1]], ExitPolicy(0.5))


def test_the_scripted_model_does_detect_wrong_engines():
    """The control: each kind of wrong call must fail."""
    model = model_that_is_sure(sometimes)
    session = EarlyExitEngine(model).start([Request((1, 2), 5)], policy=ExitPolicy(0.5))
    session.step()
    forward = session._forward
    with pytest.raises(AssertionError, match="computed twice"):
        forward.step({0: TokenInput(1, (4,))})
    with pytest.raises(AssertionError, match=r"misses the positions \[2\]"):
        forward.step({0: TokenInput(3, (4,))})
    with pytest.raises(AssertionError, match="taken as depth"):
        rows = forward._embed({0: TokenInput(2, (4,))})
        model.run(rows.hidden, TokenPositions.of(rows.positions), 3, 8, model.cache)


def test_a_sequence_that_has_ended_cuts_no_flight_any_more():
    """Its exits' stops go with it, and come back for the flush of what waits."""
    model = model_that_is_sure(lambda *_: True)
    requests = [Request((1, 2), 4), Request((3,), 9, mode="full")]
    session = EarlyExitEngine(model).start(requests, policy=ExitPolicy(0.5))
    for _ in range(4):
        session.step()
    before = len(model.cache.rows_per_run)
    session.step()
    assert model.cache.rows_per_run[before:] == [(0, 12, 1)] and session.num_pending(0) == 3
    session.cancel(1)
    session.flush()
    assert session.num_pending(0) == 0 and all((0, 4) in done for done in model.cache.computed.values())
    session.add(Request((5,), 3))
    while not session.finished:
        session.step()
    assert {(0, 3, 1), (3, 8, 3)} <= set(model.cache.rows_per_run), "the control: exits do cut"
