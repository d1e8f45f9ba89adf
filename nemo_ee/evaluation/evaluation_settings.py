# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""conf/megatron_gpt_early_exit_eval.yaml, a field for each key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import field_validator

from nemo_ee.settings.fields import FilePath, Run, StoredModel
from nemo_ee.settings.library_keys import model_keys, trainer_keys
from nemo_ee.settings.script_input import ScriptInput
from nemo_ee.settings.user_input import Positive, Text, rule


class EvaluatedModel(StoredModel):
    """The `model` block."""

    micro_batch_size: Positive | None
    global_batch_size: Positive | None
    sequence_parallel: bool | None
    encoder_seq_length: Positive | None


class EvaluationSettings(ScriptInput):
    """The whole yaml."""

    libraries: ClassVar = {"trainer": trainer_keys, "model": model_keys}
    may_lack: ClassVar = ("model.",)

    data: Annotated[Text, rule("the prefix of a Megatron .bin/.idx")]
    output: FilePath
    max_tokens: Positive | None
    trainer: Run
    model: EvaluatedModel

    @field_validator("output")
    @classmethod
    def _is_a_directory(cls, output: Path) -> Path:
        if output.exists() and not output.is_dir():
            raise ValueError("is a file; give a directory")
        return output
