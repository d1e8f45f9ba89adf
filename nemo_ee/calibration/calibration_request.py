# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What a calibration was asked for, read once from its config; every fault that needs no model, in one message."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ee.calibration.calibration_prompts import Entry, read_entries
from nemo_ee.calibration.risk_control import fewest_prompts
from nemo_ee.certificates.certificate import Setting, check_name
from nemo_ee.certificates.validity import setting_of
from nemo_ee.commands.decoding_config import (
    model_path_faults,
    precision_faults,
    sampling_of,
    switch_faults,
    whole_number_faults,
)
from nemo_ee.exits.confidence import CRITERIA
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.sampling import SamplingParams

RISKS = ("disagreement", "nll_excess", "task")
# From the safest to the fastest.
_SHARES = (0.999, 0.99, 0.98, 0.96, 0.94, 0.92, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3)
_SHARES += (0.25, 0.2, 0.15, 0.1, 0.05, 0.0)
DEFAULT_GRID = {
    "max_probability": _SHARES,
    "margin": _SHARES,
    "entropy": (0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0),
}


@dataclass(frozen=True)
class CalibrationRequest:
    """A checked request.

    Attributes:
        path: the `.nemo`.
        entries, data_facts: what the data file says.
        prompt_tokens, prompts_per_document, num_prompts: how prompts are made of it.
        risk, epsilon, delta: what is to hold.
        clip_nats: of `nll_excess`: the mean excess that counts as risk 1.
        answer_until: of `task`: an answer ends before this text; None = it is compared whole.
        criterion, grid, exits, max_pending_tokens: the policies; the grid from the safest to the fastest.
        split: share of the prompts that find an order of policies with a threshold per exit; 0 = one threshold for
            all exits, and every prompt tests.
        setting, sampling: how the model runs.
        free_running: prompts to decode freely under the result, for the report.
        batch_size: prompts run together.
        output: directory of the report.
        certificate: name to store under; None = it is not stored.
        save_to: `.nemo` to write; None = the model's own file.
        seed: of the choice of prompts and of sampling.
    """

    path: Path
    entries: tuple[Entry, ...]
    data_facts: dict[str, Any]
    prompt_tokens: int
    prompts_per_document: int
    num_prompts: int | None
    risk: str
    epsilon: float
    delta: float
    clip_nats: float
    answer_until: str | None
    criterion: str
    grid: tuple[float, ...]
    exits: tuple[str, ...] | None
    max_pending_tokens: int | None
    split: float
    setting: Setting
    sampling: SamplingParams
    free_running: int
    batch_size: int
    output: Path
    certificate: str | None
    save_to: Path | None
    seed: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CalibrationRequest:
        """Read conf/megatron_gpt_early_exit_calibrate.yaml.

        Args:
            config: the script's config as plain containers.

        Raises:
            ValueError: every fault, in one message.
        """
        faults: list[str] = []
        _check_kinds(config, faults)
        if faults:  # what follows computes with these values
            raise _error(faults)
        sampling = _sampling(config, faults)
        grid = _grid(config, faults)
        _check_risk(config, faults)
        _check_ranks(config, faults)
        path, output, save_to = _paths(config, faults)
        entries, facts = _entries(config, faults)
        if faults:
            raise _error(faults)
        exits = config["exits"]
        return cls(
            path=path, entries=entries, data_facts=facts, output=output, save_to=save_to, grid=grid, sampling=sampling,
            exits=None if exits is None else tuple(exits),
            setting=setting_of({**config, "mode": "early_exit"}),
            split=float(config["split"]),
            certificate=config["certificate"] or None,
            **{key: config[key] for key in (
                "prompt_tokens", "prompts_per_document", "num_prompts", "risk", "epsilon", "delta", "clip_nats",
                "answer_until", "criterion", "max_pending_tokens", "free_running", "batch_size", "seed",
            )},
        )  # fmt: skip


def _error(faults: list[str]) -> ValueError:
    return ValueError("nothing was calibrated:\n" + "\n".join(f"  {one}" for one in faults))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_kinds(config: Mapping[str, Any], faults: list[str]) -> None:
    lowest = {
        "tokens_to_generate": 1, "prompt_tokens": 1, "prompts_per_document": 1, "num_prompts": 1, "batch_size": 1,
        "free_running": 0, "seed": 0, "max_document_bytes": 1,
    }  # fmt: skip
    faults += whole_number_faults(config, lowest, or_null=("num_prompts", "max_document_bytes"))
    faults += switch_faults(config, ("greedy", "stop_on_eos"), or_null=("add_BOS",))
    for key in ("epsilon", "delta"):
        if not _is_number(config[key]) or not 0 < config[key] < 1:
            faults.append(f"{key}={config[key]!r} must be a number between 0 and 1")
    if not _is_number(config["split"]) or not 0 <= config["split"] < 1:
        faults.append(f"split={config['split']!r} must be a number from 0, below 1")
    if not _is_number(config["clip_nats"]) or not 0 < config["clip_nats"] < float("inf"):
        faults.append(f"clip_nats={config['clip_nats']!r} must be a number of nats above 0")
    for key, known in (("risk", RISKS), ("criterion", CRITERIA)):
        if config[key] not in known:
            faults.append(f"{key}={config[key]!r} is unknown; use one of {', '.join(known)}")
    until = config["answer_until"]
    if until is not None and (not isinstance(until, str) or not until):
        faults.append(f"answer_until={until!r} must be a text, or null")


def _sampling(config: Mapping[str, Any], faults: list[str]) -> SamplingParams | None:
    try:
        return sampling_of(config)
    except ValueError as fault:
        faults.append(str(fault))
        return None


def _grid(config: Mapping[str, Any], faults: list[str]) -> tuple[float, ...]:
    """The thresholds from the safest to the fastest, whatever the order they are given in."""
    given = config["grid"]
    criterion = config["criterion"]
    if given is None:
        return DEFAULT_GRID[criterion]
    if not isinstance(given, list) or not given:
        faults.append(f"grid={given!r} must be a list of thresholds, or null")
        return ()
    try:
        for value in given:
            ExitPolicy(
                value, criterion=criterion, active=config["exits"], max_pending_tokens=config["max_pending_tokens"]
            )
    except ValueError as fault:
        faults.append(f"grid: {fault}")
        return ()
    return tuple(sorted({float(value) for value in given}, reverse=criterion != "entropy"))


def _check_risk(config: Mapping[str, Any], faults: list[str]) -> None:
    try:
        ExitPolicy(
            0.5, criterion=config["criterion"], active=config["exits"], max_pending_tokens=config["max_pending_tokens"]
        )
    except ValueError as fault:
        faults.append(str(fault))
    if config["risk"] == "task" and config["split"]:
        faults.append("split needs a risk that one pass can simulate; set split=0 with risk=task")
    fewest, given = fewest_prompts(config["epsilon"], config["delta"]), config["num_prompts"]
    if given is not None and given - round(config["split"] * given) < fewest:
        faults.append(
            f"num_prompts={given} leaves fewer than {fewest} prompts to test, which epsilon={config['epsilon']} and "
            f"delta={config['delta']} need even where nothing is lost; give more prompts, or raise epsilon or delta"
        )


def _check_ranks(config: Mapping[str, Any], faults: list[str]) -> None:
    """Calibration runs on the ranks of one stage of one model."""
    trainer, model = config["trainer"], config["model"]
    stages, tensor = model["pipeline_model_parallel_size"], model["tensor_model_parallel_size"]
    if stages != 1:
        faults.append(
            f"model.pipeline_model_parallel_size={stages}: calibration is not available over pipeline stages yet; set "
            "it to 1 and share the layers with model.tensor_model_parallel_size"
        )
    elif trainer["devices"] * trainer["num_nodes"] != tensor:
        faults.append(
            f"trainer.devices={trainer['devices']} x trainer.num_nodes={trainer['num_nodes']} ranks, but "
            f"model.tensor_model_parallel_size={tensor}: calibration runs one model, make the two equal"
        )
    faults += precision_faults(config)


def _paths(config: Mapping[str, Any], faults: list[str]) -> tuple[Path, Path, Path | None]:
    path = Path(str(config["model"]["restore_from_path"]))
    faults += model_path_faults(config)
    output = Path(str(config["output"]))
    save_to = None if config["save_to"] is None else Path(str(config["save_to"]))
    written = {"output": output}
    if config["certificate"]:
        in_place = {"model.restore_from_path": path if path.is_dir() else path.resolve().parent}
        written |= in_place if save_to is None else {"save_to": save_to.parent}
    faults += [fault for key, folder in written.items() for fault in _folder_faults(key, folder)]
    if save_to is not None and save_to.exists():
        faults.append(f"save_to={save_to} exists; give another name, or null to put the certificate into the model")
    if config["certificate"]:
        try:
            check_name(config["certificate"])
        except ValueError as fault:
            faults.append(str(fault))
    elif save_to is not None:
        faults.append("save_to is given, but certificate is null, so nothing would be stored; name the certificate")
    return path, output, save_to


def _folder_faults(key: str, folder: Path) -> Iterator[str]:
    """Why nothing can be written to a folder, which need not exist yet."""
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not there.is_dir():
        yield f"{key}: {there} is a file, but files are to be written below it; give a directory"
    elif not os.access(there, os.W_OK | os.X_OK):
        yield f"{key}: {there} may not be written to; give another place, or ask for the right to write there"


def _entries(config: Mapping[str, Any], faults: list[str]) -> tuple[tuple[Entry, ...], dict[str, Any]]:
    data = config["data"]
    if data in (None, "???", ""):
        faults.append("data is not set; give a .jsonl with prompts or documents, or a text file")
        return (), {}
    try:
        entries, digest = read_entries(Path(str(data)), config["max_document_bytes"])
    except ValueError as fault:
        faults.append(f"data: {fault}")
        return (), {}
    if config["risk"] == "task":
        missing = sum(entry.answer is None for entry in entries)
        if missing:
            faults.append(f'risk=task needs an "answer" in every line of {data}; {missing} have none')
    return tuple(entries), {"file": Path(str(data)).name, "sha256": digest}
