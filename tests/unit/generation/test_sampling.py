# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Sampling: the shaped distribution against Hugging Face's processors; random numbers that depend on nothing else."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_ee.generation.sampling import GREEDY, SamplingParams, choose, distribution, draw, sample, uniform

LOGITS = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 2
PREVIOUS = [[1, 2, 3], [], [39, 39], [5], [0, 7]]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"repetition_penalty": 1.3},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.8, "repetition_penalty": 1.7},
        {"min_p": 0.2},
        {"logit_bias": ((3, 5.0), (39, -100.0), (7, -0.5))},
        {"min_p": 0.05, "temperature": 1.4, "top_k": 9, "top_p": 0.7, "repetition_penalty": 1.3,
         "logit_bias": ((1, 2.5), (5, -3.0))},
    ],
)  # fmt: skip
def test_distribution_equals_hugging_face(settings):
    processors = pytest.importorskip("transformers.generation.logits_process")
    params = SamplingParams(greedy=False, **settings)
    for row, previous in zip(LOGITS, PREVIOUS, strict=True):
        scores = row[None].clone()
        ids = torch.tensor([previous], dtype=torch.long)
        if params.logit_bias:
            bias = {(token,): value for token, value in params.logit_bias}
            scores = processors.SequenceBiasLogitsProcessor(bias)(ids, scores)
        if previous:
            scores = processors.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
        scores = processors.TemperatureLogitsWarper(float(params.temperature))(ids, scores)
        if params.min_p:  # vLLM's place for it; transformers' own order has it behind top_p
            scores = processors.MinPLogitsWarper(params.min_p)(ids, scores)
        if params.top_k:
            scores = processors.TopKLogitsWarper(params.top_k)(ids, scores)
        scores = processors.TopPLogitsWarper(params.top_p)(ids, scores)
        torch.testing.assert_close(distribution(row, params, previous).float(), scores[0].softmax(0))


@pytest.mark.parametrize("top_p", [0.01, 0.6, 0.95, 0.999])
@pytest.mark.parametrize("sharpness", [0.02, 1.0, 6.0])
def test_top_p_of_a_large_vocabulary_is_hugging_face_s(top_p, sharpness):
    """Nuclei of one token, of a few hundred and of nearly all: with and without a look at the whole vocabulary."""
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = sharpness * torch.randn(5000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = processors.TopPLogitsWarper(top_p)(None, logits[None].clone())[0].softmax(0)
    found = distribution(logits, SamplingParams(greedy=False, top_p=top_p))
    torch.testing.assert_close(found, expected)
    assert (found > 0).equal(expected > 0)


def test_top_p_after_top_k_of_a_large_vocabulary_is_hugging_face_s():
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = processors.TopPLogitsWarper(0.8)(None, processors.TopKLogitsWarper(50)(None, logits[None].clone()))[0]
    found = distribution(logits, SamplingParams(greedy=False, top_k=50, top_p=0.8))
    torch.testing.assert_close(found, expected.softmax(0))


@pytest.mark.parametrize("count", [3000, 500])
def test_of_equally_likely_tokens_top_p_keeps_those_of_lower_id(count):
    logits = torch.full((3000,), -math.inf)
    logits[-count:] = 0.0
    found = distribution(logits, SamplingParams(greedy=False, top_p=0.5))
    assert found.nonzero().squeeze(-1).tolist() == list(range(3000 - count, 3000 - count + count // 2))


def test_greedy_is_the_most_likely_token_after_the_penalty():
    assert sample(LOGITS, [GREEDY] * 5, range(5), PREVIOUS) == LOGITS.argmax(1).tolist()
    best = int(LOGITS[0].argmax())
    penalty = SamplingParams(repetition_penalty=100.0)
    assert sample(LOGITS[:1], [penalty], [0], [[best]]) != [best]
    assert distribution(LOGITS[0], GREEDY)[best] == 1.0


@pytest.mark.parametrize(("presence", "frequency"), [(0.7, 0.0), (0.0, 0.6), (-1.5, 2.0)])
@pytest.mark.parametrize("num_prompt", [0, 2, 5])
def test_presence_and_frequency_penalties_are_openai_s(presence, frequency, num_prompt):
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, where c counts the answer's tokens, written out by token; the
    control: with the prompt's tokens counted too it is another distribution."""
    text = [5, 7, 4, 9, 4, 7]
    params = SamplingParams(greedy=False, presence_penalty=presence, frequency_penalty=frequency)

    def expected(answer):
        own = [float(x) - answer.count(j) * frequency - (j in answer) * presence for j, x in enumerate(LOGITS[0])]
        return torch.tensor(own, dtype=torch.float64).softmax(0)

    found = distribution(LOGITS[0], params, text, num_prompt)
    torch.testing.assert_close(found, expected(text[num_prompt:]), atol=1e-6, rtol=0)
    assert num_prompt == 0 or not torch.allclose(found, expected(text), atol=1e-3)


def test_min_p_goes_before_top_p():
    """As in vLLM: top_p counts what min_p left. 0.5, 0.3, 0.2: min_p 0.5 leaves two, of which 0.625 >= 0.6 is one."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    assert distribution(logits, SamplingParams(greedy=False, min_p=0.5, top_p=0.6)).tolist() == [1.0, 0.0, 0.0]
    assert distribution(logits, SamplingParams(greedy=False, top_p=0.6))[1] > 0.3
    assert distribution(logits, SamplingParams(greedy=False, min_p=1.0)).tolist() == [1.0, 0.0, 0.0]


def test_greedy_follows_bias_and_penalties():
    best, second = LOGITS[0].topk(2).indices.tolist()
    gap = float(LOGITS[0][best] - LOGITS[0][second])
    for settings, previous in (
        ({"logit_bias": ((second, gap + 0.01),)}, []),
        ({"logit_bias": ((best, -100.0),)}, []),
        ({"presence_penalty": gap + 0.01}, [1, best]),
        ({"frequency_penalty": gap / 2 + 0.01}, [1, best, best]),
    ):
        params = SamplingParams(**settings)
        assert not params.takes_the_most_likely
        (choice,) = choose(LOGITS[:1], [params], [0], [previous], num_prompt=[1])
        assert choice.token == second
        (control,) = choose(LOGITS[:1], [params], [0], [previous], num_prompt=[len(previous)])
        assert (control.token == best) == bool(previous)
    assert SamplingParams(min_p=0.3).takes_the_most_likely


def test_draw_turns_uniform_numbers_into_the_distribution():
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    count = 4000
    drawn = [draw(probabilities, (i + 0.5) / count) for i in range(count)]
    assert [drawn.count(token) / count for token in range(6)] == probabilities.tolist()
    assert draw(probabilities, 0.0) == 1 and draw(probabilities, 1.0 - 2**-53) == 4


def test_uniform_numbers_are_uniform_fixed_and_keyed_by_all_three():
    numbers = [uniform(7, position, "token") for position in range(2000)]
    assert all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / 2000 - 0.5) < 4 / math.sqrt(12 * 2000)
    assert len({uniform(s, p, k) for s in (0, 1) for p in (0, 1) for k in ("token", "accept")}) == 8
    # Recorded: the same on every machine, device and version.
    assert uniform(0, 0, "token") == 0.46666252626062166


def test_a_row_does_not_depend_on_its_neighbours():
    params = [SamplingParams(greedy=False, seed=i, temperature=2.0, top_k=30) for i in range(5)]
    positions = [9, 3, 4, 9, 1]
    together = sample(LOGITS, params, positions, PREVIOUS)
    alone = [sample(LOGITS[i : i + 1], [params[i]], [positions[i]], [PREVIOUS[i]])[0] for i in range(5)]
    assert together == alone
    mixed = sample(LOGITS, [*params[:4], GREEDY], positions, PREVIOUS)
    assert mixed == [*alone[:4], int(LOGITS[4].argmax())]
    # The control: another seed or position does change what is drawn somewhere.
    assert [sample(LOGITS, params, [p + k for p in positions], PREVIOUS) for k in range(1, 4)] != [together] * 3


def test_what_was_drawn_comes_with_its_distribution():
    params = [SamplingParams(greedy=False, top_k=7), GREEDY, SamplingParams(repetition_penalty=1.2)]
    first, *others = choose(LOGITS[:3], params, [0, 0, 0], PREVIOUS[:3])
    assert torch.equal(first.distribution, distribution(LOGITS[0], params[0], PREVIOUS[0]))
    assert [other.distribution for other in others] == [None, None]


def test_plain_rows_take_one_argmax_whoever_is_beside_them(monkeypatch):
    argmax, seen = torch.Tensor.argmax, []

    def noted(self, *args, **kwargs):
        seen.append(tuple(self.shape))
        return argmax(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "argmax", noted)
    choose(LOGITS, [GREEDY, SamplingParams(greedy=False), GREEDY, GREEDY, GREEDY], [0] * 5, [()] * 5)
    assert seen == [(5, 40)]


def test_all_problems_in_one_message():
    with pytest.raises(ValueError) as caught:
        SamplingParams(temperature=0, top_k=0, top_p=1.5, repetition_penalty=-1, seed=-2, min_p=2,
                       presence_penalty=math.inf, logit_bias=((3, math.nan),))  # fmt: skip
    for part in (
        "temperature = 0 must be a finite number above 0; for the most likely token set greedy=True",
        "top_k = 0 must be a whole number from 1",
        "top_p = 1.5 must be above 0 and at most 1",
        "repetition_penalty = -1 must be a finite number above 0",
        "seed = -2 must be a whole number from 0",
        "min_p = 2 must be from 0 to 1",
        "presence_penalty = inf must be a finite number",
        "logit_bias holds (3, nan)",
    ):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="temperature = nan"):
        SamplingParams(temperature=math.nan)
