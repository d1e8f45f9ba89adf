# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Megatron-core 0.13 to 0.19 without NeMo: the same logits, losses, tokens and checkpoints on every version."""

# What a column runs besides this folder: the tests of `nemo_ee/megatron/`, and those of `nemo_ee/checkpoint/` that use
# Megatron-core.
UNIT_TESTS = (
    "tests/unit/megatron",
    *(
        f"tests/unit/checkpoint/test_{name}.py"
        for name in ("chunk_reader", "distributed_checkpoint", "fingerprint", "huggingface", "reading_checks")
    ),
)
