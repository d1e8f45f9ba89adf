# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Masked tokens cost nothing once the minimum length is reached, and only rows before it change."""

from __future__ import annotations

import math
import random

import pytest
import torch

from nemo_ee.generation.decoding_model import TokenPositions
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.request import Request
from nemo_ee.generation.sampling import MinLengthMask
from tests.helpers.stub_models import ScriptedModel, exit_points


def test_only_rows_before_the_least_length_lose_only_their_tokens():
    mask = MinLengthMask()
    mask.mask(0, 5, {3, 1})
    mask.mask(2, 9, {0})
    logits = torch.randn(5, 6)
    positions = TokenPositions.of({0: [3, 4], 1: [1], 2: [7, 8]})
    expected = logits.clone()
    expected[0, [1, 3]] = -math.inf
    expected[3, 0] = -math.inf
    kept = logits.clone()
    assert torch.equal(mask.masked(logits, positions), expected) and torch.equal(logits, kept)
    passed = TokenPositions.of({0: [4, 5], 1: [1], 2: [8, 9]})
    assert mask.masked(logits, passed) is logits, "nothing is copied where nothing is masked"


@pytest.mark.parametrize("mode", ["early_exit", "self_speculative", "static_depth", "full"])
def test_a_sequence_that_has_its_least_length_masks_nothing_any_more(mode):
    model = ScriptedModel(6, exit_points(("a", 2, 3)), lambda name, token, position: ((token * 7 + 1) % 50, 0.9))
    requests = [Request((1, 2), 12, min_new_tokens=3, stop_tokens=frozenset({7}))]
    session = EarlyExitEngine(model).start(
        requests, mode=mode, policy=ExitPolicy(0.5, max_pending_tokens=2, num_draft_tokens=2), max_length=20
    )
    assert len(session._forward._min_length) == 1
    for _ in range(7):
        session.step()
    assert len(session._forward._min_length) == 0 and not session.finished


def test_a_sequence_that_ends_early_leaves_nothing_masked():
    model = ScriptedModel(6, exit_points(("a", 2, 3)), lambda *_: (1, 0.9))
    session = EarlyExitEngine(model).start(
        [Request((1, 2), 12, min_new_tokens=9, stop_tokens=frozenset({7}))], mode="full"
    )
    session.step()
    session.cancel(0)
    assert len(session._forward._min_length) == 0


@pytest.mark.parametrize("least", range(1, 9))
@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
def test_drafts_that_are_taken_back_are_held_again(least, right):
    """Greedy self-speculation near the least length gives what the full model gives."""

    def happens(what, position, probability):
        return random.Random(f"{least}/{what}/{position}").random() < probability

    def script(name, token, position):
        best = 7 if happens("stop", position, 0.7) else (token * 3 + position) % 50
        return best if name is None or happens("agrees", position, right) else (best + 1) % 50, 0.9

    def tokens(mode):
        model = ScriptedModel(6, exit_points(("a", 2, 3)), script)
        requests = [Request((1, 2), 10, min_new_tokens=least, stop_tokens=frozenset({7}))]
        session = EarlyExitEngine(model).start(
            requests, mode=mode, policy=ExitPolicy(0.5, max_pending_tokens=3, num_draft_tokens=3)
        )
        events = []
        while not session.finished:
            events += session.step()
        return [event.token for event in events]

    assert tokens("self_speculative") == tokens("full") and len(tokens("full")) > least
