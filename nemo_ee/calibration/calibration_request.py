# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings of a calibration, read once from its config. All problems that need no model are in one message."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from nemo_ee.calibration.calibration_prompts import Entry, read_entries
from nemo_ee.calibration.risk_control import fewest_prompts
from nemo_ee.certificates.certificate import Setting, check_name
from nemo_ee.certificates.validity import setting_of
from nemo_ee.commands.decoding_config import Cap, SamplingInput, check_policy, check_ranks
from nemo_ee.exits.criteria import PROBE, SMALLER_IS_CONFIDENT
from nemo_ee.settings.fields import AboveZero, BelowOne, Criterion, ExitNames, FilePath, Run, StoredModel
from nemo_ee.settings.library_keys import model_keys, trainer_keys
from nemo_ee.settings.script_input import ScriptInput
from nemo_ee.settings.user_input import Natural, Positive, Sentence, Text, rule

# From the safest to the fastest.
_SHARES = (0.999, 0.99, 0.98, 0.96, 0.94, 0.92, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3)
_SHARES += (0.25, 0.2, 0.15, 0.1, 0.05, 0.0)
DEFAULT_GRID = {
    "max_probability": _SHARES,
    "margin": _SHARES,
    PROBE: _SHARES,
    "entropy": (0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0),
}


Probability = Annotated[float, Field(gt=0, lt=1)]


class CalibrationData(NamedTuple):
    """Content of the data file: its entries, and its name and sha256."""

    entries: tuple[Entry, ...]
    facts: dict[str, Any]


def _read_data(file: Any, info: ValidationInfo) -> Any:
    if not isinstance(file, str) or "max_document_bytes" not in info.data:
        return file
    try:
        entries, digest = read_entries(Path(file), info.data["max_document_bytes"])
    except ValueError as problem:
        raise Sentence(f"data: {problem}") from None
    missing = sum(entry.answer is None for entry in entries)
    if info.data.get("risk") == "task" and missing:
        raise Sentence(f'risk=task needs an "answer" in every line of {file}; {missing} have none')
    return CalibrationData(tuple(entries), {"file": Path(file).name, "sha256": digest})


# Its content is read at once; `max_document_bytes` must be a field before it.
PromptFile = Annotated[
    CalibrationData,
    BeforeValidator(_read_data),
    rule("the name of a .jsonl with prompts or documents, or of a text file"),
]


class CalibrationRequest(SamplingInput, ScriptInput):
    """conf/megatron_gpt_early_exit_calibrate.yaml, a field for each key.

    `data` is the content of the file, `grid` is sorted from the safest threshold to the fastest.
    """

    headline: ClassVar = "nothing was calibrated"
    libraries: ClassVar = {"trainer": trainer_keys, "model": model_keys}

    max_document_bytes: Positive | None
    risk: Literal["disagreement", "nll_excess", "task"]
    data: PromptFile
    epsilon: Probability
    delta: Probability
    clip_nats: AboveZero
    answer_until: Annotated[str, Field(min_length=1)] | None
    split: BelowOne
    prompt_tokens: Positive
    prompts_per_document: Positive
    num_prompts: Positive | None
    criterion: Criterion
    exits: ExitNames
    grid: Annotated[tuple[float, ...] | None, rule("a list of thresholds, or null")]
    max_pending_tokens: Cap
    tokens_to_generate: Positive
    batch_size: Positive
    free_running: Natural
    output: FilePath
    certificate: Text | None
    save_to: FilePath | None
    trainer: Run
    model: StoredModel

    @field_validator("split")
    @classmethod
    def _has_a_risk_to_simulate(cls, split: float, info: ValidationInfo) -> float:
        if split and info.data.get("risk") == "task":
            raise ValueError("needs a risk that one pass can simulate; set split=0 with risk=task")
        return split

    @field_validator("num_prompts")
    @classmethod
    def _is_enough(cls, given: int | None, info: ValidationInfo) -> int | None:
        if given is None or not {"epsilon", "delta", "split"} <= info.data.keys():
            return given
        epsilon, delta = info.data["epsilon"], info.data["delta"]
        fewest = fewest_prompts(epsilon, delta)
        if given - round(info.data["split"] * given) < fewest:
            raise ValueError(
                f"leaves fewer than {fewest} prompts to test, which epsilon={epsilon} and delta={delta} need even "
                "where nothing is lost; give more prompts, or raise epsilon or delta"
            )
        return given

    @field_validator("exits")
    @classmethod
    def _are_named_once(cls, exits: tuple[str, ...] | None) -> tuple[str, ...] | None:
        check_policy(0.0, active=exits)
        return exits

    @field_validator("grid")
    @classmethod
    def _goes_with_the_criterion(cls, grid: Any, info: ValidationInfo) -> Any:
        """The thresholds sorted from the safest to the fastest."""
        criterion = info.data.get("criterion")
        if criterion is None:
            return grid
        if grid == ():
            raise ValueError("holds no threshold; give some, or null")
        for threshold in grid or ():
            check_policy(threshold, criterion=criterion)
        return (
            tuple(sorted(set(grid), reverse=criterion not in SMALLER_IS_CONFIDENT))
            if grid
            else DEFAULT_GRID[criterion]
        )

    @field_validator("output")
    @classmethod
    def _can_be_written(cls, output: Path) -> Path:
        check_folder("output", output)
        return output

    @field_validator("certificate")
    @classmethod
    def _is_a_name(cls, certificate: str | None) -> str | None:
        if certificate is not None:
            check_name(certificate)
        return certificate

    @field_validator("save_to")
    @classmethod
    def _is_a_new_file(cls, save_to: Path | None, info: ValidationInfo) -> Path | None:
        if save_to is None:
            return None
        if save_to.exists():
            raise ValueError("exists; give another name, or null to put the certificate into the model")
        if info.data.get("certificate", "") is None:
            raise Sentence(
                "save_to is given, but certificate is null, so nothing would be stored; name the certificate"
            )
        check_folder("save_to", save_to.parent)
        return save_to

    @field_validator("model")
    @classmethod
    def _is_one_model(cls, model: StoredModel, info: ValidationInfo) -> StoredModel:
        """Check that the ranks are those of one pipeline stage of one model, and that its file can be written."""
        path, stages = model.restore_from_path, model.pipeline_model_parallel_size
        if stages != 1:
            raise ValueError(
                f"model.pipeline_model_parallel_size={stages}: calibration is not available over pipeline stages "
                "yet; set it to 1 and share the layers with model.tensor_model_parallel_size"
            )
        check_ranks(info.data.get("trainer"), model, "calibration")
        if info.data.get("certificate") and info.data.get("save_to", "") is None:
            check_folder("model.restore_from_path", path if path.is_dir() else path.resolve().parent)
        return model

    @property
    def path(self) -> Path:
        """Path of the `.nemo`."""
        return self.model.restore_from_path

    @property
    def setting(self) -> Setting:
        """The setting of the model that a certificate names."""
        return setting_of(self, "early_exit")


def check_folder(key: str, folder: Path) -> None:
    """Raises Sentence if a folder cannot be written to. It need not exist yet."""
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not there.is_dir():
        raise Sentence(f"{key}: {there} is a file, but files are to be written below it; give a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise Sentence(f"{key}: {there} may not be written to; give another place, or get the right to write there")
