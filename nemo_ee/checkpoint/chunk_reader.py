# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Reading chunks of a Megatron distributed checkpoint (format torch_dist) without a process group.

Megatron-core loads whole layer stacks only. Here any chunk (key, offset, shape) of a global tensor is read, for
instance one layer's tensor-parallel slice of a [num_layers, ffn, hidden] tensor that several ranks saved, through
the public parts of torch.distributed.checkpoint. No code in an untrusted file runs (restricted_pickle.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nemo_ee.checkpoint.restricted_pickle import METADATA_FILE, load_metadata, plain_file_name
from nemo_ee.text.json_values import read_json_object

MEGATRON_CONFIG_FILE = "metadata.json"


@dataclass(frozen=True)
class TensorInfo:
    """A global tensor as the checkpoint holds it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@runtime_checkable
class WeightSource(Protocol):
    """Weights under Megatron-core's canonical names, the stacked layer axis first, read chunk by chunk."""

    def keys(self) -> dict[str, TensorInfo]:
        """Every tensor by canonical name."""
        ...

    def read(
        self, key: str, offset: tuple[int, ...], shape: tuple[int, ...], *, allow_missing_rows: bool = False
    ) -> Tensor:
        """The chunk of `key` that starts at `offset` and has `shape`, on the CPU, in the stored dtype.

        Args:
            allow_missing_rows: rows (axis 0) past the stored end are zeros instead of an error, because the padding of
                the vocabulary differs between layouts.

        Raises:
            KeyError: no such key.
            ValueError: the chunk does not lie inside the tensor.
        """
        ...


class ChunkReader:
    """A `WeightSource` over one torch_dist directory (`model_weights/` or `exit_weights/` of a `.nemo`).

    Args:
        directory: holds `.metadata` and the `.distcp` files.
        prefix: leading part of the stored names that callers do not write; keys without it are not shown.

    Raises:
        ValueError: not a torch_dist directory (the message says what it is and the way out), or a damaged one.
        UnsafeCheckpointError: the metadata asks for more than plain metadata.
    """

    def __init__(self, directory: str | Path, prefix: str = "model.") -> None:
        self.directory = Path(directory)
        self.prefix = prefix
        refuse_other_formats(self.directory)
        metadata = load_metadata(self.directory)
        try:
            self._tensors = _checked_tensors(metadata, self.directory)
        except (AttributeError, TypeError) as fault:
            raise ValueError(
                f"{self.directory / METADATA_FILE}: damaged, entries are missing ({fault}); save the checkpoint again."
            ) from fault
        self._reader = FileSystemReader(self.directory)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)

    def keys(self) -> dict[str, TensorInfo]:
        """Every stored tensor whose name starts with the prefix; sharded objects (`_extra_state`) are no tensors."""
        return {
            name[len(self.prefix) :]: TensorInfo(tuple(entry.size), entry.properties.dtype)
            for name, entry in sorted(self._tensors.items())
            if name.startswith(self.prefix)
        }

    def read(
        self, key: str, offset: tuple[int, ...], shape: tuple[int, ...], *, allow_missing_rows: bool = False
    ) -> Tensor:
        """See `WeightSource.read`. Only the stored chunks that overlap the wanted one are opened."""
        name = self.prefix + key
        if name not in self._tensors:
            raise KeyError(_missing_key_message(key, self.keys(), self.directory))
        entry = self._tensors[name]
        rows = present_rows(f"{self.directory}: {key!r}", tuple(entry.size), offset, shape, allow_missing_rows)
        chunk = torch.empty(shape, dtype=entry.properties.dtype)
        if rows is not None:
            chunk[rows:].zero_()
            inside = chunk[:rows]
        else:
            inside = chunk
        if inside.numel():
            self._read_into(inside, name, entry, offset)
        return chunk

    def _read_into(self, target: Tensor, name: str, entry: TensorStorageMetadata, offset: tuple[int, ...]) -> None:
        wanted = ChunkStorageMetadata(offsets=torch.Size(offset), sizes=target.shape)
        items = create_read_items_for_chunk_list(name, entry, [wanted])
        covered = sum(math.prod(item.lengths) for item in items)
        if covered != target.numel():
            raise ValueError(
                f"{self.directory}: {name!r} at offset {tuple(offset)}: the saved chunks cover {covered} of "
                f"{target.numel()} elements; the checkpoint is incomplete, save it again."
            )
        try:
            self._reader.read_data(LoadPlan(items), _OneChunkPlanner(target)).wait()
        except Exception as fault:  # noqa: BLE001  truncated or missing files raise many types
            raise ValueError(
                f"{self.directory}: cannot read {name!r} ({type(fault).__name__}: {fault}); the checkpoint is damaged "
                "or incomplete, fetch or save it again."
            ) from fault


class _OneChunkPlanner(LoadPlanner):
    """Tells the storage reader where the one wanted chunk goes. Byte payloads are never asked for nor unpickled."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        raise AssertionError("the chunk reader makes its own plan")

    def create_local_plan(self) -> LoadPlan:
        raise AssertionError("the chunk reader makes its own plan")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise AssertionError("the chunk reader makes its own plan")

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise AssertionError("the chunk reader makes its own plan")

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("the chunk reader asks for tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self._target
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(axis, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


def present_rows(
    what: str, stored: tuple[int, ...], offset: Sequence[int], shape: Sequence[int], allow_missing_rows: bool
) -> int | None:
    """Checks a wanted chunk against the stored shape.

    Returns:
        None when the whole chunk is stored, otherwise how many of its leading rows are (the rest is to be zeros).

    Raises:
        ValueError: wrong number of axes, negative numbers, or outside of the tensor.
    """
    if len(offset) != len(stored) or len(shape) != len(stored):
        raise ValueError(
            f"{what} has shape {list(stored)}: offset {list(offset)} and shape {list(shape)} need {len(stored)} "
            "entries each."
        )
    outside = [
        axis
        for axis, (size, start, length) in enumerate(zip(stored, offset, shape, strict=True))
        if start < 0 or length < 0 or start + length > size
    ]
    if not outside:
        return None
    if allow_missing_rows and outside == [0] and offset[0] >= 0 and shape[0] >= 0:
        return max(0, min(shape[0], stored[0] - offset[0]))
    hint = ""
    if outside == [0] and not allow_missing_rows:
        hint = " Rows past the end are zeros with allow_missing_rows=True."
    raise ValueError(
        f"{what} has shape {list(stored)}: the chunk at offset {list(offset)} of shape {list(shape)} lies outside of "
        f"it.{hint}"
    )


def refuse_other_formats(directory: Path) -> None:
    """Raises a ValueError with the way out unless `directory` looks like a torch_dist distributed checkpoint."""
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory; give the model_weights/ directory of a .nemo.")
    if any(directory.glob("mp_rank_*")) or any(directory.glob("tp_rank_*")):
        raise ValueError(
            f"{directory}: a legacy checkpoint (one mp_rank_*/tp_rank_* folder per rank) is not read; restore it with "
            "NeMo and save it again with a distributed checkpoint (model.dist_ckpt_format=torch_dist)."
        )
    backend = _backend(directory)
    if backend not in (None, "torch_dist"):
        raise ValueError(
            f"{directory}: a distributed checkpoint of format {backend!r} is not read, only torch_dist; restore it "
            "with NeMo and save it again with model.dist_ckpt_format=torch_dist."
        )
    if not (directory / METADATA_FILE).is_file():
        raise ValueError(
            f"{directory}: not a torch_dist distributed checkpoint (no {METADATA_FILE} file); give the model_weights/ "
            "directory of a .nemo, or save again if the save was interrupted."
        )


def _backend(directory: Path) -> str | None:
    path = directory / MEGATRON_CONFIG_FILE
    if not path.is_file():
        return "zarr" if any(directory.glob("*/.zarray")) else None
    try:
        return str(read_json_object(path)["sharded_backend"])
    except (ValueError, KeyError, TypeError) as fault:
        raise ValueError(f"{path}: damaged ({fault!r}); fetch or save the checkpoint again.") from fault


def _checked_tensors(metadata: Any, directory: Path) -> dict[str, TensorStorageMetadata]:
    """The tensor entries, after checking everything that reading relies on (the file may come from anyone)."""
    entries, places = metadata.state_dict_metadata, metadata.storage_data
    damaged = f"{directory / METADATA_FILE}: damaged, "
    if not isinstance(entries, dict) or not isinstance(places, dict):
        raise ValueError(f"{damaged}no index of tensors; save the checkpoint again.")
    tensors = {}
    for name, entry in entries.items():
        if isinstance(entry, BytesStorageMetadata):
            continue
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{damaged}{name!r} is neither tensor nor bytes; save the checkpoint again.")
        if not isinstance(entry.properties.dtype, torch.dtype):
            raise ValueError(f"{damaged}{name!r} has no dtype; save the checkpoint again.")
        for chunk in entry.chunks:
            numbers = [*chunk.offsets, *chunk.sizes]
            inside = len(numbers) == 2 * len(entry.size) and min(numbers, default=0) >= 0
            ends = (start + length for start, length in zip(chunk.offsets, chunk.sizes, strict=False))
            if not inside or any(end > size for end, size in zip(ends, entry.size, strict=False)):
                raise ValueError(f"{damaged}a chunk of {name!r} lies outside of it; save the checkpoint again.")
        tensors[name] = entry
    for place in places.values():
        plain_file_name(place.relative_path, directory)
    return tensors


def _missing_key_message(key: str, known: dict[str, TensorInfo], directory: Path) -> str:
    near = [name for name in known if name.split(".")[-2:] == key.split(".")[-2:]] or list(known)
    return f"{directory}: no tensor {key!r}; it holds {len(known)} tensors: {', '.join(near[:4]) or 'none'}, ..."
