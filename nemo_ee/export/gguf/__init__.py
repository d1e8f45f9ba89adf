# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""GGUF files for llama.cpp: the full model, and each exit as a stand-alone model."""
