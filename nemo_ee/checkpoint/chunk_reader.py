# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Reading chunks of a Megatron distributed checkpoint (format torch_dist) without a process group.

Megatron-core loads whole layer stacks only. This module reads any chunk (key, offset, shape) of a global tensor, for
instance one layer's tensor-parallel slice of a [num_layers, ffn, hidden] tensor that several ranks saved. It uses the
public parts of torch.distributed.checkpoint and does not unpack an archive. No code in an untrusted file runs
(restricted_pickle.py).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nemo_ee.checkpoint.file_folder import FileFolder
from nemo_ee.checkpoint.members import METADATA_FILE
from nemo_ee.checkpoint.restricted_pickle import load_metadata, plain_file_name
from nemo_ee.checkpoint.tensor_checks import is_finite, load_checked, non_finite_message
from nemo_ee.text.json_values import parse_json

MEGATRON_CONFIG_FILE = "metadata.json"
_AGAIN = "fetch or save it again"


@dataclass(frozen=True)
class TensorInfo:
    """A global tensor of the checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def numbers_by_dtype(infos: Mapping[str, TensorInfo]) -> dict[torch.dtype, int]:
    """Number of elements stored in each dtype, the most frequent dtype first."""
    counts: dict[torch.dtype, int] = {}
    for info in infos.values():
        counts[info.dtype] = counts.get(info.dtype, 0) + math.prod(info.shape)
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def dtype_shares(infos: Mapping[str, TensorInfo]) -> str:
    """The shares of the dtypes as text: `bfloat16 (99.8 %), float32 (0.2 %)`."""
    counts = numbers_by_dtype(infos)
    total = sum(counts.values())
    return ", ".join(f"{str(t).removeprefix('torch.')} ({100 * n / total:.3g} %)" for t, n in counts.items())


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
            allow_missing_rows: rows (axis 0) past the stored end are zeros instead of an error. Layouts differ in the
                padding of the vocabulary.

        Raises:
            KeyError: no such key.
            ValueError: the chunk does not lie inside the tensor.
        """
        ...


class ChunkReader:
    """A `WeightSource` over one torch_dist directory (`model_weights/` or `exit_weights/` of a `.nemo`).

    Every stored chunk is checked when it is read for the first time: its bytes have the checksum that was stored with
    them, and it holds neither NaN nor infinities.

    Args:
        folder: holds `.metadata` and the `.distcp` files; a directory, or a folder in an archive.
        prefix: leading part of the stored names, which keys omit; tensors without it are left out.

    Raises:
        ValueError: not a torch_dist directory (the message has its kind and the way out), or a damaged one.
        UnsafeCheckpointError: the metadata needs more classes than those of plain metadata.
    """

    def __init__(self, folder: str | Path | FileFolder, prefix: str = "model.") -> None:
        self.folder = folder if isinstance(folder, FileFolder) else FileFolder.on_disk(folder)
        self.prefix = prefix
        refuse_other_formats(self.folder)
        metadata = load_metadata(self.folder)
        try:
            self._tensors = _checked_tensors(metadata, self.folder.shown(METADATA_FILE))
        except (AttributeError, TypeError) as problem:
            raise ValueError(
                f"{self.folder.shown(METADATA_FILE)}: damaged, entries are missing ({problem}); {_AGAIN}."
            ) from problem
        self._places = metadata.storage_data
        self._checked: set[MetadataIndex] = set()

    def keys(self) -> dict[str, TensorInfo]:
        """Every stored tensor whose name starts with the prefix; sharded objects (`_extra_state`) are left out."""
        return {
            name[len(self.prefix) :]: TensorInfo(tuple(entry.size), entry.properties.dtype)
            for name, entry in sorted(self._tensors.items())
            if name.startswith(self.prefix)
        }

    def read(
        self, key: str, offset: tuple[int, ...], shape: tuple[int, ...], *, allow_missing_rows: bool = False
    ) -> Tensor:
        """See `WeightSource.read`. Only the stored chunks that overlap the wanted one are read.

        Raises:
            ValueError: also for a stored chunk that is damaged or not finite.
        """
        name = self.prefix + key
        if name not in self._tensors:
            raise KeyError(_missing_key_message(key, self.keys(), self.folder.name))
        entry = self._tensors[name]
        rows = present_rows(f"{self.folder.name}: {key!r}", tuple(entry.size), offset, shape, allow_missing_rows)
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
                f"{self.folder.name}: {name!r} at offset {tuple(offset)}: the saved chunks cover {covered} of "
                f"{target.numel()} elements; the checkpoint is incomplete, {_AGAIN}."
            )
        for item in items:
            stored = self._stored(item.storage_index)
            part = target
            for axis, (here, there, length) in enumerate(
                zip(item.dest_offsets, item.storage_offsets, item.lengths, strict=True)
            ):
                part, stored = part.narrow(axis, here, length), stored.narrow(axis, there, length)
            part.copy_(stored)

    def _stored(self, index: MetadataIndex) -> Tensor:
        """A stored chunk of a tensor; checked when it is read for the first time."""
        check = index not in self._checked
        stored = self._load(index, check=check)
        if check and not is_finite(stored):
            raise ValueError(non_finite_message(self.folder.name, self._whole_tensors()))
        self._checked.add(index)
        return stored

    def _load(self, index: MetadataIndex, *, check: bool) -> Tensor:
        chunks = self._tensors[index.fqn].chunks
        where = f"{self.folder.name}: no place for {index.fqn!r}"
        try:
            place = self._places[index]
            where = self.folder.shown(place.relative_path)
            if getattr(place, "transform_descriptors", None):
                raise ValueError("it is compressed, which is not read")
            with self.folder.open(place.relative_path, place.offset, place.length) as stream:
                stored = load_checked(stream, check=check)
            if not any(chunk.offsets == index.offset and chunk.sizes == stored.shape for chunk in chunks):
                raise ValueError(f"it has shape {list(stored.shape)}, unlike its index")
        except Exception as problem:  # noqa: BLE001  truncated or missing files raise many types
            raise ValueError(
                f"{where}: cannot read {index.fqn!r} ({_first_line(problem)}); the checkpoint is damaged or "
                f"incomplete, {_AGAIN}."
            ) from problem
        return stored

    def _whole_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under the prefix, with the files it is in; the readable chunks of damaged ones."""
        for name, entry in sorted(self._tensors.items()):
            if not name.startswith(self.prefix):
                continue
            chunks, files = [], set()
            for chunk in entry.chunks:
                index = MetadataIndex(name, chunk.offsets)
                with contextlib.suppress(ValueError):
                    chunks.append(self._load(index, check=False).reshape(-1))
                    files.add(self._places[index].relative_path)
            if chunks:
                yield f"{', '.join(sorted(files))}: {name}", torch.cat(chunks)


def present_rows(
    what: str, stored: tuple[int, ...], offset: Sequence[int], shape: Sequence[int], allow_missing_rows: bool
) -> int | None:
    """Checks a wanted chunk against the stored shape.

    Returns:
        None when the whole chunk is stored, else the number of its stored leading rows (the rest must become zeros).

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


def refuse_other_formats(folder: FileFolder) -> None:
    """Raises a ValueError with the way out unless `folder` looks like a torch_dist distributed checkpoint."""
    names = folder.names()
    if not names:
        raise ValueError(f"{folder.name}: no such directory, or an empty one; give a .nemo that has its weights.")
    if any(name.startswith(("mp_rank_", "tp_rank_")) for name in names):
        raise ValueError(
            f"{folder.name}: a legacy checkpoint (one mp_rank_*/tp_rank_* folder per rank) is not read; restore it "
            "with NeMo and save it again with a distributed checkpoint (model.dist_ckpt_format=torch_dist)."
        )
    backend = _backend(folder)
    if backend not in (None, "torch_dist"):
        raise ValueError(
            f"{folder.name}: a distributed checkpoint of format {backend!r} is not read, only torch_dist; restore it "
            "with NeMo and save it again with model.dist_ckpt_format=torch_dist."
        )
    if METADATA_FILE not in folder:
        raise ValueError(
            f"{folder.shown(METADATA_FILE)} is missing, so this is not a whole torch_dist distributed checkpoint; "
            f"{_AGAIN}, or give the model_weights/ of a .nemo."
        )


def _backend(folder: FileFolder) -> str | None:
    if MEGATRON_CONFIG_FILE not in folder:
        return "zarr" if any(name.endswith("/.zarray") for name in folder.names()) else None
    try:
        return str(parse_json(folder.read(MEGATRON_CONFIG_FILE))["sharded_backend"])
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"{folder.shown(MEGATRON_CONFIG_FILE)}: damaged ({problem!r}); {_AGAIN}.") from problem


def _checked_tensors(metadata: Any, index: str) -> dict[str, TensorStorageMetadata]:
    """The tensor entries, after a check of everything that reading relies on (the file may be untrusted)."""
    entries, places = metadata.state_dict_metadata, metadata.storage_data
    damaged = f"{index}: damaged, "
    if not isinstance(entries, dict) or not isinstance(places, dict):
        raise ValueError(f"{damaged}no index of tensors; {_AGAIN}.")
    tensors = {}
    for name, entry in entries.items():
        if isinstance(entry, BytesStorageMetadata):
            continue
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{damaged}{name!r} is neither tensor nor bytes; {_AGAIN}.")
        if not isinstance(entry.properties.dtype, torch.dtype):
            raise ValueError(f"{damaged}{name!r} has no dtype; {_AGAIN}.")
        for chunk in entry.chunks:
            numbers = [*chunk.offsets, *chunk.sizes]
            inside = len(numbers) == 2 * len(entry.size) and min(numbers, default=0) >= 0
            ends = (start + length for start, length in zip(chunk.offsets, chunk.sizes, strict=False))
            if not inside or any(end > size for end, size in zip(ends, entry.size, strict=False)):
                raise ValueError(f"{damaged}a chunk of {name!r} lies outside of it; {_AGAIN}.")
        tensors[name] = entry
    for place in places.values():
        plain_file_name(place.relative_path, index)
    return tensors


def _missing_key_message(key: str, known: dict[str, TensorInfo], folder: str) -> str:
    near = [name for name in known if name.split(".")[-2:] == key.split(".")[-2:]] or list(known)
    return f"{folder}: no tensor {key!r}; it holds {len(known)} tensors: {', '.join(near[:4]) or 'none'}, ..."


def _first_line(problem: Exception) -> str:
    """The first line of a message; PyTorch's messages about damaged zips have many."""
    text = (str(problem).splitlines() or [""])[0].split(". This is an internal")[0]
    return text if isinstance(problem, ValueError | OSError) else f"{type(problem).__name__}: {text}"
