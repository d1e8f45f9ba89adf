# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""lm-eval's own `hf` model, on a model and a tokenizer that are in memory."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

# What lm-eval's file imports of it; nothing of that runs for a model that is given as an object.
_ACCELERATE = {
    "accelerate": ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size"),
    "accelerate.utils": ("get_max_memory",),
}


def hugging_face_lm(model: Any, tokenizer: Any, **settings: Any) -> Any:
    """`HFLM` on the CPU.

    Args:
        model, tokenizer: transformers'.
        settings: further ones of `HFLM`.
    """
    return hugging_face_module().HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", **settings)


def hugging_face_module() -> ModuleType:
    """lm-eval's file with `HFLM`. The package accelerate need not be installed."""
    stand_ins: dict[str, ModuleType] = {}
    if importlib.util.find_spec("accelerate") is None:
        for name, attributes in _ACCELERATE.items():
            stand_ins[name] = ModuleType(name)
            vars(stand_ins[name]).update(dict.fromkeys(attributes))
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("lm_eval.models.huggingface")
    finally:
        for name in stand_ins:
            del sys.modules[name]
