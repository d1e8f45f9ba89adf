# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""JSON of a request body: a JSON object within the limits of `nemo_ee.text.json_values`."""

from __future__ import annotations

from typing import Any

from nemo_ee.serving.errors import ApiError, shown
from nemo_ee.text.json_values import JsonError, parse_json


def parse(body: bytes) -> dict[str, Any]:
    """The object of a body.

    Raises:
        ApiError: 400.
    """
    try:
        value = parse_json(body)
    except JsonError as error:
        raise ApiError(400, f"the body cannot be read, line {error.line}: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, not {shown(value)}")
    return value
