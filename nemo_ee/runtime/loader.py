# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Loads an exported directory: config.json, safetensors, tokenizer. Nothing in it is executed.

Projections that are computed together are put into one matrix as they are read, so that no tensor is in memory twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_ee.runtime.config import ExitEntry, RuntimeConfig, read_config
from nemo_ee.runtime.linear import Linear, make_linear
from nemo_ee.runtime.model import HeadWeights, LayerWeights, MlpWeights, RuntimeModel, Weights
from nemo_ee.runtime.names import NAMES
from nemo_ee.runtime.norm import LayerNorm, Norm, make_rms_norm
from nemo_ee.runtime.rotary import pairs_together
from nemo_ee.text.json_values import read_json_object
from nemo_ee.text.tokenizer_directory import readable_tokenizer

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_model(
    directory: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None
) -> RuntimeModel:
    """Load a model with its exits.

    Args:
        directory: `hf_early_exit/` of an export; a stock directory of one of the families is a model without exits.
        device: where it runs.
        dtype: to compute in, a torch dtype or its name; None = fp32 on the CPU (where weights stored in half precision
            stay so in memory), elsewhere the stored one.

    Raises:
        ValueError: a model that is not run here, or files that are missing, damaged or do not fit together.
    """
    directory = Path(directory)
    config = read_config(directory)
    if isinstance(dtype, str) or dtype is None:
        name = dtype or ("float32" if torch.device(device).type == "cpu" else config.dtype)
        if name not in DTYPES:
            raise ValueError(f"dtype={name!r} must be one of {', '.join(DTYPES)}")
        dtype = DTYPES[name]
    with _Tensors(directory, torch.device(device), dtype) as tensors:
        weights = _Reader(config, tensors).weights()
    return RuntimeModel(config, weights, dtype)


def model_of_files(config: RuntimeConfig, files: Mapping[str, Any], origin: Path) -> RuntimeModel:
    """A model in fp32 on the CPU, from tensors that are named as in a directory of the config's family.

    Args:
        files: name -> an open safetensors file that holds it, or anything else with its `get_tensor` and `get_slice`.
        origin: what messages name.

    Raises:
        ValueError: a tensor is missing or does not fit the config.
    """
    tensors = _Tensors(origin, torch.device("cpu"), torch.float32, files)
    return RuntimeModel(config, _Reader(config, tensors).weights(), torch.float32)


def load_tokenizer(directory: str | Path) -> Any:
    """The directory's tokenizer (transformers), whichever version of transformers saved it. No code in it is run.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    if not any((Path(directory) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(f"{directory}: no tokenizer in it; export from a .nemo that carries one, or use token ids")
    with readable_tokenizer(directory) as readable:
        tokenizer = AutoTokenizer.from_pretrained(readable, trust_remote_code=False, local_files_only=True)
    tokenizer.name_or_path = str(directory)
    return tokenizer


class _Tensors:
    """The stored tensors by name; a context manager that opens the directory's files, where `files` does not say which
    open one has what."""

    def __init__(
        self, directory: Path, device: torch.device, dtype: torch.dtype, files: Mapping[str, Any] | None = None
    ) -> None:
        self.directory, self.device, self.dtype = directory, device, dtype
        self._stack = ExitStack()
        self._files: dict[str, Any] = dict(files or {})

    def __enter__(self) -> _Tensors:
        try:
            for path in self._paths():
                try:
                    file = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
                except (SafetensorError, OSError) as fault:
                    raise ValueError(f"{path}: missing or damaged ({fault}); export again") from fault
                self._files |= dict.fromkeys(file.keys(), file)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *fault: object) -> None:
        self._stack.close()

    def _paths(self) -> list[Path]:
        index = self.directory / "model.safetensors.index.json"
        if not index.is_file():
            return [self.directory / "model.safetensors"]
        try:
            names = sorted(set(read_json_object(index)["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as fault:
            raise ValueError(f"{index}: damaged ({fault!r}); export again") from fault
        if any(Path(str(name)).name != name for name in names):
            raise ValueError(f"{index}: refused, it names files outside of the directory")
        return [self.directory / name for name in names]

    def half(self, names: Sequence[str]) -> torch.dtype | None:
        """The half-precision dtype these are stored in; None where they are not, or not in the same one."""
        kinds = {self._files[name].get_slice(name).get_dtype() if name in self._files else None for name in names}
        return {"BF16": torch.bfloat16, "F16": torch.float16}.get(kinds.pop()) if len(kinds) == 1 else None

    def read(self, name: str, *shape: int) -> Tensor:
        """One tensor, converted and on the device.

        Raises:
            ValueError: missing, or of another shape.
        """
        return self.below([name], *shape)

    def below(
        self,
        names: Sequence[str],
        height: int,
        width: int | None = None,
        *,
        turned: Mapping[str, int] = MappingProxyType({}),
        transposed: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Tensors one below the other as one.

        Args:
            height, width: of the result; a vector has no width.
            turned: name -> head size, for rows whose rotary pairs are put together.
            transposed: each is stored as its transpose.
            dtype: of the result; None = the one to compute in.
        """
        shape, top = (height,) if width is None else (height, width), 0
        result = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        for name in names:
            if name not in self._files:
                raise ValueError(f"{self.directory}: {name} is missing; export again")
            part = self._files[name].get_tensor(name)
            part = part.t() if transposed else part
            stop = top + part.shape[0]
            if part.shape[1:] != result.shape[1:] or stop > height or (len(names) == 1 and stop != height):
                shape = list(part.t().shape if transposed else part.shape)
                raise ValueError(f"{self.directory}: {name} has shape {shape}, which does not fit config.json")
            result[top:stop] = pairs_together(part, turned[name]) if name in turned else part
            top = stop
        if top != height:
            raise ValueError(f"{self.directory}: {name} has too few rows for config.json; export again")
        return result


class _Reader:
    """Puts the weights together, by the names of the config's family."""

    def __init__(self, config: RuntimeConfig, tensors: _Tensors) -> None:
        self.config, self.tensors, self.names = config, tensors, NAMES[config.family]

    def weights(self) -> Weights:
        config, names, read = self.config, self.names, self.tensors.read
        embedding, half = self._embedding()
        positions = None
        if names.positions is not None:
            positions = read(names.positions, config.max_positions + config.position_offset, config.hidden_size)
        if config.tied:
            output = make_linear(embedding.to(self.tensors.dtype), None, stored_in_half=half)
        else:
            output = self._output("lm_head")
        heads: dict[str | None, HeadWeights] = {None: HeadWeights(None, None, self._norm(names.final_norm), output)}
        for exit in config.exits:
            heads[exit.name] = self._head(exit, output)
        layers = tuple(self._layer(names.layer.format(index)) for index in range(config.num_layers))
        return Weights(embedding, positions, layers, heads)

    def _embedding(self) -> tuple[Tensor, bool]:
        """The word embeddings, and whether they are half-precision numbers, which stay so on the CPU."""
        name, half = self.names.embedding, self.tensors.half([self.names.embedding])
        dtype = half if self.tensors.device.type == "cpu" else None
        matrix = (self.config.vocab_size, self.config.hidden_size)
        return self.tensors.below([name], *matrix, dtype=dtype), half is not None

    def _head(self, exit: ExitEntry, shared: Linear) -> HeadWeights:
        prefix = f"exit_heads.{exit.name}."
        return HeadWeights(
            layer=self._layer(f"{prefix}layer.") if exit.architecture == "layer" else None,
            mlp=self._mlp(prefix) if exit.architecture == "mlp" else None,
            norm=None if exit.architecture == "embedding" else self._norm(f"{prefix}norm"),
            output=self._output(f"{prefix}unembed") if exit.own_output else shared,
        )

    def _layer(self, prefix: str) -> LayerWeights:
        config, names = self.config, self.names
        size, heads = config.head_dim, config.num_heads
        height = (heads + 2 * config.num_kv_heads) * size
        qkv = [f"{prefix}{name}" for name in names.qkv]
        # Rotary pairs are put together in query and key, which then are two separate tensors.
        turned = {} if config.rope is None else dict.fromkeys(qkv[:2], size)
        return LayerWeights(
            norm=self._norm(f"{prefix}{names.attention_norm}"),
            qkv=self._linear(qkv, height, config.hidden_size, config.qkv_bias, turned),
            proj=self._linear([f"{prefix}{names.proj}"], config.hidden_size, heads * size, config.proj_bias),
            mlp=self._mlp(prefix),
        )

    def _mlp(self, prefix: str) -> MlpWeights:
        config, names = self.config, self.names
        hidden, ffn, bias = config.hidden_size, config.ffn_hidden_size, config.mlp_bias
        return MlpWeights(
            norm=self._norm(f"{prefix}{names.mlp_norm}"),
            fc1=self._linear([f"{prefix}{name}" for name in names.fc1], len(names.fc1) * ffn, hidden, bias),
            fc2=self._linear([f"{prefix}{names.fc2}"], hidden, ffn, bias),
        )

    def _norm(self, name: str) -> Norm:
        config, read = self.config, self.tensors.read
        weight = read(f"{name}.weight", config.hidden_size) if config.norm_affine else None
        if not config.layer_norm:
            return make_rms_norm(weight, config.norm_epsilon)
        bias = read(f"{name}.bias", config.hidden_size) if config.norm_affine else None
        return LayerNorm(weight, bias, config.norm_epsilon)

    def _output(self, name: str) -> Linear:
        weight = self.tensors.read(f"{name}.weight", self.config.vocab_size, self.config.hidden_size)
        return make_linear(weight, None, stored_in_half=self.tensors.half([f"{name}.weight"]) is not None)

    def _linear(
        self, names: list[str], height: int, width: int, bias: bool, turned: Mapping[str, int] | None = None
    ) -> Linear:
        """Linears that read the same input as one, `width` to `height`. `turned`: see `_Tensors.below`."""

        def of(kind: str, *shape: int, **layout: bool) -> Tensor:
            heads = {f"{name}.{kind}": size for name, size in (turned or {}).items()}
            return self.tensors.below([f"{name}.{kind}" for name in names], *shape, turned=heads, **layout)

        weight = of("weight", height, width, transposed=self.names.transposed)
        half = self.tensors.half([f"{name}.weight" for name in names]) is not None
        return make_linear(weight, of("bias", height) if bias else None, stored_in_half=half)
