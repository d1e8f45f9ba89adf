# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Level 2: a small single-device model that loads an exported Hugging Face directory and decodes on the engine."""
