# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Measuring exits: their loss and agreement on a text, and reports of it (level 4). Importing this package loads nothing else."""
