# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The Megatron-Bridge host, on the CPU and without Transformer Engine (see conftest.py)."""
