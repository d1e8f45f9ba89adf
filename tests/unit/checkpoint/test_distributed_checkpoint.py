# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Distributed checkpoints through this package's reader: nested state, in place, whichever Megatron-core wrote them.

The checkpoints of other versions themselves: tests/stack/megatron/test_checkpoints.py.
"""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from nemo_ee.checkpoint.chunk_reader import ChunkReader
from nemo_ee.checkpoint.distributed_checkpoint import load_distributed, save_distributed
from tests.unit.checkpoint.save_as_rank import global_tensors, sharded_state

pytestmark = pytest.mark.usefixtures("megatron")


def nested(scale: float) -> dict:
    """Sharded tensors in dicts in dicts, a gated matrix that is stored in two halves, and plain values."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    gated = ShardedTensor.from_rank_offsets("gated", scale * torch.arange(12.0).view(6, 2), (0, 0, 1))
    vector = ShardedTensor.from_rank_offsets("vector", scale * torch.ones(3))
    return {
        "model": {"gated": apply_swiglu_sharded_factory(gated, ())},
        "optimizer": {"a": {"vector": vector}},
        "n": 7,
    }


def test_nested_state_is_filled_in_place(tmp_path: Path) -> None:
    saved = nested(2.0)
    save_distributed(saved, tmp_path / "saved")
    assert type(saved["model"]["gated"]).__name__ == "ShardedTensorFactory", "the caller's dicts are as they were"
    wanted = nested(0.0)
    gated, vector = wanted["model"]["gated"].data, wanted["optimizer"]["a"]["vector"].data
    loaded = load_distributed(wanted, tmp_path / "saved")
    assert loaded["model"]["gated"] is gated and loaded["optimizer"]["a"]["vector"] is vector and loaded["n"] == 7
    assert torch.equal(gated, 2.0 * torch.arange(12.0).view(6, 2)) and torch.equal(vector, 2.0 * torch.ones(3))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    saved = nested(1.0)
    del saved["optimizer"]
    save_distributed(saved, tmp_path / "saved")
    with pytest.raises(ValueError, match="the checkpoint lacks 1 of the model's tensors: vector"):
        load_distributed(nested(0.0), tmp_path / "saved")


def test_the_index_that_megatron_core_0_15_writes_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its class has one attribute more than torch's, and other versions lack it."""
    from megatron.core.dist_checkpointing.strategies import torch as strategies

    save_distributed(sharded_state(0, 1), tmp_path / "saved")
    made = dataclasses.make_dataclass("MCoreMetadata", [("mcore_data", dict, None)], bases=(Metadata,))
    made.__module__ = strategies.__name__
    monkeypatch.setattr(strategies, "MCoreMetadata", made, raising=False)
    path = tmp_path / "saved" / ".metadata"
    written = pickle.loads(path.read_bytes())
    fields = {field.name: getattr(written, field.name) for field in dataclasses.fields(Metadata)}
    path.write_bytes(pickle.dumps(made(mcore_data={"a": {}}, **fields)))
    assert b"MCoreMetadata" in path.read_bytes()
    for key, value in global_tensors().items():
        assert torch.equal(ChunkReader(tmp_path / "saved").read(key, (0,) * value.ndim, tuple(value.shape)), value)
