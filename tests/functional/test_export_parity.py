# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The parity digest in the manifests: right, the same whatever the export and its shards, and changed by a problem.

Right: against transformers and the exits of the NeMo model, 2e-5 of the largest logit in fp32. The same: between
Hugging Face and TensorRT-LLM exports and between shards, equal numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nemo")

from tests.functional.test_export_tensorrt_llm import FAMILIES, each_once, export
from tests.helpers.megatron_models import exit_logits

import torch  # isort: skip  # after the CPU host is on
from safetensors.torch import load_file, save_file

from nemo_ee.export.manifest import MANIFEST, file_problems, read_manifest, sha256_of
from nemo_ee.export.parity import parity_of, probe_tokens
from nemo_ee.export.tensorrt_llm.unified_reader import load_checkpoint
from nemo_ee.export.verify import verify_export
from tests.helpers.huggingface_models import reference_logits

TWO_BY_TWO = {"tensor_parallel": 2, "pipeline_parallel": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    return each_once(tmp_path_factory)


def parities(directory: Path) -> dict[str, Any]:
    """Directory -> its parity digest."""
    return {entry["directory"]: entry["parity"] for entry in read_manifest(directory)["artifacts"]}


def hugging_face(checkpoint: Path, output: Path, **settings: Any) -> Path:
    from nemo_ee.export.huggingface.exporter import HuggingFaceSettings, export_huggingface

    settings |= {"checkpoint": checkpoint, "output": output, "progress": False}
    return export_huggingface(HuggingFaceSettings.from_config(settings))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_numbers_are_the_models(name: str, made, tmp_path: Path) -> None:
    one = made(name)
    found = parities(export(one.path, tmp_path / "out", drafts=(), **TWO_BY_TWO))["trtllm_ckpt"]
    assert found["tokens"] == probe_tokens(one.model.vocab_size, 32) and len(set(found["tokens"])) == 16
    tokens = torch.tensor([found["tokens"]])
    logits = {"final": reference_logits(one.reference, tokens), **exit_logits(one.model, tokens)}
    assert found["heads"].keys() == logits.keys() and len(logits) == 8
    for head, numbers in found["heads"].items():
        rows = logits[head][0]
        first, second = rows.topk(2).values.unbind(-1)
        assert numbers["argmax"] == rows.argmax(-1).tolist()
        for key, wanted in (("logit", first), ("margin", first - second), ("logsumexp", rows.logsumexp(-1))):
            far = (torch.tensor(numbers[key]) - wanted).abs().max()
            assert far < 2e-5 * rows.abs().max(), (head, key)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3"])
def test_all_exports_of_a_model_have_the_same_numbers(name: str, dtype: str, made, tmp_path: Path) -> None:
    one = made(name)
    whole = export(one.path, tmp_path / "one", dtype=dtype)
    first = parities(whole)
    sizes = [(2, 2), (4, 1)] if name == "llama" else [(2, 2)]
    for tp, pp in sizes:
        output = export(one.path, tmp_path / f"{tp}{pp}", dtype=dtype, tensor_parallel=tp, pipeline_parallel=pp)
        assert parities(output) == first, (tp, pp)
        assert verify_export(output) == []
    stock = parities(hugging_face(one.path, tmp_path / "hf", dtype=dtype))
    assert stock["hf_early_exit"] == first["trtllm_ckpt"]
    assert stock["hf_full"]["heads"]["final"] == first["trtllm_ckpt"]["heads"]["final"]
    drafts = {directory.removeprefix("draft_"): own for directory, own in first.items() if directory[:5] == "draft"}
    assert len(drafts) == (5 if name in ("llama", "qwen3") else 0)
    for exit, own in drafts.items():
        assert own == stock[f"hf_exit_{exit}"]
        head, alone = first["trtllm_ckpt"]["heads"][exit], own["heads"]["final"]
        torch.testing.assert_close(torch.tensor(head["logit"]), torch.tensor(alone["logit"]), rtol=1e-5, atol=1e-5)
    assert verify_export(tmp_path / "hf") == [] == verify_export(whole)


def test_half_precision_is_another_model(made, tmp_path: Path) -> None:
    """Control: the digest sees the rounding of the weights."""
    one = made("llama")
    wide, half = (parities(export(one.path, tmp_path / d, dtype=d, drafts=())) for d in ("float32", "bfloat16"))
    assert wide != half


def spoil(tensors: dict[str, torch.Tensor], how: str) -> None:
    layer = "transformer.layers.1."
    if how == "two halves swapped":
        gate, fc = f"{layer}mlp.gate.weight", f"{layer}mlp.fc.weight"
        tensors[gate], tensors[fc] = tensors[fc], tensors[gate]
    elif how == "keys and values swapped":
        query, key, value = tensors[f"{layer}attention.qkv.weight"].split([20, 10, 10])
        tensors[f"{layer}attention.qkv.weight"] = torch.cat((query, value, key))
    else:
        tensors[how] = tensors[how] * 1.01


SPOILT = {
    "two halves swapped": "final gives other numbers",
    "keys and values swapped": "of tensor-parallel rank 1 differs from the ranks before it",
    "transformer.layers.0.mlp.proj.weight": "final gives other numbers",
    "lm_head.weight": "final gives other numbers",
    "exit_heads.l1-mlp-random-own.unembed.weight": "parity: l1-mlp-random-own gives other numbers",
    "exit_heads.l4-layer-copy-own.layer.attention.dense.weight": "parity: l4-layer-copy-own gives other numbers",
    "transformer.layers.2.input_layernorm.weight": "input_layernorm.weight of tensor-parallel rank 1 differs",
}


@pytest.fixture(scope="module")
def sharded(made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four ranks, of which two share each key-value head."""
    return export(made("llama").path, tmp_path_factory.mktemp("sharded") / "out", tensor_parallel=4, drafts=())


@pytest.mark.parametrize("how", SPOILT)
def test_one_wrong_tensor_in_one_shard_is_noticed(how: str, sharded: Path) -> None:
    """With hashes in the manifest that fit the file, so that nothing else can tell."""
    shard, manifest = sharded / "trtllm_ckpt" / "rank1.safetensors", sharded / MANIFEST
    before = shard.read_bytes(), manifest.read_text()
    tensors = load_file(shard)
    spoil(tensors, how)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, shard)
        content = json.loads(before[1])
        size = shard.stat().st_size
        content["files"]["trtllm_ckpt/rank1.safetensors"] = {"bytes": size, "sha256": sha256_of(shard)}
        manifest.write_text(json.dumps(content))
        assert file_problems(sharded, read_manifest(sharded)) == [], "control"
        problems = verify_export(sharded)
        assert problems and SPOILT[how] in problems[0], problems
    finally:
        shard.write_bytes(before[0])
        manifest.write_text(before[1])
    assert verify_export(sharded) == []


def test_padding_rows_must_be_zeros(made, tmp_path: Path) -> None:
    """131 words over two ranks: one row of padding."""
    folder = export(made("llama").path, tmp_path / "out", tensor_parallel=2, drafts=()) / "trtllm_ckpt"
    tensors = load_file(folder / "rank1.safetensors")
    tensors["lm_head.weight"][-1] = 1.0
    save_file(tensors, folder / "rank1.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight: the rows past the vocabulary are not zeros"):
        load_checkpoint(folder)


def test_switched_off_or_too_large(made, tmp_path: Path) -> None:
    one = made("llama")
    for size in (0, 1e-6):
        outputs = [
            export(one.path, tmp_path / f"trt{size}", parity_gigabytes=size),
            hugging_face(one.path, tmp_path / f"hf{size}", parity_gigabytes=size),
        ]
        for output in outputs:
            assert set(parities(output).values()) == {None} and verify_export(output) == []
    for wrong in (-1, True, "4"):
        with pytest.raises(ValueError, match=f"parity_gigabytes={wrong!r} must be a number of GB"):
            export(one.path, tmp_path / "x", parity_gigabytes=wrong)
        with pytest.raises(ValueError, match=f"parity_gigabytes={wrong!r} must be a number of GB"):
            hugging_face(one.path, tmp_path / "x", parity_gigabytes=wrong)


def test_ties_may_fall_either_way(made, tmp_path: Path) -> None:
    """On another machine sums differ in the last digits: what is read is compared with a tolerance."""
    from nemo_ee.export.parity import parity_problems

    folder = export(made("llama").path, tmp_path / "out", drafts=()) / "trtllm_ckpt"
    stated = parity_of(load_checkpoint(folder))
    final = stated["heads"]["final"]
    final["logit"] = [number + 1e-6 for number in final["logit"]]
    assert list(parity_problems(stated, folder, load_checkpoint)) == []
    final["argmax"] = [(token + 1) % 131 for token in final["argmax"]]
    assert list(parity_problems(stated, folder, load_checkpoint)) == [
        "parity: final gives other numbers than those in the manifest (argmax)"
    ]


def test_a_model_larger_than_the_limit_is_not_run_again(made, tmp_path: Path, caplog) -> None:
    one = made("llama")
    engine = export(one.path, tmp_path / "trt", drafts=())
    outputs = [engine, hugging_face(one.path, tmp_path / "hf", targets=("full",))]
    for output in outputs:
        content = json.loads((output / MANIFEST).read_text())
        (entry,) = content["artifacts"]
        entry["parity"]["heads"]["final"]["argmax"][0] += 1
        (output / MANIFEST).write_text(json.dumps(content))
        caplog.clear()
        assert verify_export(output, parity_gigabytes=1e-6) == []
        assert "more than parity_gigabytes, so its parity was not run" in caplog.text
        (problem,) = verify_export(output)
        assert "final gives other numbers than those in the manifest" in problem, "control"
        with pytest.raises(ValueError, match="parity_gigabytes=nan must be a number of GB"):
            verify_export(output, parity_gigabytes=float("nan"))


@pytest.mark.parametrize("problem", [RuntimeError("sizes do not match"), IndexError("index 9 is out of bounds")])
def test_a_run_that_breaks_is_a_problem_like_others(problem: Exception, made, tmp_path: Path, monkeypatch) -> None:
    from nemo_ee.export import parity

    output = hugging_face(made("llama").path, tmp_path / "hf", targets=("full",))

    def broken(model: Any) -> None:
        raise problem

    monkeypatch.setattr(parity, "parity_of", broken)
    assert verify_export(output) == [f"hf_full: parity: cannot be run ({problem!r})"]


def test_what_cannot_be_run_is_not_exported(made, tmp_path: Path, monkeypatch) -> None:
    """Only an OPT without its final norm goes without a digest."""
    from nemo_ee.export.huggingface import exporter as huggingface

    def refuse(folder: Path) -> None:
        raise ValueError(f"{folder / 'config.json'}: damaged")

    monkeypatch.setattr(huggingface, "load_model", refuse)
    with pytest.raises(ValueError, match="cannot be run, so nothing was exported: .*damaged\nparity_gigabytes=0 exp"):
        hugging_face(made("llama").path, tmp_path / "hf", targets=("full",))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    opt = parities(hugging_face(made("opt").path, tmp_path / "opt"))
    missing = {directory for directory, own in opt.items() if own is None}
    assert missing and all(directory.startswith("hf_exit_") and "embedding" in directory for directory in missing)
