# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What exits compute at step 0 (against transformers), and the gradients that they are tuned with (against autograd).

Bitwise where two ways must run the same sums, 1e-5 of the largest value where they run them in another order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from tests.helpers.core_models import (
    ALL_ARCHITECTURES,
    exit_entry,
    exit_logits,
    microbatch,
    naive_logits,
    random_tokens,
    relative_difference,
    tiny_core_pair,
)
from tests.helpers.huggingface_models import TINY_MODELS, reference_logits

TOLERANCE = 1e-5
SAME_AT_STEP_0 = [(init, output) for init in ("copy", "lora") for output in ("own", "shared", "low_rank")]


@dataclass
class Lens:
    """The logit lens by transformers itself, of every depth and kind of exit."""

    raw: dict[int, torch.Tensor]  # layer -> [b, s, h] after that many layers, never normed
    one_more: dict[int, torch.Tensor]  # layer -> the same after one more pass through the last layer
    norm: torch.nn.Module
    head: torch.nn.Module

    @torch.no_grad()
    def logits(self, layer: int, architecture: str) -> torch.Tensor:
        hidden = (self.one_more if architecture == "layer" else self.raw)[layer]
        return self.head(hidden if architecture == "embedding" else self.norm(hidden))


@torch.no_grad()
def lens_of(reference: torch.nn.Module, tokens: torch.Tensor) -> Lens:
    family = reference.config.model_type
    body = {"gpt2": lambda: reference.transformer, "opt": lambda: reference.model.decoder}.get(
        family, lambda: reference.model
    )()
    layers = body.h if family == "gpt2" else body.layers
    norm = {"gpt2": "ln_f", "opt": "final_layer_norm"}.get(family, "norm")
    called, last_output = {}, {}
    hooks = [
        layers[-1].register_forward_pre_hook(lambda _, a, k: called.update(args=a, kwargs=k), with_kwargs=True),
        layers[-1].register_forward_hook(lambda _, a, out: last_output.update(hidden=out[0])),
    ]
    states = reference(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    for hook in hooks:
        hook.remove()
    depth = len(layers)
    raw = {layer: states[layer] for layer in range(1, depth)} | {depth: last_output["hidden"]}
    kwargs = {key: value for key, value in called["kwargs"].items() if key != "hidden_states"}
    one_more = {layer: layers[-1](hidden, *called["args"][1:], **kwargs)[0] for layer, hidden in raw.items()}
    if depth > 1:
        torch.testing.assert_close(one_more[depth - 1], raw[depth], rtol=0, atol=0)
    return Lens(raw, one_more, getattr(body, norm), reference.get_output_embeddings())


@pytest.fixture(scope="module", params=sorted(TINY_MODELS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(transformers model, our model with every exit that equals the lens, at every layer)."""
    depth = TINY_MODELS[request.param][1].get("num_hidden_layers") or TINY_MODELS[request.param][1]["n_layer"]
    exits = [
        exit_entry(layer, architecture, init, output, rank=3)
        for layer in range(1, depth + 1)
        for architecture in ALL_ARCHITECTURES
        for init, output in SAME_AT_STEP_0
    ]
    return tiny_core_pair(tmp_path_factory.mktemp(request.param), request.param, exits)


def test_full_model_and_exits_equal_transformers_at_step_0(pair) -> None:
    reference, model = pair
    tokens = random_tokens(model)
    with torch.no_grad():
        ours = model.model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)[..., : model.vocab_size]
    assert relative_difference(ours, reference_logits(reference, tokens)) < TOLERANCE
    lens = lens_of(reference, tokens)
    assert relative_difference(lens.logits(model.cfg.num_layers, "norm"), reference_logits(reference, tokens)) < 1e-6
    wrong = {}
    for name, logits in exit_logits(model, tokens).items():
        exit = model.early_exit.exit(name)
        # An mlp exit's own MLP is layer k's: both are the logit lens of layer k.
        kind = "norm" if exit.architecture == "mlp" else exit.architecture
        difference = relative_difference(logits, lens.logits(exit.layer, kind))
        if not difference < TOLERANCE:
            wrong[name] = difference
    assert not wrong


def test_the_lens_tells_layers_and_architectures_apart(pair) -> None:
    """Control: each wrong layer and each wrong kind of lens is far outside of the tolerance."""
    reference, model = pair
    tokens = random_tokens(model)
    lens = lens_of(reference, tokens)
    ours = exit_logits(model, tokens)
    for layer in range(1, model.cfg.num_layers + 1):
        for architecture in ("embedding", "norm", "layer"):
            logits = ours[f"l{layer}-{architecture}-copy-own"]
            for other_layer in range(1, model.cfg.num_layers + 1):
                for other in ("embedding", "norm", "layer"):
                    # One more last layer after layer L-1 is the full model: the same by construction.
                    same = (other_layer, other) == (layer, architecture) or {
                        (layer, architecture),
                        (other_layer, other),
                    } == {(model.cfg.num_layers - 1, "layer"), (model.cfg.num_layers, "norm")}
                    difference = relative_difference(logits, lens.logits(other_layer, other))
                    assert (difference < TOLERANCE) if same else (difference > 0.01), (layer, architecture, other)


def test_a_head_without_its_copied_mlp_is_detected(tmp_path) -> None:
    """Control: an mlp exit with another layer's MLP does not pass for the lens."""
    reference, model = tiny_core_pair(tmp_path, "llama", [exit_entry(1, "mlp"), exit_entry(2, "mlp")])
    tokens = random_tokens(model)
    heads = model.model.exits
    with torch.no_grad():
        for ours, theirs in zip(
            heads["l1-mlp-copy-own"].mlp.parameters(), heads["l2-mlp-copy-own"].mlp.parameters(), strict=True
        ):
            ours.copy_(theirs)
    lens = lens_of(reference, tokens)
    assert relative_difference(exit_logits(model, tokens)["l1-mlp-copy-own"], lens.logits(1, "norm")) > 0.01


def test_truncated_model_gives_the_same_exits(tmp_path) -> None:
    """Layers past the deepest exit and that exit's unused MLP are not built; nothing else changes, bitwise."""
    exits = [exit_entry(1, "norm"), exit_entry(2, "mlp", "lora", "low_rank"), exit_entry(1, "layer", output="shared")]
    _, whole = tiny_core_pair(tmp_path, "llama-tied", exits)
    _, cut = tiny_core_pair(tmp_path, "llama-tied", exits, full_depth=False)
    assert len(cut.model.decoder.layers) == 2 < len(whole.model.decoder.layers)
    assert not list(cut.model.decoder.layers[-1].mlp.parameters()), "the deepest exit replaces this MLP"
    tokens = random_tokens(whole)
    for name, logits in exit_logits(cut, tokens).items():
        torch.testing.assert_close(logits, exit_logits(whole, tokens)[name], rtol=0, atol=0)


# -- gradients ------------------------------------------------------------------------------------------------------

TRAINED = [
    exit_entry(2, architecture, init, output, rank=3)
    for architecture in ALL_ARCHITECTURES
    for init, output in (*SAME_AT_STEP_0, ("random", "own"))
]


@pytest.fixture(scope="module", params=["llama-bias", "gpt2"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A truncated model with every kind of exit, its low-rank updates moved away from zero."""
    _, model = tiny_core_pair(tmp_path_factory.mktemp("trained"), request.param, TRAINED, full_depth=False)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.model.exits.named_parameters():
            if name.endswith("low_rank_b"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def _batch(model):
    tokens = random_tokens(model, length=13)
    mask = (torch.arange(26).view(2, 13) % 3 != 0).float() * torch.tensor([[1.0], [0.5]])
    labels = tokens.roll(-1, dims=1)
    labels[mask == 0] = -100  # labels that do not count are not read
    return microbatch(tokens, labels=labels, mask=mask)


def _naive_loss(head, stage, batch, vocab_size: int) -> torch.Tensor:
    logits = naive_logits(head, stage.taps[head.exit.stop], stage.rotary_pos_emb, vocab_size)
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.clamp(min=0).flatten(), reduction="none"
    )
    return (losses * batch.loss_mask.flatten()).sum()


@pytest.mark.parametrize("index", range(len(TRAINED)), ids=[exit["name"] for exit in TRAINED])
def test_gradients_equal_autograd_through_all_logits(trained, index: int) -> None:
    from nemo_ee.megatron.pipeline.exit_loss import tune_exit

    model, batch = trained, _batch(trained)
    head = model.model.exits[TRAINED[index]["name"]]
    stage = model.model.forward_to_taps(batch)
    parameters = {name: p for name, p in head.named_parameters() if p.requires_grad}
    head.zero_grad()
    scale = 0.37
    loss = _naive_loss(head, stage, batch, model.vocab_size)
    expected = {}
    if parameters:
        values = torch.autograd.grad(scale * loss, list(parameters.values()))
        expected = dict(zip(parameters, values, strict=True))
    result = tune_exit(model.context, head, batch, stage, grad_scale=scale)
    assert result.sums.weight == batch.loss_mask.sum()
    assert result.sums.loss.item() == pytest.approx(loss.item(), rel=TOLERANCE)
    for name, parameter in head.named_parameters():
        if name not in expected:
            assert parameter.grad is None, f"{name} is frozen"
            continue
        assert parameter.grad.abs().max() > 0, name
        difference = relative_difference(parameter.grad, expected[name])
        # All gradients of one exit are sums over the same tokens; 1e-5 of the largest.
        assert difference < TOLERANCE, (name, difference)
    head.zero_grad()


def test_what_trains_is_what_the_settings_say(trained) -> None:
    """An mlp exit's own norm is frozen, with lora all but the updates, shared outputs are nobody's parameter."""
    for head in trained.model.exits:
        exit = head.exit
        trains = {name for name, parameter in head.named_parameters() if parameter.requires_grad}
        frozen = {name for name, parameter in head.named_parameters() if not parameter.requires_grad}
        if exit.init == "lora":
            assert all("low_rank_" in name for name in trains)
            assert all("low_rank_" not in name for name in frozen)
        else:
            norm = {name for name in frozen if name.startswith("pre_mlp_layernorm.")}
            assert frozen == norm and bool(norm) == (exit.architecture == "mlp")
        assert ("output.weight" in trains | frozen) == (exit.output == "own")
        assert any("output_update" in name for name in trains) == (
            exit.output == "low_rank" or (exit.output, exit.init) == ("own", "lora")
        )
    backbone = [p for name, p in trained.model.named_parameters() if not name.startswith("exits.")]
    assert backbone and not any(parameter.requires_grad for parameter in backbone)


def test_gradients_accumulate_and_no_gradient_reaches_the_tap(trained) -> None:
    from nemo_ee.megatron.pipeline.exit_loss import tune_exit

    model, batch = trained, _batch(trained)
    head = model.model.exits["l2-mlp-copy-own"]
    stage = model.model.forward_to_taps(batch)
    tap = stage.taps[head.exit.stop].clone().requires_grad_(True)
    stage = replace(stage, taps={head.exit.stop: tap})
    head.zero_grad()
    tune_exit(model.context, head, batch, stage, grad_scale=1.0)
    once = {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}
    tune_exit(model.context, head, batch, stage, grad_scale=1.0)
    for name, gradient in once.items():
        torch.testing.assert_close(dict(head.named_parameters())[name].grad, 2 * gradient)
    assert tap.grad is None
    head.zero_grad()


def test_evaluation_agrees_with_tuning_and_leaves_no_gradient(trained) -> None:
    from nemo_ee.megatron.pipeline.exit_loss import evaluate_exit, tune_exit

    model, batch = trained, _batch(trained)
    stage = model.model.forward_to_taps(batch)
    for head in model.model.exits:
        head.zero_grad()
        tap = stage.taps[head.exit.stop]
        evaluated = evaluate_exit(model.context, head, batch, stage, want_argmax=True)
        assert all(parameter.grad is None for parameter in head.parameters())
        tuned = tune_exit(model.context, head, batch, stage, grad_scale=1.0)
        head.zero_grad()
        assert torch.equal(evaluated.sums.loss, tuned.sums.loss)
        with torch.no_grad():
            best = naive_logits(head, tap, stage.rotary_pos_emb, model.vocab_size).argmax(-1)
        assert torch.equal(evaluated.argmax.view(13, 2).t(), best)
