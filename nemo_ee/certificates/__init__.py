# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Level 2: what a certificate says, of which model and setting, and whether it is valid here."""
