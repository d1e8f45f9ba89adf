# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Reads a TensorRT-LLM unified checkpoint back into `nemo_ee.runtime`'s model, from the shards of all ranks.

Names and shards here follow the format's description, not the export's tables (`unified_tensors`), so that problems of
those tables are found. Tensors that several ranks hold whole must be equal on all of them, and padding must be zeros.

    attention.qkv     [Q; K; V] of each rank's heads; a key-value head that several ranks hold counts once
    dense, mlp.proj   columns side by side         mlp.fc, mlp.gate, lm_head    rows one below the other
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_ee.export.tensorrt_llm.unified_config import architecture_of
from nemo_ee.families.architecture import FC1, FC2, PROJ, QKV
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
)  # fmt: skip
from nemo_ee.runtime.exported_model import ExportedModel, exit_entries
from nemo_ee.runtime.loader import model_of
from nemo_ee.runtime.model import RuntimeModel
from nemo_ee.text.json_values import read_json_object


def load_checkpoint(folder: Path) -> RuntimeModel:
    """The model of a checkpoint directory with its exits, which computes in fp32.

    Raises:
        ValueError: files are missing, damaged or do not fit together, or ranks contradict each other.
    """
    with ExitStack() as stack:
        try:
            values = read_json_object(folder / "config.json")
            files = [
                stack.enter_context(safe_open(folder / f"rank{rank}.safetensors", framework="pt", device="cpu"))
                for rank in range(values["mapping"]["world_size"])
            ]
            # The files may have the output projection of a tied model too.
            architecture = replace(architecture_of(values), tied="lm_head.weight" not in files[-1].keys())
            table = (values.get("early_exit") or {}).get("exits", [])
            exported = ExportedModel(architecture, exit_entries(table), values["dtype"])
            return model_of(exported, _MergedShards(exported, values, files, folder))
        except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as problem:
            raise ValueError(f"{folder}: cannot be read ({problem!r})") from problem


class _MergedShards:
    """All ranks' files as one `TensorSource`."""

    def __init__(self, exported: ExportedModel, values: dict[str, Any], files: list[Any], origin: Path) -> None:
        self.a, self.files, self.origin = exported.architecture, files, origin
        self.tp, self.pp = values["mapping"]["tp_size"], values["mapping"]["pp_size"]
        self._names = [set(file.keys()) for file in files]
        self._pieces: dict[str, list[tuple[str, Callable[[], Tensor]]]] = {}
        per_stage, last = self.a.num_layers // self.pp, self.pp - 1
        self._add(self._whole, WORDS, "transformer.vocab_embedding.weight", 0)
        self._add(self._whole, POSITIONS, "transformer.position_embedding.weight", 0)
        for index in range(self.a.num_layers):
            self._add_layer(f"{LAYERS}{index}.", f"transformer.layers.{index % per_stage}.", index // per_stage)
        self._add_both(self._whole, FINAL_NORM, "transformer.ln_f.", last)
        self._add(self._vocabulary, OUTPUT, "lm_head.weight", last)
        for exit in exported.exits:
            key, prefix, stage = f"exits.{exit.name}.", f"exit_heads.{exit.name}.", (exit.layer - 1) // per_stage
            self._add_layer(f"{key}layer.", f"{prefix}layer.", stage)
            self._add_mlp(key, prefix, stage)
            self._add_both(self._whole, f"{key}norm.", f"{prefix}norm.", stage)
            self._add(self._vocabulary, f"{key}output.weight", f"{prefix}unembed.weight", stage)

    def pieces(self, key: str) -> Iterator[tuple[str, Tensor]]:
        """See `TensorSource`."""
        if key not in self._pieces:
            raise ValueError(f"{self.origin}: {key} is missing; export again")
        for name, make in self._pieces[key]:
            yield name, make()

    def _add(self, make: Callable[[str, int], Tensor], key: str, stored: str, stage: int) -> None:
        """Append a piece to a tensor, if the stage has the stored tensor."""
        if stored in self._names[stage * self.tp]:
            self._pieces.setdefault(key, []).append((stored, partial(make, stored, stage)))

    def _add_both(self, make: Callable[[str, int], Tensor], key: str, stored: str, stage: int) -> None:
        for kind in ("weight", "bias"):
            self._add(make, f"{key}{kind}", f"{stored}{kind}", stage)

    def _add_layer(self, key: str, stored: str, stage: int) -> None:
        self._add_both(self._whole, f"{key}{ATTENTION_NORM}", f"{stored}input_layernorm.", stage)
        for index in range(3):
            part = partial(self._query_key_value, index)
            self._add_both(part, f"{key}{LINEARS[QKV]}", f"{stored}attention.qkv.", stage)
        for norm, name in ((Q_NORM, "q_layernorm"), (K_NORM, "k_layernorm")):
            self._add(self._whole, f"{key}{norm}", f"{stored}attention.{name}.weight", stage)
        self._add(self._columns, f"{key}{LINEARS[PROJ]}weight", f"{stored}attention.dense.weight", stage)
        self._add(self._whole, f"{key}{LINEARS[PROJ]}bias", f"{stored}attention.dense.bias", stage)
        self._add_mlp(key, stored, stage)

    def _add_mlp(self, key: str, stored: str, stage: int) -> None:
        self._add_both(self._whole, f"{key}{MLP_NORM}", f"{stored}post_layernorm.", stage)
        for half in ("fc", "gate"):
            self._add_both(self._rows, f"{key}{LINEARS[FC1]}", f"{stored}mlp.{half}.", stage)
        self._add(self._columns, f"{key}{LINEARS[FC2]}weight", f"{stored}mlp.proj.weight", stage)
        self._add(self._whole, f"{key}{LINEARS[FC2]}bias", f"{stored}mlp.proj.bias", stage)

    def _parts(self, name: str, stage: int) -> list[Tensor]:
        """The tensor of every tensor-parallel rank of a stage."""
        return [file.get_tensor(name) for file in self.files[stage * self.tp : (stage + 1) * self.tp]]

    def _rows(self, name: str, stage: int) -> Tensor:
        return torch.cat(self._parts(name, stage))

    def _columns(self, name: str, stage: int) -> Tensor:
        return torch.cat(self._parts(name, stage), dim=1)

    def _whole(self, name: str, stage: int) -> Tensor:
        """A tensor that every rank of a stage holds."""
        parts = self._parts(name, stage)
        for rank, part in enumerate(parts):
            _refuse_another(parts[0], part, name, rank)
        return parts[0]

    def _vocabulary(self, name: str, stage: int) -> Tensor:
        rows, count = self._rows(name, stage), self.a.vocab_size
        if rows[count:].any():
            raise ValueError(f"{name}: the rows past the vocabulary are not zeros")
        return rows[:count]

    def _query_key_value(self, index: int, name: str, stage: int) -> Tensor:
        """One of query (`index` 0), key (1) and value (2)."""
        groups, size = self.a.num_query_groups, self.a.kv_channels
        held = max(groups // self.tp, 1)
        sizes = [self.a.num_attention_heads // self.tp * size, held * size, held * size]
        parts = [part.split(sizes)[index] for part in self._parts(name, stage)]
        repeats = max(self.tp // groups, 1) if index else 1
        for rank, part in enumerate(parts):
            _refuse_another(parts[rank - rank % repeats], part, name, rank)
        return torch.cat(parts[::repeats])


def _refuse_another(one: Tensor, other: Tensor, name: str, rank: int) -> None:
    if not torch.equal(one, other):
        raise ValueError(f"{name} of tensor-parallel rank {rank} differs from the ranks before it")
