# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""An early-exit `.nemo` opened for export: its config, exits, weights and certificates.

The file is opened once and unpacked when the first weight is read; low-rank updates are folded in as weights are read.
Nothing is built and NeMo is not imported; one tensor of one layer is in memory at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import yaml
from torch import Tensor

from nemo_ee.checkpoint.chunk_reader import ChunkReader, TensorInfo, WeightSource
from nemo_ee.checkpoint.nemo_archive import CONFIG_MEMBER, EXIT_WEIGHTS, MODEL_WEIGHTS, NemoArchive, unpacked
from nemo_ee.checkpoint.portable import find_backbone
from nemo_ee.exits.config import EarlyExitConfig, ExitConfig
from nemo_ee.export.tokenizer import write_tokenizer
from nemo_ee.families.tensors import OUTPUT, POSITIONS, WORDS

logger = logging.getLogger(__name__)

LORA_WEIGHTS = "lora_weights"
TOKENIZER = "tokenizer"
_BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class Origin:
    """Where a tensor comes from.

    Attributes:
        part: `backbone`; `exit`; or `output`, an exit's output projection with its low-rank update.
        key: canonical name; of an exit `<exit name>.<parameter>`; of an output the exit's name.
        layer: 0-based index in a stacked backbone tensor, None for the others.
    """

    part: str
    key: str
    layer: int | None = None


class EarlyExitSource:
    """Opens a complete or exits-only `.nemo` (or an extracted one); a context manager.

    Args:
        path: the file or directory.
        backbone: the base model's `.nemo` for an exits-only file; None takes the one its config names.

    Raises:
        ValueError: damaged, unsafe, no GPT, without a backbone, or a backbone other than the one tuned on.
    """

    def __init__(self, path: str | Path, backbone: str | Path | None = None) -> None:
        self.path = Path(path)
        self._stack = ExitStack()
        try:
            self._archive = self._base = self._stack.enter_context(NemoArchive(self.path))
            self.config = plain_config(self._archive)
            block = self.config.get("early_exit")
            self.exits = EarlyExitConfig.from_mapping(block, num_layers=self.config["num_layers"])
            self.fingerprint: str | None = self.config.get("backbone_fingerprint")
            if self.exits.exits and not self._archive.has(EXIT_WEIGHTS):
                raise ValueError(f"{self.path}: its config names exits, but there is no {EXIT_WEIGHTS}/ in it")
            if not self._archive.has(MODEL_WEIGHTS):
                self._base = self._stack.enter_context(self._base_of_exits(backbone))
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> EarlyExitSource:
        return self

    def __exit__(self, kind: type | None, fault: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def _base_of_exits(self, given: str | Path | None) -> NemoArchive:
        path = find_backbone(self.path, stored=self.config.get("backbone_path"), given=given, option="backbone")
        base = NemoArchive(path)
        found = plain_config(base).get("backbone_fingerprint")
        if None not in (found, self.fingerprint) and found != self.fingerprint:
            base.close()
            raise ValueError(
                f"the exits were tuned on the backbone with fingerprint {self.fingerprint}, but {path} has {found}; "
                "give the base model they were tuned on (backbone=...)"
            )
        return base

    def _folder(self, name: str) -> Path | None:
        return self._own / name if self._archive.has(name) else None

    @cached_property
    def _own(self) -> Path:
        """The file unpacked."""
        names = [MODEL_WEIGHTS, EXIT_WEIGHTS, LORA_WEIGHTS, TOKENIZER]
        return self._stack.enter_context(unpacked(self._archive, [name for name in names if self._archive.has(name)]))

    @cached_property
    def backbone(self) -> WeightSource:
        """The backbone's weights."""
        base = (
            self._own
            if self._base is self._archive
            else self._stack.enter_context(unpacked(self._base, [MODEL_WEIGHTS]))
        )
        weights, updates = ChunkReader(base / MODEL_WEIGHTS), self._folder(LORA_WEIGHTS)
        if updates is None:
            return weights
        from nemo_ee.checkpoint.low_rank_weights import MergedSource  # imports Megatron-core

        return MergedSource(weights, ChunkReader(updates, prefix=""))

    @cached_property
    def exit_weights(self) -> ChunkReader | None:
        """The exits' weights; None in a file without exits."""
        folder = self._folder(EXIT_WEIGHTS)
        return None if folder is None else ChunkReader(folder, "exits.")

    @property
    def tokenizer(self) -> Path | None:
        """The folder of the bundled tokenizer, if there is one."""
        return self._folder(TOKENIZER)

    @cached_property
    def _backbone_infos(self) -> dict[str, TensorInfo]:
        return self.backbone.keys()

    @cached_property
    def _exit_infos(self) -> dict[str, TensorInfo]:
        return self.exit_weights.keys() if self.exit_weights else {}

    @cached_property
    def certificates(self) -> list[dict[str, Any]]:
        """Certificates that are about these weights, as plain values; they promise nothing where keys and values of
        skipped layers are not `kv: carry`'s. Read them before anything is written, since they may be damaged."""
        from nemo_ee.evaluation.certified import valid_certificates  # imports omegaconf

        return [certificate.to_mapping() for certificate in valid_certificates(self.path)]

    def backbone_names(self) -> set[str]:
        """Canonical names of the backbone's tensors."""
        return {key for key in self._backbone_infos if "_extra_state" not in key and not key.startswith("exits.")}

    def position_rows(self) -> int | None:
        """Stored rows of learned positions; None without."""
        return self._backbone_infos[POSITIONS].shape[0] if POSITIONS in self._backbone_infos else None

    def vocabulary_rows(self) -> int:
        """Stored rows of the word embeddings, padding included."""
        return self._backbone_infos[WORDS].shape[0] if WORDS in self._backbone_infos else 0

    def shape(self, origin: Origin) -> tuple[int, ...] | None:
        """The stored shape of a tensor, without the layer axis; None where the file has no such tensor."""
        info = self._info(origin)
        if info is None:
            return None
        if origin.layer is None:
            return info.shape
        return info.shape[1:] if origin.layer < info.shape[0] else None

    def dtype(self) -> torch.dtype:
        """The dtype the backbone is stored in."""
        return self._backbone_infos[WORDS].dtype

    def read(self, origin: Origin, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A whole tensor (of one layer) in `dtype`, low-rank updates added in fp32.

        Args:
            shape: the wanted shape; a vocabulary matrix may be cut (its padding) and missing rows read as zeros.
        """
        start = (0,) * len(shape)
        if origin.part == "backbone":
            if origin.layer is None:
                tensor = self.backbone.read(origin.key, start, shape, allow_missing_rows=True)
            else:
                tensor = self.backbone.read(origin.key, (origin.layer, *start), (1, *shape))[0]
            return _converted(tensor, dtype)
        if origin.part == "exit":
            tensor = self.exit_weights.read(origin.key, start, shape)
            return _converted(tensor, dtype, self._update(origin.key.removesuffix("weight"), shape[0]))
        own = f"{origin.key}.output.weight"
        source, key = (self.exit_weights, own) if own in self._exit_infos else (self.backbone, self.output_key())
        tensor = source.read(key, start, shape, allow_missing_rows=True)
        return _converted(tensor, dtype, self._update(f"{origin.key}.output_update.", shape[0]))

    def output_key(self) -> str:
        """Canonical name of the backbone's output matrix: its own or the word embeddings."""
        return OUTPUT if OUTPUT in self._backbone_infos else WORDS

    def exit_row(self, exit: ExitConfig) -> dict[str, Any]:
        """What every table of exits says of one."""
        return {
            "name": exit.name,
            "layer": exit.layer,
            "architecture": exit.architecture,
            "output": "own" if self.has_own_output(exit.name) else "backbone",
            "tensors": f"exit_heads.{exit.name}.",
        }

    def has_own_output(self, name: str) -> bool:
        """Whether an exit's output projection is another matrix than the backbone's."""
        return f"{name}.output.weight" in self._exit_infos or f"{name}.output_update.low_rank_a" in self._exit_infos

    def _info(self, origin: Origin) -> TensorInfo | None:
        if origin.part == "backbone":
            return self._backbone_infos.get(origin.key)
        if origin.part == "exit":
            return self._exit_infos.get(origin.key)
        own = self._exit_infos.get(f"{origin.key}.output.weight")
        return own or self._backbone_infos.get(self.output_key())

    def _update(self, stem: str, rows: int) -> tuple[Tensor, Tensor] | None:
        a, b = self._exit_infos.get(f"{stem}low_rank_a"), self._exit_infos.get(f"{stem}low_rank_b")
        if a is None or b is None:
            return None
        wide = self.exit_weights.read(f"{stem}low_rank_a", (0, 0), a.shape)
        tall = self.exit_weights.read(f"{stem}low_rank_b", (0, 0), (rows, b.shape[1]), allow_missing_rows=True)
        return tall, wide


def plain_config(archive: NemoArchive) -> dict[str, Any]:
    """The model config of a GPT's `.nemo` as plain values.

    Raises:
        ValueError: it is damaged, or not a GPT's.
    """
    try:
        config = yaml.safe_load(archive.config_text())
    except yaml.YAMLError as fault:
        raise ValueError(
            f"{archive.path}: {CONFIG_MEMBER} is damaged ({fault}); fetch or save the file again"
        ) from fault
    layers = config.get("num_layers") if isinstance(config, dict) else None
    if not isinstance(layers, int) or layers < 1:
        raise ValueError(
            f"{archive.path}: {CONFIG_MEMBER} has no num_layers, so this is not a GPT; give the .nemo of one"
        )
    return config


def copy_tokenizer(source: EarlyExitSource, to: Path) -> bool:
    """Writes the tokenizer, if the `.nemo` carries one; see `write_tokenizer`.

    Args:
        to: a directory, made if need be.
    """
    if source.tokenizer is None:
        logger.info("%s: the .nemo has no tokenizer/ folder, so no tokenizer is written", to.name)
        return False
    to.mkdir(exist_ok=True)
    return write_tokenizer(source.tokenizer, to)


def _converted(tensor: Tensor, dtype: torch.dtype, update: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The tensor (plus B A) in `dtype`; converted in blocks of rows, so that no fp32 copy of all of it exists."""
    if update is None and tensor.dtype is dtype:
        return tensor
    result = torch.empty(tensor.shape, dtype=dtype)
    wide = None if update is None else update[1].float()
    for start, stop in row_blocks(tensor.shape):
        rows = tensor[start:stop].float()
        if update is not None:
            rows.addmm_(update[0][start:stop].float(), wide)
        result[start:stop] = rows
    return result


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive blocks of rows of about 32 MiB in fp32."""
    width = 1
    for size in shape[1:]:
        width *= size
    rows = max(_BLOCK_BYTES // max(4 * width, 1), 1)
    for start in range(0, shape[0], rows):
        yield start, min(start + rows, shape[0])
