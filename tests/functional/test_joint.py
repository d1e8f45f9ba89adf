# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Joint training in one process: every gradient equals that of `transformers` with exits in plain autograd."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("nemo")

from tests.helpers.megatron_models import exit_entry, microbatch, random_tokens, tiny_pair

import torch  # isort: skip  # after the CPU host is on
from torch.optim import AdamW

from tests.helpers.joint_reference import JointReference

EXITS = [
    exit_entry(1, "mlp", loss_weight=0.5),
    exit_entry(2, "norm", output="shared", loss_weight=2.0),
    exit_entry(2, "layer", loss_weight=0.25),
    exit_entry(3, "mlp", loss_weight=1.5),
    exit_entry(3, "norm"),
]
WEIGHTS = {exit["name"]: exit.get("loss_weight", 1.0) for exit in EXITS}
OPTIM = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.01}
FAMILIES = ["llama", "llama-bias", "gpt2"]


def batches_of(model, count: int = 2) -> list[tuple[torch.Tensor, ...]]:
    """(tokens, labels, mask), masks with holes of different sizes."""
    generator = torch.Generator().manual_seed(4)
    batches = []
    for index in range(count):
        tokens = random_tokens(model, length=12, seed=20 + index)
        mask = (torch.rand(tokens.shape, generator=generator) > 0.2 + 0.3 * index).float()
        batches.append((tokens, tokens.roll(-1, dims=1), mask))
    return batches


def train_once(model, batches) -> SimpleNamespace:
    """Gradients of one global batch, left on the model; `losses` per token by name."""
    from nemo_ee.megatron.loss.exit_metrics import ExitSums
    from nemo_ee.megatron.optim.stage_optimizers import build_backbone_optimizer, build_exit_optimizers
    from nemo_ee.megatron.pipeline.joint_training import JointTraining

    backbone = build_backbone_optimizer(model.model, OPTIM, make=AdamW)
    optimizers = build_exit_optimizers(model.model.exits, OPTIM, make=AdamW, max_norm=0.0, more=[backbone])
    optimizers.zero_grad()
    sums = ExitSums(model.early_exit.names, torch.device("cpu"))
    JointTraining(model.context, model.placements, seed=1).train_global_batch(
        [microbatch(tokens, labels=labels, mask=mask) for tokens, labels, mask in batches],
        step=0,
        optimizers=optimizers,
        sums=sums,
        loss_weights=WEIGHTS,
    )
    losses = {name: result["loss"] for name, result in sums.reduce(over_data=False).items()}
    return SimpleNamespace(losses=losses, optimizers=optimizers)


def gradient_differences(model, folder: Path) -> dict[str, float]:
    """Key -> largest difference of a gradient to the reference's, relative to the largest of the latter."""
    from nemo_ee.checkpoint.huggingface import HuggingFaceSource
    from nemo_ee.megatron.model.backbone_training import BACKBONE_PREFIX, trained_backbone_shards
    from nemo_ee.megatron.model.exit_head_init import backbone_key, global_chunk, local_shards

    found = {}

    def compare(label: str, shard, source, key: str, layer: int | None) -> None:
        offset, shape = global_chunk(shard)
        if layer is not None:
            offset, shape = (layer, *offset), (1, *shape)
        wanted = source.read(key, offset, shape, allow_missing_rows=True).view(shard.data.shape)
        scale = max(wanted.abs().max().item(), 1e-6)
        found[f"{label} {offset[:1]}"] = ((shard.data - wanted).abs().max() / scale).item()

    def gradients(shards: dict) -> list:
        trained = {key: s for key, s in shards.items() if getattr(s.data, "requires_grad", False)}
        return local_shards({key: replace(s, data=s.data.grad) for key, s in trained.items()})

    source = HuggingFaceSource(folder / "full_model")
    for shard in gradients(trained_backbone_shards(model.model)):
        compare(shard.key, shard, source, shard.key.removeprefix(BACKBONE_PREFIX), None)
    tied = model.cfg.share_embeddings_and_output_weights
    for head in model.model.exits:
        source = HuggingFaceSource(folder / head.exit.name)
        for shard in gradients(head.sharded_state_dict()):
            key, layer = backbone_key(
                shard.key, exit_layer=head.exit.layer, num_layers=model.cfg.num_layers, tied=tied
            )
            compare(f"{head.exit.name} {shard.key}", shard, source, key, layer)
    return found


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model in joint mode and the reference's gradients over two microbatches."""
    folder = tmp_path_factory.mktemp(request.param)
    reference, model = tiny_pair(
        folder / "hf", request.param, EXITS,
        early_exit={"exits": EXITS, "train": "joint"}, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    batches = batches_of(model)
    losses = JointReference(reference.train(False), EXITS).gradients(batches, WEIGHTS, folder)
    return SimpleNamespace(model=model, batches=batches, losses=losses, folder=folder)


def test_losses_and_every_gradient_equal_transformers(case: SimpleNamespace) -> None:
    """fp32: losses 1e-5 relative, gradients 2e-5 of the largest of each tensor."""
    done = train_once(case.model, case.batches)
    assert done.losses.keys() == case.losses.keys()
    for name, loss in done.losses.items():
        assert loss == pytest.approx(case.losses[name], rel=1e-5), name
    differences = gradient_differences(case.model, case.folder)
    trainable = [p for p in case.model.model.parameters() if p.requires_grad]
    assert all(parameter.grad is not None for parameter in trainable)
    assert len(differences) >= len(trainable), "every trainable parameter was compared"
    wrong = {key: value for key, value in differences.items() if not value < 2e-5}
    assert not wrong


@pytest.mark.parametrize("settings", [("uniform", 1), ("uniform", 2), ("block", 2), ("block", 7)], ids=str)
def test_recomputation_changes_nothing(case: SimpleNamespace, settings: tuple[str, int]) -> None:
    """Bitwise the same losses and gradients, except the output weight's, whose parts add up in another order."""
    plain = train_once(case.model, case.batches)
    wanted = {name: p.grad.clone() for name, p in case.model.model.named_parameters() if p.grad is not None}
    forwards: list[int] = []
    counter = case.model.model.decoder.layers[0].mlp.register_forward_hook(lambda *_: forwards.append(1))
    config = case.model.model.config
    config.recompute_granularity, (config.recompute_method, config.recompute_num_layers) = "full", settings
    try:
        again = train_once(case.model, case.batches)
    finally:
        config.recompute_granularity = config.recompute_method = config.recompute_num_layers = None
        counter.remove()
    assert len(forwards) == 2 * len(case.batches), "each microbatch's first layer ran twice"
    assert again.losses == plain.losses
    for name, parameter in case.model.model.named_parameters():
        if parameter.requires_grad:
            if parameter is case.model.model.backbone_output_weight():
                torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-5, atol=1e-7)
            else:
                assert torch.equal(parameter.grad, wanted[name]), name


def test_recomputation_drops_out_the_same(case: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout on, a recomputed layer sees the random numbers of its first run: losses and gradients stay."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    gpt = case.model.model
    for layer in gpt.decoder.layers:
        monkeypatch.setattr(layer, "hidden_dropout", 0.3)

    def run(granularity: str | None) -> tuple[dict, torch.Tensor]:
        torch.manual_seed(5)
        model_parallel_cuda_manual_seed(5)
        monkeypatch.setattr(gpt.config, "recompute_granularity", granularity)
        monkeypatch.setattr(gpt.config, "recompute_method", granularity and "uniform")
        monkeypatch.setattr(gpt.config, "recompute_num_layers", granularity and 1)
        losses = train_once(case.model, case.batches).losses
        return losses, gpt.embedding.word_embeddings.weight.grad.clone()

    (plain, gradient), (again, recomputed) = run(None), run("full")
    assert plain == again != case.losses
    torch.testing.assert_close(recomputed, gradient, rtol=1e-5, atol=1e-7)


def test_a_weight_on_an_exit_s_loss_shows_in_the_backbone(case: SimpleNamespace, monkeypatch) -> None:
    """Control: with another weight of one exit most gradients leave the tolerance, those of deeper layers do not."""
    monkeypatch.setitem(WEIGHTS, EXITS[0]["name"], 1.0)
    train_once(case.model, case.batches)
    wrong = {key for key, value in gradient_differences(case.model, case.folder).items() if not value < 2e-5}
    assert any("word_embeddings" in key for key in wrong)
    assert any(key.startswith("backbone.decoder.layers.self_attention") and "(0,)" in key for key in wrong)
    assert not any(key.startswith("backbone.decoder.layers.") and "(2,)" in key for key in wrong)


def test_the_model_trains_in_training_mode_and_its_exits_do_not(case: SimpleNamespace) -> None:
    gpt, modes = case.model.model, []
    watch = [gpt.decoder.layers[0], gpt.exits[EXITS[2]["name"]].layer, gpt.exits[EXITS[0]["name"]].mlp]
    hooks = [m.register_forward_hook(lambda module, *_: modes.append(module.training)) for m in watch[1:]]
    hooks.append(watch[0].mlp.register_forward_hook(lambda module, *_: modes.append(module.training)))
    train_once(case.model, case.batches[:1])
    for hook in hooks:
        hook.remove()
    assert sorted(modes) == [False, False, True]
    assert not any(module.training for module in gpt.modules()), "evaluation mode again"
