# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""JSON of a request body. Stricter than Python's parser: only what JSON allows and a server should see."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from nemo_ee.serving.errors import ApiError, shown


def parse(body: bytes) -> dict[str, Any]:
    """A JSON object whose numbers are finite, whole ones within 64 bits, and whose text is valid Unicode.

    Raises:
        ApiError: 400.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_number, parse_float=_finite, parse_int=_whole)
        # Escapes may spell halves of characters, which no tokenizer takes.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        raise ApiError(400, "the body is not valid UTF-8, or spells half a character; send valid Unicode") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply; no request needs more than a few levels") from None
    except ValueError as fault:
        raise ApiError(400, f"the body is not JSON: {fault}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, not {shown(value)}")
    return value


def _no_number(word: str) -> NoReturn:
    raise ApiError(400, f"the body holds {word}, which is no JSON; numbers must be finite")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ApiError(400, f"the body holds the number {text[:40]}, which is too large; numbers must be finite")
    return value


def _whole(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise ApiError(400, f"the body holds the number {text[:40]}, which does not fit into 64 bits")
    return int(text)
