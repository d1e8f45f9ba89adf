# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The random numbers of a joint training step follow from seed, step, stage and replica, and from nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import random as megatron_random

from nemo_ee.megatron.pipeline import joint_training
from tests.helpers import core_models  # noqa: F401 -- switches the CPU host on


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch):
    """(seed, step, stage, replica, tensor-parallel rank) -> (draws of the shared stream, of the rank's own one)."""

    def draws(seed: int, step: int, stage: int = 0, replica: int = 0, tensor: int = 0) -> tuple[list, list]:
        ranks = {"get_pipeline_model_parallel_rank": lambda: stage, "get_data_parallel_rank": lambda: replica}
        monkeypatch.setattr(joint_training, "parallel_state", SimpleNamespace(**ranks))
        monkeypatch.setattr(megatron_random, "get_tensor_model_parallel_rank", lambda: tensor)
        monkeypatch.setattr(megatron_random, "get_expert_model_parallel_rank", lambda: 0)
        monkeypatch.setattr(megatron_random, "get_expert_tensor_parallel_rank", lambda: tensor)
        torch.rand(3)  # whatever was drawn before
        joint_training.seed_dropout(seed, step)
        shared = torch.rand(4).tolist()
        with tensor_parallel.get_cuda_rng_tracker().fork():
            own = torch.rand(4).tolist()
        return shared, own

    return draws


def test_the_same_step_draws_the_same(draw) -> None:
    assert draw(1, 7, 1, 1, 1) == draw(1, 7, 1, 1, 1)


@pytest.mark.parametrize("other", [(2, 7, 1, 1), (1, 8, 1, 1), (1, 7, 0, 1), (1, 7, 1, 0)])
def test_seed_step_stage_and_replica_each_change_both_streams(draw, other: tuple[int, ...]) -> None:
    ours, theirs = draw(1, 7, 1, 1), draw(*other)
    assert ours[0] != theirs[0] and ours[1] != theirs[1]


def test_tensor_parallel_ranks_share_one_stream_and_have_one_each(draw) -> None:
    ours, theirs = draw(1, 7, tensor=0), draw(1, 7, tensor=1)
    assert ours[0] == theirs[0] and ours[1] != theirs[1]
