# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The early-exit GPT: layers, taps, exit heads and their initialisation."""
