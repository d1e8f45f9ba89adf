# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Early exit inside vLLM: a plugin that vLLM loads by the entry point `vllm.general_plugins`.

vLLM's words keep their meaning: model runner, request, step, row (a token of a step).
"""
