# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The CPU host's answers for Megatron's random states, whose code changes from version to version."""

from __future__ import annotations

import pytest
import torch

from nemo_ee import cpu_host


@pytest.mark.usefixtures("one_rank")
def test_megatrons_tracker_forks_and_restores_the_cpu_generator() -> None:
    from megatron.core import tensor_parallel

    assert cpu_host.enabled()
    tensor_parallel.model_parallel_cuda_manual_seed(5)
    outside = torch.get_rng_state()
    draws = []
    for _ in range(2):
        with tensor_parallel.get_cuda_rng_tracker().fork():
            draws.append(torch.rand(3).tolist())
        assert torch.equal(torch.get_rng_state(), outside), "the state outside is kept"
    assert draws[0] != draws[1], "the state inside goes on"
    tensor_parallel.model_parallel_cuda_manual_seed(5)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        assert torch.rand(3).tolist() == draws[0]
