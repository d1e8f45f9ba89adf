# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Lets megatron.bridge be imported without Transformer Engine, and below Python 3.12. The shim is in tests only.

megatron-bridge 0.6.2 with Megatron-core 0.19.2 imports two things that a CPU host does not have:

    megatron/training/models/gpt.py:5           `from typing import override`, which is of Python 3.12
    megatron/bridge/peft/lora_layers.py         `import transformer_engine.pytorch as te`, for classes of adapters

The stand-in for Transformer Engine is in place while megatron.bridge is imported, after Megatron-core has found that
there is none. Nothing of it runs in a test.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
import typing
from unittest.mock import MagicMock

from nemo_ee import cpu_host

# Modules of Megatron-core that look for Transformer Engine when they are imported.
_LOOK_FOR_IT = ("extensions.transformer_engine", "fp8_utils", "fp4_utils")


def _installed() -> bool:
    return importlib.util.find_spec("megatron") is not None and importlib.util.find_spec("megatron.bridge") is not None


def import_bridge() -> None:
    """Import megatron.bridge behind the shim."""
    cpu_host.enable()
    if sys.version_info < (3, 12):
        import typing_extensions

        typing.override = typing_extensions.override
    for name in _LOOK_FOR_IT:
        importlib.import_module(f"megatron.core.{name}")
    sys.modules["megatron.core.utils"].get_te_version()
    if importlib.util.find_spec("transformer_engine") is not None:
        importlib.import_module("megatron.bridge")
        return
    stand_in = types.ModuleType("transformer_engine")
    stand_in.pytorch = MagicMock()
    sys.modules |= {"transformer_engine": stand_in, "transformer_engine.pytorch": stand_in.pytorch}
    try:
        importlib.import_module("megatron.bridge")
    finally:
        del sys.modules["transformer_engine"], sys.modules["transformer_engine.pytorch"]


if _installed():
    import_bridge()
