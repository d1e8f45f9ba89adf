# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Megatron's process groups of one rank, on a GPU (NCCL) or on the CPU (gloo)."""

from __future__ import annotations

import os

import torch


def one_rank(device: str) -> None:
    """Set the groups up for this process alone. On the CPU the CPU host must be on."""
    from megatron.core import parallel_state, tensor_parallel

    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # Megatron makes gloo groups too; no network is needed
    backend = "gloo" if device == "cpu" else "nccl"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
