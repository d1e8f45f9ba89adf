# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Calls the engine refuses, each before anything runs and with every problem at once."""

from __future__ import annotations

import numpy
import pytest

from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.sampling import SamplingParams
from tests.helpers.stub_models import ScriptedModel, exit_points

POLICY = ExitPolicy(0.5)


@pytest.fixture
def engine():
    return EarlyExitEngine(ScriptedModel(4, exit_points(("a", 2, 3)), lambda *_: (1, 0.9)))


GENERATE = [
    ({"prompts": []}, "no prompts were given; give at least one"),
    ({"prompts": [[1], []]}, "prompt 1 is empty; give at least one token"),
    ({"prompts": [[1, 50]]}, r"prompt 0: token 50 outside the vocabulary 0\.\.49; use the tokenizer"),
    ({"prompts": [[-1, 2.5, "a", 51, 1]]}, r"prompt 0: token -1, 2.5, 'a' and 1 more outside the vocabulary"),
    ({"max_new_tokens": 64}, r"1 prompt tokens \+ max_new_tokens = 64 are more than the model's 64 positions; .*63"),
    ({"max_new_tokens": 0}, "max_new_tokens = 0 must be a whole number from 1"),
    ({"max_new_tokens": "5"}, "max_new_tokens = '5' must be one int, or a list with one for each of 1 sequences"),
    ({"max_new_tokens": [3, 4]}, r"max_new_tokens = \[3, 4\] must be one int, or a list"),
    ({"sampling": []}, r"sampling = \[\] must be one SamplingParams, or a list"),
    ({"stop_tokens": [50]}, r"stop token 50 is not in the vocabulary 0\.\.49; remove it"),
    ({"stop_tokens": [None]}, "stop token None is not in the vocabulary"),
    ({"mode": "fast"}, "mode = 'fast' is unknown; use one of early_exit, self_speculative, static_depth, full"),
    ({"mode": "self_speculative", "policy": None}, "mode = 'self_speculative' needs a policy"),
    (
        {"mode": "static_depth", "policy": ExitPolicy(0.5, active=())},
        "mode 'static_depth' reads from one exit, but none is active; name one of a under active",
    ),
    ({"mode": "static_depth", "policy": ExitPolicy(0.5, active=("b",))}, "active names the exit 'b', which the model"),
    ({"policy": None}, r"mode = 'early_exit' needs a policy; pass ExitPolicy\(thresholds=...\) or use mode='full'"),
    ({"policy": ExitPolicy({"b": 0.5}, active=("a",))}, "thresholds names the exit 'b', which the model does not"),
]


@pytest.mark.parametrize("change, message", GENERATE)
def test_generate(engine, change, message):
    call = {"prompts": [[1]], "max_new_tokens": 4, "policy": POLICY} | change
    for method in (engine.generate, engine.stream):
        with pytest.raises(ValueError, match=message):
            method(call["prompts"], **{key: value for key, value in call.items() if key != "prompts"})
    assert engine.model.cache is None, "nothing ran"


def test_all_problems_of_a_call_in_one_message(engine):
    with pytest.raises(ValueError) as caught:
        engine.generate([[], [99]], max_new_tokens=100, mode="x", policy=POLICY, stop_tokens=[70])
    for part in ("6 problems", "prompt 0 is empty", "token 99", "max_new_tokens = 100", "stop token 70", "mode = 'x'"):
        assert part in str(caught.value)


SCORE = [
    ({"tokens": []}, "no sequences were given"),
    ({"tokens": [[]]}, "sequence 0 is empty"),
    ({"tokens": [[1, 77]]}, "sequence 0: token 77 outside the vocabulary"),
    ({"num_context": 0}, "num_context = 0 must be at least 1 and leave one of its 3 tokens to score"),
    ({"num_context": 3}, "num_context = 3 must be at least 1 and leave one of its 3 tokens"),
    ({"num_context": [1, 1]}, r"num_context = \[1, 1\] must be one int, or a list with one for each of 1"),
    ({"tokens": [[1] * 66]}, "65 tokens before the last one are more than the model's 64 positions; shorten it or"),
    ({"mode": "static_depth", "policy": None}, "needs a policy"),
    ({"policy": None}, "needs a policy"),
]


@pytest.mark.parametrize("change, message", SCORE)
def test_score(engine, change, message):
    call = {"tokens": [[1, 2, 3]], "num_context": 1, "policy": POLICY} | change
    with pytest.raises(ValueError, match=message):
        engine.score(**call)
    assert engine.model.cache is None, "nothing ran"


def test_the_largest_call_that_fits_and_numpy_tokens_are_accepted(engine):
    prompt = numpy.array([1, 2])
    result = engine.generate([prompt], max_new_tokens=62, policy=POLICY, sampling=[SamplingParams()])
    assert len(result.tokens[0]) == 62
    assert len(engine.score([[1] * 64], 1, policy=POLICY).logprobs[0]) == 63
