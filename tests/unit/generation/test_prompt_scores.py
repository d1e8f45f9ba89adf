# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of a prompt's tokens against a decoder that recomputes everything, in every mode and batch."""

from __future__ import annotations

import pytest
import torch

from nemo_ee.generation import prompt_scores
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.request import Request
from nemo_ee.generation.stats import Failure, PromptScores, TokenEvent
from tests.helpers.reference_decoder import hidden_by_stop, logits_at
from tests.helpers.stub_models import TinyTransformer
from tests.unit.generation.test_against_reference import ALL_KINDS

PROMPTS = [(1, 2, 3, 4, 5, 6, 7), (9,), (3, 3, 8), (5, 1, 2, 2, 4)]
MODES = {
    "full": None,
    "early_exit": ExitPolicy(0.2),
    "self_speculative": ExitPolicy(0.2, num_draft_tokens=3),
    "static_depth": ExitPolicy(0.0, active=("layer1-layer",)),
}


@pytest.fixture(scope="module")
def model():
    return TinyTransformer(ALL_KINDS, seed=5)


def decode(model, requests, mode):
    """Events of each sequence."""
    session = EarlyExitEngine(model).start(requests, mode=mode, policy=MODES[mode])
    events = []
    while not session.finished:
        events += session.step()
    return [[event for event in events if event.sequence == index] for index in range(len(requests))]


def expected(model, prompt, mode):
    """ln p of each prompt token but the first, and the distributions `[n - 1, v]` they are from."""
    name = "layer1-layer" if mode == "static_depth" else None
    logprobs = logits_at(model, name, hidden_by_stop(model, prompt)).log_softmax(dim=1)[:-1]
    return [float(row[token]) for row, token in zip(logprobs, prompt[1:], strict=True)], logprobs


@pytest.mark.parametrize("rows", [1, 3, None], ids=["a-token-a-step", "three", "all-at-once"])
@pytest.mark.parametrize("mode", MODES)
def test_they_are_a_naive_forward_s_and_the_answer_stays_what_it_was(mode, rows, model, monkeypatch):
    plain = decode(model, [Request(prompt, 6) for prompt in PROMPTS], mode)
    if rows is not None:
        monkeypatch.setattr(prompt_scores, "LOGITS_PER_CALL", rows * model.vocab_size)
    requests = [Request(prompt, 6, prompt_logprobs=2) for prompt in PROMPTS]
    for prompt, own, (scores, *answer) in zip(PROMPTS, plain, decode(model, requests, mode), strict=True):
        logprobs, rows_of_reference = expected(model, prompt, mode)
        assert isinstance(scores, PromptScores) and scores.finish_reason is None
        assert scores.logprobs == pytest.approx(logprobs, abs=1e-4)
        best = rows_of_reference.topk(2, dim=1) if len(prompt) > 1 else torch.empty(0, 2).topk(2)
        assert [[token for token, _ in top] for top in scores.top] == best.indices.tolist()
        for top, values in zip(scores.top, best.values.tolist(), strict=True):
            assert [value for _, value in top] == pytest.approx(values, abs=1e-4)
        for token, top, logprob in zip(prompt[1:], scores.top, scores.logprobs, strict=True):
            assert dict(top).get(token, logprob) == logprob, "one number for a token, to the last digit"
        assert [(one.token, one.exit) for one in answer] == [(one.token, one.exit) for one in own]


@pytest.mark.parametrize("mode", MODES)
def test_no_new_token_is_needed(mode, model):
    requests = [
        Request(PROMPTS[0], 0, prompt_logprobs=0),
        Request(PROMPTS[2], 3),
        Request(PROMPTS[1], 0, prompt_logprobs=1),
    ]
    first, second, third = decode(model, requests, mode)
    assert [one.finish_reason for one in first + third] == ["length", "length"]
    assert first[0].logprobs == pytest.approx(expected(model, PROMPTS[0], mode)[0], abs=1e-4) and first[0].top == ()
    assert third[0].logprobs == ()
    assert [one.token for one in second] == [one.token for one in decode(model, [Request(PROMPTS[2], 3)], mode)[0]]


def test_the_least_length_is_the_answer_s_and_not_the_prompt_s(model):
    held = Request(PROMPTS[0], 4, stop_tokens=frozenset(PROMPTS[0]), min_new_tokens=2, prompt_logprobs=0)
    ((scores, *answer),) = decode(model, [held], "full")
    assert scores.logprobs == pytest.approx(expected(model, PROMPTS[0], "full")[0], abs=1e-4)
    assert all(isinstance(one, TokenEvent) and one.token not in PROMPTS[0] for one in answer[:2])


def test_logits_that_are_not_numbers_end_their_own_sequence(model, monkeypatch):
    real = model.embed

    def poisoned(tokens, positions):
        return real(tokens, positions).masked_fill(
            (positions.sequence == 0)[:, None] & (positions.position >= 2)[:, None], torch.nan
        )

    monkeypatch.setattr(model, "embed", poisoned)
    bad, good = decode(
        model, [Request(PROMPTS[0], 2, prompt_logprobs=0), Request(PROMPTS[3], 2, prompt_logprobs=0)], "full"
    )
    assert [type(one) for one in bad] == [Failure] and bad[0].position >= 1 and "not numbers" in bad[0].message
    assert [type(one) for one in good] == [PromptScores, TokenEvent, TokenEvent]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0 must be a whole number from 1"),
        ({"max_new_tokens": -1, "prompt_logprobs": 0}, "max_new_tokens = -1 must be a whole number from 0"),
        ({"prompt_logprobs": -1}, "prompt_logprobs = -1 must be a whole number from 0, or None"),
    ],
)
def test_what_cannot_be_is_refused(changes, words, model):
    request = Request(**{"prompt": (1,), "max_new_tokens": 2, **changes})
    with pytest.raises(ValueError, match=words):
        EarlyExitEngine(model).start([request], mode="full")


def test_a_scored_prompt_is_not_overtaken_by_those_that_come_after_it(model, monkeypatch):
    """The room for logits goes by arrival: a slot that gets free is taken again at once."""
    monkeypatch.setattr(prompt_scores, "LOGITS_PER_CALL", model.vocab_size)  # one row a step
    session = EarlyExitEngine(model).start([], mode="full", max_length=16, num_slots=2)
    session.add(Request(PROMPTS[0], 0, prompt_logprobs=0))
    second = session.add(Request(PROMPTS[0], 0, prompt_logprobs=0))
    finished = []
    for _ in range(4 * len(PROMPTS[0])):
        for event in session.step():
            finished.append(event.sequence)
            if event.sequence != second:
                session.add(Request(PROMPTS[0], 0, prompt_logprobs=0))
    assert second in finished[:2]


def test_tokens_that_are_masked_out_are_no_candidates():
    logits = torch.tensor([0.0, float("-inf"), 1.0])
    assert [token for token, _ in prompt_scores.most_likely(logits, 3)] == [2, 0]
