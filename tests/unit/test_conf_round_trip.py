# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Every yaml in conf/: it loads, its exits block is the config's own, every key is one that something reads.

A key counts as read when it is a field of the class that takes its block (Lightning's Trainer, NeMo's experiment
manager, `EarlyExitConfig`), or when its name occurs as a key or an attribute in the scripts, the package, or the NeMo
files that read a GPT model's config.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_ee.exits.config import BLOCK_KEYS, DistillationConfig, EarlyExitConfig

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "conf").glob("*.yaml"))
STEMS = [file.stem for file in FILES]
# Settings laid over another yaml, started with that one's script and --config-name.
VARIANTS = {"megatron_gpt_early_exit_sweep": "megatron_gpt_early_exit_tune"}
# NeMo's readers of what is not read by this package itself.
NEMO_READERS = (
    "collections/nlp/models/language_modeling/megatron_gpt_model.py",
    "collections/nlp/models/language_modeling/megatron_base_model.py",
    "collections/nlp/parts/megatron_trainer_builder.py",
)


def load(stem: str) -> dict[str, Any]:
    """The yaml as Hydra composes it, without Hydra's own block, interpolations unresolved."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return OmegaConf.to_container(compose(stem))


def leaves(block: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything below, blocks themselves left out."""
    for key, value in block.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_there_are_configs() -> None:
    assert {"megatron_gpt_early_exit_convert", "megatron_gpt_early_exit_tune"} <= set(STEMS)


@pytest.mark.parametrize("stem", STEMS)
def test_it_loads_and_has_a_script(stem: str) -> None:
    assert load(stem)
    scripts = [
        path for folder in ("examples", "scripts", "benchmarks") for path in (ROOT / folder).rglob(f"{stem}.py")
    ]
    if stem in VARIANTS:
        assert not scripts and VARIANTS[stem] in STEMS
        return
    assert len(scripts) == 1, f"one script of the same name, not {scripts}"
    assert f'config_name="{stem}"' in scripts[0].read_text(encoding="utf-8")


WITH_EXITS = [stem for stem in STEMS if stem not in VARIANTS and "early_exit" in (load(stem).get("model") or {})]


@pytest.mark.parametrize("stem", WITH_EXITS)
def test_the_exits_block_is_the_config_s_own(stem: str) -> None:
    """Key for key, in order, with the defaults of the dataclasses; reading it back gives the same config."""
    block = load(stem)["model"]["early_exit"]
    assert tuple(block) == BLOCK_KEYS
    assert tuple(block["distillation"]) == tuple(field.name for field in dataclasses.fields(DistillationConfig))
    config = EarlyExitConfig.from_mapping(block, num_layers=8)
    assert config == EarlyExitConfig(), "the yaml shows the defaults"
    assert config.to_mapping() == block
    filled = {**block, "every": "1/4", "exits": [{"layer": 8, "architecture": "layer", "init": "lora", "lr": 0.5}]}
    config = EarlyExitConfig.from_mapping(filled, num_layers=8)
    assert config.names == ("layer8-layer", "layer2-mlp", "layer4-mlp", "layer6-mlp")
    written = config.to_mapping()
    assert tuple(written) == BLOCK_KEYS and written["every"] is None
    assert EarlyExitConfig.from_mapping(written, num_layers=8) == config
    assert EarlyExitConfig.from_mapping(OmegaConf.to_container(OmegaConf.create(written)), num_layers=8) == config


def test_two_blocks_that_are_the_same_everywhere() -> None:
    blocks = [load(stem)["model"]["early_exit"] for stem in WITH_EXITS]
    assert len(blocks) >= 2 and all(block == blocks[0] for block in blocks)


@cache
def _names() -> frozenset[str]:
    """Attributes, quoted keys and names of arguments in all that reads a config: package, scripts, NeMo's readers."""
    files = [p for folder in ("nemo_ee", "examples", "scripts") for p in sorted((ROOT / folder).rglob("*.py"))]
    nemo = find_spec("nemo")
    if nemo is not None:
        files += [Path(nemo.submodule_search_locations[0]) / name for name in NEMO_READERS]
    source = "\n".join(file.read_text(encoding="utf-8") for file in files)
    forms = (r"\.(\w+)", r"""["'](\w+)["']""", r"\b(\w+)\s*[:=]")
    return frozenset(name for form in forms for name in re.findall(form, source))


@cache
def _taken_over() -> frozenset[str]:
    """Dotted keys whose values a yaml takes over."""
    return frozenset(key for file in FILES for key in re.findall(r"\$\{([\w.]+)\}", file.read_text(encoding="utf-8")))


@pytest.mark.parametrize("stem", VARIANTS)
def test_a_variant_changes_what_it_says_and_nothing_else(stem: str) -> None:
    base, variant = dict(leaves(load(VARIANTS[stem]))), dict(leaves(load(stem)))
    own = set(OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / f"{stem}.yaml")))
    changed = {key for key in variant if key not in base or variant[key] != base[key]}
    assert changed and {key.split(".")[0] for key in changed} <= own and base.keys() <= variant.keys()


def test_the_sweep_is_nine_exits_on_one_layer() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)
        rates = ["model.optim.lr=2e-3", "model.optim.sched.min_lr=0"]
        cfg = compose("megatron_gpt_early_exit_sweep", ["layer=5", *rates])
    block = OmegaConf.to_container(cfg.model.early_exit, resolve=True)
    exits = EarlyExitConfig.from_mapping(block, num_layers=8).exits
    pairs = {(exit.init, exit.architecture) for exit in exits}
    assert pairs == {(init, shape) for init in ("copy", "random", "lora") for shape in ("norm", "mlp", "layer")}
    assert all(exit.name == f"{exit.init}-{exit.architecture}" and exit.layer == 5 for exit in exits)
    for exit in exits:
        assert (exit.lr, exit.min_lr) == ((pytest.approx(6e-3), 0) if exit.init == "lora" else (None, None))


def _is_read(key: str) -> bool:
    """Whether the last part of a dotted key occurs as an attribute, a quoted key or a name of an argument; or whether
    a yaml takes the value over from there."""
    return key in _taken_over() or key.split(".")[-1] in _names()


def _known(key: str) -> bool | None:
    """Whether the class that takes the key's block has such a field; None where no class takes it."""
    block, _, name = key.partition(".")
    if block == "trainer":
        from lightning.pytorch import Trainer

        return name in inspect.signature(Trainer).parameters
    if block == "exp_manager":
        exp_manager = pytest.importorskip("nemo.utils.exp_manager")
        if name.startswith("checkpoint_callback_params."):
            fields = dataclasses.fields(exp_manager.CallbackParams)
            return name.split(".")[1] in {field.name for field in fields}
        return name.split(".")[0] in {field.name for field in dataclasses.fields(exp_manager.ExpManagerConfig)}
    return None


@pytest.mark.parametrize("stem", STEMS)
def test_every_key_is_one_that_something_reads(stem: str) -> None:
    unread = []
    for key, _ in leaves(load(stem)):
        known = _known(key)
        if not (known if known is not None else _is_read(key)):
            unread.append(key)
    assert not unread


def test_keys_that_nothing_reads_are_found() -> None:
    """Control: misspelt keys."""
    for key in (
        "trainer.max_stepz",
        "exp_manager.resume_if_exist",
        "exp_manager.checkpoint_callback_params.save_topk",
    ):
        assert _known(key) is False
    for key in ("model.micro_batchsize", "sourc", "model.optim.sched.warm_steps"):
        assert _known(key) is None and not _is_read(key)


@pytest.mark.parametrize("file", FILES, ids=STEMS)
def test_every_line_is_explained_and_the_header_has_the_command(file: Path) -> None:
    """A key with a value has a comment with unit, options or limits; keys that only open a block need none."""
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    header = "\n".join(lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))])
    started = f"--config-name {file.stem} " if file.stem in VARIANTS else rf"{file.stem}\.py"
    assert re.search(rf"#\s+(python|torchrun)\b.*{started}", header)
    bare = [line for line in lines if re.match(r"\s*[\w.]+:\s*[^\s#]", line) and not re.search(r"\s#\s*\S", line)]
    assert not bare
