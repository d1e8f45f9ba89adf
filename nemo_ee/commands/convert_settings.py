# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""conf/megatron_gpt_early_exit_convert.yaml, a field for each key, with the rules for source and output."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import ValidationInfo, field_validator

from nemo_ee.models.tune_settings import ExitsBlock
from nemo_ee.settings.fields import AboveZero, FilePath, Run, Seed, Verify
from nemo_ee.settings.library_keys import model_keys, trainer_keys
from nemo_ee.settings.script_input import ScriptInput
from nemo_ee.settings.user_input import Positive, Text, UserInput, rule


class ConvertedModel(UserInput):
    """The `model` block."""

    backbone_path: Text | None
    micro_batch_size: Positive | None
    global_batch_size: Positive | None
    sequence_parallel: bool | None
    encoder_seq_length: Positive | None
    tensor_model_parallel_size: Positive
    pipeline_model_parallel_size: Positive
    make_vocab_size_divisible_by: Positive
    transformer_engine: bool | None
    seed: Seed
    distributed_timeout_minutes: AboveZero
    early_exit: ExitsBlock


class ConvertSettings(ScriptInput):
    """The whole yaml."""

    libraries: ClassVar = {"trainer": trainer_keys, "model": model_keys}
    may_lack: ClassVar = ("trainer.num_nodes", "model.")

    source: Annotated[FilePath, rule("the name of a Hugging Face directory, a .gguf file or a .nemo file")]
    overwrite: bool
    output: Annotated[FilePath, rule("the name of a .nemo file")]
    gguf_dtype: Literal["float32", "float16", "bfloat16"]
    verify: Verify
    compare_with_transformers: bool
    probe_tokens: Positive
    trainer: Run
    model: ConvertedModel

    @field_validator("source")
    @classmethod
    def _exists(cls, source: Path) -> Path:
        if not source.exists():
            raise ValueError("does not exist; give a Hugging Face directory, a .gguf file or a .nemo file")
        return source

    @field_validator("output")
    @classmethod
    def _is_a_new_file(cls, output: Path, info: ValidationInfo) -> Path:
        problems, source = [], info.data.get("source")
        if output.suffix != ".nemo":
            problems.append("must end in .nemo")
        if output.is_dir():
            problems.append("is a directory; give the name of a file")
        elif output.exists() and not info.data.get("overwrite", True):
            problems.append("exists; choose another name or add overwrite=True")
        if source is not None and output.exists() and output.resolve() == source.resolve():
            problems.append("is the source itself; choose another name")
        if problems:
            raise ValueError(*problems)
        return output
