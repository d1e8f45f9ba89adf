# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings of a generation run, read once from its config. All problems that need no model are in one message."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from nemo_ee.commands.decoding_config import PolicyInput, SamplingInput, check_ranks
from nemo_ee.generation.policy import unused_cap
from nemo_ee.settings.fields import FilePath, Run, StoredModel
from nemo_ee.settings.library_keys import model_keys, trainer_keys
from nemo_ee.settings.script_input import ScriptInput
from nemo_ee.settings.user_input import Natural, Positive, Sentence, Text, rule
from nemo_ee.text.text_files import TextError, is_jsonl, read_json_lines, read_lines, text_line

# Keys of a line of `output`, beside those of the prompt's line.
OUTPUT_KEYS = ("prompt", "text", "finish_reason", "tokens", "error")


class PromptLine(NamedTuple):
    """A prompt, and the other keys of its line in a `.jsonl` file; none of `OUTPUT_KEYS`."""

    prompt: str
    labels: Mapping[str, Any]


def _prompts_of_file(file: Any, info: ValidationInfo) -> Any:
    """One prompt a line; in a `.jsonl` each line is an object with the key `prompt`. Blank lines are left out."""
    given = info.data.get("given_prompts", ())  # a problem of `prompts` is reported alone
    if given and file is not None:
        raise Sentence("both prompts and prompts_file are given; leave one out")
    if file is None and not given and "given_prompts" in info.data:
        raise Sentence("no prompts are given; set prompts=['...'] or prompts_file=<.txt or .jsonl>")
    if not isinstance(file, str):
        return file
    path, wrong = Path(file), list[str]()
    if is_jsonl(path):
        found = [line for _, line in read_json_lines(path, _prompt_of_line, problems=wrong)]
    else:
        found = []
        try:
            found += [PromptLine(text_line(path, number, line), {}) for number, line in read_lines(path)]
        except TextError as problem:
            wrong.append(str(problem))
    if not found and not wrong:
        wrong.append(f"{path}: holds no prompt; put one on each line")
    if wrong:
        raise Sentence(*(f"prompts_file: {one}" for one in wrong))
    return tuple(found)


def _prompt_of_line(value: Any) -> PromptLine:
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise ValueError('must be an object with a text under "prompt"')
    labels = {key: own for key, own in value.items() if key != "prompt"}
    taken = ", ".join(f'"{key}"' for key in labels if key in OUTPUT_KEYS)
    if taken:
        raise ValueError(f"the key {taken} is also a key of the output; rename it or leave it out")
    return PromptLine(value["prompt"], labels)


EndString = Annotated[str, Field(min_length=1)]  # a line break, too


class GenerationModel(StoredModel):
    """The `model` block."""

    layer_split: dict[str, Any] | None


class GenerationRequest(PolicyInput, SamplingInput, ScriptInput):
    """conf/megatron_gpt_early_exit_generate.yaml, a field for each key.

    `prompts` holds the texts of the source that is set, at least one.
    """

    headline: ClassVar = "nothing was generated"
    libraries: ClassVar = {"trainer": trainer_keys, "model": model_keys}

    given_prompts: Annotated[tuple[str, ...] | None, rule("a list of texts; write prompts=['...']")] = Field(
        alias="prompts"
    )
    prompts_file: Annotated[
        tuple[PromptLine, ...] | None, BeforeValidator(_prompts_of_file), rule("the name of a text file, or null")
    ]
    overwrite: bool
    output: FilePath | None
    colour: Literal["auto", "always", "never"]
    certificate: Annotated[bool | Text | None, rule("True, or the name of a certificate, or null")]
    allow_other_setting: bool
    tokens_to_generate: Positive
    min_tokens_to_generate: Natural
    end_strings: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...], rule("a list of texts, none empty; write end_strings=['...']")
    ]
    batch_size: Positive
    trainer: Run
    model: GenerationModel

    @field_validator("num_draft_tokens")
    @classmethod
    def _goes_with_the_mode(cls, cap: int | None, info: ValidationInfo) -> int | None:
        if "mode" in info.data and (
            problem := unused_cap(info.data["mode"], info.data.get("max_pending_tokens"), cap)
        ):
            raise Sentence(problem)
        return cap

    @field_validator("draft_rule")
    @classmethod
    def _goes_with_drafts(cls, rule: str, info: ValidationInfo) -> str:
        if rule != "fixed" and info.data.get("mode", "self_speculative") != "self_speculative":
            raise ValueError("has no effect in this mode; use fixed, or mode=self_speculative")
        return rule

    @field_validator("given_prompts")
    @classmethod
    def _can_be_written_as_utf8(cls, prompts: tuple[str, ...] | None) -> tuple[str, ...] | None:
        rule = "with half of a surrogate pair in it; write the whole character"
        if broken := [one for one in prompts or () if not _is_writable(one)]:
            raise Sentence(*(f"prompts holds {one!r}, {rule}" for one in broken))
        return prompts

    @field_validator("output")
    @classmethod
    def _can_be_written(cls, output: Path | None, info: ValidationInfo) -> Path | None:
        if output is None:
            return None
        if output.is_dir():
            raise ValueError("is a directory; give the name of a .jsonl file")
        if output.exists() and not info.data.get("overwrite", True):
            raise ValueError("exists; give another name or overwrite=True")
        if not output.parent.is_dir():
            raise ValueError(f"cannot be written: the folder {output.parent} does not exist; make it first")
        return output

    @field_validator("min_tokens_to_generate")
    @classmethod
    def _is_reached(cls, least: int, info: ValidationInfo) -> int:
        if least > info.data.get("tokens_to_generate", least):
            raise ValueError(f"is more than tokens_to_generate={info.data['tokens_to_generate']}; lower it")
        return least

    @field_validator("model")
    @classmethod
    def _takes_the_ranks(cls, model: GenerationModel, info: ValidationInfo) -> GenerationModel:
        check_ranks(info.data.get("trainer"), model, "generation")
        ranks = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
        if ranks > 1 and info.data.get("cost_rule") == "fallback":
            raise ValueError("cost_rule=fallback measures times on one rank; use cost_rule=none with several")
        if ranks > 1 and info.data.get("draft_rule") == "value":
            raise ValueError("draft_rule=value measures times on one rank; use draft_rule=fixed with several")
        return model

    @property
    def path(self) -> Path:
        """Path of the `.nemo`."""
        return self.model.restore_from_path

    @property
    def prompts(self) -> tuple[str, ...]:
        """Texts of the prompts."""
        return self.given_prompts or tuple(line.prompt for line in self.prompts_file or ())

    @property
    def labels(self) -> tuple[Mapping[str, Any], ...]:
        """The other keys of each prompt's line."""
        return tuple(line.labels for line in self.prompts_file or ()) or ({},) * len(self.prompts)


def _is_writable(text: str) -> bool:
    """Whether UTF-8 can encode a text; it cannot encode lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
