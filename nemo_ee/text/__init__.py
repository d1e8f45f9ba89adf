# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Level 1: text files that a user names, special tokens, stop strings, and generated text as a person reads it."""
