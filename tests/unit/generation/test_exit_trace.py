# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The table of all exits, and policies simulated on it, against the engine under the policy and a naive decoder."""

from __future__ import annotations

import random

import pytest
import torch

from nemo_ee.exits.config import ExitConfig
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.exit_trace import ExitTrace, TracePass
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.reference import decode
from nemo_ee.generation.sampling import GREEDY, SamplingParams, sample
from tests.helpers.reference_decoder import PlainTransformer, hidden_by_stop, logits_at
from tests.helpers.stub_models import TinyTransformer

ARCHITECTURES = ("embedding", "norm", "mlp", "layer")
RANGES = {"max_probability": (0.1, 0.7), "margin": (0.02, 0.5), "entropy": (0.8, 2.8)}
SEEDS = range(8)


def case(seed):
    """A model with exits of all kinds, prompts of different lengths and the full model's own continuations."""
    rng = random.Random(seed)
    layers = rng.randint(3, 5)
    exits = {(rng.randint(1, layers), kind) for kind in ARCHITECTURES}
    model = TinyTransformer(
        [ExitConfig(f"l{layer}-{kind}", layer, kind, "random", "own") for layer, kind in exits], num_layers=layers,
        seed=seed,
    )  # fmt: skip
    prompts = [[rng.randrange(model.vocab_size) for _ in range(rng.randint(1, 6))] for _ in range(4)]
    sampling = GREEDY if seed % 2 else SamplingParams(greedy=False, temperature=1.3, top_k=20, seed=seed)
    full = EarlyExitEngine(model).generate(
        prompts, max_new_tokens=[rng.randint(1, 12) for _ in prompts], mode="full", sampling=sampling
    )
    sequences = [[*prompt, *new] for prompt, new in zip(prompts, full.tokens, strict=True)]
    criterion = rng.choice(list(RANGES))
    names = [point.name for point in model.exits if rng.random() < 0.8]
    thresholds = {name: rng.uniform(*RANGES[criterion]) for name in names}
    cap = rng.choice([None, 0, 1, 3])
    policy = ExitPolicy(thresholds, criterion=criterion, active=tuple(names), max_pending_tokens=cap)
    return model, prompts, sequences, policy, sampling


def simulate(model, prompts, sequences, policy, sampling):
    """(table, choices) under the policy."""
    table = TracePass(model, policy.active, policy.criterion).run(
        sequences, [len(prompt) for prompt in prompts], [sampling] * len(prompts)
    )
    return table, table.choices([policy.thresholds[point.name] for point in table.exits], policy.max_pending_tokens)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_simulated_policy_reads_where_the_engine_does(seed):
    model, prompts, sequences, policy, sampling = case(seed)
    table, choice = simulate(model, prompts, sequences, policy, sampling)
    scored = EarlyExitEngine(model).score(sequences, [len(prompt) for prompt in prompts], policy=policy)
    names = [*(point.name for point in table.exits), None]
    for row, exits in enumerate(scored.exits):
        assert [names[index] for index in choice[row, : len(exits)]] == list(exits)
        assert table.valid[row].tolist() == [column < len(exits) for column in range(table.valid.shape[1])]
        read = table.logprobs[row].gather(1, choice[row][:, None])[: len(exits), 0]
        assert read.tolist() == pytest.approx(list(scored.logprobs[row]), abs=1e-5)
        excess = sum(table.logprobs[row, : len(exits), -1].tolist()) - sum(scored.logprobs[row])
        assert table.nll_excess(choice)[row].item() == pytest.approx(excess / len(exits), abs=1e-5)
        if sampling == GREEDY:
            differ = [not same and name is not None for same, name in zip(scored.is_greedy[row], exits, strict=True)]
            assert table.disagreement(choice)[row].item() == pytest.approx(sum(differ) / len(differ))
    depth = (table.depth(choice) * table.valid.sum(1)).sum() / table.valid.sum()
    assert depth.item() == pytest.approx(scored.stats.mean_depth)


@pytest.mark.parametrize("seed", SEEDS)
def test_risks_are_those_of_a_decoder_that_recomputes_everything(seed):
    model, prompts, sequences, policy, sampling = case(seed)
    table, choice = simulate(model, prompts, sequences, policy, sampling)
    for row, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True)):
        forced = sequence[len(prompt) :]
        _, exits, logits = decode(
            PlainTransformer(model), prompt, len(forced), thresholds=policy.thresholds, criterion=policy.criterion,
            max_pending_tokens=policy.max_pending_tokens, forced=forced,
        )  # fmt: skip
        states = hidden_by_stop(model, sequence)
        final = logits_at(model, None, states).log_softmax(dim=1)
        differ, excess = 0, 0.0
        for offset, (exit, own) in enumerate(zip(exits, logits, strict=True)):
            position = len(prompt) + offset
            token = sample(own[None], [sampling], [position], [sequence[:position]])[0]
            differ += exit is not None and token != sequence[position]
            excess += float(final[position - 1, sequence[position]] - own.log_softmax(0)[sequence[position]])
        assert table.disagreement(choice)[row].item() == pytest.approx(differ / len(forced))
        assert table.nll_excess(choice)[row].item() == pytest.approx(excess / len(forced), abs=1e-4)


def test_the_cases_leave_early_and_disagree_sometimes():
    """Control: of the tests above."""
    risks, early, capped = [], 0, 0
    for seed in SEEDS:
        model, prompts, sequences, policy, sampling = case(seed)
        table, choice = simulate(model, prompts, sequences, policy, sampling)
        risks += table.disagreement(choice).tolist()
        early += int((choice[table.valid] < len(table.exits)).sum())
        free = table.choices([policy.thresholds[point.name] for point in table.exits])
        capped += int((free != choice)[table.valid].sum())
    assert early > 50 and capped > 5 and any(0 < risk < 1 for risk in risks)


def test_batches_join_and_rows_are_selected():
    model, prompts, sequences, policy, sampling = case(3)
    whole, choice = simulate(model, prompts, sequences, policy, sampling)
    parts = [simulate(model, prompts[i : i + 1], sequences[i : i + 1], policy, sampling)[0] for i in range(4)]
    joined = ExitTrace.join(parts)
    thresholds = [policy.thresholds[point.name] for point in whole.exits]
    assert torch.equal(joined.choices(thresholds, policy.max_pending_tokens)[whole.valid], choice[whole.valid])
    assert torch.allclose(joined.nll_excess(choice), whole.nll_excess(choice), atol=1e-5)
    assert torch.equal(whole.select([2]).valid, whole.valid[2:3])


def test_an_unknown_exit_is_refused():
    with pytest.raises(ValueError, match=r"exits \['nine'\] are not the model's; its exits are"):
        TracePass(case(1)[0], ["nine"], "margin")
