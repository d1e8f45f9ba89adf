# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The cost model by hand; `tests/unit/models/test_stage_layers.py` compares it with the real modules. Exact."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from nemo_ee.exits.config import ExitConfig
from nemo_ee.families.architecture import Architecture
from nemo_ee.planning.cost_measurement import stopwatch
from nemo_ee.planning.cost_model import (
    Attention,
    ModelShape,
    Pointwise,
    Product,
    StageCosts,
    count_flops,
    exit_operations,
    exit_parameters,
    layer_operations,
)
from nemo_ee.planning.tuning_estimate import LLAMA_2, Assumptions, Layout, shape_of

# 3 tokens twice; QKV 8 x 16, attention output 8 x 8, gated MLP 8 x 20 and 10 x 8, output 8 x 32.
MODEL = Architecture(
    num_layers=4, hidden_size=8, ffn_hidden_size=10, num_attention_heads=2, num_query_groups=1, kv_channels=4,
    vocab_size=32, max_position_embeddings=3,
)  # fmt: skip
SHAPE = ModelShape(MODEL, sequence=3, micro_batch=2)
QKV, OUT, MLP, VOCABULARY = 8 * 16, 8 * 8, 8 * 20 + 10 * 8, 8 * 32
ATTENTION = 2 * 2 * (2 * 3 * 3 * 4 * 2)  # two products of 2 x 3 x 3 x 4 for each of 2 sequences


def exit_of(architecture: str, init: str = "copy", output: str = "own") -> ExitConfig:
    return ExitConfig("e", 2, architecture, init, output, rank=3)


def flops(operations) -> float:
    return sum(map(count_flops, operations))


def test_a_layer() -> None:
    assert flops(layer_operations(SHAPE, mlp=False)) == 2 * 6 * (QKV + OUT) + ATTENTION
    assert flops(layer_operations(SHAPE)) == 2 * 6 * (QKV + OUT + MLP) + ATTENTION
    trained = flops(layer_operations(SHAPE, backward=True))
    assert trained == 3 * flops(layer_operations(SHAPE)), "input and weight gradients cost as much as the forward"
    passed = flops(layer_operations(SHAPE, backward=True, trained=False))
    assert passed == 2 * 2 * 6 * (QKV + OUT + MLP) + 3 * ATTENTION


@pytest.mark.parametrize(
    ("exit", "products"),
    [
        (exit_of("embedding"), 2 * VOCABULARY),  # forward and weight gradient: nothing in front of it trains
        (exit_of("norm"), 3 * VOCABULARY),
        (exit_of("norm", output="shared"), 2 * VOCABULARY),  # forward and the gradient for the norm
        (exit_of("mlp"), 3 * (MLP + VOCABULARY)),
        (exit_of("mlp", output="shared"), 3 * MLP + 2 * VOCABULARY),
        (exit_of("layer"), 3 * (QKV + OUT + MLP + VOCABULARY)),
        # Low rank: A [3, 8], B [32, 3], three products each; the shared matrix has no weight gradient.
        (exit_of("mlp", output="low_rank"), 3 * MLP + 2 * VOCABULARY + 3 * 3 * (8 + 32)),
    ],
)
def test_an_exit(exit: ExitConfig, products: int) -> None:
    attention = 3 * ATTENTION if exit.architecture == "layer" else 0
    assert flops(exit_operations(SHAPE, exit)) == 2 * 6 * products + attention


def test_without_transformer_engine_an_own_mlp_has_no_gradient_of_its_input() -> None:
    local, exit = dataclasses.replace(SHAPE, transformer_engine=False), exit_of("mlp")
    assert flops(exit_operations(SHAPE, exit)) - flops(exit_operations(local, exit)) == 2 * 6 * 8 * 20
    for exit in (exit_of("layer"), exit_of("mlp", "lora")):  # a trained norm reads it; a frozen matrix has none
        assert flops(exit_operations(SHAPE, exit)) == flops(exit_operations(local, exit))
    joint = [flops(exit_operations(shape, exit_of("mlp"), again=True)) for shape in (SHAPE, local)]
    assert joint[0] == joint[1], "the backbone reads it"


def test_frozen_weights_have_no_gradient_product() -> None:
    """LoRA on an MLP: the first matrix only runs forward, the second passes a gradient on, updates train."""
    frozen = 8 * 20 + 2 * (10 * 8) + 2 * VOCABULARY
    first = 2 * 3 * 8 + 3 * 3 * 20  # A of the first matrix sees the tap, which wants no gradient
    updates = first + 3 * 3 * (10 + 8) + 3 * 3 * (8 + 32)
    assert flops(exit_operations(SHAPE, exit_of("mlp", "lora"))) == 2 * 6 * (frozen + updates)


def test_tensor_parallelism_shares_everything_out() -> None:
    shape = dataclasses.replace(SHAPE, model=dataclasses.replace(MODEL, num_query_groups=2))
    halved = dataclasses.replace(shape, tensor_parallel=2)
    assert 2 * flops(layer_operations(halved)) == flops(layer_operations(shape))
    assert 2 * flops(exit_operations(halved, exit_of("mlp"))) == flops(exit_operations(shape, exit_of("mlp")))


@pytest.mark.parametrize(("name", "millions"), [("7B", 266), ("13B", 376), ("70B", 967)])
def test_parameters_of_an_mlp_exit(name: str, millions: int) -> None:
    """The published sizes of EE-Tuning's models."""
    shape = shape_of(LLAMA_2[name], Layout(1, 1, 1), Assumptions())
    trained, frozen = exit_parameters(shape, exit_of("mlp"))
    assert round(trained / 1e6) == millions and frozen == 0


def test_units_and_what_hangs_on_a_layer() -> None:
    exits = (exit_of("mlp"), dataclasses.replace(exit_of("norm"), name="n", layer=3))
    costs = StageCosts.of(SHAPE, exits, count_flops)
    layer = flops(layer_operations(SHAPE))
    assert costs.layer == 1.0 and costs.embedding == 0.0
    assert costs.layer_without_mlp == flops(layer_operations(SHAPE, mlp=False)) / layer
    assert costs.final_exit == 2 * 6 * VOCABULARY / layer
    assert costs.exits == {"e": 2 * 6 * 3 * (MLP + VOCABULARY) / layer, "n": 2 * 6 * 3 * VOCABULARY / layer}
    plain = StageCosts(layer=1.0, layer_without_mlp=0.25, embedding=0.5, final_exit=2.0, exits={"e": 4.0, "n": 3.0})
    cut = plain.per_layer(exits, layers_to_run=3, skip_last_mlp=True, final_exit=False)
    assert cut == [1.5, 5.0, 3.25]
    assert plain.per_layer(exits, layers_to_run=4, skip_last_mlp=False, final_exit=True) == [1.5, 5.0, 4.0, 3.0]


def test_a_backbone_that_trains_costs_its_backward() -> None:
    joint = StageCosts.of(SHAPE, (), count_flops, train="joint")
    lora = StageCosts.of(SHAPE, (), count_flops, train="lora")
    assert joint.layer == 3.0 and 2.0 < lora.layer < 3.0  # attention itself trains nothing in either


def test_the_final_exit_of_a_backbone_that_trains_costs_four_products() -> None:
    """Logits, once more in the backward pass, and two gradients; without the weight's three."""
    once = StageCosts.of(SHAPE, (), count_flops).final_exit
    assert StageCosts.of(SHAPE, (), count_flops, train="joint").final_exit == pytest.approx(4 * once)
    assert StageCosts.of(SHAPE, (), count_flops, train="lora").final_exit == pytest.approx(3 * once)
    exits = (exit_of("norm"),)
    alone, beside = (StageCosts.of(SHAPE, exits, count_flops, train=t).exits["e"] for t in ("exits", "joint"))
    assert beside == pytest.approx(alone + once)


def test_a_taught_exit_forms_the_teacher_s_logits_too() -> None:
    exits = (exit_of("norm"), dataclasses.replace(exit_of("norm"), name="n"))
    costs = StageCosts.of(SHAPE, exits, count_flops, taught=["n"])
    assert costs.exits["n"] == pytest.approx(costs.exits["e"] + costs.final_exit) and costs.final_exit > 0


def test_a_stage_forms_the_teacher_once() -> None:
    """Four exits on two stages pay for two teachers, a `layer` exit beside them for one of its own."""
    exits = [dataclasses.replace(exit_of("norm"), name=name) for name in "abcd"]
    exits.append(dataclasses.replace(exit_of("layer"), name="layer"))
    alone = StageCosts.of(SHAPE, exits, count_flops)
    taught = StageCosts.of(SHAPE, exits, count_flops, taught=[exit.name for exit in exits], num_stages=2)
    more = {name: (cost - alone.exits[name]) / alone.final_exit for name, cost in taught.exits.items()}
    assert more == pytest.approx({"a": 0.5, "b": 0.5, "c": 0.5, "d": 0.5, "layer": 1.0})
    each = StageCosts.of(SHAPE, exits, count_flops, taught=["a", "layer"], num_stages=None)
    assert each.exits["a"] - alone.exits["a"] == pytest.approx(alone.final_exit)


def test_at_7b_an_mlp_exit_costs_about_four_layers() -> None:
    shape = shape_of(LLAMA_2["7B"], Layout(1, 1, 1), Assumptions())
    assert StageCosts.of(shape, (exit_of("mlp"),), count_flops).exits["e"] == pytest.approx(4.0, abs=0.25)


EVERYTHING = [
    Product(6, 8, 5, input_gradient=True, weight_gradient=True),
    Product(6, 8, 5, rows_at_once=4),
    *(Attention(2, 3, 2, 4, fused=fused, backward=backward) for fused in (False, True) for backward in (False, True)),
    *(
        Pointwise(kind, 6, 8, gated=gated, backward=backward)
        for kind in ("norm", "activation", "lookup", "loss")
        for gated in (False, True)
        for backward in (False, True)
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_operation_can_be_timed(dtype: torch.dtype) -> None:
    price = stopwatch(torch.device("cpu"), dtype)
    for operation in EVERYTHING:
        seconds = price(operation)
        assert 0.0 < seconds < math.inf
        assert price(operation) == seconds, "timed once"


def test_measured_costs_have_every_entry() -> None:
    exits = tuple(
        dataclasses.replace(exit_of(architecture, init, output), name=f"{architecture}-{init}-{output}")
        for architecture in ("embedding", "norm", "mlp", "layer")
        for init in ("copy", "lora")
        for output in ("own", "shared", "low_rank")
    )
    costs = StageCosts.of(SHAPE, exits, stopwatch(torch.device("cpu"), torch.float32))
    assert costs.layer == 1.0 and costs.embedding > 0.0 and costs.final_exit > 0.0
    assert costs.exits.keys() == {exit.name for exit in exits} and min(costs.exits.values()) > 0.0
