# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""An early-exit `.nemo` opened for export: its config, exits, weights and certificates.

The file is opened once and its weights are read in place (a compressed file is unpacked on the first read). Low-rank
updates are added as weights are read. No model is built and NeMo is not imported; one tensor of one layer is in memory
at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_ee.certificates.exit_probes import stored_probes
from nemo_ee.certificates.validity import identify, valid_certificates
from nemo_ee.checkpoint.chunk_reader import ChunkReader, TensorInfo, WeightSource, dtype_shares, numbers_by_dtype
from nemo_ee.checkpoint.members import EXIT_WEIGHTS, LORA_WEIGHTS, MODEL_WEIGHTS, TOKENIZER_FOLDER
from nemo_ee.checkpoint.nemo_archive import NemoArchive
from nemo_ee.checkpoint.portable import backbone_of, plain_config
from nemo_ee.checkpoint.tensor_checks import is_finite
from nemo_ee.checkpoint.tokenizer_files import is_plain_file, special_token_ids
from nemo_ee.checkpoint.unpacked import readable, unpacked
from nemo_ee.exits.config import EarlyExitConfig, ExitConfig
from nemo_ee.export.tokenizer import write_tokenizer
from nemo_ee.families.tensors import OUTPUT, POSITIONS, WORDS
from nemo_ee.text.huggingface_json import without_code
from nemo_ee.text.json_values import JsonError, read_json_object
from nemo_ee.text.special_tokens import CONFIG, GENERATION_CONFIG, end_of_text, token_of

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class Origin:
    """The source of a written tensor.

    Attributes:
        part: `backbone`; `exit`; or `output`, an exit's output projection with its low-rank update.
        key: canonical name; for an exit `<exit name>.<parameter>`; for an output the exit's name.
        layer: 0-based index in a stacked backbone tensor, None for the others.
    """

    part: str
    key: str
    layer: int | None = None


class EarlyExitSource:
    """Opens a complete or exits-only `.nemo` (or an extracted one); a context manager.

    Args:
        path: path of the file or directory.
        backbone: the base model's `.nemo` for an exits-only file; None = the one that its config names.
        option: the setting for it, for messages.

    Raises:
        ValueError: the file is damaged, unsafe, not a GPT or without a backbone, or the backbone is not the one that
            the exits were tuned on.
    """

    def __init__(self, path: str | Path, backbone: str | Path | None = None, *, option: str = "backbone") -> None:
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
                self._base = self._stack.enter_context(NemoArchive(backbone_of(self.path, backbone, option)))
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> EarlyExitSource:
        return self

    def __exit__(self, *problem: object) -> None:
        self._stack.close()

    @cached_property
    def _own(self) -> NemoArchive:
        """The file as an archive whose weights are read in place."""
        return self._stack.enter_context(readable(self._archive))

    @cached_property
    def backbone(self) -> WeightSource:
        """The backbone's weights."""
        base = self._own if self._base is self._archive else self._stack.enter_context(readable(self._base))
        weights = ChunkReader(base.folder(MODEL_WEIGHTS))
        if not self._archive.has(LORA_WEIGHTS):
            return weights
        from nemo_ee.checkpoint.low_rank_weights import MergedSource  # imports Megatron-core

        return MergedSource(weights, ChunkReader(self._own.folder(LORA_WEIGHTS), prefix=""))

    @cached_property
    def exit_weights(self) -> ChunkReader | None:
        """The exits' weights; None in a file without exits."""
        if not self._archive.has(EXIT_WEIGHTS):
            return None
        return ChunkReader(self._own.folder(EXIT_WEIGHTS), "exits.")

    @cached_property
    def tokenizer(self) -> Path | None:
        """Folder of the bundled tokenizer, if there is one."""
        if not self._archive.has(TOKENIZER_FOLDER):
            return None
        return self._stack.enter_context(unpacked(self._own, [TOKENIZER_FOLDER])) / TOKENIZER_FOLDER

    @cached_property
    def _backbone_infos(self) -> dict[str, TensorInfo]:
        return self.backbone.keys()

    @cached_property
    def _exit_infos(self) -> dict[str, TensorInfo]:
        return self.exit_weights.keys() if self.exit_weights else {}

    @cached_property
    def certificates(self) -> list[dict[str, Any]]:
        """Certificates for these weights, as plain values. They hold only if keys and values of skipped layers are
        computed as in `kv: carry`. Read them before anything is written, since they may be damaged."""
        return [certificate.to_mapping() for certificate in valid_certificates(self.path)]

    @cached_property
    def probes(self) -> dict[str, Any] | None:
        """The content of the file of the exits' probes; None = there are none for these weights. Damaged and void ones
        cause a warning."""
        try:
            stored = stored_probes(self.path)
        except ValueError as damage:
            logger.warning("the probes are left out: %s", damage)
            return None
        problem = None if stored is None else stored.problem(identify(self.path))
        if problem is not None:
            logger.warning("%s: the probes are left out: %s", self.path, problem)
        return None if stored is None or problem is not None else stored.values

    def generation_config(self, vocab_size: int) -> dict[str, Any]:
        """The values of generation_config.json for every exported directory: the original model's, else what
        transformers makes of its config.json, else the tokenizer's special tokens. `eos_token_id` are the end-of-text
        tokens of this `.nemo`, from any of its files.

        Args:
            vocab_size: vocabulary size; ids outside of it are left out.
        """
        tokens = special_token_ids(self.tokenizer)
        generation, config = (self.bundled(name) for name in (GENERATION_CONFIG, CONFIG))
        config = tokens if config is None else config
        end = end_of_text(generation, config, tokens["eos_token_id"], vocab_size=vocab_size, origin=self.path)
        if generation is None:
            generation = {name: token_of(config, name) for name in tokens}
            outside = [name for name, token in generation.items() if isinstance(token, int) and token >= vocab_size]
            generation |= dict.fromkeys(outside)
        named = generation.get("eos_token_id")
        if end.ids and end.ids != (tuple(named) if isinstance(named, list) else (named,)):
            generation["eos_token_id"] = end.ids[0] if len(end.ids) == 1 else list(end.ids)
        return generation

    def bundled(self, name: str) -> dict[str, Any] | None:
        """The values of a file of the original model, without keys that run code; None if there is no usable one."""
        path = None if self.tokenizer is None else self.tokenizer / name
        if path is None or not is_plain_file(path):
            return None
        try:
            return without_code(read_json_object(path))
        except JsonError as error:
            logger.warning("%s: tokenizer/%s is left out: %s", self.path, name, error)
            return None

    def backbone_names(self) -> set[str]:
        """Canonical names of the backbone's tensors."""
        return {key for key in self._backbone_infos if "_extra_state" not in key and not key.startswith("exits.")}

    def position_rows(self) -> int | None:
        """Number of stored rows of learned positions; None without."""
        return self._backbone_infos[POSITIONS].shape[0] if POSITIONS in self._backbone_infos else None

    def vocabulary_rows(self) -> int:
        """Number of stored rows of the word embeddings, padding included."""
        return self._backbone_infos[WORDS].shape[0] if WORDS in self._backbone_infos else 0

    def shape(self, origin: Origin) -> tuple[int, ...] | None:
        """The stored shape of a tensor, without the layer axis; None if the file has no such tensor."""
        info = self._info(origin)
        if info is None:
            return None
        if origin.layer is None:
            return info.shape
        return info.shape[1:] if origin.layer < info.shape[0] else None

    def dtype(self) -> torch.dtype:
        """The most frequent stored dtype of the backbone, which is the default dtype of an export."""
        names = self.backbone_names()
        infos = {name: info for name, info in self._backbone_infos.items() if name in names}
        dtype = next(iter(numbers_by_dtype(infos)))
        dtype = torch.float32 if dtype is torch.float64 else dtype
        if len({info.dtype for info in infos.values()}) > 1:
            logger.warning(
                "%s: the backbone is stored as %s; all of it is written as %s, which dtype=... changes",
                self._base.path, dtype_shares(infos), str(dtype).removeprefix("torch."),
            )  # fmt: skip
        return dtype

    def read(self, origin: Origin, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A whole tensor (of one layer) in `dtype`, low-rank updates added in fp32.

        Args:
            shape: the wanted shape. A vocabulary matrix may lose padding rows; missing rows are read as zeros.

        Raises:
            ValueError: the tensor is damaged, not finite, or beyond the range of `dtype`.
        """
        tensor = self._read(origin, shape, dtype)
        if dtype is not torch.float32 and not is_finite(tensor):
            wider = "bfloat16 or float32" if dtype is torch.float16 else "float32"
            name = str(dtype).removeprefix("torch.")
            raise ValueError(f"{origin.key} has values beyond {name}; use dtype={wider}")
        return tensor

    def _read(self, origin: Origin, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
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
        """Canonical name of the backbone's output matrix: the output projection or the word embeddings."""
        return OUTPUT if OUTPUT in self._backbone_infos else WORDS

    def exit_row(self, exit: ExitConfig) -> dict[str, Any]:
        """The common keys of an exit in every table of exits."""
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


def copy_tokenizer(source: EarlyExitSource, to: Path) -> bool:
    """Writes the tokenizer, if the `.nemo` has one; see `write_tokenizer`.

    Args:
        to: a directory, made if absent.
    """
    if source.tokenizer is None:
        logger.info("%s: the .nemo has no tokenizer/ folder, so no tokenizer is written", to.name)
        return False
    to.mkdir(exist_ok=True)
    return write_tokenizer(source.tokenizer, to)


def _converted(tensor: Tensor, dtype: torch.dtype, update: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The tensor (plus B A) in `dtype`; converted in blocks of rows, without an fp32 copy of the whole tensor."""
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
