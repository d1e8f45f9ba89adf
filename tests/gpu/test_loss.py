# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The fused loss of an exit on a device, against torch's autograd in fp64 on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from nemo_ee.exits.objective import Objective
from nemo_ee.megatron.loss.linear_cross_entropy import linear_cross_entropy
from nemo_ee.megatron.loss.teacher import FullTeacher, TopKTeacher
from nemo_ee.megatron.loss.vocab_parallel import VocabularyShard

TOKENS, HIDDEN, VOCABULARY, PADDED, TEMPERATURE = 300, 64, 1000, 1024, 1.5
OBJECTIVES = {
    "labels": Objective(),
    "distillation": Objective(0.0, 1.0, TEMPERATURE),
    "mixed": Objective(0.5, 0.5, TEMPERATURE),
    "top_k": Objective(0.0, 1.0, TEMPERATURE, top_k=8),
}
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # of the largest gradient; bf16 has 8 bits


def _expected(objective: Objective, x, weight, final, labels, kept=None):
    """Loss sum and gradients for inputs and weight, fp64. `kept`: the teacher's most likely tokens."""
    x, weight = (value.double().requires_grad_() for value in (x, weight))
    logits = (x @ weight.t())[:, :VOCABULARY]
    teacher = (final.double() @ weight.detach().t())[:, :VOCABULARY] / objective.temperature
    if kept is not None:
        teacher = torch.full_like(teacher, -torch.inf).scatter(1, kept, teacher.gather(1, kept))
    soft = log_softmax(logits / objective.temperature, dim=-1)
    kl = kl_div(soft, softmax(teacher, dim=-1), reduction="sum") * objective.temperature**2
    loss = objective.label_weight * cross_entropy(logits, labels, reduction="sum") + objective.teacher_weight * kl
    return loss.item(), *torch.autograd.grad(loss, (x, weight))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients(device: torch.device, dtype: torch.dtype, name: str) -> None:
    objective, generator = OBJECTIVES[name], torch.Generator().manual_seed(1)
    x, final = (torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype) for _ in range(2))
    weight = (0.3 * torch.randn(PADDED, HIDDEN, generator=generator)).to(dtype)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    vocabulary, on_cpu, kept = VocabularyShard(0, VOCABULARY, None), (x, weight, final, labels), None
    x, weight, final, labels = (value.to(device) for value in on_cpu)
    x.requires_grad_(), weight.requires_grad_()
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    teacher = FullTeacher(final, weight.detach(), TEMPERATURE)
    if objective.top_k:
        options = {"top_k": objective.top_k, "temperature": TEMPERATURE, "vocabulary": vocabulary}
        teacher = TopKTeacher.of(final, weight.detach(), **options)
        kept = teacher.ids.cpu()  # in bf16 the last of them may be another than in fp64
    loss, *expected = _expected(objective, *on_cpu, kept)
    result = linear_cross_entropy(
        [x], [weight], labels, torch.ones(TOKENS, device=device), vocabulary=vocabulary, objective=objective,
        teacher=teacher, grad_scale=1.0, chunk_bytes=4 * PADDED * 100,
    )  # fmt: skip
    assert abs(result.sums.loss.item() - loss) <= TOLERANCES[dtype] * abs(loss)
    for ours, theirs in zip((result.input_grads[0], weight.main_grad), expected, strict=True):
        difference = (ours.double().cpu() - theirs).abs().max()
        assert 0 < difference <= TOLERANCES[dtype] * theirs.abs().max()
