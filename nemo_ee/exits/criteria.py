# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The names of the confidence criteria and the order of their values; without torch, for the checks of settings.

The formulas are in `nemo_ee.exits.confidence`.
"""

from __future__ import annotations

CRITERIA = ("max_probability", "margin", "entropy")
SMALLER_IS_CONFIDENT = frozenset({"entropy"})  # a token leaves below the threshold; elsewhere above it
# The threshold at which no token ever leaves.
NEVER_LEAVES = {"max_probability": 1.0, "margin": 1.0, "entropy": 0.0}
