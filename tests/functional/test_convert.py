# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Conversion: what comes out, that nothing of what was tuned is lost, and what is refused before any long work.

One run of the script as a user starts it; everything else calls `convert` in this process.
"""

from __future__ import annotations

import copy
import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nemo")

from tests.helpers.megatron_models import (
    REFERENCE_MODEL,
    ROOT,
    cpu_trainer,
    exit_entry,
    exit_logits,
    microbatch,
    random_tokens,
    reset_batch_sizes,
    script_config,
    snapshot,
    user_environment,
)

import torch  # isort: skip  # after the CPU host is on
from omegaconf import OmegaConf

from tests.helpers.huggingface_models import reference_logits, save_tiny_model, tiny_model

SCRIPT = "megatron_gpt_early_exit_convert"
EXITS = [
    exit_entry(1, "mlp", "random"),
    exit_entry(2, "norm", "lora", "low_rank", rank=3),
    exit_entry(2, "layer", output="shared"),
]


def run_convert(source: Path, output: Path, exits: Sequence[dict] = (), *overrides: str, **early_exit: Any):
    """`convert` with the script's yaml."""
    import nemo_ee.models  # noqa: F401
    from nemo_ee.convert.convert import convert

    reset_batch_sizes()
    given = [f"source={source}", f"output={output}", "probe_tokens=16", "model.make_vocab_size_divisible_by=16"]
    with script_config(SCRIPT, [*given, *overrides]) as cfg:
        cfg.model.early_exit = OmegaConf.merge(cfg.model.early_exit, {"exits": list(exits), **early_exit})
        return convert(cfg)


def restore(path: Path, *, verify: str = "stored", exits_only: bool = False, **changes: Any):
    """The model of a `.nemo`, full depth."""
    import nemo_ee.models  # noqa: F401
    from nemo_ee.models.connector import EarlyExitSaveRestoreConnector, read_config
    from nemo_ee.models.megatron_early_exit_gpt_model import MegatronEarlyExitGPTModel
    from nemo_ee.models.run_config import merge_model_config

    reset_batch_sizes()
    config = merge_model_config(read_config(path), OmegaConf.create({"full_depth": True, **changes}))
    return MegatronEarlyExitGPTModel.restore_from(
        str(path),
        override_config_path=config,
        trainer=cpu_trainer(),
        save_restore_connector=EarlyExitSaveRestoreConnector(verify=verify, exits_only=exits_only),
    )


def with_tokenizer(folder: Path) -> Path:
    for file in REFERENCE_MODEL.glob("*token*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {
            info.name.removeprefix("./"): tar.extractfile(info).read() for info in tar.getmembers() if info.isreg()
        }


def rewritten(path: Path, output: Path, changes: Mapping[str, bytes | None]) -> Path:
    """A copy of an archive with members replaced; None leaves one out."""
    content: dict[str, bytes | None] = {**members(path), **changes}
    with tarfile.open(output, "w") as tar:
        for name, data in content.items():
            if data is None:
                continue
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return output


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
    """The converted model with every trainable parameter of its exits moved, as tuning would leave it."""
    model = restore(converted)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.model.exits.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    output = tmp_path_factory.mktemp("tuned") / "tuned.nemo"
    model.save_to(str(output))
    return output


# -- what comes out -------------------------------------------------------------------------------------------------


def test_the_script_as_a_user_runs_it(tmp_path: Path) -> None:
    """On the shipped reference model, from another directory."""
    command = [sys.executable, str(ROOT / "examples" / f"{SCRIPT}.py"), f"source={REFERENCE_MODEL}"]
    command += ["output=ee.nemo", "model.early_exit.every=1/4", "trainer.accelerator=cpu", "probe_tokens=8"]

    done = subprocess.run(command, cwd=tmp_path, env=user_environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    output = done.stdout + done.stderr
    assert "ee.nemo: exits layer3-mlp, layer6-mlp, layer9-mlp (new: layer3-mlp, layer6-mlp, layer9-mlp)" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ee.nemo"], "nothing else is left behind"
    names = set(members(tmp_path / "ee.nemo"))
    assert {"model_config.yaml", "model_weights/.metadata", "exit_weights/.metadata"} <= names
    assert "tokenizer/tokenizer.json" in names


def test_result_and_stored_config(source: Path, converted: Path, tmp_path: Path) -> None:
    from nemo_ee.models.connector import read_config

    result = run_convert(source, tmp_path / "again.nemo", EXITS)
    names = tuple(exit["name"] for exit in EXITS)
    assert result.exits == names == result.added and result.output == tmp_path / "again.nemo"
    assert result.logit_difference < 1e-5
    config = read_config(converted)
    assert config.backbone_fingerprint == result.fingerprint and len(result.fingerprint) == 64
    assert [exit.name for exit in config.early_exit.exits] == list(names)
    assert config.target.endswith("MegatronEarlyExitGPTModel")
    for key in ("full_depth", "restore_from_path", "_stored_exits", "precision"):
        assert key not in config, "belongs to the run"
    assert config.transformer_engine is True, "what the CPU host needs is not stored"
    assert config.get("use_cpu_initialization") is None
    assert str(source) not in members(converted)["model_config.yaml"].decode().replace(str(config.tokenizer.type), "")


@pytest.mark.parametrize("name", ["gpt2", "opt", "qwen2", "mistral"])
def test_every_family_goes_through(name: str, tmp_path: Path) -> None:
    """Written, read back, and the full model still equals transformers; exits equal what they were in memory."""
    folder = tmp_path / "source"
    reference = save_tiny_model(folder, name)
    with_tokenizer(folder)
    result = run_convert(folder, tmp_path / "ee.nemo", every="1/2", architecture="norm")
    assert result.logit_difference < 1e-5 and result.exits == ("layer2-norm",)
    model = restore(tmp_path / "ee.nemo", verify="full")
    tokens = random_tokens(model)
    with torch.no_grad():
        ours = model.model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)[..., : model.vocab_size]
    theirs = reference_logits(reference, tokens)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_weights_are_stored_in_the_source_s_precision(tmp_path: Path) -> None:
    from nemo_ee.checkpoint.chunk_reader import ChunkReader
    from nemo_ee.checkpoint.nemo_archive import open_nemo

    folder = tmp_path / "source"
    save_tiny_model(folder, "llama", dtype=torch.bfloat16)
    run_convert(with_tokenizer(folder), tmp_path / "ee.nemo", [exit_entry(1, "norm")])
    with open_nemo(tmp_path / "ee.nemo") as unpacked:
        stored = ChunkReader(unpacked / "model_weights").keys()
        assert {info.dtype for info in stored.values()} == {torch.bfloat16}
    model = restore(tmp_path / "ee.nemo", verify="full")
    reference = tiny_model("llama", dtype=torch.bfloat16)
    assert torch.equal(model.model.decoder.final_layernorm.weight, reference.model.norm.weight.float())


def test_a_conversion_that_computes_something_else_is_refused(source: Path, tmp_path: Path, monkeypatch) -> None:
    """Control of the comparison with transformers: another rotary base, and nothing is written."""
    from nemo_ee.checkpoint.huggingface_backbone import HuggingFaceBackbone

    right = HuggingFaceBackbone.nemo_config
    monkeypatch.setattr(HuggingFaceBackbone, "nemo_config", lambda self: right(self) | {"rotary_base": 500})
    with pytest.raises(ValueError, match=r"logits differ from transformers' by .* nothing was written"):
        run_convert(source, tmp_path / "ee.nemo", EXITS)
    assert list(tmp_path.iterdir()) == []


# -- tuned exits survive --------------------------------------------------------------------------------------------


def test_adding_exits_keeps_the_tuned_ones_bitwise(tuned: Path, tmp_path: Path) -> None:
    added = [exit_entry(3, "mlp"), exit_entry(1, "embedding")]
    result = run_convert(tuned, tmp_path / "more.nemo", added)
    assert result.added == tuple(exit["name"] for exit in added)
    assert result.exits == tuple(exit["name"] for exit in (*EXITS, *added))
    old, new = restore(tuned), restore(tmp_path / "more.nemo")
    for head in old.model.exits:
        theirs = dict(new.model.exits[head.exit.name].named_parameters())
        for name, value in head.named_parameters():
            assert torch.equal(value, theirs[name]), (head.exit.name, name)
    tokens = random_tokens(old)
    was, now = exit_logits(old, tokens), exit_logits(new, tokens)
    assert all(torch.equal(was[name], now[name]) for name in was)
    fresh = exit_logits(restore(tuned, early_exit={"exits": [{**EXITS[0], "name": "new"}]}), tokens)["new"]
    assert not torch.equal(fresh, was[EXITS[0]["name"]]), "control: an exit under a new name starts anew"
    kept = {name: data for name, data in members(tuned).items() if name.startswith(("model_weights/", "tokenizer/"))}
    assert kept and {name: members(tmp_path / "more.nemo")[name] for name in kept} == kept, "byte for byte"


def test_a_stored_exit_is_not_rebuilt_as_another(tuned: Path, tmp_path: Path) -> None:
    """Weights tuned for one place would silently be used, in part, in another."""
    mlp, norm = EXITS[0]["name"], EXITS[1]["name"]
    for changed, told in (
        ({"name": mlp, "layer": 2}, [f"exit '{mlp}' is stored with layer=1 and asked for with layer=2"]),
        ({"name": mlp, "architecture": "norm"}, ["architecture=mlp and asked for with architecture=norm"]),
        ({"name": norm, "rank": 4, "init": "copy"}, ["init=lora and", "init=copy", "rank=3", "rank=4"]),
        ({"name": norm, "output": "own"}, ["output=low_rank and asked for with output=own"]),
    ):
        with pytest.raises(ValueError, match="another name to start a new one") as caught:
            restore(tuned, early_exit={"exits": [changed]})
        assert all(text in str(caught.value) for text in told), str(caught.value)
    with pytest.raises(ValueError, match="already the name of"):
        run_convert(tuned, tmp_path / "x.nemo", [{**EXITS[0], "layer": 2}])
    harmless = {"name": norm, "lr": 0.5, "loss_weight": 0.25}
    assert restore(tuned, early_exit={"exits": [harmless]}).early_exit.exits[0].loss_weight == 0.25


def test_exits_only_and_base_equal_the_complete_file(tuned: Path, converted: Path, tmp_path: Path) -> None:
    model = restore(tuned, exits_only=True)
    model.backbone_path = str(converted)  # any file that holds the same backbone
    small = tmp_path / "exits.nemo"
    model._save_restore_connector.save_to(model, str(small))
    assert not any(name.startswith("model_weights/") for name in members(small))
    again = restore(small)
    whole = restore(tuned)
    assert again.backbone_path == str(converted)
    tokens = random_tokens(whole)
    one, other = exit_logits(whole, tokens), exit_logits(again, tokens)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert {n: v.sum() for n, v in snapshot(whole.model).items()} == {
        n: v.sum() for n, v in snapshot(again.model).items()
    }

    moved = tmp_path / "base.nemo"
    moved.write_bytes(converted.read_bytes())
    assert restore(small, backbone_path=str(moved)).backbone_path == str(moved)
    with pytest.raises(ValueError, match=r"holds exits only; its base model \('/nowhere.nemo'\) was not found"):
        restore(small, backbone_path="/nowhere.nemo")
    with pytest.raises(ValueError, match="exits.nemo"):
        restore(small, backbone_path=str(small))
    # An exits-only file is completed by saving it in full.
    again.save_to(str(tmp_path / "whole.nemo"))
    assert members(tmp_path / "whole.nemo")["model_weights/.metadata"] == members(converted)["model_weights/.metadata"]


# -- the backbone belongs to the exits ------------------------------------------------------------------------------


def _with_backbone_of(tuned: Path, other: Path, output: Path) -> Path:
    """The exits and config of one file, the weights of another."""
    content = members(other)
    weights = {n: d for n, d in content.items() if n.startswith("model_weights/")}
    return rewritten(tuned, output, weights)


def test_another_backbone_is_refused(tuned: Path, tmp_path: Path) -> None:
    other_source = tmp_path / "other"
    save_tiny_model(other_source, "llama", seed=1)
    run_convert(with_tokenizer(other_source), tmp_path / "other.nemo", [exit_entry(1, "norm")])
    restore(tuned, verify="full")
    model = restore(tuned, exits_only=True)
    model._save_restore_connector.save_to(model, str(tmp_path / "exits.nemo"))
    with pytest.raises(ValueError, match=r"the backbone with fingerprint \w{64}, but .*other.nemo has \w{64}"):
        restore(tmp_path / "exits.nemo", backbone_path=str(tmp_path / "other.nemo"))
    # Swapped inside the file: the stored fingerprints cannot show it, a full check does.
    swapped = _with_backbone_of(tuned, tmp_path / "other.nemo", tmp_path / "swapped.nemo")
    with pytest.raises(ValueError, match="give the base model they were tuned on"):
        restore(swapped, verify="full")
    with pytest.raises(ValueError, match="give the base model they were tuned on"):
        run_convert(swapped, tmp_path / "x.nemo", [exit_entry(3, "mlp")], "verify=full")


def test_a_wrong_backbone_is_refused_before_it_is_unpacked(tuned: Path, tmp_path: Path, monkeypatch) -> None:
    from nemo_ee.models import connector

    base = rewritten(
        tuned, tmp_path / "base.nemo",
        {"model_config.yaml": members(tuned)["model_config.yaml"].replace(b"fingerprint: ", b"fingerprint: 0")},
    )  # fmt: skip
    no_backbone = {n: None for n in members(tuned) if n.startswith("model_weights/")}
    small = rewritten(tuned, tmp_path / "small.nemo", no_backbone)
    monkeypatch.setattr(connector, "open_nemo", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(ValueError, match="give the base model they were tuned on"):
        restore(small, backbone_path=str(base))


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long work in these tests is a failure."""
    from nemo_ee.convert import convert as module

    monkeypatch.setattr(module, "single_run_trainer", lambda *_: pytest.fail("work began before the faults were told"))


FAULTY = {
    "no source": ({"source": "/nowhere"}, [], {}, ["source=/nowhere does not exist"]),
    "suffix": ({"output": "x.ckpt"}, EXITS, {}, ["output=", "x.ckpt must end in .nemo"]),
    "no exits": ({}, [], {}, ["asks for no exits; add model.early_exit.every=1/4"]),
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
        {"train": "joint"},
        ["must end in .nemo", "layer = 9", "init = '?'", "train='joint'", "tensor_model_parallel_size=3"],
    ),
}


@pytest.mark.parametrize("what", FAULTY)
def test_faults_are_told_before_any_work(what: str, source: Path, tmp_path: Path, nothing_is_built: None) -> None:
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
    with pytest.raises(ValueError, match=r"ee.nemo exists; choose another name or add overwrite=True"):
        run_convert(source, output, EXITS)
    with pytest.raises(ValueError, match="is the source itself"):
        run_convert(tuned, tuned, [exit_entry(3, "mlp")], "overwrite=True")
    folder = tmp_path / "folder.nemo"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"folder.nemo is a directory"):
        run_convert(source, folder, EXITS, "overwrite=True")
    assert output.read_text() == "precious"


def test_overwriting_is_asked_for(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "ee.nemo"
    output.write_text("old")
    run_convert(source, output, [exit_entry(1, "norm")], "overwrite=True")
    assert "model_config.yaml" in members(output)


def test_unknown_keys_of_the_block_are_refused(source: Path, tmp_path: Path, nothing_is_built: None) -> None:
    with script_config(
        SCRIPT, [f"source={source}", f"output={tmp_path / 'x.nemo'}", "+model.early_exit.evry=1/2"]
    ) as cfg:
        from nemo_ee.convert.convert import convert

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
    for name, message in (
        ("cut.nemo", "damaged or truncated|truncated"),
        ("text.nemo", "not a .nemo archive, or damaged"),
        ("empty", "config.json"),
        ("half", "safetensors"),
        ("asr.nemo", "num_layers"),
        ("yaml.nemo", "model_config.yaml"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            run_convert(tmp_path / name, tmp_path / "out.nemo", [exit_entry(1, "mlp")])
        assert name in str(caught.value) and "nothing was converted" in str(caught.value)
    assert not (tmp_path / "out.nemo").exists()


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


@pytest.mark.parametrize("fault", ["the rename fails", "the disk is full", "the weights cannot be written"])
def test_a_failed_write_leaves_nothing(fault: str, source: Path, tmp_path: Path, monkeypatch) -> None:
    from megatron.core import dist_checkpointing

    from nemo_ee.checkpoint import nemo_archive

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if fault == "the rename fails":
        monkeypatch.setattr(nemo_archive.os, "replace", fail)
    elif fault == "the disk is full":
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
    from nemo_ee.convert import convert as module

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
    with pytest.raises(ValueError, match=r"\.metadata: refused, it asks for (posix|os)\.mkdir"):
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


def test_the_fingerprint_does_not_depend_on_the_way_in(source: Path, tuned: Path, tmp_path: Path) -> None:
    """From Hugging Face, from .nemo, with other padding: one backbone, one fingerprint."""
    first = run_convert(source, tmp_path / "a.nemo", EXITS, "model.make_vocab_size_divisible_by=128")
    second = run_convert(tuned, tmp_path / "b.nemo", [exit_entry(3, "mlp")], "verify=full")
    assert first.fingerprint == second.fingerprint
    digests = [hashlib.sha256(members(tmp_path / n)["model_config.yaml"]).hexdigest() for n in ("a.nemo", "b.nemo")]
    assert digests[0] != digests[1], "control: two different files"
    model = restore(tmp_path / "a.nemo", verify="full")
    batch = microbatch(random_tokens(model))
    assert model.model.forward_to_taps(batch).hidden.isfinite().all()
