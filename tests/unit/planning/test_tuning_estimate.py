# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The on-paper estimate on a model small enough to do by hand."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_ee.exits.config import ExitConfig
from nemo_ee.families.architecture import Architecture
from nemo_ee.planning.tuning_estimate import (
    LLAMA_2,
    Assumptions,
    Layout,
    all_reduces,
    estimate,
    fastest_layout,
    layout_problem,
    mlp_exits,
)

# Per layer: QKV and output 4 x 8 x 8, gated MLP 3 x 8 x 16; an mlp exit: 384 and the output 8 x 32.
MODEL = Architecture(
    num_layers=4, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2, num_query_groups=2, kv_channels=4,
    vocab_size=32, max_position_embeddings=16,
)  # fmt: skip
EXITS = (ExitConfig("e", 2, "mlp", "copy", "own"),)
ATTENTION, MLP, OUTPUT = 4 * 8 * 8, 3 * 8 * 16, 8 * 32
# 4 tokens a sequence; links and memory so fast that only products and one reduction count.
FAST = Assumptions(
    peak_tflops=1e-6, utilisation=0.5, tensor_link_gb_s=1e9, data_link_gb_s=1e9, memory_bandwidth_gb_s=1e9,
    fixed_gb=0.0, steps=10, sequences=8, sequence_length=4, micro_batch=2, fused_attention=False,
)  # fmt: skip
# FLOPs of one sequence: a layer, a layer without its MLP, the exit.
SQUARE = 4 * 2 * 4 * 4 * 4  # two products over 4 x 4 scores of 2 heads 4 wide
LAYER, CUT, EXIT = 2 * 4 * (ATTENTION + MLP) + SQUARE, 2 * 4 * ATTENTION + SQUARE, 2 * 4 * 3 * (MLP + OUTPUT)


def test_time_on_one_gpu() -> None:
    result = estimate(MODEL, EXITS, Layout(1, 1, 1), FAST)
    seconds = 10 * 8 * (LAYER + CUT + EXIT) / (1e6 * 0.5)
    assert result.hours == pytest.approx(seconds / 3600, rel=1e-6) and result.gpu_hours == result.hours
    assert result.tokens_per_second == pytest.approx(10 * 8 * 4 / seconds, rel=1e-6)
    assert result.slowest_share == 1.0 and [stage.exits for stage in result.stages] == [("e",)]


def test_the_slowest_stage_and_one_filling() -> None:
    result = estimate(MODEL, EXITS, Layout(1, 2, 1), FAST)
    assert [stage.layers for stage in result.stages] == [1, 1]
    slow, fill = 8 * (CUT + EXIT), 2 * LAYER  # a step of the second stage; one microbatch of the first
    assert result.hours * 3600 == pytest.approx((10 * slow + fill) / 0.5e6, rel=1e-6)
    assert result.slowest_share == pytest.approx((CUT + EXIT) / (LAYER + CUT + EXIT))


def test_data_and_tensor_parallelism_divide_the_work() -> None:
    one = estimate(MODEL, EXITS, Layout(1, 1, 1), FAST)
    for layout in (Layout(1, 1, 4), Layout(2, 1, 1), Layout(2, 1, 2)):
        result = estimate(MODEL, EXITS, layout, FAST)
        assert result.gpu_hours == pytest.approx(one.gpu_hours, rel=1e-4), layout


def test_links_and_the_optimizer_take_time() -> None:
    slow = dataclasses.replace(
        FAST, peak_tflops=1e9, tensor_link_gb_s=1e-6, data_link_gb_s=2e-6, memory_bandwidth_gb_s=1e-3
    )
    (stage,) = estimate(MODEL, EXITS, Layout(2, 1, 4), slow).stages
    hidden = 8 * 8 * 2  # 8 tokens of 8 numbers of 2 bytes
    assert stage.seconds["layers"] == pytest.approx(3 * hidden / 1e3), "two layers, one without its MLP"
    assert stage.seconds["exits"] == pytest.approx(3 * hidden / 1e3)
    trained = (MLP + OUTPUT) / 2
    assert stage.seconds["gradients"] == pytest.approx(2 * 3 / 4 * trained * 4 / 2e3)
    assert stage.seconds["optimizer"] == pytest.approx(trained * 30 / 1e6)
    first, second = estimate(MODEL, EXITS, Layout(1, 2, 4), slow).stages
    for stage in (first, second):
        assert stage.seconds["transfer"] == pytest.approx(hidden / 2e3, rel=1e-3)


@pytest.mark.parametrize(
    ("architecture", "init", "expected"),
    [("embedding", "copy", 0), ("norm", "copy", 1), ("norm", "lora", 0), ("mlp", "copy", 3), ("layer", "copy", 5)],
)
def test_all_reduces_of_an_exit(architecture: str, init: str, expected: int) -> None:
    assert all_reduces(ExitConfig("e", 1, architecture, init, "own")) == expected


def test_memory_by_part() -> None:
    assumptions = dataclasses.replace(FAST, fixed_gb=1.0)
    (stage,) = estimate(MODEL, EXITS, Layout(1, 1, 4), assumptions).stages
    assert stage.memory["backbone"] == 2 * (2 * ATTENTION + MLP + 32 * 8), "two layers, one cut, and the embeddings"
    assert stage.memory["exits"] == 18 * (MLP + OUTPUT)
    assert stage.memory["taps"] == 8 * 8 * 2 and stage.memory["transfers"] == 0.0
    assert stage.memory["loss chunk"] == 1.5 * 4 * 8 * 32, "all of 8 x 32 logits are less than a chunk"
    assert stage.memory["activations"] == 2 * 8 * (6 * 8 + 2 * 48)
    assert stage.memory["fixed"] == 1e9
    local = dataclasses.replace(assumptions, transformer_engine=False)
    (other,) = estimate(MODEL, EXITS, Layout(1, 1, 4), local).stages
    assert other.memory["activations"] - stage.memory["activations"] == 2 * 4 * 8 * 8, "two fp32 copies"
    shared_out = dataclasses.replace(assumptions, distributed_optimizer=True)
    (stage,) = estimate(MODEL, EXITS, Layout(1, 1, 4), shared_out).stages
    assert stage.memory["exits"] == (2 + 4 + 12 / 4) * (MLP + OUTPUT)
    first, second = estimate(MODEL, EXITS, Layout(2, 2, 1), assumptions).stages
    assert first.memory["exits"] == first.memory["loss chunk"] == first.memory["taps"] == 0.0
    assert second.memory["backbone"] == 2 * ATTENTION / 2 and second.memory["exits"] == 9 * (MLP + OUTPUT)


def test_the_recipe_and_its_exits() -> None:
    recipe = Assumptions()
    assert recipe.steps * recipe.sequences * recipe.sequence_length == pytest.approx(1.31e9, rel=1e-3)
    assert [exit.layer for exit in mlp_exits(LLAMA_2["13B"], 1)] == [10]
    assert [exit.layer for exit in mlp_exits(LLAMA_2["13B"], 8)] == [5, 10, 15, 20, 25, 30, 35, 40]
    # The exit's training state is 18 B per parameter of 266M, 376M, 967M.
    for name, gigabytes in (("7B", 4.8), ("13B", 6.8), ("70B", 17.4)):
        (stage,) = estimate(LLAMA_2[name], mlp_exits(LLAMA_2[name], 1), Layout(1, 1, 1)).stages
        assert stage.memory["exits"] / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_layouts_that_do_not_go() -> None:
    assert "5 stages are more than the 2 layers" in layout_problem(MODEL, EXITS, Layout(1, 5, 1), FAST)
    assert "8 sequences per step" in layout_problem(MODEL, EXITS, Layout(1, 1, 8), FAST)
    assert "2 heads" in layout_problem(MODEL, EXITS, Layout(4, 1, 1), FAST)
    assert layout_problem(MODEL, EXITS, Layout(2, 2, 4), FAST) == ""
    with pytest.raises(ValueError, match="TP 1 x PP 5 x DP 1: 5 stages"):
        estimate(MODEL, EXITS, Layout(1, 5, 1), FAST)


def test_the_fastest_layout_fits() -> None:
    found = fastest_layout(MODEL, EXITS, 4, FAST)
    others = [estimate(MODEL, EXITS, Layout(*sizes), FAST) for sizes in ((1, 1, 4), (2, 1, 2), (1, 2, 2), (2, 2, 1))]
    assert found is not None and found.hours == min(other.hours for other in others)
    tight = dataclasses.replace(FAST, memory_gb=min(other.peak_gb for other in others) * 1.001)
    assert fastest_layout(MODEL, EXITS, 4, tight).layout == min(others, key=lambda other: other.peak_gb).layout
    assert fastest_layout(MODEL, EXITS, 4, dataclasses.replace(FAST, memory_gb=1e-9)) is None
    assert fastest_layout(MODEL, EXITS, 3, FAST) is None, "8 sequences cannot be shared out"
