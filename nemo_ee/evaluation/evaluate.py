# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs an evaluation: check everything, restore, measure, write exits.json and exits.png."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from omegaconf import DictConfig

from nemo_ee.checkpoint.atomic import write_json
from nemo_ee.data.token_windows import TokenWindows, microbatches, num_batches
from nemo_ee.evaluation.evaluation_settings import EvaluationSettings
from nemo_ee.evaluation.exit_quality import evaluate_exits
from nemo_ee.evaluation.report import draw_quality
from nemo_ee.models.connector import EarlyExitSaveRestoreConnector, read_config
from nemo_ee.models.megatron_early_exit_gpt_model import MegatronEarlyExitGPTModel
from nemo_ee.models.run_config import merge_model_config
from nemo_ee.models.supported import refuse_unsupported
from nemo_ee.models.trainer import single_run_trainer
from nemo_ee.settings.script_input import raise_problems, script_problems

logger = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Run an evaluation; `cfg` is conf/megatron_gpt_early_exit_eval.yaml. Every rank must call it.

    Returns:
        The content of exits.json, which rank 0 has written.

    Raises:
        ValueError: all problems of model, data and settings in one message, before anything is built.
    """
    model_config, windows = _check(cfg)
    trainer = single_run_trainer(cfg)
    model = MegatronEarlyExitGPTModel.restore_from(
        str(cfg.model.restore_from_path),
        override_config_path=model_config,
        trainer=trainer,
        save_restore_connector=EarlyExitSaveRestoreConnector(verify=cfg.model.verify),
    )
    model.to(trainer.strategy.root_device)
    batch_size = model_config.global_batch_size
    batches = microbatches(
        windows,
        micro_batch_size=model_config.micro_batch_size,
        global_batch_size=batch_size,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        device=model.device,
    )
    start = time.perf_counter()
    quality = evaluate_exits(
        model, batches, num_batches=num_batches(windows, global_batch_size=batch_size), progress=True
    )
    report = {
        "model": str(cfg.model.restore_from_path),
        "data": str(cfg.data),
        "seq_length": windows.seq_length,
        **quality.to_mapping(),
        "seconds": time.perf_counter() - start,
    }
    if trainer.is_global_zero:
        output = Path(cfg.output)
        write_json(output / "exits.json", report)
        draw_quality(
            output / "exits.png",
            report,
            title=f"Exits of {Path(report['model']).name}",
            caption=f"{report['tokens']:,} tokens of {Path(report['data']).name} in windows of {windows.seq_length}",
        )
        logger.info("wrote %s and %s", output / "exits.json", output / "exits.png")
    return report


def _check(cfg: DictConfig) -> tuple[DictConfig, TokenWindows]:
    """The model config for restoring, and the windows of the evaluation text.

    Raises:
        ValueError: all problems that can be found without weights.
    """
    problems = script_problems(EvaluationSettings, cfg)
    texts, wrong = [one.text for one in problems], {one.where for one in problems}
    model_config = None if wrong - {"data", "output"} else _model_config(cfg, texts)
    windows = None if wrong & {"data", "max_tokens"} else _windows(cfg, model_config, texts)
    raise_problems("nothing was evaluated", texts)
    return model_config, windows


def _model_config(cfg: DictConfig, texts: list[str]) -> DictConfig | None:
    path = cfg.model.restore_from_path
    try:
        config = merge_model_config(read_config(path), cfg.model)
    except ValueError as problem:
        texts.append(f"model.restore_from_path={path}: {problem}")
        return None
    config.full_depth = True  # agreement needs the final exit
    block = config.get("early_exit") or {}
    if not block.get("exits") and not block.get("every"):
        texts.append(f"{path} has no exits; add some with examples/megatron_gpt_early_exit_convert.py")
    length, longest = config.encoder_seq_length, config.get("max_position_embeddings")
    if length < 1 or (longest and length > longest):
        texts.append(f"model.encoder_seq_length={length} is not in 1..{longest}, the model's positions; change it")
    size = config.get("tensor_model_parallel_size", 1)
    if config.get("sequence_parallel") and length % size:
        texts.append(
            f"model.encoder_seq_length={length} is not a multiple of tensor_model_parallel_size={size}; change it or "
            "set model.sequence_parallel=False"
        )
    try:
        ranks = int(cfg.trainer.devices) * int(cfg.trainer.num_nodes)
        refuse_unsupported(config, world_size=ranks, precision=cfg.trainer.precision)
    except ValueError as problem:
        texts.append(str(problem))
    return config


def _windows(cfg: DictConfig, model_config: DictConfig | None, texts: list[str]) -> TokenWindows | None:
    length = model_config.encoder_seq_length if model_config is not None else 1
    vocabulary = model_config.get("vocab_size") if model_config is not None else None
    try:
        return TokenWindows(str(cfg.data), seq_length=max(1, length), max_tokens=cfg.max_tokens, vocab_size=vocabulary)
    except ValueError as problem:
        texts.append(f"data={cfg.data}: {problem}")
        return None
