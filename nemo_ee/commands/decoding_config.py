# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Keys that the yamls of several scripts share: the exit policy and the choice of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from nemo_ee.commands.cost_table_file import CostTableFile, read_tables
from nemo_ee.generation.cost_rule import COST_RULES
from nemo_ee.generation.decoding_model import DecodingModel
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import DRAFT_RULES, MODES, ExitPolicy
from nemo_ee.generation.sampling import SamplingParams
from nemo_ee.settings.fields import AboveZero, Criterion, ExitNames, FilePath, Run, StoredModel
from nemo_ee.settings.user_input import Natural, Sentence, UserInput, rule


def check_ranks(run: Run | None, model: StoredModel, what: str) -> None:
    """Raises ValueError unless the number of ranks is that of one model."""
    tensor, stages = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    if run is not None and run.ranks != tensor * stages:
        raise ValueError(
            f"trainer.devices={run.devices} x trainer.num_nodes={run.num_nodes} ranks, but "
            f"model.tensor_model_parallel_size={tensor} x model.pipeline_model_parallel_size={stages}: {what} runs "
            "one model, make the two equal"
        )


Cap = Annotated[Natural | None, rule("a whole number of tokens from 0, or null for no cap")]


class PolicyInput(UserInput):
    """Settings of the exit policy; `policy` combines them."""

    mode: Literal[MODES]
    criterion: Criterion
    threshold: float | dict[str, float]
    exits: ExitNames
    max_pending_tokens: Cap
    num_draft_tokens: Cap
    draft_rule: Literal[DRAFT_RULES]
    cost_rule: Literal[COST_RULES]
    cost_table: FilePath | None

    @field_validator("cost_table")
    @classmethod
    def _goes_with_the_rule(cls, file: Path | None, info: ValidationInfo) -> Path | None:
        if file is not None and (info.data.get("cost_rule"), info.data.get("draft_rule")) == ("none", "fixed"):
            raise ValueError(
                "has no effect with cost_rule=none and draft_rule=fixed; set one of them, or leave it out"
            )
        if file is not None and (file.is_dir() or not file.parent.is_dir()):
            raise ValueError("cannot be written; give the name of a file in a folder that exists")
        if file is not None and file.exists():
            read_tables(file)
        return file

    def engine(self, model: DecodingModel) -> EarlyExitEngine:
        """The engine of a model under the cost rule.

        Raises:
            ValueError: the file of cost tables cannot be read, or is of another model.
        """
        tables = None if self.cost_table is None else CostTableFile(self.cost_table, model)
        return EarlyExitEngine(model, cost_rule=self.cost_rule, cost_tables=tables)

    @field_validator("threshold")
    @classmethod
    def _goes_with_the_criterion(cls, threshold: Any, info: ValidationInfo) -> Any:
        if "criterion" in info.data:
            check_policy(threshold, criterion=info.data["criterion"])
        return threshold

    @field_validator("draft_rule")
    @classmethod
    def _goes_with_the_confidence(cls, rule: str, info: ValidationInfo) -> str:
        if "criterion" in info.data:
            check_policy(0.0, criterion=info.data["criterion"], draft_rule=rule)
        return rule

    @field_validator("exits")
    @classmethod
    def _are_named_once(cls, exits: tuple[str, ...] | None) -> tuple[str, ...] | None:
        check_policy(0.0, active=exits)
        return exits

    @property
    def policy(self) -> ExitPolicy:
        """Check the policy's parts together; a wrong criterion is reported in every mode."""
        caps = {key: getattr(self, key) for key in ("max_pending_tokens", "num_draft_tokens")}
        own = {"criterion": self.criterion, "active": self.exits, "draft_rule": self.draft_rule}
        return ExitPolicy(self.threshold, **own, **caps)


def check_policy(threshold: float | Mapping[str, float], **others: Any) -> None:
    """Raises Sentence with the problem of a part of an exit policy."""
    try:
        ExitPolicy(threshold, **others)
    except ValueError as error:
        raise Sentence(str(error).removeprefix("exit policy: ")) from None


class SamplingInput(UserInput):
    """Settings of the choice of tokens; `sampling` combines them."""

    greedy: bool
    temperature: Annotated[AboveZero, rule("a finite number above 0; for the most likely token set greedy=True")]
    top_k: Annotated[Natural | None, rule("a whole number of at least 1; 0 or null keeps every token")]
    top_p: Annotated[float, Field(gt=0, le=1), rule("a number above 0 and at most 1; 1.0 keeps every token")]
    repetition_penalty: Annotated[AboveZero, rule("a finite number above 0; 1.0 changes nothing")]
    seed: Natural
    add_BOS: bool | None
    stop_on_eos: bool

    @property
    def sampling(self) -> SamplingParams:
        """None for top_k=0, with which NeMo keeps every token."""
        keys = ("greedy", "temperature", "top_p", "repetition_penalty", "seed")
        return SamplingParams(top_k=self.top_k or None, **{key: getattr(self, key) for key in keys})
