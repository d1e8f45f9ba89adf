# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Hugging Face directories against transformers: the backbone bitwise, every exit's logits, refusals, problems.

Logits in fp32, tolerance 1e-5 of the largest; weights and rounded weights bitwise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nemo")

from tests.helpers.megatron_models import exit_entry, exit_logits, random_tokens, relative_difference, tiny_pair
from tests.helpers.nemo_files import members, rewritten

import torch  # isort: skip  # after the CPU host is on
from safetensors.torch import load_file

from nemo_ee.checkpoint.huggingface import HuggingFaceSource
from nemo_ee.families.registry import FAMILIES
from tests.functional.test_export_tensorrt_llm import moved
from tests.helpers.huggingface_models import TINY_MODELS
from tests.helpers.huggingface_models import reference_logits as transformers_logits

TOLERANCE = 1e-5
# Every architecture, initialisation and kind of output, at the first, a middle and the last of three layers.
EXITS = [
    exit_entry(1, "mlp", "random"),
    exit_entry(2, "mlp", "lora", rank=2),
    exit_entry(3, "mlp", "copy", "low_rank", rank=3),
    exit_entry(1, "mlp", "copy", "shared"),
    exit_entry(2, "norm", "lora", "low_rank", rank=3),
    exit_entry(1, "norm", "copy"),
    exit_entry(2, "norm", "random", "shared"),
    exit_entry(2, "layer", "lora", "shared", rank=2),
    exit_entry(3, "layer", "copy"),
    exit_entry(1, "layer", "random", "low_rank", rank=2),
    exit_entry(3, "embedding"),
    exit_entry(1, "embedding", "copy", "low_rank", rank=2),
    exit_entry(2, "embedding", output="shared"),
]
# Three layers, so that an exit's layer says which one it is.
CHANGES = {name: {FAMILIES[family].keys["num_layers"]: 3} for name, (family, _) in TINY_MODELS.items()}


class Made:
    """A tiny model as transformers', as NeMo's, and as a `.nemo` that carries config.json as a conversion's does."""

    def __init__(
        self, folder: Path, name: str, exits: Sequence[dict] = EXITS, *, bundled: bool = True, **changes: Any
    ) -> None:
        self.source = folder / "hf"
        self.reference, self.model = tiny_pair(self.source, name, exits, changes=CHANGES[name] | changes)
        moved(self.model)
        if bundled:
            self.model.bundled_files = {
                f"tokenizer/{file}": self.source / file for file in ("config.json", "generation_config.json")
            }
        self.path = folder / f"{name}.nemo"
        self.model.save_to(str(self.path))
        if not bundled:  # as earlier versions wrote it: no tokenizer in it either
            whole = self.path.rename(folder / "whole.nemo")
            rewritten(whole, self.path, {name: None for name in members(whole) if name.startswith("tokenizer/")})
        self.tokens = random_tokens(self.model, length=12)
        self.logits = transformers_logits(self.reference, self.tokens)
        self.exits = exit_logits(self.model, self.tokens)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """(name, bundled) -> `Made`, each made once."""
    kept: dict[tuple[str, bool], Made] = {}

    def of(name: str, *, bundled: bool = True) -> Made:
        if (name, bundled) not in kept:
            kept[name, bundled] = Made(tmp_path_factory.mktemp(name), name, bundled=bundled)
        return kept[name, bundled]

    return of


def export(checkpoint: Path, output: Path, **settings: Any) -> Path:
    from nemo_ee.export.huggingface.exporter import HuggingFaceSettings, export_huggingface

    settings = {"progress": False, **settings, "checkpoint": checkpoint, "output": output}
    return export_huggingface(HuggingFaceSettings.from_config(settings))


def stock(folder: Path, **settings: Any):
    """The directory as transformers loads it; anything missing or left over is a problem."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, output_loading_info=True, attn_implementation="eager", **settings
    )
    assert not any(report.values()), report
    return model.eval()


# -- the backbone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_backbone_comes_back_bitwise(name: str, made, tmp_path: Path) -> None:
    """Names, shapes, numbers and class of the directory the model was converted from."""
    one = made(name)
    folder = export(one.path, tmp_path / "out", targets=("full",)) / "hf_full"
    ours, theirs = load_file(folder / "model.safetensors"), load_file(one.source / "model.safetensors")
    if name.startswith("opt"):
        # OPT's first two positions, which no token looks up, are not in a NeMo model and come back as zeros.
        key = "model.decoder.embed_positions.weight"
        assert not ours[key][:2].any()
        theirs[key][:2] = 0
    if name == "gpt2":
        assert theirs.keys() == ours.keys(), "a tied output is stored by neither"
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: tensor.shape for key, tensor in theirs.items()}
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    config, source = (json.loads((path / "config.json").read_text()) for path in (folder, one.source))
    if "rope_theta" in source:  # and once more in the spelling of transformers 5
        source["rope_scaling"] = source.get("rope_scaling")
        expected = source["rope_scaling"] or {"rope_type": "default"}
        assert config.pop("rope_parameters") == {**expected, "rope_theta": source["rope_theta"]}
    assert {k: v for k, v in source.items() if k != "transformers_version"} == config
    generation, source = (json.loads((path / "generation_config.json").read_text()) for path in (folder, one.source))
    assert generation == source
    assert torch.equal(transformers_logits(stock(folder), one.tokens), one.logits)
    HuggingFaceSource(folder)  # and the importer reads it without a problem
    if name == "opt":
        mask = torch.ones_like(one.tokens).index_fill(1, torch.arange(3), 0)  # [b, s], padded on the left
        ours, theirs = (m(one.tokens, attention_mask=mask).logits for m in (stock(folder), one.reference))
        assert torch.allclose(ours[:, 3:], theirs[:, 3:], rtol=0, atol=1e-6)
        assert not torch.allclose(ours[:, :3], theirs[:, :3], rtol=0, atol=1e-2), "control: padding has row 1"


@pytest.mark.parametrize("name", TINY_MODELS)
def test_without_the_original_config_a_family_is_chosen_by_what_it_computes(name: str, made, tmp_path: Path) -> None:
    one = made(name, bundled=False)
    model = stock(export(one.path, tmp_path / "out", targets=("full",)) / "hf_full")
    expected = {"mistral": "llama"}.get(name.split("-")[0], name.split("-")[0])
    assert model.config.model_type == expected
    assert relative_difference(transformers_logits(model, one.tokens), one.logits) <= TOLERANCE


# -- exits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY_MODELS)
def test_an_exit_s_logits_in_transformers(name: str, made, tmp_path: Path) -> None:
    one = made(name)
    output = export(one.path, tmp_path / "out", targets=("exits",))
    written = {folder.name.removeprefix("hf_exit_") for folder in output.glob("hf_exit_*")}
    refused = [exit["name"] for exit in EXITS if exit["architecture"] == "embedding" and not name.startswith("opt")]
    assert sorted([*written, *refused]) == sorted(exit["name"] for exit in EXITS)
    for exit in EXITS:
        if exit["name"] in refused:
            continue
        model = stock(output / f"hf_exit_{exit['name']}")
        assert model.config.num_hidden_layers == exit["layer"] + (exit["architecture"] == "layer")
        logits = transformers_logits(model, one.tokens)
        assert relative_difference(logits, one.exits[exit["name"]]) <= TOLERANCE, exit["name"]
        assert relative_difference(logits, one.logits) > 100 * TOLERANCE, "control: not the full model's"


# -- backbone and exits in one --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_runtime_s_logits(name: str, made, tmp_path: Path) -> None:
    from nemo_ee.generation.decoding_model import TokenPositions
    from nemo_ee.runtime.loader import load_model

    one = made(name)
    model = load_model(export(one.path, tmp_path / "out", targets=("early_exit",)) / "hf_early_exit")
    names = [point.name for point in model.exits]
    assert sorted(names) == sorted(one.exits)
    batch, length = one.tokens.shape
    positions = TokenPositions.of({row: range(length) for row in range(batch)})
    cache = model.new_cache(batch, length, tuple(names))
    hidden, depth = model.embed(one.tokens.flatten(), positions), 0
    for point in model.exits:
        hidden, depth = model.run(hidden, positions, depth, point.stop, cache), point.stop
        logits = model.exit_logits(point.name, hidden, positions, cache).view(batch, length, -1)
        assert relative_difference(logits, one.exits[point.name]) <= TOLERANCE, point.name
    hidden = model.run(hidden, positions, depth, 2 * model.num_layers, cache)
    logits = model.exit_logits(None, hidden, positions, cache).view(batch, length, -1)
    assert relative_difference(logits, one.logits) <= TOLERANCE
