# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What reading a checkpoint notices of its tensors: flipped bits, NaN, damage, and under which name it is reported."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from nemo_ee.checkpoint import tensor_checks
from nemo_ee.checkpoint.chunk_reader import ChunkReader
from nemo_ee.checkpoint.unpacked import open_nemo
from tests.unit.checkpoint.save_as_rank import global_tensors, sharded_state

FC1 = "decoder.layers.mlp.linear_fc1.weight"
FC2 = "decoder.layers.mlp.linear_fc2.weight"
EMBEDDING = "embedding.word_embeddings.weight"
NORM = "decoder.final_layernorm.weight"

pytestmark = pytest.mark.slow_unit


@pytest.fixture(scope="module")
def one_rank(megatron: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from megatron.core import dist_checkpointing

    directory = tmp_path_factory.mktemp("one_rank")
    dist_checkpointing.save(sharded_state(0, 1), str(directory))
    return directory


@pytest.fixture
def copy(one_rank: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(one_rank, tmp_path / "copy"))


def _read_all(reader: ChunkReader) -> dict[str, torch.Tensor]:
    return {key: reader.read(key, (0,) * len(info.shape), info.shape) for key, info in reader.keys().items()}


def _items(directory: Path) -> dict[str, tuple[Path, int, int]]:
    """A stored chunk of every tensor -> its file, offset and length."""
    places = pickle.loads((directory / ".metadata").read_bytes()).storage_data
    return {
        index.fqn: (directory / place.relative_path, place.offset, place.length)
        for index, place in places.items()
        if index.fqn.startswith("model.") and "_extra_state" not in index.fqn
    }


def _numbers(item: bytes) -> tuple[int, int]:
    """Where a stored tensor's numbers begin in its zip, and how many bytes they are."""
    with zipfile.ZipFile(io.BytesIO(item)) as records:
        content = records.read("archive/data/0")
    return item.index(content), len(content)


def test_one_flipped_bit_in_any_tensor_is_an_error_that_names_it(copy: Path) -> None:
    """Whatever the tensor's dtype, in any number of it; `torch.load` itself notices nothing."""
    assert len(_items(copy)) == 4
    for name, (file, offset, length) in _items(copy).items():
        whole = file.read_bytes()
        start, size = _numbers(whole[offset : offset + length])
        for position in (0, size // 2, size - 1):
            content = bytearray(whole)
            content[offset + start + position] ^= 0x10
            file.write_bytes(content)
            torch.load(io.BytesIO(content[offset : offset + length]), weights_only=True)  # control
            message = rf"{file.name}: cannot read '{name}' \(its bytes do not have the checksum.*save it again"
            with pytest.raises(ValueError, match=message):
                _read_all(ChunkReader(copy))
        file.write_bytes(whole)
    assert _read_all(ChunkReader(copy)).keys() == global_tensors().keys()


def test_a_stored_chunk_is_checked_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked, reader = [], ChunkReader(copy)
    real = tensor_checks.zlib.crc32
    monkeypatch.setattr(tensor_checks.zlib, "crc32", lambda data: checked.append(len(data)) or real(data))
    _read_all(reader)
    size = sum(value.nbytes for value in global_tensors().values())
    assert sum(checked) == size
    _read_all(reader)
    assert sum(checked) == size


def test_a_checkpoint_without_checksums_is_read(tmp_path: Path, megatron: None) -> None:
    """`torch.serialization.set_crc32_options(False)` writes zeros for them."""
    from megatron.core import dist_checkpointing

    torch.serialization.set_crc32_options(False)
    try:
        dist_checkpointing.save(sharded_state(0, 1), str(tmp_path))
    finally:
        torch.serialization.set_crc32_options(True)
    assert all(torch.equal(value, global_tensors()[key]) for key, value in _read_all(ChunkReader(tmp_path)).items())


def test_tensors_that_are_not_finite_are_named_all_at_once(tmp_path: Path, megatron: None) -> None:
    from megatron.core import dist_checkpointing

    state = sharded_state(0, 1)
    state[f"{FC2}1"].data[0, :3] = float("nan")
    state[EMBEDDING].data[4, 1:3] = torch.tensor([float("inf"), -float("inf")])
    state[f"{FC1}2"].data.fill_(torch.finfo(torch.float32).max)  # finite, though their sum is not
    dist_checkpointing.save(state, str(tmp_path))
    for key, info in ChunkReader(tmp_path).keys().items():
        reader = ChunkReader(tmp_path)
        if key in (FC2, EMBEDDING):
            with pytest.raises(ValueError) as caught:
                reader.read(key, (0,) * len(info.shape), info.shape)
            first, *listed, way_out = str(caught.value).splitlines()
            assert first == f"{tmp_path}/ holds weights that are not finite:" and "get the file again" in way_out
            assert [line.partition(".distcp: ")[2] for line in listed] == [
                f"model.{FC2}: 3 NaN and 0 infinite of 90 numbers",
                f"model.{EMBEDDING}: 0 NaN and 2 infinite of 50 numbers",
            ]
        else:
            reader.read(key, (0,) * len(info.shape), info.shape)


@pytest.mark.parametrize("mode", ["w:", "w:gz"])
def test_damage_is_reported_under_the_archive_s_name(mode: str, one_rank: Path, tmp_path: Path) -> None:
    """Read in place from a tar, unpacked from a compressed one: the same numbers, and the same names in errors."""
    path, folder = tmp_path / "m.nemo", tmp_path / "tree"
    (folder / "model_config.yaml").parent.mkdir()
    (folder / "model_config.yaml").write_text("num_layers: 3\n")
    shutil.copytree(one_rank, folder / "model_weights")

    def reads(change=lambda weights: None) -> dict[str, torch.Tensor]:  # noqa: ANN001
        change(folder / "model_weights")
        with tarfile.open(path, mode) as tar:
            tar.add(folder, arcname=".")
        shutil.rmtree(folder / "model_weights", ignore_errors=True)
        shutil.copytree(one_rank, folder / "model_weights")
        with open_nemo(path) as archive:
            return _read_all(ChunkReader(archive.folder("model_weights")))

    assert all(torch.equal(value, global_tensors()[key]) for key, value in reads().items())
    file = _items(one_rank)[f"model.{NORM}"][0].name
    for change, message in (
        (lambda w: (w / file).unlink(), f"{file}: cannot read 'model.{NORM}' (the file is missing)"),
        (lambda w: os.truncate(w / file, 200), f"{file}: cannot read 'model.{NORM}' (the file has 200 bytes, "),
        (lambda w: (w / file).write_bytes(bytes((w / file).stat().st_size)), f"{file}: cannot read 'model.{NORM}' ("),
        (lambda w: os.truncate(w / ".metadata", 100), ".metadata: damaged (UnpicklingError"),
        (lambda w: (w / ".metadata").unlink(), ".metadata is missing, so this is not a whole"),
        (lambda w: (w / "metadata.json").write_text("{"), "metadata.json: damaged"),
        (shutil.rmtree, ": no such directory, or an empty one"),
    ):
        with pytest.raises(ValueError) as caught:
            reads(change)
        assert str(caught.value).startswith(f"{path}: model_weights/{message}"), caught.value
        assert str(folder) not in str(caught.value) and "unpacked-" not in str(caught.value)
