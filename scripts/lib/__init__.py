# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Shared code of scripts. A script puts the folder above this one on `sys.path`, unless it lies there itself."""
