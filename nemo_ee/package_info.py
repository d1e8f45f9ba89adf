# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Name, version and description of the package, read by setup.py without importing the package."""

__package_name__ = "nemo_ee"
__version__ = "0.1.0.dev0"
__description__ = "Early exit for Megatron GPT models in NVIDIA NeMo: tune exits on a frozen backbone, decode."
__license__ = "Apache-2.0"
__keywords__ = "NeMo, Megatron, early exit, large language models, speculative decoding"
