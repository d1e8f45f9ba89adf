# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""ChunkReader against checkpoints that Megatron-core wrote, bitwise; and what it refuses."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_ee.checkpoint.chunk_reader import ChunkReader, TensorInfo, WeightSource
from nemo_ee.checkpoint.restricted_pickle import UnsafeCheckpointError, refuse_unsafe_pickles
from tests.unit.checkpoint.save_as_rank import FFN, HIDDEN, NUM_LAYERS, VOCAB, global_tensors, sharded_state

ROOT = Path(__file__).parents[3]
FC1 = "decoder.layers.mlp.linear_fc1.weight"
FC2 = "decoder.layers.mlp.linear_fc2.weight"
EMBEDDING = "embedding.word_embeddings.weight"

pytestmark = pytest.mark.slow_unit


@pytest.fixture(scope="module")
def one_rank(megatron: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from megatron.core import dist_checkpointing

    directory = tmp_path_factory.mktemp("one_rank")
    dist_checkpointing.save({**sharded_state(0, 1), "common": {"step": 3, "x": torch.ones(2)}}, str(directory))
    return directory


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("two_ranks")
    log = tmp_path_factory.mktemp("log") / "save"
    command = [sys.executable, "-m", "tests.unit.checkpoint.save_as_rank", str(directory), str(log)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(params=["one_rank", "two_ranks"])
def saved(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def copy(one_rank: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(one_rank, tmp_path / "copy"))


def test_keys_are_the_prefixed_tensors_with_shape_and_dtype(saved: Path) -> None:
    reader = ChunkReader(saved)
    assert isinstance(reader, WeightSource)
    assert reader.keys() == {
        key: TensorInfo(tuple(value.shape), value.dtype) for key, value in sorted(global_tensors().items())
    }
    assert "step" in ChunkReader(saved, prefix="optimizer.").keys()


def test_whole_tensors_are_bitwise_equal(saved: Path) -> None:
    reader = ChunkReader(saved)
    for key, value in global_tensors().items():
        read = reader.read(key, (0,) * value.ndim, tuple(value.shape))
        assert read.dtype == value.dtype and torch.equal(read, value), key


def test_any_chunk_is_exactly_the_slice(saved: Path) -> None:
    reader, whole = ChunkReader(saved), global_tensors()
    # One layer's tensor-parallel slices under a layout other than the saved one, across the saved boundary, and empty.
    for layer in range(NUM_LAYERS):
        for part in range(3):
            rows = 2 * FFN // 3
            read = reader.read(FC1, (layer, part * rows, 0), (1, rows, HIDDEN))
            assert torch.equal(read, whole[FC1][layer : layer + 1, part * rows : (part + 1) * rows])
    assert torch.equal(reader.read(FC2, (1, 2, 1), (2, 3, 4)), whole[FC2][1:3, 2:5, 1:5])
    assert reader.read(FC1, (0, 0, 0), (1, 0, HIDDEN)).shape == (1, 0, HIDDEN)


def test_only_files_with_the_wanted_chunk_are_opened(two_ranks: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(two_ranks, tmp_path / "copy"))
    for file in directory.glob("__1_*.distcp"):
        file.unlink()
    reader, whole = ChunkReader(directory), global_tensors()
    assert torch.equal(reader.read(FC1, (2, 0, 0), (1, FFN, HIDDEN)), whole[FC1][2:3, :FFN])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        reader.read(FC1, (2, 0, 0), (1, FFN + 1, HIDDEN))


def test_rows_past_the_end_are_zeros_only_on_request(saved: Path) -> None:
    reader, whole = ChunkReader(saved), global_tensors()[EMBEDDING]
    read = reader.read(EMBEDDING, (VOCAB - 2, 0), (5, HIDDEN), allow_missing_rows=True)
    assert torch.equal(read[:2], whole[-2:]) and read.dtype == whole.dtype
    assert torch.equal(read[2:], torch.zeros(3, HIDDEN, dtype=whole.dtype))
    assert not reader.read(EMBEDDING, (VOCAB + 4, 0), (2, HIDDEN), allow_missing_rows=True).any()
    with pytest.raises(ValueError, match=r"lies outside of it.*allow_missing_rows=True"):
        reader.read(EMBEDDING, (VOCAB - 2, 0), (5, HIDDEN))
    with pytest.raises(ValueError, match="lies outside of it"):
        reader.read(EMBEDDING, (0, 1), (1, HIDDEN), allow_missing_rows=True)


def test_missing_key_and_wrong_chunks_name_the_problem(one_rank: Path) -> None:
    reader = ChunkReader(one_rank)
    with pytest.raises(KeyError, match="no tensor 'decoder.nope'"):
        reader.read("decoder.nope", (0,), (1,))
    with pytest.raises(ValueError, match=r"has shape \[3, 12, 5\].*need 3 entries"):
        reader.read(FC1, (0, 0), (1, 1))
    with pytest.raises(ValueError, match="lies outside of it"):
        reader.read(FC1, (-1, 0, 0), (1, 1, 1))
    with pytest.raises(ValueError, match="lies outside of it"):
        reader.read(FC1, (NUM_LAYERS, 0, 0), (1, 1, 1))


def test_other_formats_are_refused_with_a_way_out(copy: Path, tmp_path: Path) -> None:
    (copy / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1}))
    with pytest.raises(ValueError, match="format 'zarr' is not read.*dist_ckpt_format=torch_dist"):
        ChunkReader(copy)
    (copy / "metadata.json").write_text("{")
    with pytest.raises(ValueError, match="metadata.json: damaged"):
        ChunkReader(copy)
    (tmp_path / "legacy" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "legacy" / "mp_rank_00" / "model_weights.ckpt").write_bytes(b"x")
    with pytest.raises(ValueError, match="legacy.*restore it with NeMo"):
        ChunkReader(tmp_path / "legacy")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "__0_0.distcp").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"\.metadata is missing, so this is not a whole torch_dist.*model_weights/"):
        ChunkReader(tmp_path / "empty")
    with pytest.raises(ValueError, match="no such directory"):
        ChunkReader(tmp_path / "absent")


def test_damaged_files_give_one_clear_error(copy: Path) -> None:
    for file in copy.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot read .*damaged or incomplete"):
        ChunkReader(copy).read(FC1, (0, 0, 0), (1, 1, 1))
    whole = (copy / ".metadata").read_bytes()
    for end in (0, 10, len(whole) // 2, len(whole) - 1):
        (copy / ".metadata").write_bytes(whole[:end])
        with pytest.raises(ValueError, match=".metadata: damaged"):
            ChunkReader(copy)
    (copy / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match=".metadata: damaged, it holds a dict"):
        ChunkReader(copy)


class _Touch:
    """Unpickles to a call of os.system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_the_metadata_pickle_runs_no_code(copy: Path, tmp_path: Path) -> None:
    bait = tmp_path / "executed"
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    metadata.planner_data = _Touch(bait)
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UnsafeCheckpointError, match=r"refused, it needs (posix|nt)\.system"):
        ChunkReader(copy)
    assert not bait.exists()
    pickle.loads((copy / ".metadata").read_bytes())
    assert bait.exists(), "control: the stock unpickler runs it"


@pytest.mark.parametrize(
    "stream",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"\x80\x04\x8c)torch.distributed.checkpoint.filesystem\x8c\tos.system\x93.",
        b"cbuiltins\ngetattr\n(cbuiltins\ngetattr\nS'__call__'\ntR.",
        b"cbuiltins\ngetattr\n(ctorch\nSize\nS'__init__'\ntR.",
        b"ctorch\nload\n.",
        b"S'x'\nP1\n.",
    ],
)
def test_the_metadata_unpickler_knows_nothing_else(copy: Path, stream: bytes) -> None:
    (copy / ".metadata").write_bytes(stream)
    with pytest.raises(ValueError, match="refused|damaged"):
        ChunkReader(copy)


def test_the_index_cannot_point_outside_of_the_directory(copy: Path) -> None:
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = "../" + place.relative_path
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UnsafeCheckpointError, match=r"points to '\.\./"):
        ChunkReader(copy)


def test_a_hole_in_the_saved_chunks_is_an_error(copy: Path) -> None:
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    del metadata.state_dict_metadata[f"model.{FC1}"].chunks[1]
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    reader = ChunkReader(copy)
    assert reader.read(FC1, (0, 0, 0), (1, 2 * FFN, HIDDEN)).shape == (1, 2 * FFN, HIDDEN)
    with pytest.raises(ValueError, match="cover 60 of 120 elements"):
        reader.read(FC1, (0, 0, 0), (2, 2 * FFN, HIDDEN))


def test_incomplete_metadata_is_an_error(copy: Path) -> None:
    for break_it in (
        lambda entry: setattr(entry, "chunks", None),
        lambda entry: setattr(entry, "size", 3),
        lambda entry: setattr(entry.properties, "dtype", "float32"),
        lambda entry: setattr(entry.chunks[0], "offsets", torch.Size([9, 9, 9])),
        lambda entry: setattr(entry.chunks[0], "sizes", torch.Size([1])),
    ):
        original = (copy / ".metadata").read_bytes()
        metadata = pickle.loads(original)
        break_it(metadata.state_dict_metadata[f"model.{FC1}"])
        (copy / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(ValueError, match=".metadata: damaged"):
            ChunkReader(copy)
        (copy / ".metadata").write_bytes(original)


def test_metadata_of_older_pytorch_is_read(copy: Path) -> None:
    from torch.distributed._shard.sharded_tensor.metadata import TensorProperties

    metadata = pickle.loads((copy / ".metadata").read_bytes())
    for entry in metadata.state_dict_metadata.values():
        if hasattr(entry, "properties"):
            entry.properties = TensorProperties(dtype=entry.properties.dtype)
    for place in metadata.storage_data.values():
        vars(place).pop("transform_descriptors", None)
    del metadata.storage_meta, metadata.version
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    value = global_tensors()[FC2]
    assert torch.equal(ChunkReader(copy).read(FC2, (0, 0, 0), tuple(value.shape)), value)


def test_common_pt_needs_trust_when_it_is_more_than_data(copy: Path, tmp_path: Path) -> None:
    refuse_unsafe_pickles(copy)
    bait = tmp_path / "executed"
    torch.save({"common": _Touch(bait)}, copy / "common.pt")
    with pytest.raises(UnsafeCheckpointError, match=r"common\.pt: refused.*system.*trust_checkpoint=true"):
        refuse_unsafe_pickles(copy)
    assert not bait.exists()
    refuse_unsafe_pickles(copy, trust_checkpoint=True)
    torch.load(copy / "common.pt", weights_only=False)
    assert bait.exists(), "control: unpickling it freely runs it"
    (copy / "common.pt").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(ValueError, match=r"common\.pt: damaged"):
        refuse_unsafe_pickles(copy)
    (copy / "common.pt").unlink()
    refuse_unsafe_pickles(copy)


@pytest.mark.parametrize("wrap", ["direct", "stream", "byte_tensor", "none", "empty"])
def test_sharded_objects_are_checked_stream_within_stream(megatron: None, tmp_path: Path, wrap: str) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    bait = tmp_path / "executed"
    inner = io.BytesIO()
    torch.save(None if wrap == "none" else _Touch(bait), inner)
    payload = {
        "direct": _Touch(bait),
        "stream": inner,
        "byte_tensor": torch.frombuffer(bytearray(inner.getvalue()), dtype=torch.uint8),
        "none": inner,
        "empty": torch.empty(0, dtype=torch.uint8),
    }[wrap]
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    dist_checkpointing.save({"extra": ShardedObject("model.x._extra_state", payload, (1,), (0,))}, str(directory))
    bait.unlink(missing_ok=True)
    assert ChunkReader(directory).keys() == {}
    if wrap in ("none", "empty"):
        refuse_unsafe_pickles(directory)
    else:
        with pytest.raises(UnsafeCheckpointError, match=r"_extra_state.*trust_checkpoint=true"):
            refuse_unsafe_pickles(directory)
    assert not bait.exists()
    (directory / "modelopt_state").mkdir()
    with pytest.raises(UnsafeCheckpointError, match="modelopt_state"):
        refuse_unsafe_pickles(directory)
