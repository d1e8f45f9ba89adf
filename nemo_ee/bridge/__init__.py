# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The Megatron-Bridge host: backbones by `AutoBridge`, exits, training step and checkpoint keys by `nemo_ee.megatron`.

It needs megatron-bridge 0.6 and Megatron-core 0.19. It does not import NeMo or `nemo_ee.models`.
"""
