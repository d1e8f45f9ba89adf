# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Level 0: what an early exit is, where it sits, how confident it is, and how much its loss counts."""
