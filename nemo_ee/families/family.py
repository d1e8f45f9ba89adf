# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The dataclasses that a family's file fills in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_ee.families.architecture import Architecture
from nemo_ee.families.config_reader import ConfigReader
from nemo_ee.families.gguf_metadata import GgufForm
from nemo_ee.families.tensors import Names


@dataclass(frozen=True, kw_only=True)
class EngineClass:
    """A class of TensorRT-LLM's engine backend (unified checkpoints, 0.20 to 1.2.1).

    Attributes:
        architecture: the class's name in a checkpoint's config.json.
        computes: architecture -> whether the class computes it.
        fields: architecture -> keys of config.json that only this class has.
        early_exit: the class in `export/tensorrt_llm/files/tensorrt_llm_model.py` that adds exits to it, or None.
    """

    architecture: str
    computes: Callable[[Architecture], bool]
    fields: Callable[[Architecture], Mapping[str, Any]]
    early_exit: str | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models that share a class of the transformers library.

    Attributes:
        model_type: transformers' name of the family.
        model_class, config_class: transformers' classes.
        names: names of the stored tensors.
        keys: field of `Architecture` -> key of config.json, for fields that are a number or a switch in both.
        read: reader of a config.json -> its architecture; the reader collects problems.
        other_keys: architecture -> the other keys of its config.json. They may be wrong for an unsuitable
            architecture, since they are read back and compared.
        special_tokens: ids that the config class assumes where config.json has no such key, e.g. `bos_token_id`.
        chosen_for: whether a model of this architecture and of unknown origin is written as this family's.
        droppable_final_norm: key of config.json that leaves the final norm out, if the class has one.
        engine: the class of TensorRT-LLM's engine backend; None = the class of an earlier family, or no class.
        pytorch_early_exit: whether `export/tensorrt_llm/files/tensorrt_llm_pytorch_model.py` adds exits to
            TensorRT-LLM's PyTorch class, which has the same name as the class of transformers.
        gguf: the family in GGUF files; None = llama.cpp does not have it.
    """

    model_type: str
    model_class: str
    config_class: str
    names: Names
    keys: Mapping[str, str]
    read: Callable[[ConfigReader], Architecture]
    other_keys: Callable[[Architecture], dict[str, Any]]
    special_tokens: Mapping[str, int] = dataclasses.field(default_factory=dict)
    chosen_for: Callable[[Architecture], bool] = lambda a: True
    droppable_final_norm: str | None = None
    engine: EngineClass | None = None
    pytorch_early_exit: bool = False
    gguf: GgufForm | None = None

    def stock_config(self, architecture: Architecture) -> dict[str, Any]:
        """The values of a config.json for an architecture, with class and family."""
        keyed = {key: getattr(architecture, field) for field, key in self.keys.items()}
        named = {"model_type": self.model_type, "architectures": [self.model_class]}
        return {**named, **keyed, **self.other_keys(architecture)}
