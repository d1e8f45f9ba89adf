# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Reads the pickled parts of a distributed checkpoint without running code in them.

A torch_dist directory holds pickles in three places: `.metadata` (the index of chunks), `common.pt` (everything
unsharded) and the byte payloads of sharded objects (`_extra_state`). Megatron-core and PyTorch unpickle all three
without restrictions, so a file from an untrusted source can run anything. Here `.metadata` goes through an unpickler
that is limited to the classes it needs, the other two through `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import enum
import io
import pickle
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import metadata as shard_metadata
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from nemo_ee.checkpoint.file_folder import FileFolder
from nemo_ee.checkpoint.members import METADATA_FILE

COMMON_FILE = "common.pt"
MODELOPT_FOLDER = "modelopt_state"

_AGAIN = "fetch or save the checkpoint again"
_WAY_OUT = "if you trust where the file comes from, set model.trust_checkpoint=true"


class UnsafeCheckpointError(ValueError):
    """A pickled part of a checkpoint needs more than plain data and tensors."""


class _Ignored:
    """Replaces a class whose instances are recorded in `.metadata` but not needed to read tensors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __hash__(self) -> int:
        return 0


def _enum_member(owner: Any, name: str) -> Any:
    """`getattr` for enum members, which some Python versions pickle with it; any other use is an error."""
    if owner is _Ignored:
        return _Ignored()
    if isinstance(owner, type) and issubclass(owner, enum.Enum) and name in owner.__members__:
        return owner[name]
    raise UnsafeCheckpointError(f"it calls getattr on {owner!r}")


# (module, name) -> the object that the restricted unpickler returns for it.
_CLASSES: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("collections", "OrderedDict"): dict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "getattr"): _enum_member,
    **{
        ("torch.distributed.checkpoint.metadata", name): getattr(dcp_metadata, name)
        for name in (
            "ChunkStorageMetadata _MEM_FORMAT_ENCODING TensorProperties TensorStorageMetadata BytesStorageMetadata "
            "StorageMeta Metadata MetadataIndex"
        ).split()
    },
    # Up to PyTorch 2.2 a checkpoint used the tensor properties of sharded tensors.
    **{
        ("torch.distributed._shard.sharded_tensor.metadata", name): getattr(shard_metadata, name)
        for name in ("TensorProperties", "MEM_FORMAT_ENCODING")
    },
    # Python 3.13 moved the classes; a path of another operating system is used as a label only.
    **{
        (module, name): PurePosixPath
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PurePath", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    },
    # Plans of the writers, which Megatron-core stores with the metadata to speed up later saves.
    **{
        ("torch.distributed.checkpoint.planner", name): _Ignored
        for name in (
            "SavePlan LoadPlan WriteItem WriteItemType TensorWriteData BytesIOWriteData ReadItem LoadItemType"
        ).split()
    },
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): _Ignored,
    # Megatron-core 0.15's index: torch's, with one attribute more.
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): dcp_metadata.Metadata,
    **{
        (module, name): _Ignored
        for module, name in (
            ("torch.distributed._shard.sharded_tensor.metadata", "ShardedTensorMetadata"),
            ("torch.distributed._shard.metadata", "ShardMetadata"),
        )
    },
}


class MetadataUnpickler(pickle.Unpickler):
    """Unpickles a torch_dist `.metadata` file and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        known = _CLASSES.get((module, name))
        if known is not None:
            return known
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise UnsafeCheckpointError(f"it needs {module}.{name}")


def load_metadata(folder: FileFolder) -> dcp_metadata.Metadata:
    """Reads a folder's `.metadata` with the restricted unpickler.

    Raises:
        UnsafeCheckpointError: the pickle names a class or function outside the known list; nothing was executed.
        ValueError: the file is damaged.
    """
    path = folder.shown(METADATA_FILE)
    try:
        metadata = MetadataUnpickler(io.BytesIO(folder.read(METADATA_FILE))).load()
    except UnsafeCheckpointError as problem:
        raise UnsafeCheckpointError(
            f"{path}: refused, {problem}. A .metadata file may only hold torch.distributed.checkpoint metadata; "
            "a file that holds more was not written by Megatron-core, fetch the checkpoint again."
        ) from None
    except Exception as problem:  # noqa: BLE001  a damaged pickle may raise anything at all
        raise ValueError(f"{path}: damaged ({type(problem).__name__}: {problem}); {_AGAIN}.") from problem
    if not isinstance(metadata, dcp_metadata.Metadata):
        raise ValueError(f"{path}: damaged, it holds a {type(metadata).__name__}, not checkpoint metadata; {_AGAIN}.")
    return metadata


def refuse_unsafe_pickles(directory: Path | str, *, trust_checkpoint: bool = False, known: Sequence[Any] = ()) -> None:
    """Checks every pickled part of a torch_dist directory, for use before NeMo or Megatron-core unpickle it freely.

    Byte payloads are streams within streams (Transformer Engine's `_extra_state`): the inner ones are checked too.

    Args:
        trust_checkpoint: skip all checks.
        known: further classes that `common.pt` may hold; unpickling them must run no code.

    Raises:
        UnsafeCheckpointError: a part needs more than tensors and plain data, and `trust_checkpoint` is off.
    """
    if trust_checkpoint:
        return
    directory = Path(directory)
    if (directory / MODELOPT_FOLDER).exists():
        # NeMo passes this folder to ModelOpt, which unpickles it before anything else is read.
        raise UnsafeCheckpointError(f"{directory}: refused, it has a {MODELOPT_FOLDER}/ folder; {_WAY_OUT}.")
    metadata = load_metadata(FileFolder.on_disk(directory))
    common = directory / COMMON_FILE
    if common.exists():
        with torch.serialization.safe_globals(list(known)):
            _load_pickle(common, str(common))
    for index, place in (metadata.storage_data or {}).items():
        if not isinstance(metadata.state_dict_metadata.get(index.fqn), dcp_metadata.BytesStorageMetadata):
            continue
        try:
            with open(directory / plain_file_name(place.relative_path, str(directory)), "rb") as file:
                file.seek(place.offset)
                payload = io.BytesIO(file.read(place.length))
        except OSError as problem:
            raise ValueError(f"{directory}: damaged or incomplete ({problem}); {_AGAIN}.") from problem
        where = f"{directory}: sharded object {index.fqn!r}"
        with torch.serialization.safe_globals([io.BytesIO]):
            _refuse_unsafe_content(_load_pickle(payload, where), where)


def plain_file_name(name: Any, index: str) -> str:
    """`name` if it is a file name without any folder, so that a checkpoint cannot point outside its own directory.

    Args:
        index: name of the file that holds `name`, for the message.
    """
    if not isinstance(name, str) or not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise UnsafeCheckpointError(f"{index}: refused, its index points to {name!r}, not to a file inside it.")
    return name


def _load_pickle(source: Path | io.BytesIO, where: str) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        raise UnsafeCheckpointError(
            f"{where}: refused, it needs unrestricted unpickling ({_reason(problem)}); {_WAY_OUT}."
        ) from None
    except Exception as problem:  # noqa: BLE001  a damaged pickle may raise anything at all
        raise ValueError(f"{where}: damaged ({type(problem).__name__}: {problem}); {_AGAIN}.") from problem


def _reason(problem: Exception) -> str:
    """The part of PyTorch's long message that names the requested class or function."""
    lines = [line.strip() for line in str(problem).splitlines() if "GLOBAL" in line or "Unsupported" in line]
    return lines[0] if lines else "not plain data"


def _refuse_unsafe_content(value: Any, where: str) -> None:
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        for item in value:
            _refuse_unsafe_content(item, where)
    elif isinstance(value, io.BytesIO) and value.getbuffer().nbytes:
        _refuse_unsafe_content(_load_pickle(io.BytesIO(value.getvalue()), where), where)
    elif isinstance(value, bytes | bytearray) and value:
        raise UnsafeCheckpointError(f"{where}: refused, it carries bytes that may be unpickled later; {_WAY_OUT}.")
    elif isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.numel():
        # Transformer Engine 2 keeps a pickle in a byte tensor when fp8 is on; without fp8 the tensor is empty.
        raise UnsafeCheckpointError(f"{where}: refused, it carries bytes that may be unpickled later; {_WAY_OUT}.")
