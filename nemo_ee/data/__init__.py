# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Tokenised data on disk, Megatron's `.bin/.idx`: its checks, and windows of it (level 2)."""
