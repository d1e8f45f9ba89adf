# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Measuring exits on a text, generating with them, and reports of both (level 4). Importing it loads nothing."""
