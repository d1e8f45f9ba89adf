# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Origins of an exported model's tensors: the whole backbone, or an exit as a stand-alone model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_ee.exits.config import ExitConfig
from nemo_ee.export.source import Origin
from nemo_ee.families.tensors import FINAL_NORM, LAYERS, OUTPUT, WORDS, Canonical, TensorTable


@dataclass(frozen=True)
class Model:
    """One written checkpoint: the origins of every layer's tensors, the final norm and the output.

    Attributes:
        layers: for each layer, canonical name within a layer -> origin.
        final_norm: `weight` or `bias` -> origin; None leaves it out.
        output: origin of the output projection; None if it is the word embeddings and left out.
        exits: heads in the checkpoint: (exit, its output projection or None if that is the backbone's).
    """

    layers: tuple[Callable[[str], Origin], ...]
    final_norm: Callable[[str], Origin] | None
    output: Origin | None
    exits: tuple[tuple[ExitConfig, Origin | None], ...] = ()

    def parts(self, table: TensorTable) -> Iterator[ModelTensor]:
        """Every canonical tensor to read, in the order of the tensors in the files.

        Args:
            table: the tensors of the written stock model.
        """
        for key, tensor in table.others.items():
            if key.startswith("embedding."):
                yield ModelTensor(Origin("backbone", key), None, key, tensor)
        for index, layer in enumerate(self.layers):
            for key, tensor in table.layer.items():
                yield ModelTensor(layer(key), index, key, tensor)
        for key, tensor in table.others.items():
            if key.startswith(FINAL_NORM) and self.final_norm is not None:
                yield ModelTensor(self.final_norm(key.removeprefix(FINAL_NORM)), None, key, tensor)
        if self.output is not None:
            yield ModelTensor(self.output, None, OUTPUT, table.others.get(OUTPUT, table.others[WORDS]))
        for exit, output in self.exits:
            for key, tensor in table.of_exit(exit.architecture, output is not None).items():
                origin = output if key == "output.weight" else Origin("exit", f"{exit.name}.{key}")
                yield ModelTensor(origin, exit, key, tensor)


@dataclass(frozen=True)
class ModelTensor:
    """A canonical tensor of a written model.

    Attributes:
        origin: the tensor in the source.
        place: the layer of the tensor, by its index from 0, or its exit; None for the others.
        key: its canonical name in that place.
        tensor: its rows; stored names omit the place's prefix.
    """

    origin: Origin
    place: int | ExitConfig | None
    key: str
    tensor: Canonical


def full_model(num_layers: int, exits: Sequence[tuple[ExitConfig, bool]], *, tied: bool, write_output: bool) -> Model:
    """The backbone with exit heads beside it.

    Args:
        exits: pairs (exit, whether it has an output projection).
        tied: whether the output projection is the word embeddings.
        write_output: False leaves out an output projection that is the word embeddings.
    """
    output = Origin("backbone", WORDS if tied else OUTPUT)
    return Model(
        layers=tuple(_backbone_layer(index) for index in range(num_layers)),
        final_norm=lambda kind: Origin("backbone", f"{FINAL_NORM}{kind}"),
        output=output if write_output else None,
        exits=tuple((exit, Origin("output", exit.name) if own else None) for exit, own in exits),
    )


def described_model(
    artifact: Mapping[str, Any], table: Sequence[Mapping[str, Any]], num_layers: int, *, tied: bool, write_output: bool
) -> Model:
    """The model of a written directory, with the origins of its export.

    Args:
        artifact: its entry in the manifest.
        table: the exits in the directory.
        num_layers, tied: values of its config.json.
        write_output: see `full_model`.
    """
    if artifact["exit"] is None:
        exits = [(_described_exit(row), row["output"] == "own") for row in table]
        return full_model(num_layers, exits, tied=tied, write_output=write_output)
    layer = num_layers - (artifact["architecture"] == "layer")
    exit = {"name": artifact["exit"], "layer": layer, "architecture": artifact["architecture"]}
    return draft_model(_described_exit(exit), write_output=write_output)


def _described_exit(row: Mapping[str, Any]) -> ExitConfig:
    return ExitConfig(row["name"], row["layer"], row["architecture"], "copy", "own")


def draft_model(exit: ExitConfig, *, write_output: bool = True) -> Model:
    """An exit as a stand-alone model: k layers, the last one with the exit's MLP, or k + 1; its norm and its output.

    Args:
        write_output: False leaves out an output projection that is the word embeddings.
    """
    layers = [_backbone_layer(index) for index in range(exit.layer)]
    if exit.architecture == "mlp":
        attention = layers[-1]
        layers[-1] = lambda key: Origin("exit", f"{exit.name}.{key}") if key.startswith("mlp.") else attention(key)
    if exit.architecture == "layer":
        layers.append(lambda key: Origin("exit", f"{exit.name}.layer.{key}"))
    norm = None if exit.architecture == "embedding" else lambda kind: Origin("exit", f"{exit.name}.norm.{kind}")
    return Model(tuple(layers), norm, Origin("output", exit.name) if write_output else None)


def _backbone_layer(index: int) -> Callable[[str], Origin]:
    return lambda key: Origin("backbone", f"{LAYERS}{key}", index)
