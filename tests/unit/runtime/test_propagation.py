# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""`kv: propagate` against transformers' modules without a cache (tests/helpers/propagation_reference.py).

Tokens and exits exactly, logits within 1e-5 of the largest, fp32 on the CPU; with these seeds no decision is within
2e-6 of its threshold.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is the reference here")

import torch

from nemo_ee.exits.confidence import confidence, leaves
from nemo_ee.exits.criteria import OF_LOGITS
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.runtime.loader import load_model
from nemo_ee.runtime.propagation import PropagatingBatch, generate_propagating
from tests.helpers.propagation_reference import NaivePropagation, save_early_exit_directory

EXITS = [("mlp", 1, True), ("norm", 1, False), ("embedding", 2, True), ("mlp", 2, False)]
PROMPTS = [[5, 71, 13, 9, 0, 44], [3], [100, 99, 98, 97]]
NEW_TOKENS = [9, 12, 4]


@pytest.fixture(scope="module", params=["llama", "qwen2", "mistral", "llama-bias"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp(request.param)
    reference = save_early_exit_directory(folder, request.param, EXITS, num_hidden_layers=4)
    return reference, folder, load_model(folder)


def quantiles(model, prompts, criterion: str, quantile: float) -> dict[str, float]:
    """Per exit the value that this share of its confidences lies below, over one full-depth pass."""
    never = {"entropy": 1e-7}.get(criterion, 1 - 1e-7)
    seen: dict[str, list[float]] = {exit.name: [] for exit in model.exits}
    asked = ExitPolicy(never, criterion).evaluated_exits(model.exits)
    batch = PropagatingBatch(model, [asked], criterion, 32)
    original = model.exit_logits

    def recording(name, hidden, positions, cache):
        logits = original(name, hidden, positions, cache)
        if name is not None:
            seen[name] += confidence(logits, criterion).tolist()
        return logits

    model.exit_logits = recording
    try:
        for position, token in enumerate(sum(prompts, [])):
            batch.run({0: (position, [token])}, evaluating=True)
    finally:
        del model.exit_logits
    return {name: torch.tensor(values).quantile(quantile).item() for name, values in seen.items()}


@pytest.mark.parametrize("criterion", OF_LOGITS)
def test_tokens_and_exits_are_the_naive_decoder_s(criterion: str, made) -> None:
    reference, folder, model = made
    used = set()
    for quantile in (0.2, 0.5, 0.8):
        thresholds = quantiles(model, PROMPTS, criterion, quantile)

        def sure(row: torch.Tensor, threshold: float) -> bool:
            value = confidence(row, criterion)
            assert abs(value.item() - threshold) > 2e-6
            return bool(leaves(value, threshold, criterion))

        naive = NaivePropagation(reference, folder)
        expected = naive.generate(PROMPTS, NEW_TOKENS, thresholds, sure)
        ours = generate_propagating(
            model, PROMPTS, max_new_tokens=NEW_TOKENS, policy=ExitPolicy(thresholds, criterion)
        )
        assert [list(own) for own in ours.tokens] == expected[0]
        assert [list(own) for own in ours.exits] == expected[1]
        used |= {exit for own in ours.exits for exit in own}
    assert len(used) >= 3, "control: tokens leave at several exits and at the end"


def test_each_row_is_read_from_its_own_exit(made) -> None:
    """Thresholds of their own for each sequence; a sequence without any keeps the others at full depth."""
    reference, folder, model = made
    low, high = (quantiles(model, PROMPTS, "max_probability", q) for q in (0.3, 0.6))
    one = dict(list(high.items())[1:3])

    def passes(row: torch.Tensor, threshold: float) -> bool:
        value = confidence(row, "max_probability").item()
        assert abs(value - threshold) > 2e-6
        return value > threshold

    for thresholds in ([low, high, one], [low, {}, one]):
        naive = NaivePropagation(reference, folder)
        expected = naive.generate(PROMPTS, NEW_TOKENS, thresholds, passes, row_by_row=True)
        policies = [ExitPolicy(own, active=tuple(own)) for own in thresholds]
        ours = generate_propagating(model, PROMPTS, max_new_tokens=NEW_TOKENS, policy=policies, row_by_row=True)
        assert [list(own) for own in ours.tokens] == expected[0]
        assert [list(own) for own in ours.exits] == expected[1]
        steps = list(zip(*(own[1:4] for own in ours.exits), strict=True))
        assert any(len(set(step)) > 1 for step in steps) == all(thresholds), "control: rows of one step differ"


def test_logits_after_tokens_that_left_and_a_control(made) -> None:
    """A token that leaves in between changes the next full-depth logits, in just the way the reference says."""
    reference, folder, model = made
    asked = ExitPolicy(0.0).evaluated_exits(model.exits)[:1]
    naive, text = NaivePropagation(reference, folder), [5, 71, 13, 9, 0, 44]
    rows, full = [], []
    for leave in (True, False):
        batch = PropagatingBatch(model, [asked if leave else ()], "max_probability", 16)
        for position, token in enumerate(text):
            logits = batch.run({0: (position, [token])}, evaluating=position in (2, 3))[1]
            (rows if leave else full).append(logits[0])
    for position, token in enumerate(text):
        thresholds = {asked[0].point.name: 0.0} if position in (2, 3) else {}
        expected = naive.run({0: token}, thresholds, lambda row, threshold: True)[1][0]
        assert (rows[position] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (rows[-1] - full[-1]).abs().max() > 1e-3 * full[-1].abs().max(), "control: not the exact logits"


def test_thresholds_never_met_give_the_engine_s_tokens(made) -> None:
    _, _, model = made
    policy = ExitPolicy(1 - 1e-7)
    ours = generate_propagating(model, PROMPTS, max_new_tokens=NEW_TOKENS, policy=policy)
    exact = EarlyExitEngine(model).generate(PROMPTS, max_new_tokens=NEW_TOKENS, mode="full")
    assert ours.tokens == exact.tokens and {exit for own in ours.exits for exit in own} == {None}


def test_the_benchmark_s_two_ways_agree_where_nothing_leaves(made) -> None:
    """Perplexity within 1e-5, batches of two and a rest of one; a control where tokens leave."""
    from benchmarks.propagation import carried, propagated

    _, _, model = made
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(0, model.vocab_size, (3, 12), generator=generator).tolist()
    never, always = ExitPolicy(1 - 1e-7), ExitPolicy(0.0)
    exact = carried(model, texts, 5, never)
    ours = propagated(model, texts, 5, never, 2)
    assert ours.perplexity == pytest.approx(exact.perplexity, rel=1e-5)
    assert ours.mean_depth == exact.mean_depth == 4
    assert propagated(model, texts, 5, always, 2).mean_depth == carried(model, texts, 5, always).mean_depth < 2


def test_a_stop_token_ends_a_sequence(made) -> None:
    _, _, model = made
    policy = ExitPolicy(1 - 1e-7)
    free = generate_propagating(model, PROMPTS, max_new_tokens=NEW_TOKENS, policy=policy)
    stop = free.tokens[1][3]
    ended = generate_propagating(model, PROMPTS, max_new_tokens=NEW_TOKENS, policy=policy, stop_tokens={stop})
    assert ended.tokens[1] == free.tokens[1][: free.tokens[1].index(stop) + 1]


def test_what_it_cannot_do_is_refused(made, tmp_path: Path) -> None:
    _, _, model = made
    with pytest.raises(ValueError, match="max_pending_tokens=2.*prompt 0 has 1 tokens and requests 99"):
        generate_propagating(model, [[1]], max_new_tokens=[99], policy=ExitPolicy(0.5, max_pending_tokens=2))
