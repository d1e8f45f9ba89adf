# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A sequence that fails ends by itself: its neighbours get what they get alone, and it keeps what was certain."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.request import Request
from nemo_ee.generation.sampling import SamplingParams
from nemo_ee.generation.stats import Failure
from tests.helpers.stub_models import ScriptedModel, exit_points

MODES = ["early_exit", "self_speculative", "static_depth", "full"]
POLICY = ExitPolicy(0.5, active=("a",), max_pending_tokens=3, num_draft_tokens=3)
BAD = 49  # the token of the sequence that fails: it follows itself
BREAKS = 6  # the position at which it does


def model(broken=None):
    """The final exit and the static one give `broken` as every logit after the token `BAD` at some position."""

    def script(name, token, position):
        if token == BAD:
            return BAD, math.nan if position + 1 == BREAKS and broken is not None else 0.9
        return (token * 7 + position * 3 + 1) % 49, 0.9 if (token + position) % 3 else 0.3

    own = ScriptedModel(6, exit_points(("a", 2, 3)), script)
    make = own._logits
    own._logits = lambda token, p: torch.full((50,), broken) if math.isnan(p) else make(token, p)
    return own


def run(requests, mode, broken=None):
    """Events of each sequence; a sequence more is added when the first has ended."""
    session = EarlyExitEngine(model(broken)).start(requests, mode=mode, policy=POLICY, max_length=20)
    events, more = {}, [Request((5, 6), 9)]
    while not session.finished:
        for event in session.step():
            events.setdefault(event.sequence, []).append(event)
        if more and session.num_free_slots:
            session.add(more.pop())
    assert session.num_free_slots == len(requests)
    assert session.stats(sum(events.values(), [])).num_tokens == sum(
        not isinstance(event, Failure) for own in events.values() for event in own
    )
    return [own for _, own in sorted(events.items())]


def known(events):
    return [(event.position, event.token, event.exit, event.logprob, event.finish_reason) for event in events]


def alone(request, mode):
    return known(run([request], mode)[0])


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", MODES)
def test_logits_that_are_not_numbers_end_their_sequence_alone(mode, broken, greedy):
    requests = [
        Request((1, 2), 9),
        Request((BAD, BAD), 9, SamplingParams(greedy=greedy, top_k=5, top_p=0.9)),
        Request((3,), 11, SamplingParams(greedy=False, seed=3)),
    ]
    good, bad, other, later = run(requests, mode, broken)
    assert known(good) == alone(requests[0], mode) and known(other) == alone(requests[2], mode)
    assert known(later) == alone(Request((5, 6), 9), mode), "the slot that became free serves another"
    *before, failure = bad
    assert known(before) == alone(requests[1], mode)[: len(before)]
    assert isinstance(failure, Failure) and failure.finish_reason == "error" and failure.cause is None
    source = "exit 'a'" if mode == "static_depth" else "the final exit"
    if mode != "self_speculative" and greedy:
        # An early exit whose logits are not numbers is never sure, so the final exit is what fails.
        assert failure.position == BREAKS == len(before) + 2
        assert f"sequence 1: the logits for position 6 from {source} are not numbers" in failure.message


@pytest.mark.parametrize("mode", MODES)
def test_an_ends_that_raises_ends_its_sequence_alone(mode):
    def ends(tokens):
        if len(tokens) == 4:
            raise KeyError("no such thing")
        return False

    good, bad, later = run([Request((1, 2), 9), Request((BAD, BAD), 9, ends=ends)], mode)
    assert known(good) == alone(Request((1, 2), 9), mode) and known(later) == alone(Request((5, 6), 9), mode)
    *before, failure = bad
    assert known(before) == alone(Request((BAD, BAD), 9), mode)[:4], "the token it was asked about is certain"
    assert failure.message == "sequence 1: its `ends` failed at position 5: KeyError: 'no such thing'"
    assert isinstance(failure.cause, KeyError)


def test_an_ends_that_raises_on_a_draft_that_does_not_stay_is_forgiven():
    """`ends` fails on a text that only a draft makes: the output is the full model's."""

    def script(name, token, position):
        return (7 if name == "a" and position == 3 else 20 + position), 0.9

    def ends(tokens):
        assert 7 not in tokens
        return False

    drafting = ScriptedModel(6, exit_points(("a", 2, 3)), script)
    session = EarlyExitEngine(drafting).start([Request((1, 2), 6, ends=ends)], mode="self_speculative", policy=POLICY)
    events = []
    while not session.finished:
        events += session.step()
    assert [event.token for event in events] == [21, 22, 23, 24, 25, 26] and session.stats(events).drafted > 0


def test_generate_and_stream_raise_when_the_others_have_ended():
    engine = EarlyExitEngine(model(math.nan))
    call = {"max_new_tokens": 9, "policy": POLICY}
    with pytest.raises(RuntimeError, match="sequence 1: the logits for position 6 .*\nsequence 2: the logits"):
        engine.generate([[1, 2], [BAD, BAD], [BAD]], **call)
    assert (0, 9) in engine.model.cache.computed[3], "the first sequence came to its end"
    events = []
    with pytest.raises(RuntimeError, match="sequence 1: the logits"):
        for event in engine.stream([[1, 2], [BAD, BAD]], **call):
            events.append(event)
    assert known(own for own in events if own.sequence == 0) == alone(Request((1, 2), 9), "early_exit")
