# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Hugging Face directories: the full model, each exit as a stand-alone model, dynamic exits."""
