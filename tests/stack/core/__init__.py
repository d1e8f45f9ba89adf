# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What a host without NeMo, Megatron-core and transformers can do."""
