# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Level 4: evaluation of exits on a text, lm-evaluation-harness tasks, and reports. Importing it loads nothing."""
