# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Reads parts of the tensors of a Hugging Face directory: safetensors or `.bin`, one file or several with an index.

`.bin` files are pickles and are opened with `weights_only=True` only. A file outside of the directory, which an
untrusted index could name, is never opened.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_ee.text.json_values import JsonError, read_json_object

_NAMES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def refuse_adapter(directory: Path) -> None:
    """Check that a directory without a model is no PEFT adapter.

    Raises:
        ValueError: it holds a PEFT adapter; the message has the Python code that merges it.
    """
    if not (directory / "adapter_config.json").is_file():
        return
    try:
        base = read_json_object(directory / "adapter_config.json").get("base_model_name_or_path")
    except JsonError:
        base = None
    of_base = f" of {base}" if isinstance(base, str) else ""
    merged = f"AutoPeftModelForCausalLM.from_pretrained({str(directory)!r}).merge_and_unload()"
    raise ValueError(
        f"{directory} is a PEFT adapter{of_base}, not a model; merge it first:\n"
        "  from peft import AutoPeftModelForCausalLM\n"
        f"  {merged}.save_pretrained('merged')\n"
        "and give merged, with the tokenizer's files beside the model"
    )


class TensorFiles:
    """All tensors of a directory by their stored names.

    Args:
        directory: a Hugging Face model directory.

    Raises:
        ValueError: no weights, missing or damaged files, or an index that does not fit them (all problems together).
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        single, index = self._find()
        problems: list[str] = []
        weight_map = None if index is None else _read_index(index)
        self._files: dict[str, _SafetensorsFile | _BinFile] = {}
        for name in [single.name] if weight_map is None else sorted(set(weight_map.values())):
            try:
                self._files[name] = _open(directory / name)
            except ValueError as problem:
                problems.append(str(problem))
        if weight_map is None:
            weight_map = {tensor: name for name, file in self._files.items() for tensor in file.names()}
        else:
            problems += self._check_index(weight_map)
        if problems:
            raise ValueError("; ".join(problems))
        self._file_names = weight_map
        self._place = {tensor: self._files[name] for tensor, name in weight_map.items()}

    def names(self) -> set[str]:
        """The stored names."""
        return set(self._place)

    def file_of(self, name: str) -> str:
        """The name of the file that a tensor is in."""
        return self._file_names[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The stored shape."""
        return self._place[name].shape(name)

    def dtype(self, name: str) -> torch.dtype | str:
        """The stored dtype, or its name if it is not one of the supported floating dtypes."""
        return self._place[name].dtype(name)

    def read(self, name: str, ranges: tuple[tuple[int, int], ...]) -> Tensor:
        """The part [start, stop) of a tensor along every axis.

        Raises:
            ValueError: the file is damaged.
        """
        return self._place[name].read(name, ranges)

    def _find(self) -> tuple[Path, Path | None]:
        for single, index in _NAMES:
            if (self.directory / single).is_file():
                return self.directory / single, None
            if (self.directory / index).is_file():
                return self.directory / single, self.directory / index
        refuse_adapter(self.directory)
        looked_for = ", ".join(name for pair in _NAMES for name in pair)
        raise ValueError(f"{self.directory}: no weights ({looked_for}).")

    def _check_index(self, weight_map: dict[str, str]) -> list[str]:
        problems = []
        for name, file in self._files.items():
            stored, listed = file.names(), {tensor for tensor, place in weight_map.items() if place == name}
            problems += [
                f"{name}: the index places {tensor!r} there, but it is not" for tensor in sorted(listed - stored)
            ]
            # Tensors that the index does not list are not part of the model; transformers does not read them either.
        return problems


class _SafetensorsFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._handle = safe_open(path, framework="pt", device="cpu")
            self._slices = {name: self._handle.get_slice(name) for name in self._handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as problem:
            raise ValueError(f"{path}: missing or damaged ({problem}); fetch it again") from problem

    def names(self) -> set[str]:
        return set(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name].get_shape())

    def dtype(self, name: str) -> torch.dtype | str:
        stored = self._slices[name].get_dtype()
        return _SAFETENSORS_DTYPES.get(stored, stored)

    def read(self, name: str, ranges: tuple[tuple[int, int], ...]) -> Tensor:
        try:
            return self._slices[name][tuple(slice(start, stop) for start, stop in ranges)]
        except (SafetensorError, OSError) as problem:
            raise ValueError(f"{self._path}: cannot read {name!r} ({problem}); fetch it again") from problem


class _BinFile:
    def __init__(self, path: Path) -> None:
        self._tensors = _load_bin(path)

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype | str:
        stored = self._tensors[name].dtype
        return stored if stored in _SAFETENSORS_DTYPES.values() else str(stored)

    def read(self, name: str, ranges: tuple[tuple[int, int], ...]) -> Tensor:
        return self._tensors[name][tuple(slice(start, stop) for start, stop in ranges)]


def _open(path: Path) -> _SafetensorsFile | _BinFile:
    if not path.is_file():
        raise ValueError(f"{path}: missing, though the index names it; fetch it again")
    return _SafetensorsFile(path) if path.suffix == ".safetensors" else _BinFile(path)


def _load_bin(path: Path) -> dict[str, Tensor]:
    try:
        try:
            # The file is memory-mapped, so only the parts that are read take memory.
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files from before PyTorch 1.6 cannot be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        raise ValueError(
            f"{path}: refused or damaged, not a plain file of tensors ({_first_line(problem)}); it is only opened "
            "with weights_only=True, get the safetensors version of the model"
        ) from None
    except Exception as problem:  # noqa: BLE001  a damaged pickle may raise anything at all
        raise ValueError(
            f"{path}: damaged ({type(problem).__name__}: {_first_line(problem)}); fetch it again"
        ) from problem
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(
            f"{path}: does not hold a mapping from names to tensors; get the safetensors version of the model"
        )
    return content


def _first_line(problem: Exception) -> str:
    return (str(problem).splitlines() or [""])[0]


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = read_json_object(path)["weight_map"]
        entries = dict(weight_map)
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"{path}: damaged ({problem!r}); fetch it again") from problem
    for name in set(map(str, entries.values())):
        if Path(name).name != name or name in ("", ".", "..") or "\\" in name:
            raise ValueError(f"{path}: refused, it points to {name!r}, which is not a file name inside the directory")
        if not name.endswith((".safetensors", ".bin")):
            raise ValueError(f"{path}: refused, it points to {name!r}, which is neither .safetensors nor .bin")
    return {str(tensor): str(name) for tensor, name in entries.items()}
