# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""conf/megatron_gpt_early_exit_serve.yaml, a field for each key; all problems that need no weights in one message."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from nemo_ee.checkpoint.members import CONFIG_MEMBER
from nemo_ee.commands.decoding_config import PolicyInput
from nemo_ee.serving.exit_choice import ExitChoice
from nemo_ee.serving.protocol import Limits
from nemo_ee.settings.fields import AboveZero, FilePath, Label
from nemo_ee.settings.script_input import ScriptInput
from nemo_ee.settings.user_input import Natural, Positive, Sentence, Text, rule
from nemo_ee.text.text_files import TextError, read_document

KEYS_VARIABLE = "NEMO_EE_API_KEYS"
_SHORTEST_KEY = 16
_MODEL = "hf_early_exit/ of an export"


def _read_keys(file: Any) -> Any:
    """API keys from the file, one a line, and from the environment, separated by commas."""
    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",")]
    if file is not None:
        if not isinstance(file, str):
            return file
        try:
            lines = read_document(Path(file)).splitlines()
        except TextError as problem:
            raise ValueError(f"cannot be read ({problem}); give a text file with one key a line") from None
        keys += [line.strip() for line in lines if not line.lstrip().startswith("#")]
    keys = [key for key in keys if key]
    if file is not None and not keys:
        raise ValueError("holds no key; write one a line")
    if any(len(key) < _SHORTEST_KEY or not key.isascii() for key in keys):
        raise Sentence(f"an API key is shorter than {_SHORTEST_KEY} characters or not ASCII; make a longer one")
    return tuple(dict.fromkeys(keys))


def _read_template(file: Any) -> Any:
    if not isinstance(file, str):
        return file
    try:
        return read_document(Path(file))
    except TextError as problem:
        raise ValueError(f"cannot be read ({problem}); give a Jinja template") from None


class ServerSettings(PolicyInput, ScriptInput):
    """The settings of the server.

    Attributes:
        path: directory of the model.
        chat_template: text of a template that replaces the tokenizer's, or None.
        api_keys: valid keys; () = no key is needed.
    """

    headline: ClassVar = "the server was not started"

    path: Annotated[FilePath, rule(f"{_MODEL} (scripts/export/export_huggingface.py)")] = Field(alias="model")
    given_name: Label | None = Field(alias="name")
    chat_template: Annotated[
        str | None, BeforeValidator(_read_template), rule("a file with a Jinja template, or null")
    ]
    device: Text
    dtype: Literal["float32", "bfloat16", "float16"] | None
    num_threads: Positive | None
    api_keys: Annotated[
        tuple[str, ...], BeforeValidator(_read_keys), rule("the name of a text file with one key a line, or null")
    ] = Field(alias="api_keys_file", repr=False)
    host: Text
    port: Annotated[int, Field(ge=0, le=65535)]
    num_slots: Positive
    max_length: Positive | None
    max_queue: Natural
    prompt_share: Annotated[float, Field(gt=0, lt=1), rule("a number above 0 and below 1, or null")] | None
    max_new_tokens: Positive
    max_choices: Positive
    max_body_bytes: Annotated[int, Field(ge=1024)]
    max_connections: Positive
    request_timeout: Annotated[AboveZero, rule("a number of seconds above 0")]
    shutdown_timeout: Annotated[AboveZero, rule("a number of seconds above 0")]

    @field_validator("path")
    @classmethod
    def _is_a_model(cls, path: Path) -> Path:
        if path.suffix == ".nemo" or (path / CONFIG_MEMBER).is_file():
            raise ValueError(
                "is a NeMo checkpoint, which is not served as it is; run scripts/export/export_huggingface.py "
                f"checkpoint={path} output=export and give export/hf_early_exit"
            )
        if (path / "hf_early_exit").is_dir():
            raise ValueError(f"is a whole export; give {path / 'hf_early_exit'}")
        if not path.is_dir():
            raise ValueError(f"is not a directory; give {_MODEL}")
        return path

    @field_validator("host")
    @classmethod
    def _is_out_of_reach_or_guarded(cls, host: str, info: ValidationInfo) -> str:
        if info.data.get("api_keys", True) or is_loopback(host):
            return host
        raise ValueError(
            f"can be reached from other machines, and no API key is set; put keys into {KEYS_VARIABLE} or "
            "api_keys_file, or listen on 127.0.0.1"
        )

    @field_validator("max_choices")
    @classmethod
    def _fit(cls, choices: int, info: ValidationInfo) -> int:
        queue, slots = info.data.get("max_queue"), info.data.get("num_slots")
        if None not in (queue, slots) and choices > queue + slots:
            raise Sentence(
                f"max_choices={choices} answers of one request never fit into max_queue={queue} + num_slots={slots}; "
                "lower it, or raise one of those"
            )
        return choices

    @property
    def name(self) -> str:
        """Name of the model in requests."""
        return self.given_name or self.path.resolve().name

    @property
    def default(self) -> ExitChoice:
        """Mode and policy of requests without their own."""
        return ExitChoice(self.mode, self.policy)

    @property
    def limits(self) -> Limits:
        """Limits of one request."""
        return Limits(self.max_new_tokens, self.max_choices)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is loopback, which other machines cannot reach."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host[1:-1] if host[:1] + host[-1:] == "[]" else host).is_loopback
    except ValueError:
        return False
