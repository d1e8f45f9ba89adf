# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The early-exit GPT on Megatron-core: heads, taps, losses, tuning schedule, decoding adapter (level 1)."""
