# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""One-process Megatron-core on the CPU, for tests that write distributed checkpoints or build a reference GPT."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A gloo group of one rank and Megatron's parallel state; the few CUDA calls are answered on the CPU."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    patch = pytest.MonkeyPatch()
    patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    patch.setattr(torch.cuda, "synchronize", lambda *_: None)
    patch.setattr(CudaRNGStatesTracker, "fork", lambda self, name=None: contextlib.nullcontext())
    own_group = not torch.distributed.is_initialized()
    if own_group:
        store: Path = tmp_path_factory.mktemp("store") / "store"
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    own_state = not parallel_state.model_parallel_is_initialized()
    if own_state:
        parallel_state.initialize_model_parallel()
    yield
    if own_state:
        parallel_state.destroy_model_parallel()
    if own_group:
        torch.distributed.destroy_process_group()
    patch.undo()
