# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The rotary settings of a config.json in the spellings of transformers 4.51 and 5.

    4.51    rope_theta, rope_scaling
    5       rope_parameters, rope_theta in it

Each version ignores the other's keys, so both are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_DEFAULT_BASE = 10000.0


def rotary_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of a config.json, in either spelling or in both.

    Args:
        values: content of the file.

    Returns:
        `rope_theta`, `rope_type` and the type's numbers, as stored and unchecked.

    Raises:
        ValueError: the settings are not a mapping, differ by kind of layer, or differ between the two spellings.
    """
    old, new = (_one_spelling(name, values.get(name)) for name in ("rope_scaling", "rope_parameters"))
    bases = {
        "rope_theta": values.get("rope_theta"),
        "rope_scaling.rope_theta": old.pop("rope_theta", None),
        "rope_parameters.rope_theta": new.pop("rope_theta", None),
    }
    bases = {name: base for name, base in bases.items() if base is not None}
    names = list(bases)
    for name in names[1:]:
        if bases[name] != bases[names[0]]:
            raise ValueError(_disagreement(names[0], bases[names[0]], name, bases[name]))
    if old and new and old != new:
        raise ValueError(_disagreement("rope_scaling", old, "rope_parameters", new))
    base = bases[names[0]] if names else _DEFAULT_BASE
    return {"rope_type": "default", **(new or old), "rope_theta": base}


def _one_spelling(name: str, found: Any) -> dict[str, Any]:
    """The settings under a key with `rope_type` alone as the name of the type; null values count as absent."""
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{name}: {found!r}, must be a mapping")
    if any(isinstance(value, Mapping) for value in found.values()):
        raise ValueError(f"{name}: one set per kind of layer is not supported")
    settings = {key: value for key, value in found.items() if value is not None}
    old, new = settings.pop("type", None), settings.get("rope_type")
    if None not in (old, new) and old != new:
        raise ValueError(f"{name}: type {old!r} and rope_type {new!r} disagree")
    if old is not None:
        settings["rope_type"] = old
    return settings


def _disagreement(one: str, first: Any, other: str, second: Any) -> str:
    return (
        f"{one} {first!r} and {other} {second!r} disagree: transformers 4 and 5 would compute different models; "
        "keep the one that the model was trained with"
    )


def with_both_spellings(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json whose rotary settings are the same in transformers 4.51 and 5.

    Raises:
        ValueError: see `rotary_settings`.
    """
    settings = rotary_settings(values)
    base = settings.pop("rope_theta")
    scaling = None if settings["rope_type"] == "default" else settings
    return {
        **values,
        "rope_theta": base,
        "rope_scaling": values.get("rope_scaling") or scaling,
        "rope_parameters": {"rope_theta": base, **settings},
    }
