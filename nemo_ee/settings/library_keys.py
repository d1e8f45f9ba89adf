# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings of Lightning, NeMo and Megatron-core besides those of the yamls, taken from the libraries' code.

trainer       the arguments of Lightning's Trainer
exp_manager   the fields of NeMo's dataclass, with their types
model         the fields of Megatron-core's config, with their types; keys of `cfg` that NeMo's GPT model and
              the early-exit model read, found in their sources
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError

from nemo_ee.exits.block_reader import Check
from nemo_ee.settings.user_input import in_words

# Sources of the packages that read a GPT's `model` block.
_NEMO_READERS = (
    "collections/nlp/models/language_modeling/megatron_gpt_model.py",
    "collections/nlp/models/language_modeling/megatron_base_model.py",
    "collections/nlp/parts/megatron_trainer_builder.py",
    "core/classes/modelPT.py",
    "utils/callbacks/dist_ckpt_io.py",
)
_READ_THE_WHOLE_CONFIG = ("megatron_trainer_builder.py", "trainer.py")  # the block is `model` in it
_OWN_READERS = ("models/megatron_early_exit_gpt_model.py", "models/stage_layers.py", "models/trainer.py")
_METHODS = ("get", "update", "pop", "lower", "items", "keys")


def anything(value: Any) -> Any:
    """No check: the library checks the value."""
    return value


@cache
def trainer_keys() -> Mapping[str, Check]:
    """The arguments of Lightning's Trainer, which checks their values before anything is written."""
    from lightning.pytorch import Trainer

    return dict.fromkeys(inspect.signature(Trainer).parameters, anything)


@cache
def exp_manager_keys() -> Mapping[str, Check]:
    """The fields of NeMo's experiment manager, each with a check by its type."""
    from nemo.utils.exp_manager import ExpManagerConfig
    from omegaconf import OmegaConf

    schema = OmegaConf.structured(ExpManagerConfig)

    def keys(block: Any, prefix: str) -> Iterator[str]:
        for name in block:
            inner = block[name]
            yield from keys(inner, f"{prefix}{name}.") if OmegaConf.is_dict(inner) and inner else [f"{prefix}{name}"]

    return {key: _by_schema(schema, key) for key in keys(schema, "")}


def _by_schema(schema: Any, key: str) -> Check:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    def check(value: Any) -> Any:
        try:
            OmegaConf.update(schema.copy(), key, value)
        except OmegaConfBaseException as error:
            raise ValueError(f"is refused by NeMo's experiment manager: {str(error).splitlines()[0]}") from None
        return value

    return check


@cache
def model_keys() -> Mapping[str, Check]:
    """The keys of a GPT's `model` block that are read."""
    import dataclasses

    from megatron.core.transformer.transformer_config import TransformerConfig

    typed = {field.name: _by_type(field.type) for field in dataclasses.fields(TransformerConfig)}
    roots = {_folder("nemo"): _NEMO_READERS, _folder("nemo_ee"): _OWN_READERS}
    sources = [root / name for root, names in roots.items() for name in names]
    read: set[str] = set()
    for source in sources:
        keys = read_keys(source.read_text(encoding="utf-8"))
        if source.name in _READ_THE_WHOLE_CONFIG:
            keys = {key.removeprefix("model.") for key in keys if key.startswith("model.")}
        read |= keys
    blocks = {key.rpartition(".")[0] for key in read} | {"model", "trainer", "exp_manager"}
    return dict.fromkeys(read - blocks, anything) | typed


def _folder(package: str) -> Path:
    return Path(find_spec(package).submodule_search_locations[0])


def read_keys(source: str) -> set[str]:
    """Dotted keys of a `cfg` or `model_cfg` that a source reads: `cfg.a.b`, `cfg.get("a")`, `self.cfg["a"]`."""
    found = (_key(node) for node in ast.walk(ast.parse(source)))
    return {".".join(parts) for parts in found if parts and not set(parts) & set(_METHODS)}


def _key(node: ast.AST) -> tuple[str, ...] | None:
    """The parts of the key that an expression reads; () is the config itself, None something else."""
    if isinstance(node, ast.Name):
        return () if node.id in ("cfg", "model_cfg") else None
    if isinstance(node, ast.Attribute):
        return () if node.attr in ("cfg", "_cfg") else _below(node.value, node.attr)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return _below(node.value, node.slice.value)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get" and node.args:
        name = node.args[0]
        return _below(node.func.value, name.value) if isinstance(name, ast.Constant) else None
    return None


def _below(node: ast.AST, name: Any) -> tuple[str, ...] | None:
    parts = _key(node)
    return None if parts is None or not isinstance(name, str) else (*parts, name)


def _by_type(kind: Any) -> Check:
    """A check by a field's annotation; any value is valid unless the type is a number, a switch or null."""
    if not set(get_args(kind) or (kind,)) <= {bool, int, float, type(None)}:
        return anything
    adapter = TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))

    def check(value: Any) -> Any:
        try:
            return adapter.validate_python(value)
        except ValidationError:
            raise ValueError(f"must be {in_words(adapter.json_schema())}") from None

    return check
