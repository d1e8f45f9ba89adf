# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face directory as a Megatron checkpoint: config with NeMo's keys, weights under canonical names.

Nothing is converted in advance: a chunk of a canonical tensor is assembled from the parts of the stored tensors that
it covers. All problems of config and weights are reported on opening, in one message.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_ee.checkpoint.chunk_reader import TensorInfo, present_rows
from nemo_ee.checkpoint.huggingface_files import TensorFiles, refuse_adapter
from nemo_ee.checkpoint.tensor_checks import is_finite, non_finite_message
from nemo_ee.families.architecture import Architecture
from nemo_ee.families.registry import FAMILIES, read_config
from nemo_ee.families.tensors import LAYERS, WORDS, Canonical, Names, Stored, tensor_table
from nemo_ee.text.json_values import JsonError, read_json_object
from nemo_ee.text.special_tokens import GENERATION_CONFIG
from nemo_ee.text.tokenizer_directory import TOKENIZER_FILES

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
_MODEL_FILES = (*TOKENIZER_FILES, GENERATION_CONFIG, CONFIG_FILE)
_SHOWN = 20


def read_backbone(directory: str | Path, sequence_length: int | None = None) -> Architecture:
    """Reads config.json; needs neither the transformers library nor the weights.

    Args:
        directory: a Hugging Face model directory.
        sequence_length: the length for which the model will be used, its own maximum by default. A model whose
            attention window is shorter than its maximum is accepted up to that window.

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
    except JsonError as problem:
        raise ValueError(f"{problem}; the file is damaged, fetch it again.") from problem
    code = values.get("auto_map")
    own_code = isinstance(code, dict) and any("Model" in name for name in code)
    refused = (
        "auto_map: the model brings its own code, which is never run; remove it if the stock class computes the same"
    )
    try:
        return read_config(values, sequence_length, problems=[refused] if own_code else [])
    except ValueError as problem:
        raise ValueError(f"{path}: cannot be used. {problem}.") from None


class HuggingFaceSource:
    """A `WeightSource` over a Hugging Face directory (safetensors or `.bin`).

    Attributes:
        described_by: what describes the weights, for messages.
        backbone: the model.

    Args:
        directory: a Hugging Face model directory.
        sequence_length: see `read_backbone`.

    Raises:
        ValueError: see `read_backbone` and `check`.
    """

    described_by = CONFIG_FILE

    def __init__(self, directory: str | Path, sequence_length: int | None = None) -> None:
        self.directory = Path(directory)
        self.backbone, self._files, self._names = self._opened(sequence_length)
        table = tensor_table(self._names, self.backbone)
        # Canonical name -> the tensor; for a layer's tensor one entry per layer.
        self._places = {key: [tensor] for key, tensor in table.others.items()}
        for index in range(self.backbone.num_layers):
            for key, tensor in table.of_layer(index).items():
                self._places.setdefault(f"{LAYERS}{key}", []).append(tensor)
        self._stored_names = self._without_base_prefix()
        self.check()
        self._infos = {key: self._info(key) for key in sorted(self._places)}

    def _opened(self, sequence_length: int | None) -> tuple[Architecture, Any, Names]:
        """The model, its stored tensors (see `TensorFiles`) and their names."""
        backbone = read_backbone(self.directory, sequence_length)
        try:
            return backbone, TensorFiles(self.directory), FAMILIES[backbone.family].names
        except ValueError as problem:
            raise ValueError(f"{self.directory}: cannot be used. {problem}") from None

    def keys(self) -> dict[str, TensorInfo]:
        """Every canonical tensor. The dtype is the stored one. If a tensor's parts differ in dtype, it is the one that
        holds all of them exactly; float64 becomes float32."""
        return dict(self._infos)

    def read(
        self, key: str, offset: tuple[int, ...], shape: tuple[int, ...], *, allow_missing_rows: bool = False
    ) -> Tensor:
        """See `WeightSource.read`. Only the parts of stored tensors inside the chunk are read.

        Raises:
            ValueError: also if one of them is not finite.
        """
        if key not in self._infos:
            raise KeyError(f"{self.directory}: no tensor {key!r}; it has {', '.join(self._infos)}.")
        info = self._infos[key]
        rows = present_rows(f"{self.directory}: {key!r}", info.shape, offset, shape, allow_missing_rows)
        chunk = torch.zeros(shape, dtype=info.dtype)
        inside = chunk if rows is None else chunk[:rows]
        if not inside.numel():
            return chunk
        places = self._places[key]
        if key.startswith(LAYERS):
            for index, layer in enumerate(range(offset[0], offset[0] + inside.shape[0])):
                self._fill(inside[index], places[layer], offset[1:])
        else:
            self._fill(inside, places[0], offset)
        return chunk

    def write_model_files(self, directory: Path) -> None:
        """Write what the model has besides its weights: config.json, generation_config.json and the tokenizer.

        Args:
            directory: an existing directory.
        """
        for path in map(self.directory.joinpath, _MODEL_FILES):
            if path.is_file():
                shutil.copyfile(path, directory / path.name)

    def check(self) -> None:
        """Compares the stored tensors with those of the config.

        Raises:
            ValueError: missing weights, unread weights (except known buffers), wrong shapes, quantised weights; all in
                one message.
        """
        expected = self._expected()
        problems = [f"{name} is missing" for name in sorted(expected.keys() - self._stored_names.keys())]
        for name in sorted(expected.keys() & self._stored_names.keys()):
            stored_name = self._stored_names[name]
            shape, dtype = self._files.shape(stored_name), self._files.dtype(stored_name)
            if shape != expected[name]:
                problems.append(f"{stored_name} has shape {list(shape)}, must be {list(expected[name])}")
            if not isinstance(dtype, torch.dtype):
                problems.append(f"{stored_name} has dtype {dtype}, must be a floating one (no quantised weights)")
        names, tied = self._names, self.backbone.tied
        for name in sorted(self._stored_names.keys() - expected.keys()):
            if not names.is_buffer(name) and not (tied and name == names.output):
                problems.append(f"{self._stored_names[name]} is not read by a {self.backbone.family} of this config")
        if problems:
            more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise ValueError(
                f"{self.directory}: {self.described_by} and weights do not fit together ({len(problems)} problems). "
                f"{'; '.join(problems[:_SHOWN])}{more}. Fetch or save the model again."
            )

    def _without_base_prefix(self) -> dict[str, str]:
        """Name without the base prefix (`model.`, `transformer.`), which files of bare models lack -> stored name."""
        names: dict[str, str] = {}
        for stored in sorted(self._files.names()):
            name = stored.removeprefix(self._names.base)
            if name in names:
                raise ValueError(
                    f"{self.directory}: holds both {names[name]!r} and {stored!r}, and their names differ "
                    "in the prefix only; remove one."
                )
            names[name] = stored
        return names

    def _expected(self) -> dict[str, tuple[int, ...]]:
        tensors = (tensor for places in self._places.values() for tensor in places)
        return {self._bare(stored): stored.shape for tensor in tensors for stored in tensor.stored}

    def _bare(self, stored: Stored) -> str:
        """A stored tensor's name without the base prefix."""
        return stored.name.removeprefix(self._names.base)

    def _info(self, key: str) -> TensorInfo:
        places = self._places[key]
        stored = [own for tensor in places for own in tensor.stored]
        # A constant has no stored dtype; it takes that of the weights around it.
        stored = stored or self._places[WORDS][0].stored
        dtypes = {self._files.dtype(self._stored_names[self._bare(own)]) for own in stored}
        layers = (len(places),) if key.startswith(LAYERS) else ()
        dtype = reduce(torch.promote_types, dtypes)
        return TensorInfo((*layers, *places[0].shape), torch.float32 if dtype is torch.float64 else dtype)

    def _fill(self, target: Tensor, tensor: Canonical, offset: tuple[int, ...]) -> None:
        """Fills `target` with the part of a canonical tensor that starts at `offset`."""
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
                    part.copy_(self._read_stored(rows.stored, (source, *columns)))
            top += height

    def _read_stored(self, stored: Stored, ranges: tuple[tuple[int, int], ...]) -> Tensor:
        name, (first, last) = self._stored_names[self._bare(stored)], ranges[0]
        if stored.pairs:  # whole heads
            ranges = ((first - first % stored.pairs, last + -last % stored.pairs), *ranges[1:])
        part = self._files.read(name, ranges[::-1] if stored.transposed else ranges)
        if not is_finite(part):
            raise ValueError(non_finite_message(str(self.directory), self._whole_tensors()))
        if stored.pairs:
            by_head = part.unflatten(0, (-1, stored.pairs // 2, 2))
            return by_head.transpose(1, 2).flatten(0, 2)[first - ranges[0][0] : last - ranges[0][0]]
        return part.t() if stored.transposed else part

    def _whole_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every stored tensor that a model reads, with the file it is in."""
        for name in sorted(map(self._stored_names.get, self._expected())):
            ranges = tuple((0, size) for size in self._files.shape(name))
            yield f"{self._files.file_of(name)}: {name}", self._files.read(name, ranges)
