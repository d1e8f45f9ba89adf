# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The names of the confidence criteria, the order of their values, and the name of the file of probes; without torch,
for the checks of settings.

The formulas are in `nemo_ee.exits.confidence` and, for `probe`, in `nemo_ee.exits.probe`.
"""

from __future__ import annotations

PROBE = "probe"
OF_LOGITS = ("max_probability", "margin", "entropy")  # criteria of the exit's distribution
CRITERIA = (*OF_LOGITS, PROBE)
SMALLER_IS_CONFIDENT = frozenset({"entropy"})  # a token leaves below the threshold; elsewhere above it
PROBES_FILE = "exit_probes.json"  # the probes, in a `.nemo` and in `hf_early_exit/` of an export
# The threshold at which no token ever leaves.
NEVER_LEAVES = {"max_probability": 1.0, "margin": 1.0, "entropy": 0.0, PROBE: 1.0}
