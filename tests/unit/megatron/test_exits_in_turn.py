# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The exits of a stage side by side under one teacher, against torch's losses over all logits of one exit at a time.

fp32; sums to 1e-5, gradients to 1e-5 of the largest. `tests/stack/megatron/test_tuning.py` has tensor parallelism,
sequence parallelism and stages.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from tests.helpers.core_models import exit_entry, microbatch, naive_logits, random_tokens, tiny_core_pair

TEMPERATURE = 1.5
EXITS = [
    {**exit_entry(1, "mlp"), "objective": "distillation"},
    {**exit_entry(2, "norm", output="shared"), "objective": "mixed"},
    {**exit_entry(2, "mlp", output="low_rank", rank=3), "objective": "distillation"},
    {**exit_entry(2, "layer", "random"), "objective": "distillation"},
    exit_entry(1, "norm"),
]
BLOCK = {"distillation": {"temperature": TEMPERATURE, "weight": 0.4}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    return tiny_core_pair(tmp_path_factory.mktemp("taught"), "llama-bias", EXITS, early_exit=BLOCK)[1]


def _work(model):
    """A microbatch with tokens that do not count, its taps, and the final exit's logits."""
    tokens = random_tokens(model, length=13)
    mask = (torch.arange(26).view(2, 13) % 3 != 0).float()
    batch = microbatch(tokens, mask=mask)
    output = model.model.forward_to_taps(batch)
    return batch, output, model.model.final_hidden(output.hidden), model.model.backbone_output_weight()


class _Counted:
    """How often distributions are formed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from nemo_ee.megatron.loss.teacher import FullTeacher

        self.formed, chunk = 0, FullTeacher.chunk

        def counting(teacher, part, vocabulary):
            self.formed += 1
            return chunk(teacher, part, vocabulary)

        monkeypatch.setattr(FullTeacher, "chunk", counting)


@pytest.mark.parametrize("positions", [1, 5, 13])
def test_losses_and_gradients(model, positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_ee.megatron.loss.teacher import FullTeacher
    from nemo_ee.megatron.pipeline.exit_loss import exits_in_turn, tune_exit

    batch, output, hidden, weight = _work(model)
    # Four buffers of fp32 logits: the logits, q, z / T and their difference. A piece is whole positions of both rows.
    context = replace(model.context, chunk_bytes=4 * 4 * len(weight) * 2 * positions)
    for head in model.model.exits:
        head.zero_grad()
    counted, sums = _Counted(monkeypatch), dict.fromkeys(model.early_exit.names, 0.0)
    for head, *work, teacher in exits_in_turn(context, batch, output, FullTeacher(hidden, weight, TEMPERATURE)):
        sums[head.exit.name] += tune_exit(context, head, *work, grad_scale=0.3, teacher=teacher).sums.loss.item()
    pieces = -(-13 // positions)
    assert counted.formed == 2 * pieces, "once for three exits, and once for the `layer` exit"
    z = (hidden.view(13, 2, -1).transpose(0, 1) @ weight.t())[..., : model.vocab_size]
    for head in model.model.exits:
        objective, name = context.objectives[head.exit.name], head.exit.name
        logits = naive_logits(head, output.taps[head.exit.stop], output.rotary_pos_emb, model.vocab_size)
        loss = objective.label_weight * cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
        if objective.has_teacher:
            p, q = log_softmax(logits / TEMPERATURE, -1), (z / TEMPERATURE).softmax(-1)
            kl = kl_div(p, q, reduction="none").sum(-1).flatten()
            loss = loss + objective.teacher_weight * TEMPERATURE**2 * kl
        total = (loss * batch.loss_mask.flatten()).sum()
        assert sums[name] == pytest.approx(total.item(), rel=1e-5), name
        trained = {key: value for key, value in head.named_parameters() if value.requires_grad}
        for (key, value), expected in zip(
            trained.items(), torch.autograd.grad(0.3 * total, list(trained.values())), strict=True
        ):
            largest = expected.abs().max().item()
            torch.testing.assert_close(value.grad, expected, rtol=1e-5, atol=1e-5 * largest, msg=f"{name} {key}")


def test_one_position_may_be_more_than_a_chunk(model) -> None:
    """The piece is then several chunks of the loss, which read their parts of it."""
    from nemo_ee.megatron.loss.teacher import FullTeacher
    from nemo_ee.megatron.pipeline.exit_loss import exits_in_turn, tune_exit

    batch, output, hidden, weight = _work(model)
    losses = []
    for chunk_bytes in (1, 2**26):
        context = replace(model.context, chunk_bytes=chunk_bytes)
        losses.append(dict.fromkeys(model.early_exit.names, 0.0))
        for head, *work, teacher in exits_in_turn(context, batch, output, FullTeacher(hidden, weight, TEMPERATURE)):
            loss = tune_exit(context, head, *work, grad_scale=1.0, teacher=teacher).sums.loss
            losses[-1][head.exit.name] += loss.item()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_control_another_teacher_gives_other_losses(model) -> None:
    from nemo_ee.megatron.loss.teacher import FullTeacher
    from nemo_ee.megatron.pipeline.exit_loss import exits_in_turn, tune_exit

    batch, output, hidden, weight = _work(model)
    totals = []
    for final in (hidden, hidden.roll(1, 0)):  # the distribution of the token before
        teacher = FullTeacher(final, weight, TEMPERATURE)
        totals.append({head.exit.name: tune_exit(model.context, head, *work, grad_scale=1.0, teacher=own).sums.loss
                       for head, *work, own in exits_in_turn(model.context, batch, output, teacher)})  # fmt: skip
    assert {name for name in totals[0] if abs(totals[0][name] - totals[1][name]) > 0.1} == {
        entry["name"] for entry in EXITS if "objective" in entry
    }


def test_weights_that_would_be_cast_for_every_piece(model) -> None:
    """Under mixed precision with fp32 parameters every exit runs alone, on the whole microbatch."""
    from nemo_ee.megatron.loss.teacher import FullTeacher
    from nemo_ee.megatron.pipeline.exit_loss import exits_in_turn

    batch, output, hidden, weight = _work(model)
    teacher = FullTeacher(hidden, weight, TEMPERATURE)
    for autocast, alone in ((torch.bfloat16, 5), (torch.float32, 2)):
        context = replace(model.context, autocast=autocast, chunk_bytes=1)
        found = [own is teacher for _, _, _, own in exits_in_turn(context, batch, output, teacher)]
        assert sum(found) == alone and (len(found) == alone) == (autocast is torch.bfloat16)
