# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Sequences that come and go while others run: each gets exactly what it gets alone."""

from __future__ import annotations

import dataclasses
import random

import pytest

from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.request import Request
from nemo_ee.generation.sampling import SamplingParams
from tests.helpers.stub_models import ScriptedCache, ScriptedModel, TinyTransformer, exit_points
from tests.unit.generation.test_against_reference import ALL_KINDS

NAMES = tuple(exit.name for exit in ALL_KINDS)
EXITS = exit_points(("a", 2, 3), ("b", 4, 8))


def scripted():
    def script(name, token, position):
        sure = name is None or random.Random(f"{name}/{token}/{position}").random() < 0.5
        return (token * 7 + position * 3 + 1) % 50, 0.9 if sure else 0.1

    return ScriptedModel(6, EXITS, script)


def random_request(rng):
    """Any mode, policy, length and sampling."""
    mode = rng.choice(["early_exit", "self_speculative", "static_depth", "full"])
    criterion = rng.choice(["max_probability", "margin", "entropy"])
    active = (rng.choice(NAMES),) if mode == "static_depth" else tuple(n for n in NAMES if rng.random() < 0.6)
    threshold = rng.uniform(0.5, 2.5) if criterion == "entropy" else rng.uniform(0.05, 0.6)
    sampling = SamplingParams(
        greedy=rng.random() < 0.5,
        temperature=rng.choice([0.6, 1.0, 1.7]),
        top_k=rng.choice([None, 4, 15]),
        top_p=rng.choice([0.7, 1.0]),
        seed=rng.randrange(100),
        repetition_penalty=rng.choice([1.0, 1.3]),
    )
    return Request(
        tuple(rng.randrange(37) for _ in range(rng.randint(1, 6))),
        rng.randint(1, 12),
        sampling,
        frozenset({5}),
        min_new_tokens=rng.choice([0, 1]),
        mode=mode,
        policy=ExitPolicy(threshold, criterion, active, *[rng.choice([None, 0, 1, 3])] * 2),
    )


def facts(events):
    """What must be the same, the numbers to 1e-5."""
    return [
        (e.position, e.token, e.exit, e.layer, e.finish_reason, pytest.approx([e.confidence, e.logprob], abs=1e-5))
        for e in events
    ]


def told(events):
    return [(e.position, e.token, e.exit, e.layer, e.finish_reason, [e.confidence, e.logprob]) for e in events]


def alone(engine, request):
    session = engine.start([request])
    events = []
    while not session.finished:
        events += session.step()
    return facts(events)


@pytest.mark.parametrize("seed", range(20))
def test_a_sequence_added_later_gets_what_it_gets_alone(seed):
    """Random arrivals and cancellations, every mode, policy and sampling side by side in three slots, prompts in
    pieces of random size."""
    rng = random.Random(seed)
    engine = EarlyExitEngine(TinyTransformer(ALL_KINDS, seed=seed))
    session = engine.start([], exits=NAMES, num_slots=3, max_length=20)
    assert session.finished and session.step() == ()
    to_come = [random_request(rng) for _ in range(9)]
    added, cancelled, events = {}, set(), {}
    while to_come or not session.finished:
        while to_come and session.num_free_slots and rng.random() < 0.6:
            request = to_come.pop(0)
            added[session.add(request)] = request
        if added and rng.random() < 0.1:
            index = rng.choice(list(added))
            if events.get(index, [None])[-1] is None or events[index][-1].finish_reason is None:
                cancelled.add(index)
            session.cancel(index)
        for event in session.step(rng.choice([None, 0, 1, 2, 4])):
            assert event.sequence not in cancelled
            events.setdefault(event.sequence, []).append(event)
    assert session.num_free_slots == 3 and sorted(added) == list(range(9))
    for index, request in added.items():
        expected = alone(engine, request)
        got = told(events.get(index, []))
        assert got == (expected[: len(got)] if index in cancelled else expected)


def test_a_slot_is_used_again_and_its_old_sequence_leaves_nothing_behind():
    """The scripted model fails when a position is computed twice or attends to what is not there."""
    engine = EarlyExitEngine(scripted())
    session = engine.start([Request((1, 2, 3, 4), 4)], policy=ExitPolicy(0.5), max_length=20)
    while not session.finished:
        session.step()
    first = dict(session._slots)
    index = session.add(Request((9,), 15))
    assert (index, session.num_free_slots) == (1, 0) and session._slots == {1: first[0]}
    with pytest.raises(RuntimeError, match="every slot of the session is taken; wait until a sequence ends, cancel"):
        session.add(Request((9,), 15))
    session.step()
    session.cancel(index)
    session.cancel(index)  # once is enough, twice does no harm
    assert session.finished
    events = []
    session.add(Request((9,), 15))
    while not session.finished:
        events += session.step()
    assert {event.sequence for event in events} == {2} and len(events) == 15
    assert session.num_pending(0) == session.num_pending(1) == 0


def test_prompts_run_in_equal_pieces_while_others_go_on():
    engine = EarlyExitEngine(scripted())
    session = engine.start([Request((1, 2), 20)], mode="full", num_slots=3, max_length=30)
    session.step()
    session.add(Request((3, 4, 5, 6, 7), 6))
    session.add(Request((8, 9, 3), 6))
    assert (session.num_answers, session.prompt_tokens_left) == (1, 8)
    rows, begun = [], []
    for _ in range(4):
        begun.append({event.sequence for event in session.step(4)})
        rows.append(engine.model.cache.rows_per_run[-1][2])
    # Two each; then one, which is all of the shorter one, and three; then both have begun.
    assert rows == [1 + 4, 1 + 4, 3, 3] and begun == [{0}, {0, 1, 2}, {0, 1, 2}, {0, 1, 2}]
    assert (session.num_answers, session.prompt_tokens_left) == (3, 0)
    waiting = engine.start([Request((1, 2), 2)], mode="full")
    assert waiting.step(0) == () and waiting.prompt_tokens_left == 2, "nothing has room"


def test_a_short_prompt_does_not_wait_for_a_long_one():
    engine = EarlyExitEngine(scripted())
    session = engine.start([Request((1, 2), 20)], mode="full", num_slots=3, max_length=40)
    session.step()
    session.add(Request(tuple(range(30)), 3))
    session.add(Request((8, 9), 3))
    session.step(4)
    assert session.num_answers == 2 and session.prompt_tokens_left == 28


def test_a_prompt_that_has_begun_goes_on_in_pieces(monkeypatch):
    """A later piece needs a mask of its rows by the whole text, a prompt in one piece none."""
    monkeypatch.setattr("nemo_ee.generation.running_sequence._LATER_PIECE", 5)
    engine = EarlyExitEngine(scripted())
    session = engine.start([Request(tuple(range(14)), 2), Request(tuple(range(14)), 2)], mode="full", num_slots=2)
    session.step(4)
    assert session.prompt_tokens_left == 24
    session.step()
    assert session.prompt_tokens_left == 14
    alone = engine.start([Request(tuple(range(14)), 2)], mode="full")
    alone.step()
    assert alone.prompt_tokens_left == 0, "control"


def test_a_prompt_runs_in_the_same_flight_as_the_others_tokens():
    engine = EarlyExitEngine(scripted())
    session = engine.start([Request((1, 2), 9)], mode="full", num_slots=2)
    session.step()
    session.add(Request((3, 4, 5), 6))
    session.step()
    assert engine.model.cache.rows_per_run[-1] == (0, 12, 1 + 3)


def test_most_likely_tokens_are_reported_where_asked_for():
    """Of the distribution of `logprob`, whatever the exit; nothing by default. Exact up to 1e-5, fp32."""
    model = TinyTransformer(ALL_KINDS)
    session = EarlyExitEngine(model).start([], policy=ExitPolicy(0.05), num_slots=2, max_length=16)
    session.add(Request((1, 2, 3), 6, num_top=4))
    session.add(Request((1, 2, 3), 6))
    seen = set()
    while not session.finished:
        for event in session.step():
            assert len(event.top) == (4 if event.sequence == 0 else 0)
            for token, logprob in event.top[:1]:
                seen.add(event.exit)
                assert token == event.token and logprob == pytest.approx(event.logprob, abs=1e-5)
            values = [logprob for _, logprob in event.top]
            assert values == sorted(values, reverse=True)
    assert len(seen) > 1, "some from an early exit"
    with pytest.raises(ValueError, match="num_top = -1 must be"):
        session.add(Request((1,), 1, num_top=-1))


def test_what_does_not_fit_a_session_is_refused():
    session = EarlyExitEngine(scripted()).start([], mode="full", exits=("a",), num_slots=1, max_length=10)
    with pytest.raises(ValueError) as caught:
        session.add(Request((1, 99), 3, mode="early_exit", policy=ExitPolicy(0.5)))
    assert "sequence 0: token 99 outside" in str(caught.value)
    assert "sequence 0: exit b is not one of the session's (a); name it under exits" in str(caught.value)
    with pytest.raises(ValueError, match="2 prompt tokens .* are more than this session's 10 positions; .*max_length"):
        session.add(Request((1, 2), 9))
    with pytest.raises(ValueError, match="11 prompt tokens .* = 9 are .*; shorten the prompt by at least 2 tokens, "):
        session.add(Request((1,) * 11, 9))
    with pytest.raises(ValueError, match="= 0 are .*; shorten the prompt by at least 1 tokens, or start"):
        session.add(Request((1,) * 11, 0, prompt_logprobs=0))
    with pytest.raises(ValueError, match="mode = 'early_exit' needs a policy"):
        session.add(Request((1, 2), 3, mode="early_exit"))
    with pytest.raises(ValueError, match="mode = '' is unknown"):
        session.add(Request((1, 2), 3, mode=""))
    with pytest.raises(ValueError, match="min_new_tokens = 4 must be a whole number from 0 to max_new_tokens = 3"):
        session.add(Request((1, 2), 3, min_new_tokens=4))
    with pytest.raises(ValueError, match="sequence 0 is not one of this session's"):
        session.cancel(0)
    assert session.add(Request((1, 2), 8)) == 0, "nothing was taken by what was refused"


STARTS = [
    ({"num_slots": 0}, "num_slots = 0 must be a whole number from 1"),
    ({"num_slots": None}, "no prompts were given; give at least one, or num_slots"),
    ({"max_length": 65}, "max_length = 65 must be at least what the requests need .1. and at most the model's 64"),
    ({"exits": ("x",)}, "exits names 'x', which the model does not have; its exits are a, b"),
    ({"mode": "typo"}, "mode = 'typo' is unknown; use one of early_exit"),
    ({"mode": "typo", "exits": ("a",)}, "mode = 'typo' is unknown; use one of early_exit"),
    ({"mode": "early_exit", "exits": ("a",), "policy": ExitPolicy(0.5, active=("x",))}, "active names the exit 'x'"),
]


@pytest.mark.parametrize("change, message", STARTS)
def test_sessions_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        EarlyExitEngine(scripted()).start([], **({"mode": "full", "num_slots": 1} | change))


def test_a_mode_that_is_none_is_refused_beside_requests_that_bring_their_own():
    request = Request((1, 2), 3, mode="full")
    assert EarlyExitEngine(scripted()).start([request]).num_free_slots == 0, "the default needs no policy here"
    with pytest.raises(ValueError, match="mode = 'typo' is unknown"):
        EarlyExitEngine(scripted()).start([request], mode="typo")


@pytest.mark.parametrize("mode", ["early_exit", "self_speculative"])
def test_a_cache_that_forgets_nothing_is_noticed(mode, monkeypatch):
    """The control: a second sequence in a slot, and what follows a mismatch, would be computed twice."""
    monkeypatch.setattr(ScriptedCache, "truncate", lambda self, sequence, length: None)

    def script(name, token, position):
        return (token + (name is None)) % 50, 0.9

    engine = EarlyExitEngine(ScriptedModel(6, EXITS, script))
    session = engine.start(
        [Request((1, 2), 4)], mode=mode, policy=ExitPolicy(0.5, max_pending_tokens=2, num_draft_tokens=2)
    )
    with pytest.raises(AssertionError, match="computed twice"):
        for _ in range(20):
            if session.finished:
                session.add(Request((1, 2), 4))
            session.step()


def test_a_confidence_that_is_a_little_off_is_noticed():
    """The control of the comparison."""
    (event,) = EarlyExitEngine(scripted()).start([Request((1, 2), 1, mode="full")]).step()
    assert told([event]) == facts([event])
    for change in ({"confidence": event.confidence + 1e-4}, {"logprob": event.logprob - 1e-4}):
        assert told([dataclasses.replace(event, **change)]) != facts([event])
