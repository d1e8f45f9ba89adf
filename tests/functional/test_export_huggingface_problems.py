# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face export as a user starts it: other sources, refusals, interruption, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nemo")

from tests.helpers.megatron_models import ROOT, exit_entry, relative_difference

import torch  # isort: skip  # after the CPU host is on
import yaml
from safetensors.torch import load_file

from nemo_ee.export.manifest import MANIFEST
from nemo_ee.export.source import EarlyExitSource
from nemo_ee.export.verify import verify_export
from tests.functional.test_export_huggingface import TOLERANCE, Made, export, stock
from tests.functional.test_export_problems import run_script
from tests.functional.test_export_tensorrt_llm import moved
from tests.helpers.huggingface_models import reference_logits as transformers_logits
from tests.helpers.nemo_files import members, restore, rewritten

EXITS = [exit_entry(1, "mlp"), exit_entry(2, "layer", output="shared"), exit_entry(3, "embedding")]
MLP, LAYER, EMBEDDING = (exit["name"] for exit in EXITS)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("llama"), "llama", EXITS)


@pytest.fixture(scope="module")
def exported(one: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(one.path, tmp_path_factory.mktemp("exported") / "out")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_scripts_as_a_user_runs_them(one: Made, tmp_path: Path) -> None:
    output = tmp_path / "new" / "export"
    settings = [f"checkpoint={one.path}", f"output={output}", "dtype=bfloat16"]
    done = run_script("export_huggingface.py", *settings)
    assert done.returncode == 0, done.stderr
    assert f"no hf_exit_{EMBEDDING}: an embedding exit has no norm" in done.stderr
    assert [path.name for path in output.parent.iterdir()] == ["export"]
    directories = {"hf_full", f"hf_exit_{MLP}", f"hf_exit_{LAYER}", "hf_early_exit"}
    assert {path.name for path in output.iterdir()} == {*directories, MANIFEST}
    manifest = json.loads((output / MANIFEST).read_text())
    assert {artifact["directory"] for artifact in manifest["artifacts"]} == directories
    assert manifest["dtype"] == "bfloat16"
    fingerprint = yaml.safe_load(members(one.path)["model_config.yaml"])["backbone_fingerprint"]
    assert manifest["source"] == {"checkpoint": one.path.name, "backbone_fingerprint": fingerprint}
    checked = run_script("verify_export.py", str(output), "--checkpoint", str(one.path))
    assert checked.returncode == 0 and checked.stdout.startswith("0 problems in hashes, names, shapes and shards")
    alone = [f"checkpoint={one.path}", f"output={tmp_path / 'alone'}", "targets=full", f"exits={MLP}"]
    assert run_script("export_huggingface.py", *alone).returncode == 0
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {"hf_full", MANIFEST}
    refused = run_script("export_huggingface.py", *settings)
    assert refused.returncode == 2 and "is not empty; name a new directory" in refused.stderr
    assert "Traceback" not in refused.stderr


# -- other sources and options --------------------------------------------------------------------------------------


def test_numbers_are_rounded_to_the_asked_dtype(one: Made, exported: Path, tmp_path: Path) -> None:
    rounded = export(one.path, tmp_path / "out", dtype="bfloat16")
    for folder in exported.glob("hf_*"):
        exact = {name: tensor.to(torch.bfloat16) for name, tensor in tensors_of(folder).items()}
        assert same(tensors_of(rounded / folder.name), exact)
        assert json.loads((rounded / folder.name / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_several_files_with_an_index_are_the_same_model(one: Made, exported: Path, tmp_path: Path) -> None:
    from nemo_ee.runtime.loader import load_model

    limit = 30_000
    output = export(one.path, tmp_path / "out", shard_gigabytes=limit / 1e9)
    for folder in exported.glob("hf_*"):
        files = sorted((output / folder.name).glob("*.safetensors"))
        assert len(files) > 3 and same(tensors_of(output / folder.name), tensors_of(folder))
        biggest = max(tensor.nbytes for tensor in tensors_of(folder).values())
        assert all(file.stat().st_size < max(limit, 2 * biggest) + 8192 for file in files)
    assert verify_export(output, one.path) == []
    logits = transformers_logits(stock(output / "hf_full"), one.tokens)
    assert torch.equal(logits, one.logits)
    load_model(output / "hf_early_exit")


def test_exits_only_and_base_give_the_complete_file_s_export(one: Made, tmp_path: Path) -> None:
    model = restore(one.path, exits_only=True)
    small = tmp_path / "exits.nemo"
    model._save_restore_connector.save_to(model, str(small))
    whole = export(one.path, tmp_path / "whole")
    parts = export(small, tmp_path / "parts", backbone=one.path)
    files = [file.relative_to(whole) for file in whole.rglob("*.safetensors")]
    assert len(files) == 4 and all((whole / file).read_bytes() == (parts / file).read_bytes() for file in files)


def test_low_rank_updates_of_the_backbone_are_merged(one: Made, tmp_path: Path) -> None:
    from nemo_ee.megatron.pipeline.stage_forward import full_model_logits

    one = one
    model = restore(one.path, early_exit={"train": "lora", "lora": {"rank": 2, "merge": False}})
    moved(model)
    model.save_to(str(tmp_path / "lora.nemo"))
    ours = full_model_logits(model.context, one.tokens)
    logits = transformers_logits(stock(export(tmp_path / "lora.nemo", tmp_path / "out") / "hf_full"), one.tokens)
    assert relative_difference(logits, ours) <= TOLERANCE
    assert relative_difference(ours, one.logits) > 100 * TOLERANCE, "control: the updates do something"


def test_parameters_the_original_model_does_not_have_are_written_once_they_say_something(tmp_path: Path) -> None:
    """Megatron has one switch for all biases; trained ones go into a config that has them."""
    made = Made(tmp_path / "made", "llama-attention-bias", EXITS[:1])
    with torch.no_grad():
        made.model.model.decoder.layers[1].mlp.linear_fc1.bias[7] = 0.5
    made.model.save_to(str(made.path))
    model = stock(export(made.path, tmp_path / "out") / "hf_full")
    assert model.config.mlp_bias and model.config.attention_bias and model.config.eos_token_id == 1
    from nemo_ee.megatron.pipeline.stage_forward import full_model_logits

    ours = full_model_logits(made.model.context, made.tokens)
    assert relative_difference(transformers_logits(model, made.tokens), ours) <= TOLERANCE
    assert relative_difference(ours, made.logits) > 100 * TOLERANCE, "control: the bias does something"


def test_which_directories_are_written_is_a_choice(one: Made, tmp_path: Path) -> None:
    output = export(one.path, tmp_path / "one", targets=("exits",), exits=(MLP,))
    assert {path.name for path in output.iterdir()} == {f"hf_exit_{MLP}", MANIFEST}
    output = export(one.path, tmp_path / "two", targets=("early_exit",), exits=(EMBEDDING,))
    config = json.loads((output / "hf_early_exit" / "config.json").read_text())
    assert [exit["name"] for exit in config["early_exit"]["exits"]] == [EMBEDDING]
    stored = tensors_of(output / "hf_early_exit")
    assert {name for name in stored if name.startswith("exit_heads.")} == {f"exit_heads.{EMBEDDING}.unembed.weight"}


# -- refused before anything is written -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "problems"),
    [
        (
            {"targets": ("full", "onnx"), "dtype": "int8", "shard_gigabytes": 0},
            [
                "targets[1]='onnx' must be one of full, exits, early_exit",
                "dtype='int8' must be one of",
                "shard_gigabytes=0 must be a finite number above 0",
            ],
        ),
        ({"targets": ()}, ["targets=[] must be some of full, exits, early_exit"]),
        ({"exits": ("nope",)}, ["exits: no exit is called 'nope'; there are", MLP]),
        ({"exits": (EMBEDDING,)}, [f"exit {EMBEDDING!r} cannot be a stand-alone model", "only OPT", "leave it out"]),
        ({"exits": (), "targets": ("exits",)}, ["leave nothing to write"]),
        ({"checkpoint": Path("nowhere.nemo")}, ["nowhere.nemo", "does not exist; give an early-exit .nemo"]),
    ],
)
def test_problems_of_the_settings_come_together(
    settings: dict[str, Any], problems: list[str], one: Made, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="nothing was exported") as error:
        export(settings.pop("checkpoint", one.path), tmp_path / "out", **settings)
    assert all(problem in str(error.value) for problem in problems), error.value
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"activation": "squared-relu"}, "activation=squared-relu"),
        ({"normalization": "layernorm1p"}, "normalization=layernorm1p"),
        ({"rotary_percentage": 0.5}, "rotary_percentage=0.5: must be 1.0"),
        ({"num_moe_experts": 8, "window_size": [4, 0]}, "num_moe_experts=8.*window_size="),
        ({"kv_channels": 7}, "head_dim: 7, rotary positions need an even number"),
        ({"ffn_hidden_size": 60}, r"(?s)do not fit together:.*linear_fc1.weight.*must be \[120, 40\]"),
    ],
)
def test_models_that_no_stock_class_computes(changes: dict[str, Any], problem: str, one: Made, tmp_path: Path) -> None:
    config = yaml.safe_load(members(one.path)["model_config.yaml"]) | changes
    path = rewritten(one.path, tmp_path / "x.nemo", {"model_config.yaml": yaml.safe_dump(config).encode()})
    with pytest.raises(ValueError, match=problem):
        export(path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["x.nemo"]


def test_numbers_that_float16_does_not_hold(tmp_path: Path) -> None:
    made = Made(tmp_path / "made", "llama", EXITS[:1])
    with torch.no_grad():
        made.model.model.exits[MLP].mlp.linear_fc2.weight[3, 3] = 1e6
    made.model.save_to(str(made.path))
    with pytest.raises(ValueError, match="linear_fc2.weight has values beyond float16; use dtype=bfloat16"):
        export(made.path, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("place", ["write", "manifest"])
def test_an_interruption_leaves_nothing(
    problem: BaseException, place: str, one: Made, tmp_path: Path, monkeypatch
) -> None:
    from nemo_ee.export import export_plan as module
    from nemo_ee.export.safetensors_writer import SafetensorsWriter

    real, calls = SafetensorsWriter.write, []

    def write(self, name, chunks) -> None:  # noqa: ANN001
        calls.append(name)
        if place == "write" and len(calls) == 40:
            raise problem
        real(self, name, chunks)

    def manifest(*arguments) -> None:  # noqa: ANN002
        raise problem

    monkeypatch.setattr(SafetensorsWriter, "write", write)
    if place == "manifest":
        monkeypatch.setattr(module, "write_manifest", manifest)
    with pytest.raises((KeyboardInterrupt, ValueError)) as error:
        export(one.path, tmp_path / "new" / "deeper" / "out")
    assert isinstance(error.value, KeyboardInterrupt) or "No space left on device" in str(error.value)
    assert list(tmp_path.iterdir()) == [] and len(calls) >= 40


def test_what_a_killed_export_leaves_is_no_export_and_in_nobody_s_way(one: Made, tmp_path: Path) -> None:
    left = tmp_path / "out.partial" / "hf_full"
    left.mkdir(parents=True)
    (left / "model.safetensors.partial").write_bytes(b"half of it")
    with pytest.raises(ValueError, match="not a complete export"):
        verify_export(tmp_path / "out.partial")
    output = export(one.path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and verify_export(output, one.path) == []


def test_one_tensor_is_in_memory_at_a_time(one: Made, tmp_path: Path, monkeypatch) -> None:
    real, alive, count = EarlyExitSource.read, [], 0

    def read(self, origin, shape, dtype):  # noqa: ANN001, ANN202
        nonlocal count
        assert [ref for ref in alive if ref() is not None] == []
        tensor = real(self, origin, shape, dtype)
        alive.append(weakref.ref(tensor))
        count += 1
        return tensor

    monkeypatch.setattr(EarlyExitSource, "read", read)
    export(one.path, tmp_path / "out")
    assert count > 60


KILLED = """
import sys
import tempfile
from pathlib import Path
from nemo_ee.export.safetensors_writer import SafetensorsWriter
from nemo_ee.export.huggingface.exporter import HuggingFaceSettings, export_huggingface

def write(self, name, chunks):
    print("writing", flush=True)
    sys.stdin.read()

SafetensorsWriter.write = write
export_huggingface(HuggingFaceSettings(checkpoint=sys.argv[1], output=sys.argv[2], progress=False))
"""


def test_what_a_killed_export_leaves_goes_with_the_next(one: Made, tmp_path: Path, monkeypatch) -> None:
    """No weights are unpacked; the tokenizer and the half-written output are removed by the next start."""
    path = rewritten(one.path, tmp_path / "ee.nemo", {"tokenizer/tokenizer.json": b"{}"})
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path), str(tmp_path / "out")], text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout.readline() == "writing\n"
    process.kill()
    process.wait(timeout=60)
    assert {file.parent.name for file in temporary.rglob("*") if file.is_file()} == {"tokenizer"}
    assert (tmp_path / "out.partial").is_dir(), "control"
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert (export(path, tmp_path / "out", targets=("full",)) / MANIFEST).is_file()
    assert not list(temporary.iterdir()) and not (tmp_path / "out.partial").exists()
