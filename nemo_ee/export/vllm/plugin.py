# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The entry point: from here on vLLM serves the `hf_early_exit` directories of an export with their exits.

Stock models keep vLLM's classes. Only a directory whose config.json has a table of exits gets a class of
`nemo_ee.export.vllm.models`.
"""

from __future__ import annotations

import logging

SUPPORTED = (0, 32)
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def register() -> None:
    """Add the classes and the checks of their settings to vLLM. vLLM calls it in each of its processes."""
    import vllm

    if tuple(int(number) for number in vllm.__version__.split("+")[0].split(".")[:2]) != SUPPORTED:
        # An error here would also stop vLLM for stock models.
        logging.getLogger("vllm.nemo_ee").warning(
            "nemo_ee has early exit for vLLM %s, this is %s: a directory with exits cannot be served here; "
            "install vllm==%s.*, or serve hf_full", ".".join(map(str, SUPPORTED)), vllm.__version__,
            ".".join(map(str, SUPPORTED)),
        )  # fmt: skip
        return
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry

    from nemo_ee.export.vllm.served_exits import EarlyExitChecks, hook_after

    for name in ARCHITECTURES:
        if f"EarlyExit{name}" in MODELS_CONFIG_MAP:  # vLLM may call this again
            continue
        ModelRegistry.register_model(f"EarlyExit{name}", f"nemo_ee.export.vllm.models:EarlyExit{name}")
        MODELS_CONFIG_MAP[f"EarlyExit{name}"] = EarlyExitChecks
        MODELS_CONFIG_MAP[name] = hook_after(MODELS_CONFIG_MAP.get(name))
