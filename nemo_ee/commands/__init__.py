# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Level 4: what the example scripts run. Importing it loads nothing."""
