# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Where the tensors of an exported model come from: the whole backbone, or an exit as a model of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from nemo_ee.exits.config import ExitConfig
from nemo_ee.export.early_exit_source import EMBEDDING, OUTPUT, EarlyExitSource, Origin

_LAYERS = "decoder.layers."
_FINAL_NORM = "decoder.final_layernorm."


@dataclass(frozen=True)
class Model:
    """What is written as one checkpoint: where every layer's tensors, the final norm and the output come from.

    Attributes:
        layers: per layer, canonical name within a layer -> origin.
        final_norm: `weight` or `bias` -> origin.
        output: the output projection; None where it is the word embeddings and left out.
        exits: heads carried along: (exit, the output projection or None where it is the backbone's).
    """

    layers: tuple[Callable[[str], Origin], ...]
    final_norm: Callable[[str], Origin]
    output: Origin | None
    exits: tuple[tuple[ExitConfig, Origin | None], ...] = ()


def full_model(num_layers: int, exits: Sequence[tuple[ExitConfig, bool]], *, tied: bool, write_output: bool) -> Model:
    """The backbone with exit heads beside it.

    Args:
        exits: (exit, whether its output projection is a matrix of its own).
        tied: the output projection is the word embeddings.
        write_output: False leaves out an output projection that is the word embeddings.
    """
    output = Origin("backbone", EMBEDDING if tied else OUTPUT)
    return Model(
        layers=tuple(_backbone_layer(index) for index in range(num_layers)),
        final_norm=lambda kind: Origin("backbone", f"{_FINAL_NORM}{kind}"),
        output=output if write_output else None,
        exits=tuple((exit, Origin("output", exit.name) if own else None) for exit, own in exits),
    )


def draft_model(exit: ExitConfig) -> Model:
    """An exit as a model of its own: k layers, the last one with the exit's MLP, or k + 1; its norm and output."""
    layers = [_backbone_layer(index) for index in range(exit.layer)]
    if exit.architecture == "mlp":
        attention = layers[-1]
        layers[-1] = lambda key: Origin("exit", f"{exit.name}.{key}") if key.startswith("mlp.") else attention(key)
    if exit.architecture == "layer":
        layers.append(lambda key: Origin("exit", f"{exit.name}.layer.{key}"))
    return Model(tuple(layers), lambda kind: Origin("exit", f"{exit.name}.norm.{kind}"), Origin("output", exit.name))


def _backbone_layer(index: int) -> Callable[[str], Origin]:
    return lambda key: Origin("backbone", f"{_LAYERS}{key}", index)


class Wanted(Protocol):
    """A canonical tensor that an export reads."""

    origin: Origin
    shape: tuple[int, ...]


def tensor_faults(source: EarlyExitSource, plans: Sequence[Sequence[Wanted]], *, tied: bool) -> list[str]:
    """Tensors that are missing or of another shape, and tensors of the backbone that nothing is written from.

    Args:
        plans: what the directories are written from; that of the whole backbone is among them.
        tied: the output projection is the word embeddings, and a stored one is not read.
    """
    faults, read = [], set()
    for reading in {reading.origin: reading for plan in plans for reading in plan}.values():
        origin, shape = reading.origin, source.shape(reading.origin)
        where = f"{origin.key}" if origin.layer is None else f"{origin.key} of layer {origin.layer + 1}"
        if origin.part == "backbone":
            read.add(origin.key)
        # Vocabulary matrices are padded, by rows that are not exported; exits and backbone may differ in it.
        padded = origin.part == "output" or origin.key in (EMBEDDING, OUTPUT)
        if shape is None:
            faults.append(f"{where} is missing")
        elif shape != reading.shape and not (
            padded and shape[1:] == reading.shape[1:] and shape[0] >= reading.shape[0]
        ):
            faults.append(f"{where} has shape {list(shape)}, must be {list(reading.shape)}")
    tied_output = {OUTPUT} if tied else set()
    unknown = sorted(source.backbone_names() - read - tied_output)
    if unknown:
        faults.append(f"the backbone holds tensors that no stock class has: {', '.join(unknown)}")
    return faults
