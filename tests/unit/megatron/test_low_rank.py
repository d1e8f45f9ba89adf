# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Low-rank updates equal the same head with W + B A written into its weights, outputs and gradients."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.core_models import (
    exit_entry,
    exit_logits,
    microbatch,
    naive_logits,
    random_tokens,
    relative_difference,
    tiny_core_pair,
)

# One exit with updates and its twin that holds the merged weights.
TWINS = {
    "mlp, own output": (exit_entry(2, "mlp", "lora", rank=4), exit_entry(2, "mlp")),
    "layer, own output": (exit_entry(2, "layer", "lora", rank=4), exit_entry(2, "layer")),
    "norm, low-rank output": (exit_entry(1, "norm", "copy", "low_rank", rank=4), exit_entry(1, "norm")),
    "embedding, lora": (exit_entry(1, "embedding", "lora", rank=4), exit_entry(1, "embedding")),
    "mlp, both": (exit_entry(1, "mlp", "lora", "low_rank", rank=4), exit_entry(1, "mlp")),
}


@pytest.fixture(scope="module", params=["llama-bias", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Every pair of TWINS in one model; updates moved away from zero."""
    entries = {entry["name"]: entry for twins in TWINS.values() for entry in twins}
    _, model = tiny_core_pair(tmp_path_factory.mktemp("low_rank"), request.param, list(entries.values()))
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.model.exits.named_parameters():
            if name.endswith("low_rank_b"):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def _merge(lora, plain) -> int:
    """Write W + B A into the plain head; returns how many updates there were."""
    from nemo_ee.megatron.model.low_rank import LowRankLinear

    merged = 0
    modules = dict(plain.named_modules())
    for name, module in lora.named_modules():
        if isinstance(module, LowRankLinear):
            modules[name].weight.copy_(module.base.weight + module.low_rank_b @ module.low_rank_a)
            merged += 1
    if hasattr(lora, "output_update"):
        update = lora.output_update
        weight = lora.output.weight if lora.exit.output == "own" else lora._shared_weight()
        plain.output.weight.copy_(weight + update.low_rank_b @ update.low_rank_a)
        merged += 1
    return merged


@pytest.mark.parametrize("what", TWINS)
def test_updates_equal_merged_weights(model, what: str) -> None:
    lora, plain = (model.model.exits[entry["name"]] for entry in TWINS[what])
    tokens = random_tokens(model, length=11)
    before = exit_logits(model, tokens)
    assert relative_difference(before[lora.exit.name], before[plain.exit.name]) > 1e-2, "control: updates show"
    assert _merge(lora, plain) == {"mlp": 3, "layer": 5}.get(lora.exit.architecture, 1)
    after = exit_logits(model, tokens)
    assert relative_difference(after[lora.exit.name], after[plain.exit.name]) < 1e-5


@pytest.mark.parametrize("what", ["mlp, own output", "layer, own output"])
def test_gradients_of_updates_are_those_of_the_merged_weights(model, what: str) -> None:
    """dL/dB = dL/dW A^T and dL/dA = B^T dL/dW."""
    from nemo_ee.megatron.model.low_rank import LowRankLinear

    lora, plain = (model.model.exits[entry["name"]] for entry in TWINS[what])
    _merge(lora, plain)
    batch = microbatch(random_tokens(model, length=11))
    stage = model.model.forward_to_taps(batch)
    for head in (lora, plain):
        head.zero_grad()
        logits = naive_logits(head, stage.taps[head.exit.stop], stage.rotary_pos_emb, model.vocab_size)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).backward()
    whole = dict(plain.named_modules())
    updates = {name: m for name, m in lora.named_modules() if isinstance(m, LowRankLinear)}
    assert len(updates) == (2 if lora.exit.architecture == "mlp" else 4)
    for name, update in updates.items():
        gradient = whole[name].weight.grad
        assert update.base.weight.grad is None
        assert relative_difference(update.low_rank_b.grad, gradient @ update.low_rank_a.t()) < 1e-4, name
        assert relative_difference(update.low_rank_a.grad, update.low_rank_b.t() @ gradient) < 1e-4, name


def test_every_linear_of_a_lora_head_has_an_update(model) -> None:
    from nemo_ee.megatron.model.low_rank import LowRankLinear

    names = {n for n, m in model.model.exits["l2-layer-lora-own"].named_modules() if isinstance(m, LowRankLinear)}
    assert names == {
        "layer.self_attention.linear_qkv", "layer.self_attention.linear_proj",
        "layer.mlp.linear_fc1", "layer.mlp.linear_fc2",
    }  # fmt: skip
    backbone = [m for m in model.model.decoder.modules() if isinstance(m, LowRankLinear)]
    assert not backbone, "the backbone is left alone"
