# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Parts of request models: objects where null counts as missing, lists of limited size, fields without effect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from nemo_ee.settings.user_input import UserInput

MAX_PROBLEMS = 10  # largest number that one error lists


class RequestFields(UserInput):
    """Fields of a JSON object in a request. A field that is null counts as missing."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        given = {key: value for key, value in values.items() if value is not None}
        known = cls.model_fields.keys()
        if cls.model_config["extra"] == "forbid":
            # Unknown fields past the number that an error lists cost time and add nothing.
            for key in [*islice((key for key in given if key not in known), MAX_PROBLEMS, None)]:
                del given[key]
        return given


@dataclass(frozen=True)
class UpTo:
    """Metadata of a list or an object: its largest size, checked before its entries cost time."""

    most: int

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Pydantic's hook for metadata."""
        sized = Annotated[source, Field(max_length=self.most)]  # for the JSON schema
        return BeforeValidator(self._check).__get_pydantic_core_schema__(sized, handler)

    def _check(self, value: Any) -> Any:
        if isinstance(value, tuple | dict) and len(value) > self.most:
            raise ValueError(f"has {len(value)} entries; {self.most} are allowed")
        return value


def no_effect() -> Any:
    """Type of a field that is accepted with any value and has no effect; its value here is None."""
    schema = {"description": "accepted, has no effect", "x-acted-on": False}
    return Annotated[Any, BeforeValidator(lambda value: None), WithJsonSchema(schema)]


def neutral(values: tuple[Any, ...], way_out: str) -> Any:
    """Type of a field that is accepted with these values alone, which change nothing; its value here is None."""

    def check(value: Any) -> None:
        if value is not None and not any(_is_same(value, one) for one in values):
            raise ValueError(f"is not supported here; {way_out}")

    description = f"accepted with these values, which change nothing; otherwise {way_out}"
    schema = {"enum": [*values, None], "description": description, "x-acted-on": False}
    return Annotated[Any, BeforeValidator(check), WithJsonSchema(schema)]


def _is_same(value: object, neutral: object) -> bool:
    """Whether both are equal and of one kind. In Python True == 1, but a boolean is no number here."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral
