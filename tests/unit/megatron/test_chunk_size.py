# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The size of a chunk of the loss: by device, vocabulary shard and the buffers that the dtype takes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nemo_ee.megatron.loss.vocab_parallel import chunk_bytes_on, num_buffers, token_chunks

MIB = 2**20
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("rows", "dtype", "mib"),
    [
        (4096, torch.float32, 16),
        (8192, torch.float32, 16),  # 512 tokens
        (8193, torch.float32, 64),
        (4096, torch.bfloat16, 16),  # two buffers: 512 tokens
        (8192, torch.bfloat16, 64),
        (49_152, torch.float32, 64),
        (49_152 // 8, torch.float32, 16),  # of eight tensor-parallel ranks
    ],
)
def test_on_the_cpu_small_shards_stay_in_the_cache(rows: int, dtype: torch.dtype, mib: int) -> None:
    assert chunk_bytes_on(CPU, rows, buffers=num_buffers(dtype)) == mib * MIB


@pytest.mark.parametrize(("gib", "mib"), [(80, 256), (139, 512), (24, 64)])
def test_on_a_gpu_by_its_memory_alone(gib: int, mib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=gib * 2**30))
    for rows in (4096, 128_000):
        assert chunk_bytes_on(torch.device("cuda"), rows) == mib * MIB


def test_chunks_hold_every_token_once() -> None:
    rows = 4096
    parts = list(token_chunks(3000, rows, chunk_bytes_on(CPU, rows)))
    assert [part.stop - part.start for part in parts] == [1024, 1024, 952]
    assert [index for part in parts for index in range(part.start, part.stop)] == list(range(3000))


def test_of_no_tokens_there_is_no_chunk() -> None:
    assert list(token_chunks(0, 4096, MIB)) == []
