# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The `model.early_exit` block: which exits a model has and how they are trained.

The block is read once, by `EarlyExitConfig.from_mapping`, into frozen dataclasses that hold every default; null in the
block means "the default". All problems are reported together. `every: n/m` is a shorthand for exits at layers
ceil(i * num_layers * n / m), i = 1, 2, ... below the full depth.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_ee.exits.block_reader import BlockReader, boolean, close_match, integer, keys_of, number, one_of

ARCHITECTURES = ("embedding", "norm", "mlp", "layer")
INITS = ("copy", "random", "lora")
OUTPUTS = ("own", "shared", "low_rank")
TRAIN_MODES = ("exits", "joint", "lora")
OBJECTIVES = ("cross_entropy", "distillation", "mixed")
TOKEN_WEIGHTS = ("none", "confidence")
LOSS_WEIGHT_SCHEDULES = ("constant", "linear", "cosine")

BLOCK = "model.early_exit"
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]{0,40}")
# `final` and `full_model`: the original output layer in reports, statistics and metrics; `backbone`: the trained
# backbone in optimizers.
RESERVED_NAMES = ("final", "full_model", "backbone")

_EVERY_PATTERN = re.compile(r"\s*([0-9]+)\s*/\s*([0-9]+)\s*")


class EarlyExitConfigError(ValueError):
    """The block has problems; `problems` holds one line for each, the message holds them all."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{BLOCK} has {count}:", *(f"  - {problem}" for problem in self.problems)]))


@dataclasses.dataclass(frozen=True)
class ExitConfig:
    """One exit head.

    Attributes:
        name: unique, matches `[a-z0-9][a-z0-9_-]{0,40}`; a state key, a metric name and a directory name.
        layer: the exit sits after this many transformer layers, 1 <= layer <= num_layers.
        architecture: `embedding`, `norm`, `mlp` or `layer`.
        init: `copy`, `random` or `lora`.
        output: `own`, `shared` or `low_rank`.
        rank: rank of the `lora` and `low_rank` updates.
        loss_weight: final weight of this exit's loss.
        loss_weight_schedule: `constant`, `linear` or `cosine`.
        lr, min_lr, weight_decay: None = the optimizer's.
        objective: None = the block's (`EarlyExitConfig.objective_of`).
        seed: seed of random and lora initialisation; None = the run's.
    """

    name: str
    layer: int
    architecture: str
    init: str
    output: str
    rank: int = 16
    loss_weight: float = 1.0
    loss_weight_schedule: str = "constant"
    lr: float | None = None
    min_lr: float | None = None
    weight_decay: float | None = None
    objective: str | None = None
    seed: int | None = None

    @property
    def trains(self) -> bool:
        """Whether it has a parameter of its own to train: a frozen copy of everything has none."""
        bare = self.architecture == "embedding" or (self.architecture == "norm" and self.init == "lora")
        return not (bare and self.output == "shared")

    @property
    def stop(self) -> int:
        """The half-layer coordinate of the tap: 2k-1 (between attention and MLP of layer k) for `mlp`, else 2k."""
        return 2 * self.layer - 1 if self.architecture == "mlp" else 2 * self.layer


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """Settings of distillation: an exit learns from the final exit of the same forward pass.

    Attributes:
        temperature: both distributions are softened by it, > 0.
        top_k: only the final exit's k most likely tokens count; None = the whole vocabulary.
        weight: share of the distillation loss in `mixed`, the rest is label cross-entropy.
    """

    temperature: float = 1.0
    top_k: int | None = None
    weight: float = 0.5


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The backbone's low-rank updates with `train: lora` (LoRA, arXiv 2106.09685).

    Attributes:
        rank: rank of every update.
        merge: saving folds the updates into the backbone's weights; False stores them beside it.
    """

    rank: int = 16
    merge: bool = True


@dataclasses.dataclass(frozen=True)
class EarlyExitConfig:
    """The whole block. `architecture`, `init` and `output` are the defaults that `exits` were resolved with."""

    exits: tuple[ExitConfig, ...] = ()
    architecture: str = "mlp"
    init: str = "copy"
    output: str = "own"
    train: str = "exits"
    lora: LoraConfig = LoraConfig()
    objective: str = "cross_entropy"
    distillation: DistillationConfig = DistillationConfig()
    token_weights: str = "none"

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any] | None, *, num_layers: int) -> EarlyExitConfig:
        """Read the block.

        Args:
            mapping: the yaml block (a dict or an OmegaConf node); None and missing keys mean the defaults.
            num_layers: transformer layers of the backbone.

        Raises:
            EarlyExitConfigError: with every problem of the block.
        """
        return _read_block(mapping, num_layers)

    def to_mapping(self) -> dict[str, Any]:
        """The block with every exit spelt out and `every: None`; `from_mapping` of it equals `self`."""
        written = {
            "exits": [dataclasses.asdict(exit) for exit in self.exits],
            "every": None,
            "lora": dataclasses.asdict(self.lora),
            "distillation": dataclasses.asdict(self.distillation),
        }
        return {key: written[key] if key in written else getattr(self, key) for key in BLOCK_KEYS}

    def exit(self, name: str) -> ExitConfig:
        """The exit of that name. Raises ValueError naming the ones there are."""
        for exit in self.exits:
            if exit.name == name:
                return exit
        raise ValueError(
            f"no exit is called {name!r}{close_match(name, self.names)}; "
            f"the exits are: {', '.join(self.names) or 'none'}"
        )

    def objective_of(self, name: str) -> str:
        """The objective that exit `name` is trained with: its own or the block's."""
        return self.exit(name).objective or self.objective

    @property
    def has_teacher(self) -> bool:
        """Whether some exit learns from the final exit."""
        return any(self.objective_of(name) != "cross_entropy" for name in self.names)

    @property
    def needs_final_exit(self) -> bool:
        """Whether a training step runs the whole model: an exit learns from the final exit, or that trains itself."""
        return self.has_teacher or self.train != "exits"

    @property
    def trains(self) -> str:
        """The trained parts as text. A training checkpoint resumes only in a run that trains the same parts."""
        return f"lora of rank {self.lora.rank}" if self.train == "lora" else self.train

    @property
    def names(self) -> tuple[str, ...]:
        """Exit names in the block's order."""
        return tuple(exit.name for exit in self.exits)


# The yaml block's keys, in its order.
BLOCK_KEYS = (
    "exits",
    "every",
    *(field.name for field in dataclasses.fields(EarlyExitConfig) if field.name != "exits"),
)


def _exit_name(value: Any) -> str:
    if not isinstance(value, str) or not NAME_PATTERN.fullmatch(value):
        raise ValueError(
            "must match [a-z0-9][a-z0-9_-]{0,40}: start with a small letter or a digit, then small letters, digits, "
            "_ and -, 41 characters at most; leave it out to get layer<k>-<architecture>"
        )
    if value in RESERVED_NAMES:
        raise ValueError(f"is reserved for the model's own parts; choose another name, e.g. {value}-1")
    return value


def _read_block(mapping: Mapping[str, Any] | None, num_layers: int) -> EarlyExitConfig:
    assert num_layers >= 1, f"num_layers = {num_layers}"
    mapping = {} if mapping is None else mapping
    if not isinstance(mapping, Mapping):
        raise EarlyExitConfigError([f"{BLOCK} = {mapping!r}: must be a mapping with the keys {', '.join(BLOCK_KEYS)}"])
    problems: list[str] = []
    reader, base = BlockReader(mapping, BLOCK, BLOCK_KEYS, problems), EarlyExitConfig()
    block = EarlyExitConfig(
        architecture=reader.read("architecture", one_of(ARCHITECTURES), base.architecture),
        init=reader.read("init", one_of(INITS), base.init),
        output=reader.read("output", one_of(OUTPUTS), base.output),
        train=reader.read("train", one_of(TRAIN_MODES), base.train),
        lora=_read_lora(reader, base.lora),
        objective=reader.read("objective", one_of(OBJECTIVES), base.objective),
        distillation=_read_distillation(reader, base.distillation),
        token_weights=reader.read("token_weights", one_of(TOKEN_WEIGHTS), base.token_weights),
    )
    exits = _read_exits(reader, block, num_layers)
    if problems:
        raise EarlyExitConfigError(problems)
    return dataclasses.replace(block, exits=exits)


def _inner_block(reader: BlockReader, key: str, dataclass: type) -> BlockReader | None:
    """A reader of the block under `key`; None where there is none or it is no block."""
    value, keys = reader.given(key), keys_of(dataclass)
    if value is None:
        return None
    if not isinstance(value, Mapping):
        reader.problem(key, f"must be a mapping with the keys {', '.join(keys)}")
        return None
    return BlockReader(value, f"{reader.path}.{key}", keys, reader.problems)


def _read_lora(reader: BlockReader, base: LoraConfig) -> LoraConfig:
    inner = _inner_block(reader, "lora", LoraConfig)
    if inner is None:
        return base
    return LoraConfig(rank=inner.read("rank", integer(1), base.rank), merge=inner.read("merge", boolean, base.merge))


def _read_distillation(reader: BlockReader, base: DistillationConfig) -> DistillationConfig:
    inner = _inner_block(reader, "distillation", DistillationConfig)
    if inner is None:
        return base
    return DistillationConfig(
        temperature=inner.read("temperature", number(above=True), base.temperature),
        top_k=inner.read("top_k", integer(1, way_out="; null uses the whole vocabulary"), base.top_k),
        weight=inner.read("weight", number(high=1.0), base.weight),
    )


def _read_exits(reader: BlockReader, block: EarlyExitConfig, num_layers: int) -> tuple[ExitConfig, ...]:
    value = reader.given("exits")
    entries: Sequence[Any] = () if value is None else value
    if isinstance(entries, str | Mapping) or not isinstance(entries, Sequence):
        reader.problem("exits", "must be a list of exits; write [{layer: 4}, {layer: 8, architecture: norm}]")
        entries = ()
    exits: list[ExitConfig] = []
    named: dict[str, str] = {}  # exit name -> key of the entry that has it
    for index, entry in enumerate(entries):
        path = f"{reader.path}.exits[{index}]"
        exit = _read_exit(entry, path, reader.problems, block, num_layers)
        if exit is None:
            continue
        if exit.name in named:
            reader.problems.append(
                f"{path}.name = {exit.name!r}: is already the name of {named[exit.name]} and names are unique; "
                f"give this exit a name of its own, e.g. name: {exit.name}-{index + 1}"
            )
        named.setdefault(exit.name, path)
        exits.append(exit)
    known = {(exit.layer, exit.architecture, exit.name) for exit in exits}
    for layer in _layers_of_every(reader, num_layers):
        exit = ExitConfig(
            name=f"layer{layer}-{block.architecture}",
            layer=layer,
            architecture=block.architecture,
            init=block.init,
            output=block.output,
        )
        if (exit.layer, exit.architecture, exit.name) in known:
            continue
        if exit.name in named:
            reader.problem(
                "every", f"gives layer {layer} the name {exit.name!r}, which {named[exit.name]} has; rename that exit"
            )
        exits.append(exit)
    return tuple(exits)


def _read_exit(
    entry: Any, path: str, problems: list[str], block: EarlyExitConfig, num_layers: int
) -> ExitConfig | None:
    """One entry of `exits`, or None when it is too incomplete to have a layer, an architecture and a name."""
    keys = keys_of(ExitConfig)
    if not isinstance(entry, Mapping):
        problems.append(f"{path} = {entry!r}: must be a mapping with at least a layer; write {{layer: 4}}")
        return None
    reader = BlockReader(entry, path, keys, problems)
    layer = reader.read(
        "layer",
        integer(1, num_layers, high_is=f" (the model has {num_layers} layers, an exit sits after layer k)"),
        None,
    )
    if reader.given("layer") is None:
        reader.problem("layer", f"is missing; give the exit a layer in 1..{num_layers}")
    architecture = reader.read("architecture", one_of(ARCHITECTURES), block.architecture)
    default = ExitConfig("", 1, architecture, block.init, block.output)
    exit = dataclasses.replace(
        default,
        name=reader.read("name", _exit_name, f"layer{layer}-{architecture}"),
        layer=layer,
        init=reader.read("init", one_of(INITS), default.init),
        output=reader.read("output", one_of(OUTPUTS), default.output),
        rank=reader.read("rank", integer(1), default.rank),
        loss_weight=reader.read("loss_weight", number(), default.loss_weight),
        loss_weight_schedule=reader.read(
            "loss_weight_schedule", one_of(LOSS_WEIGHT_SCHEDULES), default.loss_weight_schedule
        ),
        lr=reader.read("lr", number(), default.lr),
        min_lr=reader.read("min_lr", number(), default.min_lr),
        weight_decay=reader.read("weight_decay", number(), default.weight_decay),
        objective=reader.read("objective", one_of(OBJECTIVES), default.objective),
        seed=reader.read("seed", integer(0, 2**63 - 1), default.seed),
    )
    if exit.lr is not None and exit.min_lr is not None and exit.min_lr > exit.lr:
        reader.problem("min_lr", f"must be at most lr = {exit.lr:g}; lower min_lr or leave it out")
    return None if reader.wrong_keys & {"layer", "architecture", "name"} else exit


def _layers_of_every(reader: BlockReader, num_layers: int) -> tuple[int, ...]:
    """The layers of the shorthand `every: n/m`, without the full depth."""
    value = reader.given("every")
    if value is None:
        return ()
    match = _EVERY_PATTERN.fullmatch(value) if isinstance(value, str) else None
    numerator, denominator = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= numerator < denominator:
        reader.problem(
            "every",
            "must be text n/m with whole numbers 1 <= n < m, the share of the depth between two exits; "
            'write "1/8", or list the exits under exits',
        )
        return ()
    layers: list[int] = []
    step = 1
    while (layer := -(-step * num_layers * numerator // denominator)) < num_layers:
        if layer not in layers:
            layers.append(layer)
        step += 1
    if not layers:
        reader.problem(
            "every", f"gives no exit below the full depth of {num_layers}; use a smaller share or list exits"
        )
    return tuple(layers)
