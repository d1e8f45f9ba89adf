# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Reads a script's config into a pydantic model, with all problems in one message.

A config may hold the model's keys, the keys that a library reads in one of its blocks, and keys that other values
refer to (`${key}`). Any other key is a spelling mistake, which Hydra accepts with `+` or in a yaml.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from pydantic import ValidationError

from nemo_ee.exits.block_reader import RENAMED_KEYS, Check, close_match
from nemo_ee.settings.user_input import InputError, Problem, UserInput, problems_of, shortened

_TAKEN_OVER = re.compile(r"\$\{(\.*\w[\w.]*)[\[}]")
_NEEDED = object()  # the value of a required setting that is not given
_TO_COME = object()  # the value of a setting that is computed from such a setting


class ScriptInput(UserInput):
    """The settings of a script, a field for each key; a field that is a UserInput is a block of the yaml.

    Attributes:
        headline: first line of the message that lists the problems.
        libraries: block -> function that returns the further keys (below the block) of a library, with their checks.
            It is called only for a key that the model does not have. These keys are not in the model.
        may_lack: prefixes of keys that a config need not have.
    """

    headline: ClassVar[str] = "nothing was started"
    libraries: ClassVar[Mapping[str, Callable[[], Mapping[str, Check]]]] = {}
    may_lack: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_config(cls: type[Script], config: Any) -> Script:
        """Read a config, plain or OmegaConf's, that has every key.

        Raises:
            InputError: a ValueError with every problem.
        """
        problems, settings = _read(cls, config if OmegaConf.is_config(config) else OmegaConf.create(config))
        if problems:
            raise InputError(cls.headline, problems)
        return settings


Script = TypeVar("Script", bound=ScriptInput)


def script_problems(model: type[ScriptInput], cfg: DictConfig) -> list[Problem]:
    """A problem of a config, with the value, the rule and the way out; `where` is a key of the yaml."""
    return _read(model, cfg)[0]


def raise_problems(headline: str, texts: Collection[str]) -> None:
    """Raises one ValueError with all problems, if there are any."""
    if texts:
        raise InputError(headline, [Problem("", "value", text) for text in texts])


def _read(model: type[Script], cfg: DictConfig) -> tuple[list[Problem], Script | None]:
    known = list(fields_of(model))
    values: dict[str, Any] = {}
    found: list[Problem] = []
    unresolved: list[Problem] = []
    absent, needed = set(known), set[str]()
    libraries = {block: dict[str, Check]() for block in model.libraries}
    taken_over = set(_TAKEN_OVER.findall(str(OmegaConf.to_container(cfg, resolve=False))))
    for key, value in _values(cfg, known):
        absent.discard(key)
        needed |= {key} if value is _NEEDED else set()
        if isinstance(value, OmegaConfBaseException):
            text = f"{key} cannot be computed: {str(value).splitlines()[0]}"
            unresolved.append(Problem(key, "value", text))
        elif key in known:
            values |= {} if value is _NEEDED or value is _TO_COME else {key: value}
        elif value is _NEEDED:
            found.append(Problem(key, "missing", f"{key} is needed and not given"))
        elif not _is_taken_over(key, taken_over):
            block = next((block for block in libraries if key.startswith(f"{block}.")), "")
            if block and not libraries[block]:
                libraries[block] = {f"{block}.{name}": check for name, check in model.libraries[block]().items()}
            found += _library_problem(key, value, libraries.get(block, {}), known)
    settings, wrong = _validated(model, _nested(model, values))
    for one in wrong:
        key = next((key for key in known if f"{one.where}.".startswith((f"{key}.", f"{key}["))), one.where)
        text = one.text
        if one.kind == "missing" and one.where == key and key not in needed:
            if key not in absent or key.startswith(model.may_lack or ("???",)):
                continue  # it is computed from a key that is reported, or may be missing
            text = f"{key} is not in the config; take its line over from the script's yaml in conf/"
        found.append(Problem(key, one.kind, text))
    # Of a value and the values computed from it, only the first is reported.
    keys = {one.where for one in found}
    return [one for one in found if not _sources(cfg, one.where) & keys] or unresolved, settings


def fields_of(model: type[UserInput], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a model; keys below a dotted key belong to its value."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        yield from fields_of(field.annotation, f"{key}.") if _is_block(field.annotation) else [key]


def _is_block(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, UserInput)


def _nested(model: type[UserInput], values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key, as nested blocks of a model; a block without values is empty."""
    result: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        name = field.alias or name
        key = f"{prefix}{name}"
        if _is_block(field.annotation):
            result[name] = _nested(field.annotation, values, f"{key}.")
        elif key in values:
            result[name] = values[key]
    return result


def _validated(model: type[Script], values: dict[str, Any]) -> tuple[Script | None, list[Problem]]:
    """The model, or the problems of its values."""
    try:
        return model.model_validate(values), []
    except ValidationError as error:
        return None, problems_of(error, model, values)


def _library_problem(key: str, value: Any, library: Mapping[str, Check], known: Collection[str]) -> Iterator[Problem]:
    """The problem of a key that the model does not have: the library's check fails, or no library reads the key."""
    entry = _entry(key, library)
    if entry is None:
        yield Problem(key, "unknown", _unknown(key, value, [*known, *library]))
        return
    try:
        if key == entry and value is not _TO_COME:
            library[key](value)
    except ValueError as error:
        yield Problem(key, "value", f"{key}={shortened(value)} {error}")


def _is_taken_over(key: str, names: Collection[str]) -> bool:
    """Whether another value is computed from a key or from a block around it; `.name` is relative to a block."""
    parts = key.split(".")
    blocks = [".".join(parts[: count + 1]) for count in range(len(parts))]
    relative = [name.lstrip(".") for name in names if name.startswith(".")]
    return any(block in names or f".{block}".endswith(tuple(f".{one}" for one in relative)) for block in blocks)


def _sources(cfg: DictConfig, key: str) -> set[str]:
    """The keys from which a value is computed."""
    block, _, name = key.rpartition(".")
    parent = OmegaConf.select(cfg, block) if block else cfg
    raw = OmegaConf.to_container(parent, resolve=False) if OmegaConf.is_dict(parent) else {}
    return set(_TAKEN_OVER.findall(str(raw.get(name))))


def _unknown(key: str, value: Any, known: Collection[str]) -> str:
    below = [one for one in dict.fromkeys(known) if one.startswith(f"{key}.")]
    if below:
        return f"{key}={shortened(value)} must be a block of settings, such as {', '.join(below[:3])}"
    block, _, name = key.rpartition(".")
    if name in RENAMED_KEYS:
        return f"{key}={shortened(value)} is now {RENAMED_KEYS[name]}"
    match = close_match(key, [one for one in known if one.rpartition(".")[0] == block]) or close_match(key, [*known])
    if not match:
        elsewhere = [one for one in known if one.rpartition(".")[2] == name]
        match = f" (did you mean {elsewhere[0]}?)" if elsewhere else ""
    return f"{key}={shortened(value)} is not a setting here{match}; nothing reads it, leave it out"


def _entry(key: str, known: Collection[str]) -> str | None:
    """The entry that equals a key or contains it; None if there is none."""
    parts = key.split(".")
    return next((one for n in range(len(parts), 0, -1) if (one := ".".join(parts[:n])) in known), None)


def _values(block: DictConfig, known: Collection[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs (dotted key, plain value or the error of computing it). Blocks are left out, also empty ones."""
    for name in block:
        key = f"{prefix}{name}"
        if OmegaConf.is_missing(block, name):
            yield key, _NEEDED
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
