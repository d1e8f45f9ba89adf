# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Early exit inside vLLM: a plugin that vLLM loads by the entry point `vllm.general_plugins`.

vLLM's own names are used for what is vLLM's: a model runner, a request, a step, a row (one token of a request).
"""
