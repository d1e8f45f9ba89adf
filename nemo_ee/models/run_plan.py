# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The validated config of a tuning run; no folder is made and no weight is read before all checks."""

from __future__ import annotations

import logging

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_ee.models.connector import read_config
from nemo_ee.models.run_config import check_run, merge_model_config
from nemo_ee.models.tune_settings import TuneSettings
from nemo_ee.settings.script_input import raise_problems, script_problems

logger = logging.getLogger(__name__)


def plan_run(cfg: DictConfig) -> DictConfig:
    """The script's config with the merged model config as its `model` block.

    Without validation (`validation: null` in the data, or `trainer.limit_val_batches=0`) checkpoints are written
    every `trainer.val_check_interval` steps, unless their own interval is given.

    Args:
        cfg: conf/megatron_gpt_early_exit_tune.yaml.

    Raises:
        ValueError: lists every problem of the settings, and of the data and the model as far as they can be read.
    """
    problems: dict[str, str] = {}
    found = script_problems(TuneSettings, cfg)
    for one in found:
        problems[one.where] = f"{problems[one.where]}\n{one.text}" if one.where in problems else one.text
    if any(one.kind == "missing" or one.where == "model.restore_from_path" for one in found):
        raise_problems("the run cannot start", problems.values())
    # Wrong values are null below, so that the file's values are used; checks that need them are left out.
    usable = OmegaConf.create(OmegaConf.to_container(cfg, resolve=not problems))
    for key in problems:
        OmegaConf.update(usable, key, None, force_add=True)
    for block in ("trainer", "exp_manager", "model.data"):
        if not OmegaConf.is_dict(OmegaConf.select(usable, block)):
            OmegaConf.update(usable, block, {}, force_add=True)
    if usable.exp_manager.get("create_early_stopping_callback") and not validates(usable):
        problems["exp_manager.create_early_stopping_callback"] = (
            "exp_manager.create_early_stopping_callback=True needs validation, and this run has none; name "
            "validation data and set trainer.limit_val_batches, or set it to False"
        )
    try:
        model = merge_model_config(read_config(usable.model.restore_from_path), usable.model)
    except (ValueError, FileNotFoundError, OmegaConfBaseException) as error:
        # A value that cannot be computed comes from a wrong one.
        more = [] if isinstance(error, OmegaConfBaseException) else [str(error)]
        raise_problems("the run cannot start", [*problems.values(), *more])
        raise
    check_run(usable, model, problems)
    plan = OmegaConf.create({**usable, "model": model})
    if not validates(plan):
        _without_validation(plan)
    return plan


def validates(cfg: DictConfig) -> bool:
    """Whether a run measures its exits on validation data."""
    prefixes = cfg.model.data.get("data_prefix")
    named = not OmegaConf.is_dict(prefixes) or prefixes.get("validation") is not None
    return named and cfg.trainer.get("limit_val_batches", 1.0) != 0


def _without_validation(plan: DictConfig) -> None:
    plan.trainer.limit_val_batches = plan.trainer.num_sanity_val_steps = 0
    params = plan.exp_manager.get("checkpoint_callback_params")
    if not plan.exp_manager.get("create_checkpoint_callback", True) or not OmegaConf.is_dict(params):
        return
    if params.get("every_n_train_steps") is None:
        params.every_n_train_steps = plan.trainer.get("val_check_interval", 200)
    logger.info(
        f"this run has no validation: a checkpoint every {params.every_n_train_steps} steps, of which the last one is "
        "kept; no metric for the best one is measured"
    )
