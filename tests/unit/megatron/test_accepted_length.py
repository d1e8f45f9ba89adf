# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The weights of the reward against the enumeration of all verdicts, and against autograd. fp64 where it can be."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

from nemo_ee.megatron.loss.accepted_length import accepted_length_weights, label_probabilities
from nemo_ee.megatron.loss.vocab_parallel import VocabularyShard
from nemo_ee.megatron.loss.weight_casts import WeightCasts
from tests.helpers.core_models import core_model, exit_entry, microbatch, random_tokens
from tests.helpers.huggingface_models import save_tiny_model

PROBABILITIES = torch.tensor([[0.9, 0.2, 0.7, 0.5], [0.3, 1.0, 0.6, 0.0], [0.0, 0.8, 0.4, 0.1], [0.6, 0.0, 0.0, 0.0]])


def enumerated(run: list[float]) -> float:
    """Mean number of drafts in front of the first rejected one, over all 2^k verdicts on k independent drafts."""
    mean = 0.0
    for verdicts in product((True, False), repeat=len(run)):
        chance = 1.0
        for p, accepted in zip(run, verdicts, strict=True):
            chance *= p if accepted else 1 - p
        mean += chance * (verdicts.index(False) if False in verdicts else len(verdicts))
    return mean


def test_the_expectation_is_that_of_all_verdicts() -> None:
    expected, _ = accepted_length_weights(PROBABILITIES.double())
    assert expected.tolist() == pytest.approx([enumerated(run) for run in PROBABILITIES.double().tolist()])


def test_the_weights_are_the_gradient_for_the_log_probabilities() -> None:
    logs = PROBABILITIES.double().clamp(min=1e-9).log().requires_grad_()
    expected, weights = accepted_length_weights(logs.exp())
    expected.sum().backward()
    torch.testing.assert_close(weights.detach(), logs.grad)
    short = PROBABILITIES[3].tolist()  # a run of one token: nothing behind its end counts
    assert accepted_length_weights(PROBABILITIES[3:])[1].tolist() == [short]


def test_label_probabilities_are_those_of_the_softmax_whatever_the_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(11, 6, generator=generator), torch.randn(11, 3, generator=generator)]
    weights = [torch.randn(16, 6, generator=generator), torch.randn(16, 3, generator=generator)]
    labels = torch.randint(0, 13, (11,), generator=generator)
    whole = VocabularyShard.of(vocab_size=13, padded_vocab_size=16, rank=0, size=1, group=None)
    logits = sum(linear(x, weight) for x, weight in zip(inputs, weights, strict=True))[:, :13]
    wanted = logits.softmax(dim=-1).gather(1, labels[:, None])[:, 0]
    for chunk_bytes in (1, 4 * 16 * 4, 1 << 20):
        found = label_probabilities(inputs, weights, labels, vocabulary=whole, chunk_bytes=chunk_bytes)
        torch.testing.assert_close(found, wanted)
    with WeightCasts() as casts:
        for cast in casts.of(weights[:1], torch.bfloat16):
            cast.zero_()
        more = {"dtype": torch.bfloat16, "casts": casts}
        found = label_probabilities(inputs[:1], weights[:1], labels, vocabulary=whole, **more)
    torch.testing.assert_close(found, torch.full((11,), 1 / 13), msg="the casts of the step are read")
    assert label_probabilities([inputs[0][:0]], weights[:1], labels[:0], vocabulary=whole).shape == (0,)


@pytest.mark.parametrize(("architecture", "parts"), [("mlp", 1), ("layer", 1), ("mlp", 2)])
def test_the_step_follows_the_gradient_of_the_expected_accepted_length(
    tmp_path: Path, architecture: str, parts: int
) -> None:
    """All the way: the gradients of a weighted step against autograd of E over naive logits. Runs overlap. In two
    microbatches, too."""
    from nemo_ee.exits.objective import CROSS_ENTROPY
    from nemo_ee.megatron.loss.exit_metrics import ExitSums
    from nemo_ee.megatron.optim.stage_optimizers import stage_optimizers
    from nemo_ee.megatron.pipeline.draft_weights import DraftWeights
    from nemo_ee.megatron.pipeline.tuning_step import tune_global_batch
    from tests.helpers.core_models import naive_logits

    save_tiny_model(tmp_path, "llama")
    entry = exit_entry(2, architecture, init="random")
    core = core_model(tmp_path, [entry])
    batch = microbatch(random_tokens(core, batch=2, length=9))
    behind = batch.tokens.numel()
    runs = torch.tensor([[1, 2, 3], [2, 3, 4], [10, 11, 12], [7, behind, behind]])
    (head,) = core.model.exits
    optimizers = stage_optimizers(core.model, {"name": "adamw", "lr": 1e-3})
    if parts == 1:
        own = [(batch, runs)]
    else:  # the rows apart
        ends = [torch.tensor([[1, 2, 3], [2, 3, 4], [7, 9, 9]]), torch.tensor([[1, 2, 3]])]
        own = [
            (microbatch(batch.tokens[[row]], labels=batch.labels[[row]]), in_row) for row, in_row in enumerate(ends)
        ]
    weigh, sums = DraftWeights(own), ExitSums([entry["name"]], torch.device("cpu"))
    assert core.context.objectives[entry["name"]] == CROSS_ENTROPY
    tune_global_batch(
        core.context, [one for one, _ in own], optimizers=optimizers, sums=sums, weigh=weigh,
        loss_weights={entry["name"]: 1.0},
    )  # fmt: skip
    found = {name: value.grad.clone() for name, value in head.named_parameters() if value.grad is not None}

    head.zero_grad()
    output = core.model.forward_to_taps(batch)
    with torch.enable_grad():
        logits = naive_logits(head, output.taps[head.exit.stop], output.rotary_pos_emb, core.vocab_size)
        logs = logits.log_softmax(dim=-1).gather(-1, batch.labels[..., None]).flatten()
        padded = torch.cat((logs.exp(), torch.zeros(1)))[runs]
        accepted = padded.cumprod(dim=-1)
        (-accepted.sum()).backward()
    total = sum(accepted[:, index:].sum() for index in range(runs.shape[1])).item()  # of all weights
    assert weigh.expected == pytest.approx(accepted.sum().item() / len(runs))
    assert found, "nothing was compared"
    for name, grad in found.items():
        wanted = dict(head.named_parameters())[name].grad / total
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
