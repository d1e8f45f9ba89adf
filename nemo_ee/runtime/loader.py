# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Loads an exported directory: config.json, safetensors, tokenizer. Nothing in it is executed.

Projections that are computed together are put into one matrix as they are read, so that no tensor is in memory twice.
Tensors are requested by Megatron's canonical names, those of a layer with its index from 0 (`decoder.layers.0.mlp...`)
and those of an exit under `exits.<name>.`; query, key and value rows come one below the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_ee.exits.criteria import PROBES_FILE
from nemo_ee.exits.probe import ExitProbe, from_file
from nemo_ee.families.architecture import FC1, FC2, PROJ, QKV
from nemo_ee.families.registry import tensors_of
from nemo_ee.families.tensors import (
    ATTENTION_NORM,
    FINAL_NORM,
    K_NORM,
    LAYERS,
    LINEARS,
    MLP_NORM,
    OUTPUT,
    POSITIONS,
    Q_NORM,
    WORDS,
    Canonical,
)  # fmt: skip
from nemo_ee.runtime.exported_model import ExitEntry, ExportedModel, read_exported_model
from nemo_ee.runtime.linear import Linear, make_linear
from nemo_ee.runtime.model import HeadWeights, LayerWeights, MlpWeights, RuntimeModel, Weights
from nemo_ee.runtime.norm import LayerNorm, Norm, make_rms_norm
from nemo_ee.runtime.rotary_frequencies import pairs_together
from nemo_ee.text.json_values import JsonError, read_json_object
from nemo_ee.text.tokenizer_directory import readable_tokenizer
from nemo_ee.text.tokenizer_json import JsonTokenizer

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_HALVES = {torch.bfloat16, torch.float16}
_CPU = torch.device("cpu")


class TensorSource(Protocol):
    """The source of the tensors of an exported model.

    Attributes:
        origin: name of the source in messages.
    """

    origin: object

    def pieces(self, key: str) -> Iterable[tuple[str, Tensor]]:
        """(stored name, rows) of the pieces of a canonical tensor from top to bottom, in their stored dtype.

        Raises:
            ValueError: there is no such tensor.
        """
        ...


def load_model(
    directory: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None
) -> RuntimeModel:
    """Load a model with its exits.

    Args:
        directory: `hf_early_exit/` of an export; a stock directory of one of the families is a model without exits.
        device: device of the model.
        dtype: to compute in, a torch dtype or its name; None = fp32 on the CPU (where weights stored in half precision
            stay so in memory), elsewhere the stored one.

    Raises:
        ValueError: a model that the runtime does not support, or files that are missing, damaged or do not fit
            together.
    """
    directory = Path(directory)
    exported = read_exported_model(directory)
    if isinstance(dtype, str) or dtype is None:
        name = dtype or ("float32" if torch.device(device).type == "cpu" else exported.dtype)
        if name not in DTYPES:
            raise ValueError(f"dtype={name!r} must be one of {', '.join(DTYPES)}")
        dtype = DTYPES[name]
    probes = _probes(directory / PROBES_FILE, exported)
    with _opened(directory, exported) as source:
        return model_of(exported, source, torch.device(device), dtype, probes=probes)


def _probes(file: Path, exported: ExportedModel) -> dict[str, ExitProbe]:
    """The exits' probes, where the directory has some."""
    if not file.is_file():
        return {}
    try:
        return from_file(read_json_object(file), exported.architecture.hidden_size)
    except (JsonError, ValueError) as problem:
        raise ValueError(f"{file}: {problem}; export again") from None


def model_of(
    exported: ExportedModel,
    source: TensorSource,
    device: torch.device = _CPU,
    dtype: torch.dtype = torch.float32,
    *,
    share: bool = False,
    probes: Mapping[str, ExitProbe] = MappingProxyType({}),
) -> RuntimeModel:
    """A model over the tensors of a source.

    Args:
        device: device of the model.
        dtype: to compute in.
        share: use the source's own storage for tensors that need no change; they must outlive the model.
        probes: the exits' probes by name.

    Raises:
        ValueError: a tensor is missing or does not fit the description.
    """
    return RuntimeModel(exported, _Reader(exported, source, device, dtype, share).weights(), dtype, probes)


def load_tokenizer(directory: str | Path) -> Any:
    """The directory's tokenizer (transformers), whichever version of transformers saved it. No code in it is run.

    Raises:
        ValueError: there is none, or transformers is not installed.
    """
    if not any((Path(directory) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(f"{directory}: no tokenizer in it; export from a .nemo that carries one, or use token ids")
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ImportError as missing:
        raise ValueError(
            f"{directory}: transformers is not installed; run pip install 'transformers>=4.51', or use an export: its "
            "tokenizer does not need transformers (nemo_ee.text.tokenizer_json)"
        ) from missing
    with readable_tokenizer(directory) as readable:
        # AutoTokenizer of transformers 5 takes Qwen2's own class beside a Qwen2 model, whatever the file says.
        loader = PreTrainedTokenizerFast if JsonTokenizer.reads(readable) else AutoTokenizer
        tokenizer = loader.from_pretrained(readable, trust_remote_code=False, local_files_only=True)
    tokenizer.name_or_path = str(directory)
    return tokenizer


def stored_tensors(exported: ExportedModel) -> dict[str, Canonical]:
    """Every tensor of a directory by its canonical name; its stored names are those of the directory."""
    table = tensors_of(exported.architecture)
    found = dict(table.others)
    for index in range(exported.architecture.num_layers):
        found |= {f"{LAYERS}{index}.{key}": tensor for key, tensor in table.of_layer(index).items()}
    for exit in exported.exits:
        for key, tensor in table.of_exit(exit.architecture, exit.own_output).items():
            found[f"exits.{exit.name}.{key}"] = tensor.under(f"exit_heads.{exit.name}.")
    return found


class StoredTensors:
    """A `TensorSource` over tensors with the names of a directory.

    Args:
        origin: see `TensorSource`.
        exported: the model.
        tensor: stored name -> the tensor; None = there is none.
        way_out: the way out of a tensor that is missing or does not fit, for messages.
    """

    def __init__(
        self, origin: object, exported: ExportedModel, tensor: Callable[[str], Tensor | None], way_out: str
    ) -> None:
        self.origin, self._table, self._tensor, self._way_out = origin, stored_tensors(exported), tensor, way_out

    def pieces(self, key: str) -> Iterator[tuple[str, Tensor]]:
        """See `TensorSource`. The rows that are used are views of the stored tensors."""
        tensor = self._table.get(key)
        if tensor is None or not tensor.stored:
            raise ValueError(f"{self.origin}: a model of this config has no {key}")
        for stored in tensor.stored:
            part = self._tensor(stored.name)
            if part is None:
                raise ValueError(f"{self.origin}: {stored.name} is missing; {self._way_out}")
            if tuple(part.shape) != stored.shape:
                shapes = f"shape {list(part.shape)}, must be {list(stored.shape)}"
                raise ValueError(f"{self.origin}: {stored.name} has {shapes} by config.json; {self._way_out}")
            start, stop = tensor.rows_of(stored)
            yield stored.name, (part.t() if stored.transposed else part)[start:stop]


@contextmanager
def _opened(directory: Path, exported: ExportedModel) -> Iterator[StoredTensors]:
    """The tensors of a directory's safetensors files."""
    files: dict[str, Any] = {}
    with ExitStack() as stack:
        for path in _weight_files(directory):
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as problem:
                raise ValueError(f"{path}: missing or damaged ({problem}); export again") from problem
            files |= dict.fromkeys(file.keys(), file)

        def tensor(name: str) -> Tensor | None:
            return files[name].get_tensor(name) if name in files else None

        yield StoredTensors(directory, exported, tensor, "export again")


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return [directory / "model.safetensors"]
    try:
        names = sorted(set(read_json_object(index)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"{index}: damaged ({problem!r}); export again") from problem
    if any(Path(str(name)).name != name for name in names):
        raise ValueError(f"{index}: refused, it names files outside of the directory")
    return [directory / name for name in names]


class _Reader:
    """Builds the model's weights."""

    def __init__(
        self, exported: ExportedModel, source: TensorSource, device: torch.device, dtype: torch.dtype, share: bool
    ) -> None:
        self.exported, self.a, self.source = exported, exported.architecture, source
        self.device, self.dtype, self.share = device, dtype, share

    def weights(self) -> Weights:
        a = self.a
        embedding, half = self._stored(WORDS, a.vocab_size, a.hidden_size, keep_half=self.device.type == "cpu")
        positions = self._read(POSITIONS, a.max_position_embeddings, a.hidden_size) if a.learned_positions else None
        if a.tied:
            output = make_linear(embedding.to(self.dtype), None, stored_in_half=half)
        else:
            output = self._output(OUTPUT)
        heads: dict[str | None, HeadWeights] = {None: HeadWeights(None, None, self._norm(FINAL_NORM), output)}
        for exit in self.exported.exits:
            heads[exit.name] = self._head(exit, output)
        return Weights(embedding, positions, tuple(self._layer(f"{LAYERS}{i}.") for i in range(a.num_layers)), heads)

    def _read(self, key: str, *shape: int) -> Tensor:
        """A tensor on the device, in the dtype to compute in."""
        return self._stored(key, *shape)[0]

    def _stored(self, key: str, *shape: int, keep_half: bool = False) -> tuple[Tensor, bool]:
        """A tensor on the device, and whether all of it is stored in one half-precision dtype.

        Args:
            keep_half: leave it in that dtype; otherwise it comes in the one to compute in.
        """
        result, top, kinds, origin = None, 0, set(), self.source.origin
        for name, piece in self.source.pieces(key):
            if result is None:
                dtype = piece.dtype if keep_half and piece.dtype in _HALVES else self.dtype
                if self.share and (piece.shape, piece.dtype, piece.device) == (shape, dtype, self.device):
                    return piece, dtype in _HALVES
                result = torch.empty(shape, dtype=dtype, device=self.device)
            stop = top + piece.shape[0]
            if piece.shape[1:] != result.shape[1:] or stop > shape[0]:
                raise ValueError(f"{origin}: {name} has a shape that does not fit config.json")
            result[top:stop] = piece
            kinds.add(piece.dtype)
            top = stop
        if top != shape[0]:
            raise ValueError(f"{origin}: {name} has too few rows for config.json; export again")
        return result, len(kinds) == 1 and kinds <= _HALVES

    def _head(self, exit: ExitEntry, shared: Linear) -> HeadWeights:
        prefix = f"exits.{exit.name}."
        return HeadWeights(
            layer=self._layer(f"{prefix}layer.") if exit.architecture == "layer" else None,
            mlp=self._mlp(prefix) if exit.architecture == "mlp" else None,
            norm=None if exit.architecture == "embedding" else self._norm(f"{prefix}norm."),
            output=self._output(f"{prefix}output.weight") if exit.own_output else shared,
        )

    def _layer(self, prefix: str) -> LayerWeights:
        a = self.a
        return LayerWeights(
            norm=self._norm(f"{prefix}{ATTENTION_NORM}"),
            qkv=self._linear(prefix, QKV, a.qkv_rows, a.hidden_size),
            heads_norm=self._heads_norm(prefix) if a.qk_norm else None,
            proj=self._linear(prefix, PROJ, a.hidden_size, a.proj_columns),
            mlp=self._mlp(prefix),
        )

    def _mlp(self, prefix: str) -> MlpWeights:
        a = self.a
        return MlpWeights(
            norm=self._norm(f"{prefix}{MLP_NORM}"),
            fc1=self._linear(prefix, FC1, a.fc1_rows, a.hidden_size),
            fc2=self._linear(prefix, FC2, a.hidden_size, a.ffn_hidden_size),
        )

    def _norm(self, key: str) -> Norm:
        a = self.a
        weight = self._read(f"{key}weight", a.hidden_size) if a.norm_affine else None
        if not a.layer_norm:
            return make_rms_norm(weight, a.norm_epsilon)
        return LayerNorm(weight, self._read(f"{key}bias", a.hidden_size) if a.norm_affine else None, a.norm_epsilon)

    def _heads_norm(self, prefix: str) -> Tensor:
        """Weights of the norms of every query and key head, `[H + K, d]`, pairs together as in the heads."""
        a = self.a
        rows = [
            pairs_together(self._read(f"{prefix}{key}", a.kv_channels), a.kv_channels).expand(count, -1)
            for key, count in ((Q_NORM, a.num_attention_heads), (K_NORM, a.num_query_groups))
        ]
        return torch.cat(rows)

    def _output(self, key: str) -> Linear:
        weight, half = self._stored(key, self.a.vocab_size, self.a.hidden_size)
        return make_linear(weight, None, stored_in_half=half)

    def _linear(self, prefix: str, linear: str, height: int, width: int) -> Linear:
        """One of a layer's linears, `width` to `height`."""
        key = f"{prefix}{LINEARS[linear]}"
        weight, half = self._stored(f"{key}weight", height, width)
        bias = self._read(f"{key}bias", height) if linear in self.a.biases else None
        if linear == QKV and not self.a.learned_positions:
            weight, bias = self._turned(weight), None if bias is None else self._turned(bias)
        return make_linear(weight, bias, stored_in_half=half)

    def _turned(self, rows: Tensor) -> Tensor:
        """Rows of query, key and value with the pairs of rotary dimensions of query and key together."""
        a = self.a
        turned = (a.num_attention_heads + a.num_query_groups) * a.kv_channels
        return torch.cat((pairs_together(rows[:turned], a.kv_channels), rows[turned:]))
