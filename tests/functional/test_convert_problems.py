# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Conversion: what is refused before any long work, writes that fail, and files that somebody made to do harm."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("nemo")

from tests.helpers.megatron_models import (
    exit_entry,
    exit_logits,
    random_tokens,
    script_config,
)

import torch  # isort: skip  # after the CPU host is on
from omegaconf import OmegaConf

from tests.functional.test_convert import EXITS
from tests.helpers.huggingface_models import save_tiny_model
from tests.helpers.nemo_files import SCRIPT, members, restore, rewritten, run_convert, with_moved_exits, with_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as a Hugging Face directory with a tokenizer."""
    folder = tmp_path_factory.mktemp("source")
    save_tiny_model(folder, "llama")
    return with_tokenizer(folder)


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "ee.nemo"
    run_convert(source, output, EXITS)
    return output


@pytest.fixture(scope="module")
def tuned(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_moved_exits(converted, tmp_path_factory.mktemp("tuned") / "tuned.nemo")


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long work in these tests is a failure."""
    from nemo_ee.commands import convert as module

    monkeypatch.setattr(module, "single_run_trainer", lambda *_: pytest.fail("work began before the problems came"))


FAULTY = {
    "no source": ({"source": "/nowhere"}, [], {}, ["source='/nowhere' does not exist"]),
    "suffix": ({"output": "x.ckpt"}, EXITS, {}, ["output=", "x.ckpt' must end in .nemo"]),
    "no exits": ({}, [], {}, ["has no exits; add model.early_exit.every=1/4"]),
    "layer 0": ({}, [{"layer": 0}], {}, ["exits[0].layer = 0", "1..3"]),
    "too deep": ({}, [{"layer": 4}], {}, ["exits[0].layer = 4", "the model has 3 layers"]),
    "same names": ({}, [{"layer": 1}, {"layer": 1}], {}, ["exits[1].name = 'layer1-mlp'", "already the name"]),
    "reserved name": ({}, [{"layer": 1, "name": "final"}], {}, ["'final'", "reserved"]),
    "unsafe name": ({}, [{"layer": 1, "name": "../x"}], {}, ["'../x'", "must match"]),
    "unknown values": (
        {},
        [{"layer": 1, "architecture": "MLP", "init": "zero", "output": "none"}],
        {},
        ["architecture = 'MLP'", "init = 'zero'", "output = 'none'"],
    ),
    "unknown key of an exit": ({}, [{"layer": 1, "weight": 2}], {}, ["exits[0].weight = 2", "is not a key"]),
    "unknown shorthand": ({}, [], {"every": "0.25"}, ["every = '0.25'", "1/8"]),
    "unknown objective": ({}, EXITS, {"objective": "imitation"}, ["objective = 'imitation'", "distillation"]),
    "too long": ({"model.encoder_seq_length": 999}, EXITS, {}, ["999", "1..32"]),
    "several": (
        {"output": "x.bin", "model.tensor_model_parallel_size": 3},
        [{"layer": 9}, {"layer": 1, "init": "?"}],
        {"train": "joint", "objective": "mixed", "token_weights": "confidence", "distillation": {"top_k": 8}},
        [
            "must end in .nemo",
            "layer = 9",
            "init = '?'",
            "train='joint'",
            "objective='mixed'",
            "distillation={'top_k': 8}",
            "token_weights='confidence'",
            "tensor_model_parallel_size=3",
        ],
    ),
}


@pytest.mark.parametrize("what", FAULTY)
def test_problems_are_told_before_any_work(what: str, source: Path, tmp_path: Path, nothing_is_built: None) -> None:
    overrides, exits, block, expected = FAULTY[what]
    overrides = dict(overrides)
    origin, output = overrides.pop("source", source), tmp_path / overrides.pop("output", "ee.nemo")
    with pytest.raises(ValueError, match="nothing was converted:") as caught:
        run_convert(origin, output, exits, *(f"{k}={v}" for k, v in overrides.items()), **block)
    for text in expected:
        assert text in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_existing_outputs_and_the_source_itself(source: Path, tuned: Path, tmp_path: Path, nothing_is_built) -> None:
    output = tmp_path / "ee.nemo"
    output.write_text("precious")
    with pytest.raises(ValueError, match=r"ee.nemo' exists; choose another name or add overwrite=True"):
        run_convert(source, output, EXITS)
    with pytest.raises(ValueError, match="is the source itself"):
        run_convert(tuned, tuned, [exit_entry(3, "mlp")], "overwrite=True")
    folder = tmp_path / "folder.nemo"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"folder.nemo' is a directory"):
        run_convert(source, folder, EXITS, "overwrite=True")
    assert output.read_text() == "precious"


def test_weights_that_are_not_finite_are_named(source: Path, tuned: Path, tmp_path: Path) -> None:
    """Of a Hugging Face directory and of a `.nemo`, of its exits too; nothing is written."""
    import shutil

    from safetensors.torch import load_file, save_file

    bad = Path(shutil.copytree(source, tmp_path / "bad"))
    tensors = load_file(bad / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, :3] = float("nan")
    tensors["model.norm.weight"][5] = float("inf")
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})
    expected = r"""(?s)bad holds weights that are not finite:
  model.safetensors: model.layers.1.mlp.up_proj.weight: 3 NaN and 0 infinite of 2240 numbers
  model.safetensors: model.norm.weight: 0 NaN and 1 infinite of 40 numbers
.*get the file again"""
    with pytest.raises(ValueError, match=expected):
        run_convert(bad, tmp_path / "ee.nemo", EXITS)
    model = restore(tuned)
    next(iter(model.model.exits.parameters())).data.view(-1)[2] = float("nan")
    model.save_to(str(tmp_path / "diverged.nemo"))
    expected = r"diverged.nemo: exit_weights/ holds weights that are not finite:\n  .*distcp: exits\..*: 1 NaN and 0"
    with pytest.raises(ValueError, match=expected):
        run_convert(tmp_path / "diverged.nemo", tmp_path / "ee.nemo", [exit_entry(3, "mlp")])
    assert not (tmp_path / "ee.nemo").exists()


def test_an_exits_only_source_says_what_to_set(source, tuned: Path, tmp_path: Path, nothing_is_built: None) -> None:
    no_backbone = {name: None for name in members(tuned) if name.startswith("model_weights/")}
    small = rewritten(tuned, tmp_path / "small.nemo", no_backbone)
    expected = r"(?s)nothing was converted:.*small.nemo holds exits only; .*give model.backbone_path=<the .nemo"
    with pytest.raises(ValueError, match=expected):
        run_convert(small, tmp_path / "ee.nemo", [exit_entry(3, "mlp")])
    with pytest.raises(pytest.fail.Exception, match="work began"):  # the base is found, so work begins
        run_convert(small, tmp_path / "ee.nemo", [exit_entry(3, "mlp")], f"model.backbone_path={tuned}")


def test_overwriting_is_asked_for(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "ee.nemo"
    output.write_text("old")
    run_convert(source, output, [exit_entry(1, "norm")], "overwrite=True")
    assert "model_config.yaml" in members(output)


def test_unknown_keys_of_the_block_are_refused(source: Path, tmp_path: Path, nothing_is_built: None) -> None:
    with script_config(
        SCRIPT, [f"source={source}", f"output={tmp_path / 'x.nemo'}", "+model.early_exit.evry=1/2"]
    ) as cfg:
        from nemo_ee.commands.convert import convert

        with pytest.raises(
            ValueError, match=r"early_exit.evry = '1/2': is not a key of this block \(did you mean every"
        ):
            convert(cfg)


def test_damaged_sources_are_refused(tuned: Path, source: Path, tmp_path: Path, nothing_is_built: None) -> None:
    content = tuned.read_bytes()
    (tmp_path / "cut.nemo").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.nemo").write_text("not an archive")
    empty = tmp_path / "empty"
    empty.mkdir()
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_bytes((source / "config.json").read_bytes())
    rewritten(tuned, tmp_path / "asr.nemo", {"model_config.yaml": b"encoder: {_target_: x}\n"})
    rewritten(tuned, tmp_path / "yaml.nemo", {"model_config.yaml": b"a: [1,\n"})
    rewritten(tuned, tmp_path / "deep.nemo", {"model_config.yaml": b"a: " + b"[" * 3000 + b"]" * 3000})
    rewritten(tuned, tmp_path / "long.nemo", {"model_config.yaml": b"num_layers: " + b"9" * 5000})
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        shutil.copytree(source, tmp_path / f"deep-{name}")
        (tmp_path / f"deep-{name}" / name).write_text('{"a":\n' + "[" * 3000)
    for name, message in (
        ("cut.nemo", "damaged or truncated|truncated"),
        ("text.nemo", "not a .nemo archive, or damaged"),
        ("empty", "config.json"),
        ("half", "safetensors"),
        ("asr.nemo", "num_layers"),
        ("yaml.nemo", "model_config.yaml"),
        ("deep.nemo", "model_config.yaml is damaged"),
        ("long.nemo", "model_config.yaml is damaged"),
        ("deep-config.json", r"deep-config.json/config.json:2: nested too deeply"),
        ("deep-tokenizer_config.json", r"/tokenizer_config.json:2: nested too deeply"),
        ("deep-tokenizer.json", r"/tokenizer.json:2: nested too deeply"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            run_convert(tmp_path / name, tmp_path / "out.nemo", [exit_entry(1, "mlp")])
        assert name in str(caught.value) and "nothing was converted" in str(caught.value)
    assert not (tmp_path / "out.nemo").exists()


def test_a_tokenizer_with_more_ids_than_the_model_is_warned_of(source: Path, monkeypatch) -> None:
    """The tiny model has 133 rows, the reference model's tokenizer 4096 ids."""
    from transformers import AutoTokenizer

    from nemo_ee.commands import convert as module

    warnings: list[str] = []
    monkeypatch.setattr(module.logger, "warning", warnings.append)
    tokenizer = AutoTokenizer.from_pretrained(source)
    for size in (4096, 4094, 133):
        model = SimpleNamespace(tokenizer=SimpleNamespace(tokenizer=tokenizer), vocab_size=size)
        module._warn_of_tokens_without_rows(model)
    last = [f"{number} {tokenizer.convert_ids_to_tokens(number)!r}" for number in (4094, 4095)]
    assert len(warnings) == 2
    assert f"2 token ids outside the model's vocabulary 0..4093: {', '.join(last)}. Tuning" in warnings[0]
    assert "the tokenizer has 3963 token ids outside the model's vocabulary 0..132: 133 " in warnings[1]
    module._warn_of_tokens_without_rows(SimpleNamespace(tokenizer=object(), vocab_size=1))


def test_damaged_weights_are_refused(tuned: Path, tmp_path: Path) -> None:
    """A cut weight file, a missing one, and weights of another shape than the config says."""
    content = members(tuned)
    weights = next(name for name in content if name.startswith("exit_weights/") and name.endswith(".distcp"))
    key = weights
    rewritten(tuned, tmp_path / "cut.nemo", {key: content[weights][:100]})
    missing = {n: None for n in content if n.startswith("exit_weights/") and n.endswith(".distcp")}
    rewritten(tuned, tmp_path / "gone.nemo", missing)
    wrong = content["model_config.yaml"].replace(b"ffn_hidden_size: 56", b"ffn_hidden_size: 64")
    assert wrong != content["model_config.yaml"]
    rewritten(tuned, tmp_path / "shape.nemo", {"model_config.yaml": wrong})
    for name in ("cut.nemo", "gone.nemo"):
        with pytest.raises(ValueError, match="distcp|exit_weights"):
            restore(tmp_path / name)
    with pytest.raises(ValueError, match=r"wrong shape.*(.|\n)*linear_fc1.weight: \(3, 112, 40\) in the checkpoint"):
        restore(tmp_path / "shape.nemo")


# -- nothing half-written -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", ["the rename fails", "the disk is full", "the weights cannot be written"])
def test_a_failed_write_leaves_nothing(problem: str, source: Path, tmp_path: Path, monkeypatch) -> None:
    from megatron.core import dist_checkpointing

    from nemo_ee.checkpoint import nemo_archive

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if problem == "the rename fails":
        monkeypatch.setattr(nemo_archive.os, "replace", fail)
    elif problem == "the disk is full":
        monkeypatch.setattr(tarfile.TarFile, "addfile", fail)
    else:
        monkeypatch.setattr(dist_checkpointing, "save", fail)
    output = tmp_path / "ee.nemo"
    output.write_text("the old file")
    with pytest.raises((OSError, ValueError), match="No space left on device"):
        run_convert(source, output, EXITS, "overwrite=True")
    assert [path.name for path in tmp_path.iterdir()] == ["ee.nemo"]
    assert output.read_text() == "the old file"


def test_a_file_that_reads_back_differently_is_removed(source: Path, tmp_path: Path, monkeypatch) -> None:
    from nemo_ee.commands import convert as module

    real = module.full_model_logits
    calls = []

    def logits(model, tokens):
        calls.append(model)
        return real(model, tokens) + (1e-6 if len(calls) > 1 else 0.0)

    monkeypatch.setattr(module, "full_model_logits", logits)
    with pytest.raises(ValueError, match=r"reads back with other logits; it was removed. Check the disk"):
        run_convert(source, tmp_path / "ee.nemo", EXITS)
    assert list(tmp_path.iterdir()) == [] and len(calls) == 2


# -- files that were not written by us ------------------------------------------------------------------------------


class _RunsCode:
    """Pickles to a call that leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("member", ["exit_weights/.metadata", "model_weights/.metadata"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(member: str, tuned: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    evil = pickle.dumps(_RunsCode(mark))
    path = rewritten(tuned, tmp_path / "evil.nemo", {member: evil})
    with pytest.raises(ValueError, match=r"\.metadata: refused, it needs (posix|os)\.mkdir"):
        restore(path)
    with pytest.raises(ValueError, match="refused"):
        run_convert(path, tmp_path / "out.nemo", [exit_entry(3, "mlp")])
    assert not mark.exists() and not (tmp_path / "out.nemo").exists()
    pickle.loads(evil)
    assert mark.exists(), "control: the pickle does run code"


@pytest.mark.parametrize("member", ["exit_weights/common.pt", "model_weights/common.pt"])
def test_pickled_common_state_is_never_read(member: str, tuned: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = rewritten(tuned, tmp_path / "evil.nemo", {member: pickle.dumps(_RunsCode(mark))})
    one, other = (exit_logits(model, random_tokens(model)) for model in (restore(path), restore(tuned)))
    assert all(torch.equal(one[name], other[name]) for name in other) and not mark.exists()


def test_another_target_in_the_config_is_not_imported(tuned: Path, tmp_path: Path, monkeypatch) -> None:
    """`target` and Hydra's `_target_` name importable classes; loading builds our own class all the same."""
    (tmp_path / "planted_module.py").write_text(
        "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = OmegaConf.create(members(tuned)["model_config.yaml"].decode())
    evil = copy.deepcopy(config)
    evil.target = "planted_module.Model"
    evil._target_ = "planted_module.Model"
    evil.tokenizer._target_ = "planted_module.Tokenizer"
    path = rewritten(tuned, tmp_path / "evil.nemo", {"model_config.yaml": OmegaConf.to_yaml(evil).encode()})
    model = restore(path)
    assert type(model).__name__ == "MegatronEarlyExitGPTModel" and model.cfg.target == config.target
    run_convert(path, tmp_path / "out.nemo", [exit_entry(3, "mlp")])
    assert not (tmp_path / "planted_module.ran").exists() and "planted_module" not in sys.modules
    import planted_module  # noqa: F401 -- control: it is importable and leaves its mark

    assert (tmp_path / "planted_module.ran").exists()
