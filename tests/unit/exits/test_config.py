# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The `model.early_exit` block: defaults, shorthand, round trip, and one message with every problem."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from nemo_ee.exits.config import (
    ARCHITECTURES,
    BLOCK_KEYS,
    INITS,
    OUTPUTS,
    DistillationConfig,
    EarlyExitConfig,
    EarlyExitConfigError,
    ExitConfig,
    LoraConfig,
)


def read(block, num_layers=12):
    return EarlyExitConfig.from_mapping(block, num_layers=num_layers)


def problems_of(block, num_layers=12):
    with pytest.raises(EarlyExitConfigError) as caught:
        read(block, num_layers)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def test_empty_block_is_the_dataclass_defaults():
    assert read({}) == read(None) == read({key: None for key in BLOCK_KEYS}) == EarlyExitConfig()


def test_keys_are_the_yaml_block():
    assert BLOCK_KEYS == (
        *("exits", "every", "architecture", "init", "output", "train"),
        *("lora", "objective", "distillation", "token_weights"),
    )
    assert tuple(EarlyExitConfig().to_mapping()) == BLOCK_KEYS


def test_entries_take_the_block_defaults_and_their_own_values():
    block = {
        "architecture": "norm",
        "init": "random",
        "output": "shared",
        "exits": [
            {"layer": 4},
            {"layer": 4, "name": "b", "architecture": "mlp", "init": "lora", "rank": 4, "lr": 1e-3, "seed": 7},
        ],
    }
    config = read(block)
    assert config.exits[0] == ExitConfig("layer4-norm", 4, "norm", "random", "shared")
    assert config.exits[1] == ExitConfig("b", 4, "mlp", "lora", "shared", rank=4, lr=1e-3, seed=7)
    assert config.names == ("layer4-norm", "b")
    assert [exit.stop for exit in config.exits] == [8, 7]


@pytest.mark.parametrize("architecture, stop", [("mlp", 23), ("embedding", 24), ("norm", 24), ("layer", 24)])
def test_stop_and_full_depth(architecture, stop):
    assert read({"exits": [{"layer": 12, "architecture": architecture}]}).exits[0].stop == stop


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_combination_of_architecture_init_and_output_is_allowed(architecture, init, output):
    read({"exits": [{"layer": 3, "architecture": architecture, "init": init, "output": output}]})


@pytest.mark.parametrize(
    "every, num_layers, layers",
    [
        ("1/4", 12, [3, 6, 9]),
        ("1/8", 12, [2, 3, 5, 6, 8, 9, 11]),
        ("1/8", 4, [1, 2, 3]),
        ("2/5", 10, [4, 8]),
        (" 1 / 3 ", 7, [3, 5]),
        ("1/8", 40, [5, 10, 15, 20, 25, 30, 35]),
    ],
)
def test_every(every, num_layers, layers):
    config = read({"every": every}, num_layers)
    assert [exit.layer for exit in config.exits] == layers
    assert config.names == tuple(f"layer{k}-mlp" for k in layers)


def test_every_joins_the_listed_exits_and_leaves_out_their_duplicates():
    listed = [{"layer": 6, "lr": 0.5}, {"layer": 3, "architecture": "norm"}, {"layer": 9, "name": "nine"}]
    config = read({"exits": listed, "every": "1/4"})
    assert config.names == ("layer6-mlp", "layer3-norm", "nine", "layer3-mlp", "layer9-mlp")
    assert config.exit("layer6-mlp").lr == 0.5


def test_every_must_not_take_the_name_of_another_exit():
    (problem,) = problems_of({"exits": [{"layer": 5, "name": "layer3-mlp"}], "every": "1/4"})
    assert "every" in problem and "layer3-mlp" in problem and "exits[0]" in problem and "rename" in problem


@pytest.mark.parametrize("every", [8, 0.125, "1:8", "1/0", "0/8", "8/8", "-1/8", "a/b", "", True, ["1/8"]])
def test_every_must_be_a_fraction(every):
    (problem,) = problems_of({"every": every})
    assert problem.startswith(f"model.early_exit.every = {every!r}: must be text n/m") and '"1/8"' in problem


@pytest.mark.parametrize("every, num_layers", [("1/8", 1), ("3/4", 2)])
def test_every_without_any_exit_is_a_problem(every, num_layers):
    (problem,) = problems_of({"every": every}, num_layers)
    assert f"no exit below the full depth of {num_layers}" in problem


FULL = {
    "exits": [
        {
            "name": "a_b-1",
            "layer": 2,
            "architecture": "layer",
            "init": "lora",
            "output": "low_rank",
            "rank": 8,
            "loss_weight": 0.5,
            "loss_weight_schedule": "cosine",
            "lr": 1e-4,
            "min_lr": 1e-5,
            "weight_decay": 0,
            "objective": "mixed",
            "seed": 3,
        },
        {"layer": 12, "architecture": "norm"},
    ],
    "every": "1/2",
    "architecture": "embedding",
    "init": "random",
    "output": "shared",
    "train": "joint",
    "lora": {"rank": 4, "merge": False},
    "objective": "distillation",
    "distillation": {"temperature": 2, "top_k": 50, "weight": 1.0},
    "token_weights": "confidence",
}


@pytest.mark.parametrize("block", [{}, FULL, {"every": "1/8"}, {"distillation": {"weight": 0}}])
def test_round_trip(block):
    config = read(block)
    mapping = config.to_mapping()
    assert mapping["every"] is None
    assert read(mapping) == config
    assert read(mapping).to_mapping() == mapping


def test_every_field_survives_reading():
    config = read(FULL)
    mapping = config.to_mapping()
    assert mapping["exits"][0] == FULL["exits"][0]
    for key in BLOCK_KEYS:
        if key not in ("exits", "every"):
            assert mapping[key] == FULL[key]
    assert {field.name for field in dataclasses.fields(ExitConfig)} == set(FULL["exits"][0])
    assert {field.name for field in dataclasses.fields(DistillationConfig)} == set(FULL["distillation"])
    assert {field.name for field in dataclasses.fields(LoraConfig)} == set(FULL["lora"])


@pytest.mark.parametrize(
    "lora, problem",
    [
        ({"rank": 0}, "model.early_exit.lora.rank = 0: must be an integer of at least 1"),
        ({"merge": "no"}, "model.early_exit.lora.merge = 'no': must be True or False"),
        ({"alpha": 8}, "model.early_exit.lora.alpha = 8: is not a key of this block"),
        (16, "model.early_exit.lora = 16: must be a mapping with the keys rank, merge"),
    ],
)
def test_problems_of_the_lora_block(lora, problem):
    (found,) = problems_of({"lora": lora})
    assert found.startswith(problem)


@pytest.mark.parametrize("name", ["final", "full_model", "backbone"])
def test_names_of_the_model_s_own_parts_are_reserved(name):
    (problem,) = problems_of({"exits": [{"layer": 1, "name": name}]})
    assert f"name = {name!r}: is reserved for the model's own parts" in problem


def test_objective_of_follows_the_block_unless_the_exit_has_its_own():
    config = read({"exits": [{"layer": 1}, {"layer": 2, "objective": "mixed"}], "objective": "distillation"})
    assert [config.objective_of(name) for name in config.names] == ["distillation", "mixed"]
    assert config.exit("layer1-mlp").objective is None


def test_unknown_exit_names_the_ones_there_are():
    with pytest.raises(ValueError, match=r"'layr4-mlp' \(did you mean layer4-mlp\?\); the exits are: layer4-mlp"):
        read({"exits": [{"layer": 4}]}).exit("layr4-mlp")


def test_all_problems_come_in_one_message():
    problems = problems_of(
        {
            "exits": [{"layer": 13}, {"layer": 3, "rank": 0}, {"layer": 3}, 5, {}],
            "every": 8,
            "architectur": "mlp",
            "train": "all",
            "distillation": {"temperature": 0, "wieght": 0.5},
        }
    )
    starts = (
        "model.early_exit.architectur = 'mlp': is not a key of this block (did you mean architecture?)",
        "model.early_exit.train = 'all': must be one of exits, joint, lora",
        "model.early_exit.distillation.wieght = 0.5: is not a key of this block (did you mean weight?)",
        "model.early_exit.distillation.temperature = 0: must be a finite number greater than 0",
        "model.early_exit.exits[0].layer = 13: must be an integer in 1..12",
        "model.early_exit.exits[1].rank = 0: must be an integer of at least 1",
        "model.early_exit.exits[2].name = 'layer3-mlp': is already the name of model.early_exit.exits[1]",
        "model.early_exit.exits[3] = 5: must be a mapping",
        "model.early_exit.exits[4].layer = None: is missing",
        "model.early_exit.every = 8: must be text n/m",
    )
    assert len(problems) == len(starts)
    for problem, start in zip(problems, starts, strict=True):
        assert problem.startswith(start)


BAD_EXIT_VALUES = [
    *(("layer", value) for value in (0, -1, 13, 1.0, "3", True)),
    *(("name", value) for value in ("", "A", "-a", "a.b", "model.x", "a b", "a" * 42, 3, "final", "a\n")),
    *(("architecture", value) for value in ("MLP", "block", 1)),
    *(("init", value) for value in ("zeros", True)),
    *(("output", value) for value in ("tied", 0)),
    *(("rank", value) for value in (0, -4, 1.5, "16", True)),
    *((key, value) for key in ("loss_weight", "lr", "min_lr", "weight_decay") for value in (-1, "1", True)),
    *((key, value) for key in ("loss_weight", "lr") for value in (float("nan"), float("inf"))),
    ("loss_weight_schedule", "step"),
    ("objective", "kl"),
    *(("seed", value) for value in (-1, 1.0, 2**63)),
]


@pytest.mark.parametrize("key, value", BAD_EXIT_VALUES)
def test_each_bad_exit_value_is_one_problem_with_its_key_and_value(key, value):
    (problem,) = problems_of({"exits": [{"layer": 3, key: value}]})
    assert problem.startswith(f"model.early_exit.exits[0].{key} = {value!r}: ")


@pytest.mark.parametrize(
    "key, value",
    [
        ("architecture", "bloc"),
        ("init", "zero"),
        ("output", "ours"),
        ("train", True),
        ("objective", "ce"),
        ("token_weights", "conf"),
        ("distillation", 3),
        ("exits", 3),
        ("exits", "layer3"),
        ("exits", {"layer": 3}),
    ],
)
def test_each_bad_block_value_is_one_problem(key, value):
    (problem,) = problems_of({key: value})
    assert problem.startswith(f"model.early_exit.{key} = {value!r}: must be ")


@pytest.mark.parametrize(
    "key, value", [("temperature", -1), ("top_k", 0), ("top_k", 1.5), ("weight", 1.01), ("weight", "0.5")]
)
def test_each_bad_distillation_value_is_one_problem(key, value):
    (problem,) = problems_of({"distillation": {key: value}})
    assert problem.startswith(f"model.early_exit.distillation.{key} = {value!r}: must be ")


def test_a_second_exit_with_the_same_default_name_must_be_named():
    (problem,) = problems_of({"exits": [{"layer": 3}, {"layer": 3, "init": "random"}]})
    assert "give this exit a name of its own, e.g. name: layer3-mlp-2" in problem
    read({"exits": [{"layer": 3}, {"layer": 3, "init": "random", "name": "layer3-mlp-2"}]})


def test_a_misspelt_value_gets_a_suggestion_and_numbers_as_text_a_hint():
    (problem,) = problems_of({"objective": "distilation"})
    assert "(did you mean distillation?)" in problem
    (problem,) = problems_of({"exits": [{"layer": 1, "lr": "1e-4"}]})
    assert "write the number without quotes and with a dot (1.0e-4)" in problem


def test_min_lr_must_not_be_above_lr():
    (problem,) = problems_of({"exits": [{"layer": 1, "lr": 0.1, "min_lr": 0.2}]})
    assert "must be at most lr = 0.1" in problem


def test_not_a_mapping():
    (problem,) = problems_of([1])
    assert problem.startswith("model.early_exit = [1]: must be a mapping")


def test_reads_omegaconf_nodes():
    omegaconf = pytest.importorskip("omegaconf")
    node = omegaconf.OmegaConf.create(FULL)
    assert read(node) == read(FULL)
    assert omegaconf.OmegaConf.create(read(FULL).to_mapping())  # plain values only


def test_importing_it_loads_nothing_heavy():
    code = "import sys, nemo_ee, nemo_ee.exits.config, nemo_ee.exits.placement; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
