# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""User input as pydantic models, and one form of its problems: the value, the rule and the way out.

A model lists the keys of a block with their types. `read` returns it, or raises one error with every problem:

    num_slots='eight' must be a whole number of at least 1
    num_slts=8 is not a setting here (did you mean num_slots?); leave it out

The rule comes from the field's JSON schema, so limits are in the field's type only. A rule that a type cannot express
is a validator that raises ValueError, with one text per problem: a field's validator with the rest of the sentence
("must be ...", "does not exist; ..."), a block's validator with the whole sentence, as `Sentence` is for a field. A
rule between two fields belongs to the later one, which finds valid earlier ones in `info.data`:
pydantic calls a block's validator only if all fields are valid.

Strict: no text becomes a number, True is not 1, a whole number may stand for a fraction. Frozen: lists become tuples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nemo_ee.exits.block_reader import RENAMED_KEYS, close_match, reads_as_number

_LONGEST_NAME = 60  # characters of a key that a message shows
_MAX_SHOWN = 80  # characters of a value
_MOST_SHOWN = 100  # problems that a message lists
_MOST_OF_ONE = 20  # problems of one value, such as a file with many wrong lines
_MOST_READ = 1000  # problems that are formatted
_NOT_BLANK = r"\S"


class UserInput(BaseModel):
    """A block of user input: unknown keys are refused, types are strict, values do not change afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _lists_to_tuples(cls, values: Any) -> Any:
        return {key: _tuples(value) for key, value in values.items()} if isinstance(values, Mapping) else values


def _tuples(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return tuple([_tuples(one) if isinstance(one, list) else one for one in value])  # a call per number is slow


def rule(text: str) -> Any:
    """Metadata of a field with another rule than that of its type: `Annotated[str, rule("a text such as ...")]`."""
    return Field(json_schema_extra={"x-rule": text})


Text = Annotated[str, Field(pattern=_NOT_BLANK)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Sentence(ValueError):
    """A whole sentence about a field, for instance about several keys. Key and value are not put in front of it."""


@dataclass(frozen=True)
class Problem:
    """One problem of user input.

    Attributes:
        where: dotted key, entries of lists by index (`messages[0].content`); empty for a whole input.
        kind: `unknown` (no such key), `missing` (a key that is needed) or `value`.
        text: the sentence, with key, value, rule and way out.
    """

    where: str
    kind: str
    text: str


class InputError(ValueError):
    """All problems of one input; the message lists their texts.

    Args:
        headline: first line of the message.
        problems: at least one.
    """

    def __init__(self, headline: str, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        texts = [one.text.replace("\n", "\n  ") for one in problems[:_MOST_SHOWN]]
        more = [f"and {len(problems) - _MOST_SHOWN} more"] if len(problems) > _MOST_SHOWN else []
        super().__init__("\n  ".join([f"{headline}:", *texts, *more]))


Model = TypeVar("Model", bound=BaseModel)


def read(
    model: type[Model],
    values: Any,
    *,
    headline: str = "the input is not usable",
    where: str = "",
    most: int = _MOST_READ,
) -> Model:
    """A model with these values.

    Args:
        model: the class.
        values: plain containers and values.
        headline: first line of the error's message.
        where: key of the input itself, put before the keys of the model.
        most: number of problems that are reported.

    Raises:
        InputError: a ValueError with every problem.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise InputError(headline, problems_of(error, model, values, where=where, most=most)) from None


@cache
def _schema(model: type[BaseModel]) -> Mapping[str, Any]:
    return model.model_json_schema()


def problems_of(
    error: ValidationError, model: type[BaseModel], values: Any, *, where: str = "", most: int = _MOST_READ
) -> list[Problem]:
    """The problems that pydantic found, in this module's form: one per key, also if the key may have several types."""
    schema = _schema(model)
    found: dict[Problem, None] = {}
    for one in error.errors(include_url=False)[:_MOST_READ]:
        if len(found) >= most:
            break
        place = _place(one["loc"], schema, values, where)
        kind = (
            {"extra_forbidden": "unknown", "missing": "missing"}.get(one["type"], "value") if place.exact else "value"
        )
        found |= dict.fromkeys(Problem(place.key, kind, text) for text in _texts(one, kind, place))
    # A list with wrong entries is not reported in addition to the entries.
    inner = [problem.where for problem in found]
    return [one for one in found if not any(where.startswith((f"{one.where}.", f"{one.where}[")) for where in inner)]


@dataclass(frozen=True)
class _Place:
    """Place of a problem in an input: its key, value, the schema of the value, and the known keys of its block."""

    key: str
    value: Any
    schema: Mapping[str, Any]
    beside: tuple[str, ...]
    exact: bool  # the problem is of the key itself, not of one of several types of its value
    is_block: bool  # the value belongs to a model's block


def _place(loc: tuple[int | str, ...], root: Mapping[str, Any], values: Any, where: str) -> _Place:
    """The deepest key that a location of pydantic names; for a value with several types it also names types."""
    definitions = root.get("$defs", {})

    def options(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        while "$ref" in schema:
            schema = definitions[schema["$ref"].rpartition("/")[2]]
        return [one for each in schema.get("anyOf") or schema.get("oneOf") or () for one in options(each)] or [schema]

    schema, beside, exact = root, tuple(root.get("properties", ())), True
    for part in loc:
        if tag := schema.get("discriminator", {}).get("mapping", {}).get(part):
            schema = {"$ref": tag}
            continue
        kinds = options(schema)
        lists = [one for one in kinds if one.get("type") == "array"]
        named = next((one for one in kinds if part in one.get("properties", ())), None)
        block = named or next((one for one in kinds if one.get("type") == "object"), {})
        if isinstance(values, list | tuple) and isinstance(part, int) and part < len(values) and len(lists) == 1:
            prefix = lists[0].get("prefixItems", ())
            schema, beside = prefix[part] if part < len(prefix) else lists[0].get("items", {}), ()
            where, values, exact = f"{where}[{part}]", values[part], True
        elif isinstance(values, Mapping) and block and (named or part in values):
            inner = named["properties"][part] if named else block.get("additionalProperties")
            schema, beside = inner if isinstance(inner, Mapping) else {}, tuple(block.get("properties", ()))
            where = f"{where}.{str(part)[:_LONGEST_NAME]}" if where else str(part)[:_LONGEST_NAME]
            values, exact = values.get(part), True
        else:
            exact = False  # one of several types of the value
    return _Place(
        where,
        values,
        {**schema, "$defs": definitions},
        beside,
        exact,
        any("properties" in one for one in options(schema)),
    )


def _texts(error: Mapping[str, Any], kind: str, place: _Place) -> Iterator[str]:
    """The sentences of one error of pydantic."""
    given = f"{place.key or 'the input'}={shortened(place.value)}"
    if kind == "unknown":
        name = place.key.rpartition(".")[2]
        if name in RENAMED_KEYS:
            yield f"{given} is now {RENAMED_KEYS[name]}"
        else:
            yield f"{given} is not a setting here{close_match(name, place.beside)}; leave it out"
    elif kind == "missing":
        yield f"{place.key} is needed and not given; it must be {in_words(place.schema)}"
    elif place.exact and error["type"] == "value_error":  # raised by a validator
        raised, count = error["ctx"]["error"], len(error["ctx"]["error"].args)
        for text in raised.args[:_MOST_OF_ONE]:
            yield text if place.is_block or isinstance(raised, Sentence) else f"{given} {text}"
        if count > _MOST_OF_ONE:
            yield f"and {count - _MOST_OF_ONE} more"
    else:
        yield f"{given} must be {in_words(place.schema)}{_hint(place)}"


def _hint(place: _Place) -> str:
    """Way out for a value that was probably meant as another type."""
    words = in_words(place.schema)
    if isinstance(place.value, str):
        if "number" in words and reads_as_number(place.value):
            dot = " and with a dot (1.0e-4)" if "e" in place.value.lower() and "." not in place.value else ""
            return f"; {place.value!r} is a text, write the number without quotes{dot}"
        return close_match(place.value, _choices(place.schema))
    if isinstance(place.value, int | float) and not isinstance(place.value, bool) and words.startswith("a text"):
        return f"; write a number that is meant as a text with quotes: \"'{place.value}'\""
    return ""


def _choices(schema: Mapping[str, Any]) -> list[str]:
    options = [schema, *schema.get("anyOf", ())]
    return [str(choice) for one in options for choice in one.get("enum", ())]


def in_words(schema: Mapping[str, Any], definitions: Mapping[str, Any] | None = None, *, many: bool = False) -> str:
    """The values that a JSON schema allows, as the object of "must be": "a whole number of at least 1, or null"."""
    definitions = schema.get("$defs", {}) if definitions is None else definitions
    if "$ref" in schema and "x-rule" not in schema:
        return in_words(definitions[schema["$ref"].rpartition("/")[2]], definitions, many=many)
    kind = schema.get("type")
    if many and (
        "x-rule" in schema or "enum" in schema or kind not in ("integer", "number", "array", "object", "string")
    ):
        return f"entries, each {in_words(schema, definitions)}"
    if "x-rule" in schema:
        return schema["x-rule"]
    if several := schema.get("anyOf") or schema.get("oneOf"):
        return ", or ".join(dict.fromkeys(in_words(one, definitions) for one in several))
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if kind in ("integer", "number"):
        noun = "whole number" if kind == "integer" else "finite number"
        return f"{noun}s{_span(schema)}" if many else f"a {noun}{_span(schema)}"
    if kind == "array":
        return f"{'lists' if many else 'a list'} of {_entries(schema, definitions)}"
    if kind == "object":
        keys = f" with the keys {', '.join(schema['properties'])}" if "properties" in schema else ""
        inner = schema.get("additionalProperties")
        keys += f" of {in_words(inner, definitions, many=True)} by key" if isinstance(inner, Mapping) and inner else ""
        return f"{'blocks' if many else 'a block'}{keys}"
    if kind == "string":
        return f"{'texts' if many else 'a text'}{_length(schema)}"
    return {"boolean": "True or False", "null": "null"}.get(str(kind), "a value")


def _span(schema: Mapping[str, Any]) -> str:
    """The limits of a number."""
    if "minimum" in schema and "maximum" in schema:
        return f" from {schema['minimum']:.16g} to {schema['maximum']:.16g}"
    words = {
        "minimum": "of at least",
        "exclusiveMinimum": "above",
        "maximum": "of at most",
        "exclusiveMaximum": "below",
    }
    given = [f"{word} {schema[key]:.16g}" for key, word in words.items() if key in schema]
    return f" {' and '.join(given)}" if given else ""


def _length(schema: Mapping[str, Any]) -> str:
    """The limits of a text's length."""
    least, most = schema.get("minLength", int(schema.get("pattern") == _NOT_BLANK)), schema.get("maxLength")
    if most is not None:
        return f" of {least} to {most} characters"
    return " with something in it" if least == 1 else f" of at least {least} characters" if least else ""


def _entries(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """The number and the kind of a list's entries."""
    least, most = schema.get("minItems", 0), schema.get("maxItems")
    first = schema.get("prefixItems")
    kinds = in_words(first[0] if first else schema.get("items", {}), definitions, many=True)
    if least == most and least:
        return f"{least} {kinds}"
    if most is not None:
        return f"{least} to {most} {kinds}"
    return f"{'one or more' if least == 1 else f'at least {least}'} {kinds}" if least else kinds


def shortened(value: Any) -> str:
    """A value for a message: on one line, and short for a value of any size."""
    text = repr(_part(value, 3))
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def _part(value: Any, depth: int) -> Any:
    """The start of a value's text, computed without the text of a large value."""
    if isinstance(value, str):
        return value[:_MAX_SHOWN]
    if not isinstance(value, list | tuple | dict):
        return value
    if not depth:
        return "..."
    if isinstance(value, dict):
        return {_part(key, 0): _part(one, depth - 1) for key, one in islice(value.items(), _MAX_SHOWN)}
    return [_part(one, depth - 1) for one in value[:_MAX_SHOWN]]
