# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Early exit for Megatron GPT models in NVIDIA NeMo: tune exits on a frozen backbone, decode with them, export them.

Importing this package imports nothing heavy; each folder below says what it may import.
"""
