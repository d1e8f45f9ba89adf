# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM unified checkpoints and the model files beside them."""
