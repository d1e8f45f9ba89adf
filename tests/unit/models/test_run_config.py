# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A script's settings over a stored config, and the problems of a run that are seen before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from omegaconf import DictConfig, OmegaConf

from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.models.run_config import check_run, merge_model_config

STORED = {
    "mcore_gpt": True,
    "num_layers": 4,
    "hidden_size": 32,
    "encoder_seq_length": 64,
    "max_position_embeddings": 64,
    "micro_batch_size": 1,
    "global_batch_size": 1,
    "precision": "bf16",
    "optim": {"name": "fused_adam", "lr": 0.5, "betas": [0.9, 0.98]},
    "tokenizer": {"library": "huggingface", "type": "somewhere"},
    "early_exit": EarlyExitConfig.from_mapping(
        {"exits": [{"layer": 1, "init": "lora", "rank": 3, "loss_weight": 0.5}, {"layer": 2, "architecture": "norm"}]},
        num_layers=4,
    ).to_mapping(),
}
BLOCK = {"exits": [], "every": None, "architecture": "mlp", "init": "copy", "output": "own"}


def _merged(**overrides: Any) -> DictConfig:
    return merge_model_config(OmegaConf.create(STORED), OmegaConf.create(overrides))


def test_settings_win_and_null_leaves_what_is_stored() -> None:
    merged = _merged(
        restore_from_path="x.nemo", verify="full",
        micro_batch_size=2, encoder_seq_length=None, brand_new=7, unset=None,
        optim={"lr": 1.0, "betas": None, "sched": {"name": "Constant"}},
    )  # fmt: skip
    assert merged.micro_batch_size == 2 and merged.brand_new == 7 and merged.encoder_seq_length == 64
    assert merged.optim == {"name": "adamw", "lr": 1.0, "betas": [0.9, 0.98], "sched": {"name": "Constant"}}
    assert merged.tokenizer.type == "somewhere" and merged.hidden_size == 32
    assert "restore_from_path" not in merged and "verify" not in merged, "the script's own"
    assert "unset" in merged and merged.unset is None
    assert OmegaConf.to_container(OmegaConf.create(STORED))["micro_batch_size"] == 1, (
        "the stored config is not touched"
    )


def test_how_a_model_was_trained_is_forced_on_nobody() -> None:
    optim = {**STORED["optim"], "overlap_grad_sync": True, "contiguous_grad_buffer": True}
    stored = OmegaConf.create({**STORED, "megatron_amp_O2": True, "precision": "bf16-mixed", "optim": optim})
    merged = merge_model_config(stored, OmegaConf.create({}))
    assert "megatron_amp_O2" not in merged and "precision" not in merged
    assert merged.optim == {"name": "adamw", "lr": 0.5, "betas": [0.9, 0.98]}
    asked = merge_model_config(
        stored, OmegaConf.create({"megatron_amp_O2": True, "optim": {"name": "mcore_distributed_optim"}})
    )
    assert asked.megatron_amp_O2 is True and asked.optim.name == "mcore_distributed_optim", "the script's own counts"
    assert stored.megatron_amp_O2 is True and stored.optim.name == "fused_adam", "the stored config is not touched"


def test_where_the_base_is_is_what_the_script_says() -> None:
    """What an exits-only file says is seen from that file, and read from it."""
    stored = OmegaConf.create({**STORED, "backbone_path": "../ee.nemo"})
    assert merge_model_config(stored, OmegaConf.create({})).get("backbone_path") is None
    assert merge_model_config(stored, OmegaConf.create({"backbone_path": None})).backbone_path is None
    said = merge_model_config(stored, OmegaConf.create({"backbone_path": "../ee.nemo"}))
    assert said.backbone_path == "../ee.nemo" == stored.backbone_path


def test_data_prefixes_are_replaced_as_a_whole() -> None:
    stored = OmegaConf.create({**STORED, "data": {"data_prefix": {"train": ["a"], "test": ["b"]}, "eod": 1}})
    merged = merge_model_config(stored, OmegaConf.create({"data": {"data_prefix": {"train": ["c"]}}}))
    assert merged.data == {"data_prefix": {"train": ["c"]}, "eod": 1}


@pytest.mark.parametrize(("length", "expected"), [(None, 64), (16, 16)])
def test_the_data_s_length_follows_the_model_s(length: int | None, expected: int) -> None:
    """The yaml writes seq_length: ${model.encoder_seq_length}, null when the file's length is meant."""
    merged = _merged(encoder_seq_length=length, data={"seq_length": length})
    assert merged.data.seq_length == expected == merged.encoder_seq_length


def _exits(merged: DictConfig) -> list[dict]:
    return OmegaConf.to_container(merged.early_exit)["exits"]


def test_an_empty_block_keeps_the_stored_exits() -> None:
    for block in (BLOCK, {**BLOCK, "objective": "cross_entropy"}, {}):
        merged = _merged(early_exit=block)
        assert _exits(merged) == STORED["early_exit"]["exits"] and merged.early_exit.get("every") is None
    assert _merged().early_exit == STORED["early_exit"]
    assert _merged(early_exit=None).early_exit == STORED["early_exit"]


def test_a_named_exit_takes_what_it_does_not_say_from_the_stored_one() -> None:
    merged = _merged(early_exit={**BLOCK, "exits": [{"name": "layer1-mlp", "lr": 0.1}, {"layer": 3}]})
    first, second = _exits(merged)
    assert first == {**STORED["early_exit"]["exits"][0], "lr": 0.1}
    assert second == {"layer": 3}, "a new exit"
    config = EarlyExitConfig.from_mapping(OmegaConf.to_container(merged.early_exit), num_layers=4)
    assert config.exit("layer1-mlp").init == "lora" and config.exit("layer3-mlp").init == "copy"


def test_an_entry_that_means_a_stored_exit_by_its_default_name_is_that_exit() -> None:
    """{layer: 1} is called layer1-mlp, which is stored: its rank and initialisation are the stored ones."""
    merged = _merged(early_exit={**BLOCK, "exits": [{"layer": 1, "lr": 0.1}]})
    config = EarlyExitConfig.from_mapping(OmegaConf.to_container(merged.early_exit), num_layers=4)
    assert config.exits == (EarlyExitConfig.from_mapping(STORED["early_exit"], num_layers=4).exits[0].__class__(
        **{**STORED["early_exit"]["exits"][0], "lr": 0.1}
    ),)  # fmt: skip


def test_every_replaces_the_stored_exits_but_keeps_what_is_stored_of_those_it_names() -> None:
    merged = _merged(early_exit={**BLOCK, "every": "1/2"})
    config = EarlyExitConfig.from_mapping(OmegaConf.to_container(merged.early_exit), num_layers=4)
    assert config.names == ("layer2-mlp",)


def test_a_malformed_entry_is_left_for_the_config_to_refuse() -> None:
    merged = _merged(early_exit={**BLOCK, "exits": ["layer1-mlp", {"layer": "x"}]})
    with pytest.raises(ValueError, match=r"exits\[0\] = 'layer1-mlp'(.|\n)*exits\[1\].layer = 'x'"):
        EarlyExitConfig.from_mapping(OmegaConf.to_container(merged.early_exit), num_layers=4)


# -- check_run --------------------------------------------------------------------------------------------------------


def _write_data(prefix: Path, lengths: list[int]) -> str:
    """A data set of documents of these lengths; returns the prefix."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for length in lengths:
        builder.add_document(torch.ones(length), [length])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def _run(tmp_path: Path, *, changes: dict[str, Any] | None = None, **model: Any) -> None:
    _write_data(tmp_path / "data", [600, 400])
    settings = {
        "restore_from_path": "ee.nemo",
        "data": {
            "data_prefix": {
                "train": [str(tmp_path / "data")],
                "validation": ["0.5", str(tmp_path / "data")],
                "test": None,
            }
        },
        "early_exit": BLOCK,
        "optim": {"name": "adamw"},
        **model,
    }
    cfg = {
        "save_to": None,
        "trainer": {
            "devices": 1,
            "num_nodes": 1,
            "precision": 32,
            **(changes or {}).pop("trainer", {}),
        },
        "model": settings,
        **(changes or {}),
    }
    config = OmegaConf.create(cfg)
    check_run(config, merge_model_config(OmegaConf.create(STORED), config.model))


@pytest.mark.parametrize(("shares", "split"), [("1000,1,0", "validation"), ("1,1000,0", "train")])
def test_a_share_without_documents_is_refused(tmp_path: Path, shares: str, split: str) -> None:
    """Megatron would count epochs of nothing for ever."""
    with pytest.raises(ValueError, match=rf"the {split} data takes 0 documents with 0 tokens of .*splits_string"):
        _run(tmp_path, data={"data_prefix": [1.0, str(tmp_path / "data")], "splits_string": shares})


def test_a_run_without_problems_starts(tmp_path: Path) -> None:
    _run(tmp_path)
    _run(tmp_path, data={"data_prefix": [1.0, str(tmp_path / "data")], "splits_string": "50,50,0"})
    weighted = ["30", str(tmp_path / "data"), "70", str(tmp_path / "data")]
    _run(tmp_path, data={"data_prefix": weighted, "splits_string": "1,1,0"})
    _run(tmp_path, early_exit={**BLOCK, "exits": [{"layer": 4, "architecture": "layer"}]})
    two = {"devices": 2, "num_nodes": 1, "precision": 32}
    split = {"layers": None, "cost": "measured", "costs": {"exits": {"layer1-mlp": 4.0}}}
    _run(tmp_path, changes={"trainer": two}, pipeline_model_parallel_size=2, layer_split=split)
    low = {**BLOCK, "exits": [{"layer": 4, "lr": 1e-5}]}
    _run(tmp_path, early_exit=low, optim={"name": "adamw", "lr": 1e-3, "sched": {"name": "Constant", "min_lr": 1e-4}})
    beside = {**BLOCK, "train": "lora", "lora": {"merge": False}}
    _run(tmp_path, early_exit=beside, changes={"save_to": "x.nemo", "exits_only": True})


FAULTS = {
    "no shares": ({"data": {"data_prefix": ["x"]}}, {}, ["model.data.splits_string is needed with a plain list"]),
    "nothing to train": (
        {"early_exit": {**BLOCK, "exits": [{"layer": 2, "architecture": "embedding", "output": "shared"}]}},
        {},
        ["nothing would train: layer2-embedding are frozen copies", "use output: own or low_rank"],
    ),
    "no such data": (
        {"data": {"data_prefix": {"train": ["nowhere/x"], "test": ["0.2", "nowhere/y"]}}},
        {},
        [
            "data_prefix, train: nowhere/x.bin does not exist",
            "nowhere/x.idx",
            "data_prefix, test: nowhere/y.bin does not exist; make it with scripts/data/preprocess_text.py",
        ],
    ),
    "no data": (
        {"data": {"data_prefix": None}},
        {},
        ["model.data.data_prefix: None is not a list of prefixes; write {train: [data/train]"],
    ),
    "empty data": (
        {"data": {"data_prefix": {"train": [], "validation": "x"}}},
        {},
        ["data_prefix, train: [] is not", "data_prefix, validation: 'x' is not a list", "data_prefix, test: None is"],
    ),
    "a length the model does not have": (
        {"encoder_seq_length": 65},
        {},
        ["model.encoder_seq_length=65 is longer than the model's 64 positions; shorten it"],
    ),
    "a directory to save to": ({}, {"save_to": "."}, ["save_to=. is a directory; give the name of a .nemo file"]),
    "an exit too deep": (
        {"early_exit": {**BLOCK, "exits": [{"layer": 5}, {"layer": 1, "architecture": "mpl"}]}},
        {},
        ["exits[0].layer = 5", "1..4", "exits[1].architecture = 'mpl'", "did you mean mlp?"],
    ),
    "a setting that is not supported": (
        {"fp8": True, "micro_batch_size": 3, "global_batch_size": 4},
        {},
        ["fp8=True", "global_batch_size=4 is not a multiple of micro_batch_size=3"],
    ),
    "exits only of a joint run": (
        {"early_exit": {**BLOCK, "train": "joint"}},
        {"save_to": "x.nemo", "exits_only": True},
        ["exits_only=True with model.early_exit.train=joint", "set exits_only=False"],
    ),
    "exits only of a merged backbone": (
        {"early_exit": {**BLOCK, "train": "lora"}},
        {"save_to": "x.nemo", "exits_only": True},
        ["exits_only=True with model.early_exit.lora.merge=True", "or model.early_exit.lora.merge=False"],
    ),
    "settings of a file that is not written": (
        {},
        {"exits_only": True, "exits_dtype": "bfloat16"},
        ["exits_only=True is a setting of save_to", "exits_dtype is a setting of save_to"],
    ),
    "fp16": ({}, {"trainer": {"precision": "16-mixed"}}, ["trainer.precision=16-mixed: fp16 tuning is not supported"]),
    "a layer split that does not fit": (
        {
            "pipeline_model_parallel_size": 3,
            "layer_split": {"layers": [1, 2], "cost": "time", "costs": {"exits": {"x": 1.0}}},
        },
        {"trainer": {"devices": 3, "precision": 32, "max_steps": 1}},
        [
            "pipeline_model_parallel_size = 3 is more than the 2 layers that run",
            "layers = [1, 2]: has 2 entries for pipeline_model_parallel_size = 3",
            "sums to 3, and 2 layers run",
            "cost = 'time': must be one of parameters, measured, even",
            "costs.exits.x = 1.0: is not a key of this block",
        ],
    ),
    "rates that would rise": (
        {
            "optim": {"lr": 1e-3, "sched": {"name": "LinearAnnealing", "min_lr": 1e-4}},
            "early_exit": {**BLOCK, "exits": [{"layer": 1, "lr": 1e-5}, {"layer": 2, "min_lr": 1e-2}, {"layer": 3}]},
        },
        {},
        [
            "exits[0].lr=1e-05 is below model.optim.sched.min_lr=0.0001, to which it would rise; give the exit a min",
            "exits[1].min_lr=0.01 is above model.optim.lr=0.001, which the exit takes",
        ],
    ),
    "a run's rate that would rise": (
        {"optim": {"lr": 1e-3, "sched": {"name": "CosineAnnealing", "min_lr": 1e-2}}},
        {},
        ["model.optim.sched.min_lr=0.01 is above model.optim.lr=0.001; lower it"],
    ),
    "ranks": ({"tensor_model_parallel_size": 2}, {}, ["tensor_model_parallel_size=2", "number of ranks (1)"]),
}


# Megatron's reader complains once more when a half-made one is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_data_that_is_not_enough_for_one_step_is_refused(tmp_path: Path) -> None:
    """2 x 64 labels need 129 tokens, over all the prefixes together; validation may be smaller."""
    short = [_write_data(tmp_path / "a", [40]), _write_data(tmp_path / "b", [40, 48])]
    data = {"data_prefix": {"train": ["0.3", short[0], "0.7", short[1]], "validation": [short[0]], "test": None}}
    batch = {"micro_batch_size": 1, "global_batch_size": 2}
    with pytest.raises(ValueError, match=r"3 documents with 128 tokens, and one step needs 129 \(global_batch_size=2"):
        _run(tmp_path, data=data, **batch)
    _run(tmp_path, data=data, **batch, encoder_seq_length=63)
    whole = {"data_prefix": [_write_data(tmp_path / "c", [129])], "splits_string": "1,0,0"}
    _run(tmp_path, data=whole, **batch)
    (tmp_path / "c.idx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"train: .*/c.idx cannot be read .*; make the data anew"):
        _run(tmp_path, data=whole, **batch)


def test_tokens_outside_the_vocabulary_are_refused_in_every_split(tmp_path: Path) -> None:
    """The true vocabulary counts: its padding has rows, but nothing was ever learnt for them."""
    bad = tmp_path / "bad"
    builder = IndexedDatasetBuilder(f"{bad}.bin", dtype=numpy.uint16)
    builder.add_document(torch.tensor([1] * 600 + [4103]), [601])
    builder.finalize(f"{bad}.idx")
    for split in ("train", "validation", "test"):
        data = {"data_prefix": {key: [str(tmp_path / "data")] for key in ("train", "validation", "test")}}
        data["data_prefix"][split] = [f"{bad}.bin"]
        with pytest.raises(ValueError, match=r"bad\.bin holds the token 4103 \(document 0, position 600\).*\.\.4099;"):
            _run(tmp_path, data=data, vocab_size=4100)
        _run(tmp_path, data=data, vocab_size=4104)


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_a_prefix_may_be_given_as_one_of_its_files(tmp_path: Path, ending: str) -> None:
    name = _write_data(tmp_path / "data", [600])
    given = {"data_prefix": {"train": ["1.0", name + ending], "validation": [name], "test": None}}
    merged = merge_model_config(OmegaConf.create(STORED), OmegaConf.create({"data": given}))
    assert merged.data.data_prefix.train == ["1.0", name]
    _run(tmp_path, data=given)
    _run(tmp_path, data={"data_prefix": [name + ending], "splits_string": "1,0,0"})


@pytest.mark.parametrize("what", FAULTS)
def test_problems_are_named_with_value_and_way_out(what: str, tmp_path: Path) -> None:
    model, changes, expected = FAULTS[what]
    with pytest.raises(ValueError, match="the run cannot start:") as caught:
        _run(tmp_path, changes={key: dict(v) if isinstance(v, dict) else v for key, v in changes.items()}, **model)
    for text in expected:
        assert text in str(caught.value)


def test_a_model_without_exits_has_nothing_to_train(tmp_path: Path) -> None:
    cfg = OmegaConf.create(
        {
            "save_to": None,
            "trainer": {"devices": 1, "num_nodes": 1, "precision": 32},
            "model": {"restore_from_path": "plain.nemo", "data": {"data_prefix": None}, "early_exit": BLOCK},
        }
    )
    stored = OmegaConf.create({key: value for key, value in STORED.items() if key != "early_exit"})
    with pytest.raises(ValueError, match=r"plain.nemo has no exits .* nothing would train; add .*every=1/4"):
        check_run(cfg, merge_model_config(stored, cfg.model))


def test_all_problems_come_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        _run(
            tmp_path,
            changes={"save_to": str(tmp_path)},
            data={"data_prefix": {"train": ["nowhere/x"]}},
            encoder_seq_length=99,
            early_exit={**BLOCK, "exits": [{"layer": 9}]},
            fp8=True,
        )
    for text in (
        "nowhere/x.bin",
        "encoder_seq_length=99",
        "save_to=",
        "layer = 9",
        "fp8",
    ):
        assert text in str(caught.value)
