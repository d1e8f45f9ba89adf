# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Megatron-core 0.13 to 0.19 without NeMo: the same logits, losses, tokens and checkpoints on every version."""

# What a column runs besides this folder: every test of `nemo_ee/megatron/` and `nemo_ee/checkpoint/`.
UNIT_TESTS = ("tests/unit/megatron", "tests/unit/checkpoint")
