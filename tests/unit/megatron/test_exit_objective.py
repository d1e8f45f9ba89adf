# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Distillation, mixtures and token weights in the fused loss, against torch's own losses over all logits.

fp32, compared by torch.testing's tolerances (1.3e-6 relative), sums of gradients 1e-5 of the largest.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.exits.objective import CROSS_ENTROPY, Objective
from nemo_ee.megatron.loss.linear_cross_entropy import linear_cross_entropy
from nemo_ee.megatron.loss.teacher import FullTeacher, TopKTeacher
from nemo_ee.megatron.loss.vocab_parallel import VocabularyShard

TOKENS, VOCABULARY, PADDED, WIDTH = 23, 13, 16, 7
WHOLE = VocabularyShard.of(vocab_size=VOCABULARY, padded_vocab_size=PADDED, rank=0, size=1, group=None)
OBJECTIVES = {
    f"labels {1 - b:g} teacher {b:g} T {t:g}{' top 4' if k else ''}{' by confidence' if c else ''}": Objective(
        1 - b, b, t, k, c
    )
    for b, t, k, c in itertools.product((1.0, 0.4), (1.0, 2.5, 0.5), (None, 4), (False, True))
} | {"labels by confidence": Objective(by_confidence=True)}


def _case(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    mask = (torch.rand(TOKENS, generator=generator) > 0.3).float()
    x, weight = draw(TOKENS, WIDTH), draw(PADDED, WIDTH)
    teacher_hidden, teacher_weight = draw(TOKENS, WIDTH), draw(PADDED, WIDTH)
    student = [tensor.requires_grad_() for tensor in (x, weight)]
    return student, labels, mask, teacher_hidden, teacher_weight


def _teacher(objective: Objective, hidden, weight, chunk_bytes: int = 1 << 20):
    if not objective.has_teacher:
        return None
    if objective.top_k is None:
        return FullTeacher(hidden, weight, objective.temperature)
    return TopKTeacher.of(
        hidden, weight, top_k=objective.top_k, temperature=objective.temperature, vocabulary=WHOLE,
        chunk_bytes=chunk_bytes,
    )  # fmt: skip


def _teacher_distribution(objective: Objective, hidden, weight) -> torch.Tensor:
    """[n, v] from the definition."""
    q = softmax(hidden @ weight[:VOCABULARY].t() / objective.temperature, dim=-1)
    if objective.top_k is not None:
        best = q.topk(objective.top_k, dim=-1)
        q = torch.zeros_like(q).scatter_(-1, best.indices, best.values)
        q = q / q.sum(dim=-1, keepdim=True)
    return q


def _naive(objective: Objective, student, labels, mask, hidden, weight):
    """(weighted loss sum, weights, per-token label loss, per-token KL, probabilities) with torch's own losses."""
    x, w = student
    logits = x @ w[:VOCABULARY].t()
    label_loss = cross_entropy(logits, labels, reduction="none")
    q = _teacher_distribution(objective, hidden, weight)
    kl = kl_div(log_softmax(logits / objective.temperature, dim=-1), q, reduction="none").sum(dim=-1)
    probabilities = softmax(logits, dim=-1)
    weights = mask * (probabilities.amax(dim=-1).detach() if objective.by_confidence else 1.0)
    loss = objective.label_weight * label_loss + objective.teacher_weight * objective.temperature**2 * kl
    return (weights * loss).sum(), weights, label_loss, kl, probabilities


@pytest.mark.parametrize("rows_per_chunk", [1, 5, 1000])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_equals_the_naive_loss_and_its_gradients(objective: Objective, rows_per_chunk: int) -> None:
    student, labels, mask, hidden, weight = _case()
    loss, weights, label_loss, kl, probabilities = _naive(objective, student, labels, mask, hidden, weight)
    expected = torch.autograd.grad(0.25 * loss, student)
    chunk_bytes = 4 * PADDED * rows_per_chunk
    result = linear_cross_entropy(
        [student[0]], [student[1]], labels, mask,
        vocabulary=WHOLE, objective=objective, teacher=_teacher(objective, hidden, weight, chunk_bytes),
        grad_scale=0.25, want_entropy=True, chunk_bytes=chunk_bytes,
    )  # fmt: skip
    sums = result.sums
    torch.testing.assert_close(sums.loss, loss.detach())
    torch.testing.assert_close(sums.weight, weights.sum())
    torch.testing.assert_close(sums.cross_entropy, (mask * label_loss).sum().detach())
    torch.testing.assert_close(sums.kl, (mask * kl).sum().detach() * objective.has_teacher)
    torch.testing.assert_close(sums.confidence, (mask * probabilities.amax(dim=-1)).sum().detach())
    entropy = -torch.xlogy(probabilities, probabilities).sum(dim=-1)
    torch.testing.assert_close(sums.entropy, (mask * entropy).sum().detach())
    assert sums.tokens == mask.sum()
    for ours, theirs in zip((result.input_grads[0], student[1].grad), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    assert not student[1].grad[VOCABULARY:].any()


@pytest.mark.parametrize(
    "wrong", [Objective(0.6, 0.4, 1.0), Objective(0.0, 1.0, 2.5, 3), Objective(0.0, 1.0, 2.5, None, True)]
)
def test_another_objective_gives_another_gradient(wrong: Objective) -> None:
    """Control: each setting matters."""
    student, labels, mask, hidden, weight = _case()
    right, grads = Objective(0.0, 1.0, 2.5), []
    for objective in (right, wrong):
        teacher = _teacher(objective, hidden, weight)
        options = {"vocabulary": WHOLE, "objective": objective, "teacher": teacher, "grad_scale": 1.0}
        grads.append(linear_cross_entropy([student[0]], [student[1]], labels, mask, **options).input_grads[0])
    assert (grads[0] - grads[1]).abs().max() > 0.05


def test_all_tokens_as_top_k_are_the_whole_distribution() -> None:
    student, labels, mask, hidden, weight = _case()
    results = []
    for top_k in (None, VOCABULARY):
        objective = Objective(0.0, 1.0, 2.0, top_k)
        options = {"vocabulary": WHOLE, "objective": objective, "teacher": _teacher(objective, hidden, weight)}
        results.append(linear_cross_entropy([student[0]], [student[1]], labels, mask, grad_scale=1.0, **options))
    torch.testing.assert_close(results[0].sums.loss, results[1].sums.loss)
    torch.testing.assert_close(results[0].input_grads, results[1].input_grads, rtol=1e-5, atol=1e-6)


def test_its_own_teacher_leaves_nothing_to_learn() -> None:
    student, labels, mask, _, _ = _case()
    teacher = FullTeacher(student[0].detach(), student[1].detach(), 2.0)
    result = linear_cross_entropy(
        [student[0]], [student[1]], labels, mask,
        vocabulary=WHOLE, objective=Objective(0.0, 1.0, 2.0), teacher=teacher, grad_scale=1.0,
    )  # fmt: skip
    assert abs(result.sums.kl) < 1e-5 and result.input_grads[0].abs().max() < 1e-5


def test_gradients_go_to_main_grad_where_there_is_one() -> None:
    student, labels, mask, _, _ = _case()
    student[1].main_grad = torch.ones(PADDED, WIDTH)
    linear_cross_entropy([student[0]], [student[1]], labels, mask, vocabulary=WHOLE, grad_scale=1.0)
    main, student[1].main_grad = student[1].main_grad, None
    assert student[1].grad is None
    linear_cross_entropy([student[0]], [student[1]], labels, mask, vocabulary=WHOLE, grad_scale=1.0)
    torch.testing.assert_close(main, 1.0 + student[1].grad)


def test_an_objective_is_read_from_the_block() -> None:
    block = {
        "exits": [{"layer": 1}, {"layer": 2, "objective": "distillation"}, {"layer": 3, "objective": "mixed"}],
        "distillation": {"temperature": 2.0, "top_k": 8, "weight": 0.25},
        "token_weights": "confidence",
    }
    config = EarlyExitConfig.from_mapping(block, num_layers=4)
    got = [Objective.of(config, name) for name in config.names]
    common = {"temperature": 2.0, "top_k": 8, "by_confidence": True}
    assert got == [Objective(1.0, 0.0, **common), Objective(0.0, 1.0, **common), Objective(0.75, 0.25, **common)]
    assert config.needs_final_exit
    plain = EarlyExitConfig.from_mapping({"exits": [{"layer": 1}]}, num_layers=4)
    assert Objective.of(plain, "layer1-mlp") == CROSS_ENTROPY and not plain.needs_final_exit
