# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Sampled self-speculation leaves the full model's distribution as it is: every path is enumerated, none is drawn.

Decoding asks for uniform numbers by (position, purpose). Here such a number is an interval that starts as [0, 1) and
is split where a decision needs it to be; each decision is a branch, and a path's probability is the product of the
lengths of its intervals. A number that is asked for again, after a draft was thrown away, is still the same number.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections import defaultdict

import pytest
import torch

from nemo_ee.generation import draft_value, verification
from nemo_ee.generation import sampling as sampling_module
from nemo_ee.generation.cost_rule import CostTable
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.request import Request
from nemo_ee.generation.sampling import SamplingParams, distribution
from tests.helpers.stub_models import ScriptedModel, exit_points

VOCABULARY = 3


class Numbers:
    """Uniform numbers as intervals, and the branches of one path through them."""

    def __init__(self) -> None:
        self.path: list[tuple[int, int]] = []  # (branch taken, how many there were)

    def start(self) -> None:
        self.intervals: dict[tuple, tuple[float, float]] = {}
        self.step = 0

    def split(self, key, edges) -> int:
        """Which of the pieces between `edges` the number of this key lies in."""
        low, high = self.intervals.get(key, (0.0, 1.0))
        pieces = []
        for index, (left, right) in enumerate(itertools.pairwise([0.0, *edges, 1.0])):
            left, right = max(left, low), min(right, high)
            if right > left:
                pieces.append((index, left, right))
        if self.step == len(self.path):
            self.path.append((0, len(pieces)))
        index, *self.intervals[key] = pieces[self.path[self.step][0]]
        self.step += 1
        return index

    def probability(self) -> float:
        return math.prod(high - low for low, high in self.intervals.values())

    def advance(self) -> bool:
        """The next path; False after the last."""
        while self.path and self.path[-1][0] + 1 == self.path[-1][1]:
            self.path.pop()
        if self.path:
            self.path[-1] = (self.path[-1][0] + 1, self.path[-1][1])
        return bool(self.path)


@pytest.fixture
def numbers(monkeypatch):
    """Decisions by enumeration in place of numbers."""
    own = Numbers()

    def draw(probabilities, key):
        edges = (probabilities / probabilities.sum()).cumsum(0).tolist()[:-1]
        return own.split(key, edges)

    replacements = {
        "uniform": lambda seed, position, purpose: (position, purpose),
        "draw": draw,
        "accepts": lambda probability, key: own.split(key, [min(probability, 1.0)]) == 0,
    }
    for module in (sampling_module, verification):
        for name, replacement in replacements.items():
            monkeypatch.setattr(module, name, replacement)
    return own


def logits_of(name, token, position):
    rng = random.Random(f"{name}/{token}/{position}")
    return torch.tensor([rng.gauss(0, 1.5) for _ in range(VOCABULARY)])


class Model(ScriptedModel):
    """Logits by (exit, token, position) as they are."""

    def __init__(self) -> None:
        exits = exit_points(("a", 1, 1), ("b", 2, 4))
        super().__init__(3, exits, lambda *key: (logits_of(*key),), vocab_size=VOCABULARY, max_positions=16)

    def _logits(self, logits):
        return logits


# A half layer takes 1 s, and evaluations nothing.
COSTS = CostTable(1, ((1, ((1, 1.0), (8, 1.0))),), dict.fromkeys("ab", ((1, 0.0),)), ((1, 0.0), (8, 0.0)))


def enumerate_outputs(numbers, request, policy, mode="self_speculative"):
    """Probability of every output, and how many paths there were."""
    outputs, count = defaultdict(float), 0
    while True:
        numbers.start()
        tables = {(1, ("a", "b")): COSTS}
        session = EarlyExitEngine(Model(), cost_tables=tables).start([request], mode=mode, policy=policy)
        tokens = []
        while not session.finished:
            tokens += [event.token for event in session.step()]
        outputs[tuple(tokens)] += numbers.probability()
        count += 1
        if not numbers.advance():
            return outputs, count


def expected_outputs(request):
    """The product of the full model's shaped distributions."""
    outputs, open_ends = {}, [((), 1.0)]
    while open_ends:
        tokens, probability = open_ends.pop()
        text = [*request.prompt, *tokens]
        logits = logits_of(None, text[-1], len(text) - 1)
        if len(tokens) < request.min_new_tokens:
            logits[list(request.stop_tokens)] = -math.inf
        p = distribution(logits, request.sampling, text, len(request.prompt))
        for token, own in enumerate(p.tolist()):
            longer = (*tokens, token)
            if own > 0 and (len(longer) == request.max_new_tokens or token in request.stop_tokens):
                outputs[longer] = probability * own
            elif own > 0:
                open_ends.append((longer, probability * own))
    return outputs


SHAPES = [
    {},
    {"temperature": 0.6},
    {"top_k": 2},
    {"top_p": 0.7},
    {"repetition_penalty": 1.4},
    {"temperature": 1.3, "top_k": 2, "top_p": 0.9, "repetition_penalty": 1.2},
    {"min_p": 0.15},
    {"presence_penalty": 0.8, "frequency_penalty": -0.5},
    {"logit_bias": ((0, 1.5), (2, -1.0)), "min_p": 0.1, "frequency_penalty": 0.7, "temperature": 1.2},
]
POLICIES = [
    ExitPolicy(0.0, active=("a",), max_pending_tokens=2, num_draft_tokens=2),  # every token is drafted
    ExitPolicy({"a": 0.6, "b": 0.4}),  # some are, from either exit
]


def assert_equal(found, expected):
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-9)
    assert set(found) <= set(expected)
    for tokens, probability in expected.items():
        assert found[tokens] == pytest.approx(probability, abs=1e-9)


@pytest.mark.parametrize("policy", POLICIES, ids=["always", "sometimes"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_output_has_the_full_models_distribution(numbers, shape, policy):
    request = Request((1,), 4, SamplingParams(greedy=False, **shape))
    found, num_paths = enumerate_outputs(numbers, request, policy)
    expected = expected_outputs(request)
    assert_equal(found, expected)
    assert num_paths > len(expected), "nothing was ever drafted and rejected"


@pytest.fixture
def quick_learner(monkeypatch):
    """Drafts by value that decide anew after every verified token, by counts with hardly a prior."""
    for name, value in {"_FIRST_PLAN": 1, "_FIRST_TRIAL": 2, "_PRIOR_DRAFTS": 0.05, "_PRIOR_TOKENS": 0.05}.items():
        monkeypatch.setattr(draft_value, name, value)


BY_VALUE = ExitPolicy(1.0, draft_rule="value")


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[5]], ids=str)
def test_with_drafts_by_value_too(numbers, quick_learner, shape):
    request = Request((1,), 5, SamplingParams(greedy=False, **shape))
    found, num_paths = enumerate_outputs(numbers, request, BY_VALUE)
    expected = expected_outputs(request)
    assert_equal(found, expected)
    assert num_paths > len(expected), "nothing was ever drafted and rejected"


def test_learning_from_what_follows_a_rejected_draft_would_show(numbers, monkeypatch):
    """The control: those drafts used random numbers that are used again, which decisions must not depend on."""

    class Careless(draft_value.DraftValue):
        goes_on = True

        def evaluates(self, exit):
            return exit == "a" and self.goes_on

        def leaves(self, exit, confidence, logits):
            super().leaves(exit, confidence, logits)
            self._evaluations[-1][-1] = self._evaluations[-1][-1]._replace(best=logits.argmax())
            return True

        def learn(self, logits, accepted, length):
            dropped = self._evaluations[len(accepted) :]
            self._evaluations = []
            if careless and len(dropped) > 1 and dropped[1]:
                self.goes_on = int(dropped[1][0].best) == 0

    monkeypatch.setattr("nemo_ee.generation.session.DraftValue", Careless)
    request = Request((1,), 5, SamplingParams(greedy=False))
    careless = False
    assert_equal(enumerate_outputs(numbers, request, BY_VALUE)[0], expected_outputs(request))
    careless = True
    with pytest.raises(AssertionError):
        assert_equal(enumerate_outputs(numbers, request, BY_VALUE)[0], expected_outputs(request))


def test_with_stop_tokens_too(numbers):
    request = Request((1,), 4, SamplingParams(greedy=False), stop_tokens=frozenset({2}))
    found, _ = enumerate_outputs(numbers, request, POLICIES[0])
    assert_equal(found, expected_outputs(request))


@pytest.mark.parametrize("policy", POLICIES, ids=["always", "sometimes"])
@pytest.mark.parametrize("least", [1, 2, 3])
def test_with_stop_tokens_and_a_least_length_too(numbers, least, policy):
    request = Request((1,), 4, SamplingParams(greedy=False, top_p=0.9), frozenset({2}), min_new_tokens=least)
    found, _ = enumerate_outputs(numbers, request, policy)
    expected = expected_outputs(request)
    assert_equal(found, expected)
    assert min(map(len, expected)) == least + 1
    with pytest.raises(AssertionError):  # the control: another least length is another distribution
        assert_equal(found, expected_outputs(dataclasses.replace(request, min_new_tokens=least - 1)))


def test_the_other_modes_by_the_same_enumeration(numbers):
    """The control of the method: it gives `full` its own distribution, and `early_exit` another one."""
    request = Request((1,), 3, SamplingParams(greedy=False))
    expected = expected_outputs(request)
    assert_equal(enumerate_outputs(numbers, request, None, "full")[0], expected)
    with pytest.raises(AssertionError):
        assert_equal(enumerate_outputs(numbers, request, POLICIES[0], "early_exit")[0], expected)


@pytest.mark.parametrize("flaw", ["accept always", "redraw from p", "one number for all"])
def test_controls_that_must_fail(numbers, monkeypatch, flaw):
    if flaw == "accept always":
        monkeypatch.setattr(verification, "accepts", lambda probability, key: True)
    elif flaw == "redraw from p":
        # (p - q) clamped at 0 becomes p: what is drawn after a rejection comes from the wrong distribution.
        monkeypatch.setattr(torch.Tensor, "clamp", lambda self, min: torch.zeros_like(self))
    else:
        for module in (sampling_module, verification):
            monkeypatch.setattr(module, "uniform", lambda seed, position, purpose: position)
    request = Request((1,), 3, SamplingParams(greedy=False))
    with pytest.raises(AssertionError):
        assert_equal(enumerate_outputs(numbers, request, POLICIES[0])[0], expected_outputs(request))


def test_the_same_seed_gives_the_same_tokens_in_any_batch():
    """With real numbers: what a sequence draws depends on its seed alone."""
    requests = [Request((i % 3,), 9, SamplingParams(greedy=False, seed=i // 2)) for i in range(6)]

    def tokens(own):
        session = EarlyExitEngine(Model()).start(own, mode="self_speculative", policy=POLICIES[1])
        events = []
        while not session.finished:
            events += session.step()
        return [[event.token for event in events if event.sequence == i] for i in range(len(own))]

    together = tokens(requests)
    assert together == [tokens([own])[0] for own in requests] and len(set(map(tuple, together))) > 2
