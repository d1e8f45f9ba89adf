# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Canonical rows and columns of each tensor of a TensorRT-LLM unified checkpoint, per rank.

Rank r = pipeline rank * tp + tensor rank holds the tensors of its layers, renumbered from 0:

    attention.qkv       [Q; K; V] of the rank's heads; Megatron stores one group after another
    attention.dense     columns      mlp.fc      rows of the activated half (gate_proj)
    mlp.proj            columns      mlp.gate    rows of the linear half (up_proj)
    lm_head             rows, zeros up to a multiple of tp
    norms, embeddings, biases of dense and proj: whole on every rank

With fewer key-value heads than ranks, tp / heads ranks hold the same one. An exit's tensors are `exit_heads.<name>.*`
on the stage of its layer; stock classes do not load them. None is called `lm_head`, a name that stock code looks up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from nemo_ee.exits.config import ExitConfig
from nemo_ee.export.model_origins import Model
from nemo_ee.export.readings import Reading, WrittenTensor, joined
from nemo_ee.export.tensorrt_llm.unified_config import stock_family
from nemo_ee.families.architecture import FC1, FC2, PROJ, QKV, Architecture
from nemo_ee.families.tensors import (
    ATTENTION_NORM,
    FINAL_NORM,
    K_NORM,
    LINEARS,
    MLP_NORM,
    OUTPUT,
    POSITIONS,
    Q_NORM,
    WORDS,
    tensor_table,
)  # fmt: skip


class _Part(NamedTuple):
    """A rank's part of a canonical tensor: row ranges one below the other, a range of columns, zero rows below."""

    rows: tuple[tuple[int, int], ...]
    columns: tuple[int, int] | None = None  # None = all
    zeros: int = 0

    def written(self, name: str, shape: tuple[int, ...], file: str) -> WrittenTensor:
        """The tensor in the file; `shape`: shape of the canonical tensor."""
        columns = self.columns and (self.columns[1] - self.columns[0],)
        height = sum(stop - start for start, stop in self.rows) + self.zeros
        shape = (height, *(columns or shape[1:]))
        return WrittenTensor(name, shape, self.rows, self.columns, zeros_below=self.zeros, file=file)


# (shape of the canonical tensor, tensor-parallel size, tensor rank) -> the rank's part
Split = Callable[[tuple[int, ...], int, int], _Part]


def draft_refusal(architecture: Architecture, exit: ExitConfig) -> str | None:
    """Reason why an exit cannot be a stand-alone model of a stock class; None if it can."""
    if exit.architecture == "embedding":
        return "an embedding exit has no norm, and no stock class can leave its final norm out"
    if architecture.learned_positions:
        name = stock_family(architecture).engine.architecture
        return f"draft models are written for models with rotary positions, not for {name}"
    return None


def stage_of(layer: int, num_layers: int, pipeline_parallel: int) -> int:
    """The pipeline rank that holds 1-based `layer`."""
    return (layer - 1) // (num_layers // pipeline_parallel)


def readings(architecture: Architecture, model: Model, tensor_parallel: int, pipeline_parallel: int) -> list[Reading]:
    """Every canonical tensor to read, in the order of the tensors in the files."""
    num_layers, names = len(model.layers), _names(architecture)
    result = []
    for part in model.parts(tensor_table(stock_family(architecture).names, architecture)):
        place, key, prefix, shape = part.place, part.key, "", part.tensor.shape
        if place is None:
            stage = 0 if key.startswith("embedding.") else pipeline_parallel - 1
        elif isinstance(place, int):
            stage = stage_of(place + 1, num_layers, pipeline_parallel)
            prefix = f"transformer.layers.{place - stage * (num_layers // pipeline_parallel)}."
        else:
            stage, prefix = stage_of(place.layer, num_layers, pipeline_parallel), f"exit_heads.{place.name}."
        if key.startswith("layer."):
            prefix, key = f"{prefix}layer.", key.removeprefix("layer.")
        written = [
            split(shape, tensor_parallel, rank).written(
                f"{prefix}{name}", shape, rank_file(stage * tensor_parallel + rank)
            )
            for rank in range(tensor_parallel)
            for name, split in names[key]
        ]
        result.append(Reading(part.origin, shape, tuple(written)))
    return result


def rank_file(rank: int) -> str:
    """The file of a rank."""
    return f"rank{rank}.safetensors"


def _names(a: Architecture) -> dict[str, tuple[tuple[str, Split], ...]]:
    """Canonical name in its place -> the tensors written from it: name and split over the ranks."""
    query_key_value = _query_key_value(a.num_attention_heads, a.num_query_groups, a.kv_channels)
    halves = (("fc", _half(0)), ("gate", _half(1))) if a.gated else (("fc", _rows),)
    names = {
        WORDS: (("transformer.vocab_embedding.weight", _whole),),
        POSITIONS: (("transformer.position_embedding.weight", _whole),),
        OUTPUT: (("lm_head.weight", _vocabulary),),
        "output.weight": (("unembed.weight", _vocabulary),),
        Q_NORM: (("attention.q_layernorm.weight", _whole),),  # over one head, so whole on every rank
        K_NORM: (("attention.k_layernorm.weight", _whole),),
    }
    for kind, columns in (("weight", _columns), ("bias", _whole)):
        names |= {
            f"{ATTENTION_NORM}{kind}": ((f"input_layernorm.{kind}", _whole),),
            f"{LINEARS[QKV]}{kind}": ((f"attention.qkv.{kind}", query_key_value),),
            f"{LINEARS[PROJ]}{kind}": ((f"attention.dense.{kind}", columns),),
            f"{MLP_NORM}{kind}": ((f"post_layernorm.{kind}", _whole),),
            f"{LINEARS[FC1]}{kind}": tuple((f"mlp.{name}.{kind}", split) for name, split in halves),
            f"{LINEARS[FC2]}{kind}": ((f"mlp.proj.{kind}", columns),),
            f"{FINAL_NORM}{kind}": ((f"transformer.ln_f.{kind}", _whole),),
            f"norm.{kind}": ((f"norm.{kind}", _whole),),
        }
    return names


def _whole(shape: tuple[int, ...], tp: int, rank: int) -> _Part:
    return _Part(((0, shape[0]),))


def _rows(shape: tuple[int, ...], tp: int, rank: int) -> _Part:
    height = shape[0] // tp
    return _Part(((rank * height, (rank + 1) * height),))


def _columns(shape: tuple[int, ...], tp: int, rank: int) -> _Part:
    width = shape[1] // tp
    return _Part(((0, shape[0]),), (rank * width, (rank + 1) * width))


def _vocabulary(shape: tuple[int, ...], tp: int, rank: int) -> _Part:
    height = -(-shape[0] // tp)
    start, stop = min(rank * height, shape[0]), min((rank + 1) * height, shape[0])
    return _Part(((start, stop),), zeros=height - (stop - start))


def _half(index: int) -> Split:
    def split(shape: tuple[int, ...], tp: int, rank: int) -> _Part:
        half = shape[0] // 2
        start = index * half + rank * (half // tp)
        return _Part(((start, start + half // tp),))

    return split


def _query_key_value(heads: int, groups: int, size: int) -> Split:
    per_group = heads // groups

    def split(shape: tuple[int, ...], tp: int, rank: int) -> _Part:
        def head(group: int, place: int) -> tuple[int, int]:
            start = (group * (per_group + 2) + place) * size
            return start, start + size

        queries = range(rank * heads // tp, (rank + 1) * heads // tp)
        held = range(rank * groups // tp, max((rank + 1) * groups // tp, rank * groups // tp + 1))
        rows = [head(query // per_group, query % per_group) for query in queries]
        rows += [head(group, per_group) for group in held]
        rows += [head(group, per_group + 1) for group in held]
        return _Part(joined(rows))

    return split


def parallel_problems(architecture: Architecture, tensor_parallel: int, pipeline_parallel: int) -> list[str]:
    """Problems of sizes that do not fit the model, each with the way out."""
    a, tp, pp = architecture, tensor_parallel, pipeline_parallel
    problems = [
        f"tensor_parallel={tp} does not divide {name}={value}; choose a divisor"
        for name, value in (("num_attention_heads", a.num_attention_heads), ("ffn_hidden_size", a.ffn_hidden_size))
        if value % tp
    ]
    groups = a.num_query_groups
    if groups % tp and tp % groups:
        problems.append(
            f"tensor_parallel={tp} and num_query_groups={groups}: one must divide the other; choose another size"
        )
    if a.num_layers % pp:
        problems.append(f"pipeline_parallel={pp} does not divide num_layers={a.num_layers}; choose a divisor")
    return problems
