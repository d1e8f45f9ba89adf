# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks of a calibration's request against its model and its prompts, before weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_ee.calibration.calibration_prompts import CalibrationPrompts, make_prompts
from nemo_ee.calibration.calibration_request import CalibrationRequest
from nemo_ee.calibration.learn_then_test import candidate_problems
from nemo_ee.calibration.risk_control import fewest_prompts
from nemo_ee.certificates.exit_probes import valid_probes
from nemo_ee.checkpoint.tokenizer_files import stored_end_of_text
from nemo_ee.commands.generate import NO_END_OF_TEXT, prompt_ids
from nemo_ee.exits.block_reader import close_match
from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.exits.criteria import NEVER_LEAVES, PROBE
from nemo_ee.exits.probe import ExitProbe


def check_model(request: CalibrationRequest, stored: DictConfig, positions: int) -> Mapping[str, ExitProbe]:
    """Refuse what does not fit the model. Returns the exits' probes, where the criterion needs them."""
    problems = []
    probes: Mapping[str, ExitProbe] = {}
    block = OmegaConf.to_container(stored.get("early_exit") or OmegaConf.create(), resolve=True)
    names = [exit.name for exit in EarlyExitConfig.from_mapping(block, num_layers=stored.num_layers).exits]
    if not names:
        problems.append(f"{request.path} has no exits; add some with examples/megatron_gpt_early_exit_convert.py")
    for name in request.exits or ():
        if name not in names:
            meant = close_match(name, names)
            problems.append(f"exits names {name!r}, which the model does not have{meant}; it has {', '.join(names)}")
    if request.split:
        chosen = [name for name in names if request.exits is None or name in request.exits]
        problems += candidate_problems(request.grid, len(chosen), NEVER_LEAVES[request.criterion])
    if request.criterion == PROBE and names:
        try:
            fitted = valid_probes(request.path, names if request.exits is None else request.exits)
            probes = fitted.probes
            if fitted.data == request.data.facts["sha256"]:
                problems.append(
                    f"the probes were fitted on {request.data.facts['file']}, so it cannot test them; calibrate on "
                    "other prompts"
                )
        except ValueError as problem:
            problems.append(str(problem))
    longest = request.setting.tokens_to_generate
    if any(entry.is_document for entry in request.data.entries):
        longest += request.prompt_tokens
    if longest >= positions:
        problems.append(
            f"prompt_tokens + tokens_to_generate are {longest} of the model's {positions} positions; lower one of them"
        )
    if problems:
        raise ValueError("nothing was calibrated:\n" + "\n".join(f"  {one}" for one in problems))
    return probes


def checked_prompts(
    request: CalibrationRequest, tokenizer: Any, positions: int, vocab_size: int | None
) -> CalibrationPrompts:
    """The prompts of a request.

    Args:
        positions: the model's.
        vocab_size: the model's; None = token ids are not checked.

    Raises:
        ValueError: the first kind of problem: of the tokenizer, of prompts (all of them), or too few prompts to test.
    """
    setting = request.setting
    if setting.add_BOS and tokenizer.bos_id is None:
        raise ValueError("add_BOS=True, but the tokenizer has no begin-of-text token; set add_BOS=False")
    if setting.stop_on_eos and not stored_end_of_text(request.path, tokenizer.eos_id).ids:
        raise ValueError(NO_END_OF_TEXT)
    adds_bos = prompt_ids(tokenizer, "x", setting.add_BOS)[:1] == [tokenizer.bos_id]
    prompts = make_prompts(
        request.data.entries,
        lambda text: prompt_ids(tokenizer, text, setting.add_BOS),
        bos=tokenizer.bos_id if adds_bos else None,
        prompt_tokens=request.prompt_tokens,
        prompts_per_document=request.prompts_per_document,
        num_prompts=request.num_prompts,
        longest=positions - setting.tokens_to_generate,
        vocab_size=vocab_size,
        seed=request.seed,
        facts=request.data.facts,
    )
    set_aside = round(request.split * len(prompts.ids))
    if request.split and not set_aside:
        raise ValueError(
            f"split={request.split} sets none of {len(prompts.ids)} prompts aside; raise it, or set split=0"
        )
    tested = len(prompts.ids) - set_aside
    fewest = fewest_prompts(request.epsilon, request.delta)
    if tested < fewest:
        raise ValueError(
            f"{tested} prompts are left to test, but epsilon={request.epsilon} and delta={request.delta} need "
            f"{fewest} even where nothing is lost; give more prompts, or raise epsilon or delta"
        )
    return prompts
