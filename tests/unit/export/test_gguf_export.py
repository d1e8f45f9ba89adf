# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""GGUF files: tensors and keys as the `gguf` package names them, the manifest, verification and refusals."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("transformers")

import gguf

from nemo_ee.checkpoint.gguf_file import GgufFile
from nemo_ee.checkpoint.gguf_source import GgufSource
from nemo_ee.checkpoint.huggingface import HuggingFaceSource
from nemo_ee.export.gguf.gguf_exporter import GgufSettings, export_gguf
from nemo_ee.export.gguf.gguf_writer import GgufArtifact, write_gguf
from nemo_ee.export.huggingface.stock_tensors import readings
from nemo_ee.export.manifest import MANIFEST, read_manifest, write_manifest
from nemo_ee.export.model_origins import full_model
from nemo_ee.export.source import EarlyExitSource, Origin
from nemo_ee.export.verify import verify_export
from nemo_ee.families.gguf_metadata import ROPE_FACTORS, has_rope_factors, llama3_factors
from nemo_ee.families.registry import FAMILIES, gguf_tensors_of
from tests.helpers import gguf_files
from tests.helpers.huggingface_models import save_tiny_model
from tests.unit.checkpoint.test_gguf_source import MODELS, WHOLE_BLOCKS, differences

COMPLETE = Path(__file__).parents[2] / "data" / "earlier" / "complete.nemo"
EXITS = ("layer2-mlp", "layer3-norm", "layer3-layer")
# Other dtypes: a model with rows in pairs, and one with transposed rows and positions.
CASES = [(name, "float32") for name in MODELS]
CASES += [(name, dtype) for name in ("llama", "gpt2") for dtype in ("float16", "bfloat16", "q8_0")]


class Weights:
    """The part of `EarlyExitSource` that writes tensors, over a Hugging Face directory."""

    def __init__(self, directory: Path) -> None:
        self.source = HuggingFaceSource(directory)

    def read(self, origin: Origin, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        start = (0,) * len(shape)
        if origin.layer is None:
            return self.source.read(origin.key, start, shape).to(dtype)
        return self.source.read(origin.key, (origin.layer, *start), (1, *shape))[0].to(dtype)


def export(output: Path, **settings: Any) -> Path:
    return export_gguf(
        GgufSettings.from_config({"checkpoint": COMPLETE, "output": output, "progress": False, **settings})
    )


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_tensors_and_keys_are_those_of_the_package(name: str, dtype: str, tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_inner": 64} if name.startswith("gpt2") else WHOLE_BLOCKS
    model = save_tiny_model(tmp_path / "hf", name, **({} if dtype == "float32" else sizes))
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    weights = Weights(tmp_path / "hf")
    a = weights.source.backbone
    form = FAMILIES[a.family].gguf
    assert form.refusal(a) is None or name.startswith("qwen2")
    plan = readings(a, full_model(a.num_layers, [], tied=a.tied, write_output=not a.tied), gguf_tensors_of(a))
    extra = {ROPE_FACTORS: llama3_factors(a)} if has_rope_factors(a) else {}
    write_gguf(tmp_path, GgufArtifact("ours.gguf", form.metadata(a), plan, extra), weights, dtype, lambda _: None)
    ours = gguf.GGUFReader(tmp_path / "ours.gguf")
    theirs = gguf.GGUFReader(gguf_files.write_gguf(tmp_path / "theirs.gguf", model, kind=kind))
    stored = [
        {tensor.name: (tensor.tensor_type, tensor.data.shape, tensor.data) for tensor in reader.tensors}
        for reader in (ours, theirs)
    ]
    assert stored[0].keys() == stored[1].keys()
    for key, (type_, shape, data) in stored[0].items():
        assert (type_, shape) == stored[1][key][:2], key
        if key == ROPE_FACTORS:
            assert data.tolist() == pytest.approx(stored[1][key][2].tolist(), rel=1e-6)
        else:
            assert data.tobytes() == stored[1][key][2].tobytes(), key
    keys = [{key: field.contents() for key, field in reader.fields.items()} for reader in (ours, theirs)]
    described = {key for key in keys[1] if not key.startswith(("GGUF.", "tokenizer.", "general."))}
    assert {key: keys[0].get(key) for key in described} == {key: keys[1][key] for key in described}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("exported") / "out", dtype="float32")


def test_the_files_and_their_manifest(exported: Path) -> None:
    files = {"full.gguf", *(f"exit_{name}.gguf" for name in EXITS)}
    assert {path.name for path in exported.iterdir()} == files | {MANIFEST}
    manifest = read_manifest(exported)
    assert set(manifest["files"]) == files
    entries = {entry["file"]: entry for entry in manifest["artifacts"]}
    assert set(entries) == files
    assert [entries[f"exit_{name}.gguf"]["exit"] for name in EXITS] == list(EXITS)
    assert [entries[f"exit_{name}.gguf"]["num_layers"] for name in EXITS] == [2, 3, 4]
    assert verify_export(exported) == [] and verify_export(exported, COMPLETE) == []


def test_a_file_reads_back_as_the_backbone(exported: Path) -> None:
    read = GgufSource(exported / "full.gguf")
    with EarlyExitSource(COMPLETE) as source:
        assert differences(read, Unpadded(source.backbone, read.backbone.vocab_size)) == []


class Unpadded:
    """A backbone without the padding of its vocabulary."""

    def __init__(self, source: Any, rows: int) -> None:
        self.source, self.rows = source, rows

    def keys(self) -> dict[str, Any]:
        infos = {key: info for key, info in self.source.keys().items() if "_extra_state" not in key}
        padded = ("embedding.word_embeddings.weight", "output_layer.weight")
        return {
            key: type(info)((self.rows, *info.shape[1:]), info.dtype) if key in padded else info
            for key, info in infos.items()
        }

    def read(self, key: str, offset: Any, shape: Any) -> torch.Tensor:
        return self.source.read(key, offset, shape)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_verification_compares_every_number(dtype: str, tmp_path: Path) -> None:
    output = export(tmp_path / "out", dtype=dtype, exits="layer2-mlp")
    assert verify_export(output, COMPLETE) == []
    path = output / "exit_layer2-mlp.gguf"
    file = GgufFile(path)
    name = "blk.1.ffn_down.weight"
    stored = file.stored(name).tobytes()
    content = path.read_bytes()
    assert content.count(stored) == 1
    changed = bytes([stored[0] ^ 1, *stored[1:]])
    path.write_bytes(content.replace(stored, changed))
    assert verify_export(output) == ["exit_layer2-mlp.gguf has another sha256 than in the manifest"]
    manifest = json.loads((output / MANIFEST).read_text())
    (output / MANIFEST).unlink()
    write_manifest(output, {key: value for key, value in manifest.items() if key not in ("files", "schema_version")})
    (problem,) = verify_export(output, COMPLETE)
    assert problem.startswith(
        f"exit_layer2-mlp.gguf: {name} differs from layer2-mlp.mlp.linear_fc2.weight of the .nemo"
    )


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "exit": ({"exits": ["layer9"]}, "no exit is called 'layer9'; there are layer2-mlp"),
    "dtype": ({"dtype": "q4_0"}, "dtype"),
    "nothing": ({"targets": "exits", "exits": []}, "leave nothing to write"),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_refused(problem: str, tmp_path: Path) -> None:
    settings, message = REFUSED[problem]
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_without_the_package_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("nemo_ee.export.gguf.gguf_exporter.EarlyExitSource", lambda *_: pytest.fail("was opened"))
    with pytest.raises(ValueError, match=r"pip install 'gguf>=0.17'"):
        export(tmp_path / "out")


def test_a_model_without_tokenizer_is_refused(tmp_path: Path) -> None:
    shutil.unpack_archive(COMPLETE, tmp_path / "nemo", format="tar")
    shutil.rmtree(tmp_path / "nemo" / "tokenizer")
    with pytest.raises(ValueError, match="has no tokenizer, which a GGUF file needs"):
        export(tmp_path / "out", checkpoint=tmp_path / "nemo")


def test_what_llama_cpp_does_not_compute(tmp_path: Path) -> None:
    refusals = {}
    for name in ("gpt2-untied-erf", "qwen2", "gpt2", "llama-bias"):
        save_tiny_model(tmp_path / name, name)
        a = HuggingFaceSource(tmp_path / name).backbone
        refusals[name] = FAMILIES[a.family].gguf.refusal(a)
    assert "hidden_act='gelu_erf'" in refusals["gpt2-untied-erf"]
    assert (refusals["qwen2"], refusals["gpt2"], refusals["llama-bias"]) == (None, None, None)
