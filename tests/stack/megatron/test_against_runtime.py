# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Logits, tokens and exits of the Megatron model on this version against the runtime, which needs no Megatron.

fp32; logits within 1e-5 of the largest, tokens and exits equal.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_ee.exits.confidence import confidence
from nemo_ee.generation.decoding_model import TokenPositions
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.sampling import SamplingParams
from tests.helpers.core_models import exit_logits, random_tokens, relative_difference
from tests.stack.megatron.runtime_twin import EXITS, prompts, twins

TOLERANCE = 1e-5
FAMILIES = ("llama-llama3", "qwen3-tied", "gpt2", "opt")
VARIED = SamplingParams(greedy=False, temperature=2.0, seed=3)  # greedy, a tiny model soon repeats itself


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    model, runtime = twins(tmp_path_factory.mktemp(request.param), request.param)
    return SimpleNamespace(model=model, runtime=runtime)


def runtime_logits(runtime: Any, tokens: torch.Tensor, exit: str | None) -> torch.Tensor:
    """[b, s, v] of an exit, None = the final one, all positions in one go."""
    batch, length = tokens.shape
    positions = TokenPositions.of({row: range(length) for row in range(batch)})
    cache = runtime.new_cache(batch, length, tuple(point.name for point in runtime.exits))
    stop = next((point.stop for point in runtime.exits if point.name == exit), 2 * runtime.num_layers)
    hidden = runtime.run(runtime.embed(tokens.flatten(), positions), positions, 0, stop, cache)
    return runtime.exit_logits(exit, hidden, positions, cache).view(batch, length, -1)


def test_logits_of_the_full_model_and_of_every_exit(pair: SimpleNamespace) -> None:
    model, tokens = pair.model, random_tokens(pair.model, length=24)
    with torch.no_grad():
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        full = model.model(tokens, positions, None)[..., : model.vocab_size]  # Megatron's own forward pass
    assert relative_difference(full, runtime_logits(pair.runtime, tokens, None)) < TOLERANCE
    ours = exit_logits(model, tokens)
    assert list(ours) == [exit["name"] for exit in EXITS]
    theirs = {name: runtime_logits(pair.runtime, tokens, name) for name in ours}
    for name, logits in ours.items():
        assert relative_difference(logits, theirs[name]) < TOLERANCE, name
        others = [other for other in theirs if other != name]
        assert all(relative_difference(logits, theirs[other]) > 1e-2 for other in others), f"control: {name}"


@pytest.mark.parametrize("mode", ["early_exit", "self_speculative", "full"])
def test_decoding_gives_the_same_tokens_and_exits(pair: SimpleNamespace, mode: str) -> None:
    from nemo_ee.megatron.decoding.decoding_adapter import MegatronDecodingModel

    tokens = torch.tensor(prompts(pair.runtime.vocab_size, (30, 30)))
    names = [exit["name"] for exit in EXITS]
    thresholds = {
        name: float(confidence(runtime_logits(pair.runtime, tokens, name), "max_probability").quantile(0.8))
        for name in names
    }
    call = {"max_new_tokens": 20, "mode": mode, "policy": ExitPolicy(thresholds), "sampling": VARIED}
    own = prompts(pair.runtime.vocab_size)
    ours, theirs = (
        EarlyExitEngine(model).generate(own, **call)
        for model in (MegatronDecodingModel(pair.model.model), pair.runtime)
    )
    assert ours.tokens == theirs.tokens
    assert [event.exit for event in ours.events] == [event.exit for event in theirs.events]
    found = {event.exit for event in theirs.events}
    assert (len(found) > 3) if mode == "early_exit" else found, f"tokens leave only at {found}: too little is compared"
