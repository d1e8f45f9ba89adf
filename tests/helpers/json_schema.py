# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""As much of JSON Schema (2020-12) as the server's published schemas use, and requests held against these schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import pytest

TYPES = {
    "string": str, "boolean": bool, "null": type(None), "array": list, "object": dict, "integer": int,
    "number": (int, float),
}  # fmt: skip
IGNORED = {"title", "description", "default", "examples", "discriminator", "$defs"}


def problems(schema: Mapping[str, Any], value: Any, root: Mapping[str, Any], where: str = "$") -> Iterator[str]:
    """What is wrong with a JSON value; a keyword that is not known here is an error.

    Args:
        schema: of the value.
        root: document that `$ref` is looked up in.
        where: place of the value.
    """
    for keyword, rule in schema.items():
        if keyword in IGNORED or keyword.startswith("x-"):
            continue
        right = _holds(keyword, rule, value, schema, root)
        if isinstance(right, bool):
            if not right:
                yield f"{where}: {keyword} {rule!r}"
            continue
        for key, inner, own in right:
            yield from problems(inner, own, root, f"{where}.{key}")


def _holds(keyword: str, rule: Any, value: Any, schema: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    """Whether a keyword holds, or the (place, schema, value) triples that have to."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if keyword == "$ref":
        inner: Any = root
        for part in rule.removeprefix("#/").split("/"):
            inner = inner[part]
        return [("", inner, value)]
    if keyword in ("anyOf", "oneOf"):
        fitting = sum(not list(problems(one, value, root)) for one in rule)
        return fitting == 1 if keyword == "oneOf" else fitting > 0
    if keyword == "type":
        kinds = [rule] if isinstance(rule, str) else rule
        return any(isinstance(value, TYPES[one]) and (one == "boolean" or value is not True and value is not False)
                   for one in kinds)  # fmt: skip
    if keyword in ("enum", "const"):
        choices = rule if keyword == "enum" else [rule]
        return any(isinstance(value, bool) == isinstance(one, bool) and value == one for one in choices)
    if keyword in ("minimum", "maximum"):
        return not is_number or (value >= rule if keyword == "minimum" else value <= rule)
    if keyword in ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"):
        kind = {"Length": str, "Items": list, "Properties": dict}[keyword[3:]]
        return not isinstance(value, kind) or (len(value) >= rule if keyword[:3] == "min" else len(value) <= rule)
    if keyword == "pattern":
        return not isinstance(value, str) or re.search(rule, value) is not None
    if keyword == "items":
        return [(index, rule, one) for index, one in enumerate(value)] if isinstance(value, list) else True
    if keyword == "required":
        return not isinstance(value, dict) or set(rule) <= set(value)
    assert keyword in ("properties", "additionalProperties", "propertyNames"), f"{keyword} is not known here"
    if not isinstance(value, dict):
        return True
    if keyword == "propertyNames":
        return [(key, rule, key) for key in value]
    if keyword == "properties":
        return [(key, rule[key], own) for key, own in value.items() if key in rule]
    others = set(value) - set(schema.get("properties", ()))
    return not others if rule is False else True if rule is True else [(key, rule, value[key]) for key in others]


@cache
def _schema(model: Any) -> dict[str, Any]:
    return json.loads(json.dumps(model.model_json_schema()))


def check_accepted_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold every request that the server accepts against the schema that it publishes; a difference is an error."""
    from nemo_ee.serving import protocol

    real = protocol.read

    def read(model: Any, body: Any, **kwargs: Any) -> Any:
        request = real(model, body, **kwargs)
        schema = _schema(model)
        assert list(problems(schema, body, schema)) == []
        return request

    monkeypatch.setattr(protocol, "read", read)
