# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A table of the settings of a script, and the problems of a config that is read with it.

A config may hold the keys of the table, what a library that takes one of its blocks reads there, and keys that other
values take over (`${key}`). Everything else is a mistake in writing, which Hydra lets in with `+` or from a yaml.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from nemo_ee.exits.block_reader import Check, close_match

_TAKEN_OVER = re.compile(r"\$\{(\.*\w[\w.]*)[\[}]")
_TO_COME = object()  # the value of a setting that is still to be given, or that is worked out from one


@dataclass(frozen=True)
class KnownSettings:
    """The settings of a script.

    Attributes:
        checks: dotted key -> check of its value. What lies below a key belongs to its value.
        blocks: block -> what gives the further keys (below the block) that a library reads there, with their checks.
            Called only for a key that `checks` does not hold.
        optional: beginnings of keys that a config may lack.
    """

    checks: Mapping[str, Check]
    blocks: Mapping[str, Callable[[], Mapping[str, Check]]] = field(default_factory=dict)
    optional: tuple[str, ...] = ()

    def problems(self, cfg: DictConfig) -> dict[str, str]:
        """Dotted key -> what is wrong with it, with the value, the rule and the way out; empty where all is right.

        A setting that is still to be given (`???`) is no problem here.
        """
        found: dict[str, str] = {}
        unresolved: dict[str, str] = {}
        more = {block: dict[str, Check]() for block in self.blocks}
        taken_over = set(_TAKEN_OVER.findall(str(OmegaConf.to_container(cfg, resolve=False))))
        given = list(_values(cfg, self.checks))
        for key, value in given:
            block = next((block for block in self.blocks if key.startswith(f"{block}.")), None)
            known: Mapping[str, Check] = self.checks
            if block and _entry(key, known) is None:
                more[block] = more[block] or {f"{block}.{name}": check for name, check in self.blocks[block]().items()}
                known = more[block]
            entry = _entry(key, known)
            if isinstance(value, OmegaConfBaseException):
                unresolved[key] = f"{key} cannot be worked out: {str(value).splitlines()[0]}"
            elif entry is None:
                if not _is_taken_over(key, taken_over):
                    found[key] = _unknown(key, value, [*self.checks, *more.get(block or "", ())])
            elif key == entry and value is not _TO_COME:
                found |= _problem(key, value, known[key])
        for key in sorted(self.checks.keys() - {key for key, _ in given}):
            if not key.startswith(self.optional or ("???",)):
                found[key] = f"{key} is not in the config; take its line over from the script's yaml in conf/"
        # A value that others are worked out from is named alone.
        return {key: text for key, text in found.items() if not _sources(cfg, key) & found.keys()} or unresolved


def _is_taken_over(key: str, names: Collection[str]) -> bool:
    """Whether another value is worked out from a key or from a block that it is in; `.name` is relative to a block."""
    parts = key.split(".")
    blocks = [".".join(parts[: count + 1]) for count in range(len(parts))]
    relative = [name.lstrip(".") for name in names if name.startswith(".")]
    return any(block in names or f".{block}".endswith(tuple(f".{one}" for one in relative)) for block in blocks)


def missing(cfg: DictConfig) -> list[str]:
    """One problem that names every setting that is still to be given; none where there is none."""
    keys = sorted(OmegaConf.missing_keys(cfg))
    return [f"needed and not given: {' '.join(f'{key}=...' for key in keys)}"] if keys else []


def raise_problems(headline: str, problems: Collection[str]) -> None:
    """One ValueError with every problem; nothing where there is none."""
    if problems:
        raise ValueError("\n  ".join([f"{headline}:", *(problem.replace("\n", "\n  ") for problem in problems)]))


def _sources(cfg: DictConfig, key: str) -> set[str]:
    """The keys that a value is worked out from."""
    block, _, name = key.rpartition(".")
    parent = OmegaConf.select(cfg, block) if block else cfg
    raw = OmegaConf.to_container(parent, resolve=False) if OmegaConf.is_dict(parent) else {}
    return set(_TAKEN_OVER.findall(str(raw.get(name))))


def _unknown(key: str, value: Any, known: Collection[str]) -> str:
    below = [one for one in dict.fromkeys(known) if one.startswith(f"{key}.")]
    if below:
        return f"{key}={value!r} must be a block of settings, such as {', '.join(below[:3])}"
    block, _, name = key.rpartition(".")
    match = close_match(key, [one for one in known if one.rpartition(".")[0] == block]) or close_match(key, [*known])
    if not match:
        elsewhere = [one for one in known if one.rpartition(".")[2] == name]
        match = f" (did you mean {elsewhere[0]}?)" if elsewhere else ""
    return f"{key}={value!r}: there is no such setting{match}; nothing reads it, leave it out"


def _problem(key: str, value: Any, check: Check) -> dict[str, str]:
    try:
        check(value)
    except ValueError as rule:
        return {key: f"{key}={value!r} {rule}"}
    return {}


def _entry(key: str, known: Mapping[str, Check]) -> str | None:
    """The entry that a key is, or lies below; None where there is none."""
    parts = key.split(".")
    return next((one for n in range(len(parts), 0, -1) if (one := ".".join(parts[:n])) in known), None)


def _values(block: DictConfig, known: Mapping[str, Check], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, plain value, or why it cannot be worked out); blocks themselves are left out, empty ones too."""
    for name in block:
        key = f"{prefix}{name}"
        if OmegaConf.is_missing(block, name):
            yield key, _TO_COME
            continue
        try:
            value = block[name]
            if OmegaConf.is_dict(value) and key not in known:
                yield from _values(value, known, f"{key}.")
                continue
            yield key, OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except InterpolationToMissingValueError:
            yield key, _TO_COME
        except OmegaConfBaseException as error:
            yield key, error
