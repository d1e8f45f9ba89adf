# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Level 2: chunks of distributed checkpoints, `.nemo` archives, Hugging Face directories, fingerprints.

Importing this package imports neither torch nor safetensors nor megatron.core.
"""
