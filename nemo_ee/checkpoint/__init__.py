# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: chunks of distributed checkpoints, `.nemo` archives, Hugging Face directories, fingerprints.

Level 2: may import torch, safetensors, megatron.core and levels 0-1. Importing this package imports none of them.
"""
