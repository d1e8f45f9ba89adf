# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The cost model counts what the real modules compute, and the split of a real model follows it.

The reference is torch's `FlopCounterMode` around Megatron's layers and around `tune_exit`: equal to the last FLOP.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from tests.helpers.megatron_models import exit_entry, microbatch, random_tokens, tiny_pair

EXITS = [
    exit_entry(2, architecture, init, output, rank=3)
    for architecture in ("embedding", "norm", "mlp", "layer")
    for init in ("copy", "lora")
    for output in ("own", "shared", "low_rank")
]
MODELS = ["llama", "gpt2"]  # gated with grouped queries; plain, with biases


@register_flop_formula(torch.ops.aten.addmm_)  # torch counts `addmm` and not its in-place twin
def _addmm_in_place_flop(total, a, b, out_shape=None, **kwargs) -> int:
    return 2 * a[0] * a[1] * b[1]


def count(work) -> int:
    """FLOPs of a call by torch's own counter, which knows no fused attention of the CPU: products of the whole
    square."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory: pytest.TempPathFactory):
    return tiny_pair(tmp_path_factory.mktemp(request.param), request.param, EXITS, full_depth=True)[1]


@pytest.fixture(scope="module")
def shape(model):
    from nemo_ee.models.stage_layers import model_shape

    shape = model_shape(model.cfg, model.transformer_config, padded_vocab_size=model.padded_vocab_size)
    return dataclasses.replace(shape, chunk_bytes=64 * 2**20, fused_attention=False)  # see `count`


@pytest.fixture(scope="module")
def stage(model):
    batch = microbatch(random_tokens(model))
    return batch, model.model.forward_to_taps(batch)


def test_a_layer_with_and_without_its_mlp(model, shape, stage) -> None:
    from nemo_ee.planning.cost_model import count_flops, layer_operations

    batch, output = stage
    layer, hidden = model.model.decoder.layers[0], output.taps[4]

    @torch.no_grad()
    def attention() -> None:
        layer._forward_attention(hidden, None, rotary_pos_emb=output.rotary_pos_emb)

    @torch.no_grad()
    def mlp() -> None:
        layer._forward_mlp(hidden)

    without = sum(map(count_flops, layer_operations(shape, mlp=False)))
    whole = sum(map(count_flops, layer_operations(shape)))
    assert without == count(attention)
    assert whole - without == count(mlp) > 0


@pytest.mark.parametrize("entry", EXITS, ids=lambda entry: entry["name"])
def test_an_exit(model, shape, stage, entry) -> None:
    """Forward, loss and backward; low-rank updates, frozen matrices and shared outputs included."""
    from nemo_ee.megatron.pipeline.exit_loss import tune_exit
    from nemo_ee.planning.cost_model import count_flops, exit_operations

    batch, output = stage
    head = model.model.exits[entry["name"]]
    found = count(lambda: tune_exit(model.context, head, batch, output, grad_scale=1e-3))
    assert sum(map(count_flops, exit_operations(shape, head.exit))) == found


def test_control_other_sizes_are_noticed(model, shape) -> None:
    from nemo_ee.planning.cost_model import count_flops, layer_operations

    other = dataclasses.replace(
        shape, model=dataclasses.replace(shape.model, ffn_hidden_size=shape.model.ffn_hidden_size + 1)
    )
    assert sum(map(count_flops, layer_operations(other))) != sum(map(count_flops, layer_operations(shape)))


def test_parameters_of_an_exit(model, shape) -> None:
    """Trained and frozen matrix entries are those of the module."""
    from nemo_ee.planning.cost_model import exit_parameters

    for head in model.model.exits:
        matrices = [parameter for parameter in head.parameters() if parameter.dim() == 2]
        trained = sum(matrix.numel() for matrix in matrices if matrix.requires_grad)
        frozen = sum(matrix.numel() for matrix in matrices if not matrix.requires_grad)
        if head.exit.output != "own":  # the backbone's, which the stage keeps once
            frozen += shape.model.hidden_size * shape.model.vocab_size
        assert exit_parameters(shape, head.exit) == (trained, frozen), head.exit.name


def two_stages(model, block: dict[str, Any], **settings: Any) -> SimpleNamespace:
    """What `choose_placements` reads of a model on two stages, its only exit after the first of three layers."""
    from nemo_ee.exits.config import EarlyExitConfig
    from nemo_ee.models.stage_layers import read_layer_split

    stored = OmegaConf.to_container(model.cfg)
    cfg = OmegaConf.create({**stored, "pipeline_model_parallel_size": 2, "layer_split": block, "full_depth": None})
    cfg.update(settings)
    stub = SimpleNamespace(
        cfg=cfg,
        early_exit=EarlyExitConfig.from_mapping({"exits": [{"layer": 1, "name": "first"}]}, num_layers=3),
        full_depth=bool(cfg.get("full_depth") or cfg.get("val_agreement")),
        padded_vocab_size=model.padded_vocab_size,
        torch_dtype=model.torch_dtype,
        trainer=model.trainer,
    )
    stub.layer_split = read_layer_split(stub, cfg)
    return stub


def sizes(model, stub: SimpleNamespace) -> list[int]:
    from nemo_ee.models.stage_layers import choose_placements

    return [stage.num_layers for stage in choose_placements(stub, model.transformer_config)]


def test_the_final_exit_counts_where_a_step_runs_it(model) -> None:
    """Depth for `val_agreement` alone runs the final output at validations only."""
    block = {"costs": {"exits": {"first": 0.0}, "final_exit": 9.0}}
    assert sizes(model, two_stages(model, block, full_depth=True)) == [2, 1]
    heavy_front = {"costs": {"exits": {"first": 5.0}, "final_exit": 9.0}}
    assert sizes(model, two_stages(model, heavy_front, val_agreement=True)) == [1, 2]
    assert sizes(model, two_stages(model, heavy_front, full_depth=True)) == [2, 1]
    assert sizes(model, two_stages(model, {"layers": [1, 2]}, full_depth=True)) == [1, 2]


def test_problems_end_it_before_anything_is_built(model) -> None:
    with pytest.raises(ValueError, match="has 1 entries"):
        two_stages(model, {"layers": [3]}, full_depth=True)
    with pytest.raises(ValueError, match="= 2 is more than the 1 layers that run"):
        two_stages(model, {})


def test_a_measurement_that_fails_ends_every_rank(model, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_ee.models import stage_layers as layer_split

    def broken(device, dtype):
        def price(operation):
            raise RuntimeError("out of memory")

        return price

    stub = two_stages(model, {"cost": "measured"}, full_depth=True)
    assert sum(sizes(model, stub)) == 3
    monkeypatch.setattr(layer_split, "stopwatch", broken)
    with pytest.raises(ValueError, match="rank 0 failed .out of memory.; use model.layer_split.cost=parameters"):
        sizes(model, stub)
