# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face directory seen as a Megatron checkpoint: config in NeMo's words, weights under canonical names.

Nothing is converted ahead of time: a chunk of a canonical tensor is put together from the parts of the stored tensors
that it touches. Faults of config and weights are found at opening, all of them in one message.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from nemo_ee.checkpoint.chunk_reader import TensorInfo, present_rows
from nemo_ee.checkpoint.huggingface_backbone import HuggingFaceBackbone
from nemo_ee.checkpoint.huggingface_families import backbone_from_config
from nemo_ee.checkpoint.huggingface_files import TensorFiles, refuse_adapter
from nemo_ee.checkpoint.huggingface_layout import LAYERS, LAYOUTS, Canonical, Stored, canonical_tensors
from nemo_ee.checkpoint.tensor_checks import is_finite, non_finite_message
from nemo_ee.text.json_values import JsonError, read_json_object

__all__ = ["HuggingFaceBackbone", "HuggingFaceSource", "read_backbone"]

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
_SHOWN_FAULTS = 20


def read_backbone(directory: str | Path, sequence_length: int | None = None) -> HuggingFaceBackbone:
    """Reads config.json; needs neither the transformers library nor the weights.

    Args:
        directory: a Hugging Face model directory.
        sequence_length: the length the model is to be used with, default its own maximum. A model whose attention
            window is shorter than its maximum is accepted up to that window.

    Raises:
        ValueError: no or damaged config.json, or a model that is not supported (every reason in one message).
    """
    directory = Path(directory)
    path = directory / CONFIG_FILE
    if not path.is_file():
        refuse_adapter(directory)
        raise ValueError(
            f"{directory}: no {CONFIG_FILE}; give the directory of a Hugging Face model (no name of a hub)."
        )
    try:
        values = read_json_object(path)
    except JsonError as fault:
        raise ValueError(f"{fault}; the file is damaged, fetch it again.") from fault
    try:
        return backbone_from_config(values, sequence_length)
    except ValueError as fault:
        raise ValueError(f"{path}: cannot be used. {fault}.") from None


class HuggingFaceSource:
    """A `WeightSource` over a Hugging Face directory (safetensors or `.bin`).

    Args:
        directory: a Hugging Face model directory.
        sequence_length: see `read_backbone`.

    Raises:
        ValueError: see `read_backbone` and `check`.
    """

    def __init__(self, directory: str | Path, sequence_length: int | None = None) -> None:
        self.directory = Path(directory)
        self.backbone = read_backbone(self.directory, sequence_length)
        try:
            self._files = TensorFiles(self.directory)
        except ValueError as fault:
            raise ValueError(f"{self.directory}: cannot be used. {fault}") from None
        self._canonical = canonical_tensors(self.backbone)
        self._stored_names = self._without_base_prefix()
        self.check()
        self._infos = {key: self._info(key, tensor) for key, tensor in sorted(self._canonical.items())}

    def keys(self) -> dict[str, TensorInfo]:
        """Every canonical tensor. The dtype is the stored one; where a tensor's parts differ, the one that holds them
        all exactly; float32 for float64."""
        return dict(self._infos)

    def read(
        self, key: str, offset: tuple[int, ...], shape: tuple[int, ...], *, allow_missing_rows: bool = False
    ) -> Tensor:
        """See `WeightSource.read`. Only the parts of stored tensors that lie in the chunk are read.

        Raises:
            ValueError: also where one of them is not finite.
        """
        if key not in self._infos:
            raise KeyError(f"{self.directory}: no tensor {key!r}; it has {', '.join(self._infos)}.")
        info = self._infos[key]
        rows = present_rows(f"{self.directory}: {key!r}", info.shape, offset, shape, allow_missing_rows)
        chunk = torch.zeros(shape, dtype=info.dtype)
        inside = chunk if rows is None else chunk[:rows]
        if not inside.numel():
            return chunk
        if key.startswith(LAYERS):
            for index, layer in enumerate(range(offset[0], offset[0] + inside.shape[0])):
                self._fill(inside[index], self._canonical[key], layer, offset[1:])
        else:
            self._fill(inside, self._canonical[key], 0, offset)
        return chunk

    def check(self) -> None:
        """Compares what is stored with what the config says should be.

        Raises:
            ValueError: missing weights, weights that nothing reads (known buffers apart), wrong shapes, quantised
                weights, all in one message.
        """
        expected = self._expected()
        faults = [f"{name} is missing" for name in sorted(expected.keys() - self._stored_names.keys())]
        for name in sorted(expected.keys() & self._stored_names.keys()):
            stored_name = self._stored_names[name]
            shape, dtype = self._files.shape(stored_name), self._files.dtype(stored_name)
            if shape != expected[name]:
                faults.append(f"{stored_name} has shape {list(shape)}, must be {list(expected[name])}")
            if not isinstance(dtype, torch.dtype):
                faults.append(f"{stored_name} has dtype {dtype}, must be a floating one (no quantised weights)")
        layout, tied = LAYOUTS[self.backbone.family], self.backbone.tied
        for name in sorted(self._stored_names.keys() - expected.keys()):
            if not layout.buffers.fullmatch(name) and not (tied and name == layout.output_name):
                faults.append(f"{self._stored_names[name]} is not read by a {self.backbone.family} of this config")
        if faults:
            more = f"; and {len(faults) - _SHOWN_FAULTS} more" if len(faults) > _SHOWN_FAULTS else ""
            raise ValueError(
                f"{self.directory}: config.json and weights do not fit together ({len(faults)} faults). "
                f"{'; '.join(faults[:_SHOWN_FAULTS])}{more}. Fetch or save the model again."
            )

    def _without_base_prefix(self) -> dict[str, str]:
        """Name without the base prefix (`model.`, `transformer.`), which files of bare models lack -> stored name."""
        prefix, names = LAYOUTS[self.backbone.family].base_prefix, {}
        for stored in sorted(self._files.names()):
            name = stored.removeprefix(prefix)
            if name in names:
                raise ValueError(
                    f"{self.directory}: holds both {names[name]!r} and {stored!r}, which is which cannot be told; "
                    "remove one."
                )
            names[name] = stored
        return names

    def _expected(self) -> dict[str, tuple[int, ...]]:
        expected = {}
        for key, tensor in self._canonical.items():
            for stored in {rows.stored for rows in tensor.rows if rows.stored is not None}:
                for layer in range(self.backbone.num_layers if key.startswith(LAYERS) else 1):
                    expected[stored.name.format(layer=layer)] = stored.shape
        return expected

    def _info(self, key: str, tensor: Canonical) -> TensorInfo:
        layered = key.startswith(LAYERS)
        layers = range(self.backbone.num_layers if layered else 1)
        stored = {rows.stored for rows in tensor.rows if rows.stored is not None}
        if not stored:
            # A constant has no dtype of its own; it goes with the weights around it.
            stored = {self._canonical["embedding.word_embeddings.weight"].rows[0].stored}
        dtypes = {self._files.dtype(self._stored_names[s.name.format(layer=i)]) for s in stored for i in layers}
        shape = (self.backbone.num_layers, *tensor.shape) if layered else tensor.shape
        dtype = reduce(torch.promote_types, dtypes)
        return TensorInfo(shape, torch.float32 if dtype is torch.float64 else dtype)

    def _fill(self, target: Tensor, tensor: Canonical, layer: int, offset: tuple[int, ...]) -> None:
        """Fills `target` with the part of one layer's canonical tensor that starts at `offset`."""
        first, last = offset[0], offset[0] + target.shape[0]
        columns = tuple((start, start + size) for start, size in zip(offset[1:], target.shape[1:], strict=True))
        top = 0
        for rows in tensor.rows:
            height = rows.stop - rows.start
            low, high = max(first, top), min(last, top + height)
            if low < high:
                part = target[low - first : high - first]
                if rows.stored is None:
                    part.fill_(rows.fill)
                else:
                    source = (rows.start + low - top, rows.start + high - top)
                    part.copy_(self._read_stored(rows.stored, layer, (source, *columns)))
            top += height

    def _read_stored(self, stored: Stored, layer: int, ranges: tuple[tuple[int, int], ...]) -> Tensor:
        name = self._stored_names[stored.name.format(layer=layer)]
        part = self._files.read(name, ranges[::-1] if stored.transposed else ranges)
        if not is_finite(part):
            raise ValueError(non_finite_message(str(self.directory), self._whole_tensors()))
        return part.t() if stored.transposed else part

    def _whole_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every stored tensor that a model reads, with the file it is in."""
        for name in sorted(map(self._stored_names.get, self._expected())):
            ranges = tuple((0, size) for size in self._files.shape(name))
            yield f"{self._files.file_of(name)}: {name}", self._files.read(name, ranges)
