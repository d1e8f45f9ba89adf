# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Conversion: what comes out, that nothing of what was tuned is lost, and that exits stay with their backbone.

One run of the script as a user starts it; everything else calls `convert` in this process.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nemo")

from tests.helpers.megatron_models import (
    REFERENCE_MODEL,
    ROOT,
    exit_entry,
    exit_logits,
    microbatch,
    random_tokens,
    snapshot,
    user_environment,
)

import torch  # isort: skip  # after the CPU host is on

from nemo_ee.families.registry import FAMILIES
from tests.helpers.huggingface_models import (
    as_transformers_5_saves,
    change_config,
    reference_logits,
    save_tiny_model,
    tiny_model,
)
from tests.helpers.nemo_files import SCRIPT, members, restore, rewritten, run_convert, with_moved_exits, with_tokenizer

EXITS = [
    exit_entry(1, "mlp", "random"),
    exit_entry(2, "norm", "lora", "low_rank", rank=3),
    exit_entry(2, "layer", output="shared"),
]


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


# -- what comes out -------------------------------------------------------------------------------------------------


def test_the_script_as_a_user_runs_it(tmp_path: Path) -> None:
    """On the shipped reference model, from another directory."""
    command = [sys.executable, str(ROOT / "examples" / f"{SCRIPT}.py"), f"source={REFERENCE_MODEL}"]
    command += ["output=ee.nemo", "model.early_exit.every=1/4", "trainer.accelerator=cpu", "probe_tokens=8"]

    done = subprocess.run(command, cwd=tmp_path, env=user_environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    output = done.stdout + done.stderr
    assert "ee.nemo: exits layer3-mlp, layer6-mlp, layer9-mlp (new: layer3-mlp, layer6-mlp, layer9-mlp)" in output
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["ee.nemo", done.stderr.split()[3]], "only the log file is left behind"
    assert left[1].startswith(f"outputs/logs/{SCRIPT}-") and "[NeMo " in (tmp_path / left[1]).read_text("utf-8")
    assert "[NeMo " not in output and "GPU available" not in output
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


@pytest.mark.parametrize(
    ("name", "saved_by"),
    [("llama-llama3", 5), *((name, 5 if index % 2 else 4) for index, name in enumerate(FAMILIES) if name != "llama")],
)
def test_every_family_goes_through(name: str, saved_by: int, tmp_path: Path) -> None:
    """Written, read back, and the full model still equals transformers; exits equal what they were in memory.

    Whichever version of transformers saved the directory: its rotary settings and its tokenizer are read.
    """
    from transformers import AutoTokenizer

    from nemo_ee.commands.generate import stored_tokenizer
    from nemo_ee.models.connector import read_config

    folder = tmp_path / "source"
    reference = save_tiny_model(folder, name, **{"rope_theta": 5e5} if name == "mistral" else {})
    with_tokenizer(folder)
    if saved_by == 5:
        as_transformers_5_saves(folder)
    result = run_convert(folder, tmp_path / "ee.nemo", every="1/2", architecture="norm")
    assert result.logit_difference < 1e-5 and result.exits == ("layer2-norm",)
    model = restore(tmp_path / "ee.nemo", verify="full")
    tokens = random_tokens(model)
    with torch.no_grad():
        ours = model.model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)[..., : model.vocab_size]
    theirs = reference_logits(reference, tokens)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    text = "def naïve(x):  # 東京 🙂"
    ids = AutoTokenizer.from_pretrained(REFERENCE_MODEL)(text).input_ids
    assert model.tokenizer.text_to_ids(text) == ids
    assert stored_tokenizer(tmp_path / "ee.nemo", read_config(tmp_path / "ee.nemo")).text_to_ids(text) == ids


def test_weights_are_stored_in_the_source_s_precision(tmp_path: Path) -> None:
    from nemo_ee.checkpoint.chunk_reader import ChunkReader
    from nemo_ee.checkpoint.unpacked import open_nemo

    folder = tmp_path / "source"
    save_tiny_model(folder, "llama", dtype=torch.bfloat16)
    run_convert(with_tokenizer(folder), tmp_path / "ee.nemo", [exit_entry(1, "norm")])
    with open_nemo(tmp_path / "ee.nemo") as archive:
        stored = ChunkReader(archive.folder("model_weights")).keys()
        assert {info.dtype for info in stored.values()} == {torch.bfloat16}
    model = restore(tmp_path / "ee.nemo", verify="full")
    reference = tiny_model("llama", dtype=torch.bfloat16)
    assert torch.equal(model.model.decoder.final_layernorm.weight, reference.model.norm.weight.float())


def test_a_source_of_mixed_dtypes(tmp_path: Path) -> None:
    """bfloat16 matrices and float32 norms in several files: every tensor keeps its dtype through both conversions, and
    exports compute what transformers does with the same weights, rounded where the export is asked to."""
    import json

    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    from nemo_ee.checkpoint.chunk_reader import ChunkReader
    from nemo_ee.checkpoint.fingerprint import backbone_fingerprint
    from nemo_ee.checkpoint.huggingface import HuggingFaceSource
    from nemo_ee.checkpoint.unpacked import open_nemo
    from nemo_ee.export.huggingface.exporter import HuggingFaceSettings, export_huggingface

    folder = tmp_path / "source"
    save_tiny_model(folder, "llama", dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    tensors = {k: v.float() * 1.001 if v.ndim == 1 else v for k, v in tensors.items()}
    assert not torch.equal(tensors["model.norm.weight"], tensors["model.norm.weight"].bfloat16().float()), "control"
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({k: v for k, v in tensors.items() if places[k] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    run_convert(with_tokenizer(folder), tmp_path / "ee.nemo", [exit_entry(1, "norm")])
    run_convert(tmp_path / "ee.nemo", tmp_path / "more.nemo", [exit_entry(2, "mlp")], "verify=full")
    stored = HuggingFaceSource(folder)
    with open_nemo(tmp_path / "more.nemo") as archive:
        reader = ChunkReader(archive.folder("model_weights"))
        assert {k: i.dtype for k, i in reader.keys().items()} == {k: i.dtype for k, i in stored.keys().items()}
        assert backbone_fingerprint(reader, vocab_size=133) == backbone_fingerprint(stored)
    tokens = torch.randint(0, 133, (1, 16), generator=torch.Generator().manual_seed(2))
    for dtype, name in ((None, "bfloat16"), ("float32", "float32")):
        settings = {"targets": ("full",), "dtype": dtype, "progress": False, "output": tmp_path / name}
        out = export_huggingface(HuggingFaceSettings(checkpoint=tmp_path / "more.nemo", **settings)) / "hf_full"
        theirs = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
        for parameter in theirs.parameters():
            parameter.data = parameter.data.to(getattr(torch, name)).float()
        ours = AutoModelForCausalLM.from_pretrained(out, torch_dtype=torch.float32)
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == name
        expected = dict(theirs.named_parameters())
        assert all(torch.equal(value, expected[key]) for key, value in ours.named_parameters())
        assert torch.equal(reference_logits(ours, tokens), reference_logits(theirs, tokens))


def test_a_conversion_that_computes_something_else_is_refused(source: Path, tmp_path: Path, monkeypatch) -> None:
    """Control of the comparison with transformers: another rotary base, and nothing is written."""
    from nemo_ee.commands import convert

    right = convert.nemo_config
    monkeypatch.setattr(convert, "nemo_config", lambda architecture: right(architecture) | {"rotary_base": 500})
    change_config(shutil.copytree(source, tmp_path / "newer"), mup_width=3, transformers_version="9.0")
    for folder, reason in (
        (source, "reads all of its keys"),
        (tmp_path / "newer", "does not read its keys mup_width"),
    ):
        with pytest.raises(ValueError, match=r"logits differ from transformers' by .* nothing was written") as caught:
            run_convert(folder, tmp_path / "ee.nemo", EXITS)
        assert reason in str(caught.value) and "compare_with_transformers=False" in str(caught.value)
    assert "saved by transformers 9.0" in str(caught.value)
    shutil.rmtree(tmp_path / "newer")
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
        ({"name": mlp, "layer": 2}, [f"exit '{mlp}' is stored with layer=1 and set to layer=2"]),
        ({"name": mlp, "architecture": "norm"}, ["architecture=mlp and set to architecture=norm"]),
        ({"name": norm, "rank": 4, "init": "copy"}, ["init=lora and", "init=copy", "rank=3", "rank=4"]),
        ({"name": norm, "output": "own"}, ["output=low_rank and set to output=own"]),
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
