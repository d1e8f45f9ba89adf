# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A tuning run from its yaml: every problem at once, before anything is made; a run without validation."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("nemo")

from omegaconf import DictConfig, OmegaConf

from nemo_ee.models import run_plan
from tests.unit.models.test_run_config import STORED, _write_data
from tests.unit.settings.test_every_script import keys_of, resolver, settings_of  # noqa: F401

SCRIPT = "megatron_gpt_early_exit_tune"


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DictConfig:
    """A run that can start."""
    monkeypatch.setattr(run_plan, "read_config", lambda path: OmegaConf.create(STORED))
    data = _write_data(tmp_path / "data", [600, 400])
    monkeypatch.chdir(tmp_path)
    prefixes = {"train": [data], "validation": [data], "test": None}
    changes = {"model.restore_from_path": "ee.nemo", "model.data.data_prefix": prefixes, "trainer.precision": 32}
    return settings_of(SCRIPT, **changes)


def change(cfg: DictConfig, **changes) -> DictConfig:
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    return cfg


def problems(cfg: DictConfig) -> str:
    with pytest.raises(ValueError, match="the run cannot start:") as caught:
        run_plan.plan_run(cfg)
    return str(caught.value)


def test_a_run_that_can_start_has_the_merged_model(cfg: DictConfig) -> None:
    plan = run_plan.plan_run(cfg)
    assert plan.model.num_layers == STORED["num_layers"] and plan.model.optim.lr == 1e-4
    assert plan.exp_manager == cfg.exp_manager and plan.trainer == cfg.trainer


def test_wrong_values_come_in_one_message_with_the_other_problems(cfg: DictConfig) -> None:
    wrong = {
        "model.optim.lr": "fast", "trainer.max_steps": "ten", "model.optim.betas": [0.9],
        "trainer.val_check_interval": 0, "model.optim.eps": float("nan"), "model.tensor_modelparallel_size": 2,
        "trainer.max_step": 5, "foo": 1, "exp_manager.checkpoint_callback_params.save_top_k": "best",
        "save_to": "tuned.bin", "model.early_exit.exits": [{"layer": 9}], "model.data.data_prefix": {"trian": []},
        "model.optim.sched.name": "Cosine", "exp_manager.step_timing_kwargs.buffer_size": "big",
    }  # fmt: skip
    message = problems(change(cfg, **wrong))
    for text in (
        "model.optim.lr='fast' must be a finite number", "max_steps='ten' must be a whole number of at least 1",
        "model.optim.betas=[0.9] must be a list of 2 finite numbers", "trainer.val_check_interval=0 must be",
        "model.optim.eps=nan must be", "did you mean model.tensor_model_parallel_size?",
        "did you mean trainer.max_steps?",
        "foo=1 is not a setting here", "save_top_k='best'", "save_to=tuned.bin must end in .nemo", "layer = 9",
        "data_prefix.trian=[] is not a setting here (did you mean train?)",
        "model.optim.sched.name='Cosine' must be one of",
        "buffer_size='big' is refused by NeMo's experiment manager",
    ):  # fmt: skip
        assert text in message, (text, message)
    assert sorted(path.name for path in Path().iterdir()) == ["data.bin", "data.idx"], "nothing was made"


BLOCKS = (
    "early_exit.every early_exit.architecture early_exit.train early_exit.lora early_exit.lora.rank "
    "early_exit.distillation early_exit.distillation.top_k layer_split layer_split.layers layer_split.cost "
    "layer_split.costs data.data_prefix.train data.data_prefix.validation data optim optim.name optim.sched"
).split()


@pytest.mark.parametrize("wrong", ["fast", float("nan"), -3, ["x", 1], {"a": "b"}], ids=str)
def test_no_value_of_a_block_ends_in_a_traceback(cfg: DictConfig, wrong) -> None:
    """What the table leaves to the readers behind it is refused under its name, too."""
    entries = [{"layer": 1, "name": ["x"]}, {"layer": wrong}, wrong]
    for key, value in [*((f"model.{key}", wrong) for key in BLOCKS), ("model.early_exit.exits", entries)]:
        message = problems(change(cfg.copy(), **{key: value}))
        assert key in message or key.removeprefix("model.") in message or key.split(".")[-1] in message, (key, message)


@pytest.mark.parametrize("wrong", ["\t", None, float("nan")], ids=str)
def test_all_values_can_be_wrong_at_once(cfg: DictConfig, wrong) -> None:
    keys = sorted(keys_of(SCRIPT) - {"model.restore_from_path"})
    message = problems(change(cfg, **dict.fromkeys(keys, wrong)))
    assert sum(f"\n  {key}=" in message for key in keys) > (30 if wrong is None else 60), message


def test_what_libraries_read_besides_the_yaml_is_let_through(cfg: DictConfig) -> None:
    more = {
        "trainer.benchmark": True, "model.hidden_dropout": 0.1, "model.data.add_fim": False,
        "exp_manager.max_time_per_run": "00:01:00:00", "exp_manager.wandb_logger_kwargs.project": "exits",
        "model.mcore_customization_config.final_logit_softcapping": None, "model.vocab_size": 300,
        "model.dist_ckpt_parallel_save": True, "model.nsys_profile.enabled": False, "cluster_type": "BCP",
    }  # fmt: skip
    assert run_plan.plan_run(change(cfg, **more)).model.hidden_dropout == 0.1
    assert "model.hidden_dropout='much' must be a finite number" in problems(
        change(cfg, **{"model.hidden_dropout": "much"})
    )


def test_a_value_that_others_take_over_is_named_alone(cfg: DictConfig) -> None:
    message = problems(change(cfg, **{"model.tensor_model_parallel_size": "two"}))
    assert "tensor_model_parallel_size='two'" in message and "checkpoint_callback_params" not in message


@pytest.mark.parametrize("by", ["data", "limit"])
def test_without_validation_checkpoints_come_by_steps(cfg: DictConfig, by: str) -> None:
    key, value = {"data": ("model.data.data_prefix.validation", None), "limit": ("trainer.limit_val_batches", 0)}[by]
    plan = run_plan.plan_run(change(cfg, **{key: value, "trainer.val_check_interval": 7}))
    assert plan.trainer.limit_val_batches == 0 == plan.trainer.num_sanity_val_steps
    assert plan.exp_manager.checkpoint_callback_params.every_n_train_steps == 7
    cfg.exp_manager.checkpoint_callback_params.every_n_train_steps = 3
    assert run_plan.plan_run(cfg).exp_manager.checkpoint_callback_params.every_n_train_steps == 3, "its own counts"


def test_early_stopping_needs_validation(cfg: DictConfig) -> None:
    changes = {"model.data.data_prefix.validation": None, "exp_manager.create_early_stopping_callback": True}
    assert "create_early_stopping_callback=True needs validation" in problems(change(cfg, **changes))
