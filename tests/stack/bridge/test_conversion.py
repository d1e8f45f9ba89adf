# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Hugging Face to Megatron by AutoBridge, exits to and from a `.nemo`, and what cannot be built."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

pytest.importorskip("megatron.bridge", reason="megatron-bridge is not installed")

import torch
from megatron.bridge import AutoBridge
from transformers import AutoModelForCausalLM

from nemo_ee.bridge import exit_weights
from nemo_ee.bridge.provider import EarlyExitModelProvider
from nemo_ee.checkpoint.chunk_reader import ChunkReader
from nemo_ee.checkpoint.exits_file import pack, save, stored_exits
from nemo_ee.checkpoint.huggingface import HuggingFaceSource
from nemo_ee.checkpoint.module_weights import load_shards
from nemo_ee.checkpoint.nemo_archive import NemoArchive
from nemo_ee.megatron.pipeline.stage_context import StageContext
from nemo_ee.megatron.pipeline.stage_forward import full_model_logits, hidden_state_transport
from tests.helpers.huggingface_models import save_tiny_model
from tests.stack.bridge.bridge_models import (
    COMPLETE,
    EARLIER,
    build,
    exit_weights_in,
    export,
    microbatch,
)

EXITS = {
    "exits": [
        {"layer": 1},
        {"layer": 2, "architecture": "layer"},
        {"layer": 2, "architecture": "norm", "output": "shared"},
    ]
}


def tokens_of(vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-linear", "qwen2", "qwen3", "mistral"])
@torch.no_grad()
def test_a_converted_model_has_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    # transformers 5.12 refuses a hidden size that is no multiple of the number of heads.
    reference = save_tiny_model(tmp_path, name, hidden_size=48)
    model, provider = build(tmp_path, EXITS, full_depth=True)
    tokens = tokens_of(provider.vocab_size)
    ours = full_model_logits(StageContext(model, hidden_state_transport(), {}), tokens)
    theirs = reference(tokens).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_parameters_without_a_mapping_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: AutoBridge alone leaves them NaN, and fills all others."""
    save_tiny_model(tmp_path, "qwen3")
    read: set[str] = set()

    def record(shards: dict, source: HuggingFaceSource) -> None:
        read.update(shards)
        load_shards(shards, source)

    monkeypatch.setattr(exit_weights, "load_shards", record)
    model, _ = build(tmp_path, EXITS)
    in_layers = {key.removeprefix("decoder.layers.").split(".", 1)[1] for key in read if "layers." in key}
    assert in_layers == {"input_layernorm.weight", "pre_mlp_layernorm.weight"}
    assert [key for key in read if "layers." not in key] == ["backbone_output.weight"]
    assert not any(parameter.isnan().any() for parameter in model.parameters())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(COMPLETE, tmp_path_factory.mktemp("source") / "export", "full") / "hf_full"


@pytest.mark.parametrize("file", ["complete.nemo", "exits.nemo"])
def test_exits_of_the_nemo_host_go_to_bridge_and_back(file: str, source: Path, tmp_path: Path) -> None:
    theirs = exit_weights_in(EARLIER / file)
    with stored_exits(EARLIER / file, HuggingFaceSource(source)) as (block, exits):
        model, provider = build(source, block, exits)
    multiple = provider.make_vocab_size_divisible_by
    save(model, provider.exit_config, tmp_path / "exits", HuggingFaceSource(source), vocab_multiple=multiple)
    pack(tmp_path / "exits", tmp_path / "back.nemo")
    for path in (tmp_path / "exits", tmp_path / "back.nemo"):
        ours = exit_weights_in(path)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            rows = min(len(tensor), len(ours[key]))  # the padding of the vocabulary depends on the host
            assert torch.equal(ours[key][:rows], tensor[:rows]), key
    with tarfile.open(tmp_path / "back.nemo") as tar:
        assert {name.split("/")[1] for name in tar.getnames() if "/" in name} == {
            "model_config.yaml", "exit_weights", "tokenizer"
        }  # fmt: skip
    with stored_exits(tmp_path / "back.nemo", HuggingFaceSource(source)) as (again, _):
        assert again["exits"] == block["exits"]
    pack(tmp_path / "back.nemo", tmp_path / "unpacked")
    assert exit_weights_in(tmp_path / "unpacked").keys() == theirs.keys()


@torch.no_grad()
def test_a_complete_file_exports_as_one_of_the_nemo_host(source: Path, tmp_path: Path) -> None:
    with stored_exits(COMPLETE, HuggingFaceSource(source)) as (block, exits):
        model, provider = build(source, block, exits, full_depth=True)
    multiple = provider.make_vocab_size_divisible_by
    weights = HuggingFaceSource(source)
    save(model, provider.exit_config, tmp_path / "complete.nemo", weights, complete=True, vocab_multiple=multiple)
    export(tmp_path / "complete.nemo", tmp_path / "export", "full", "exits", "early_exit")
    tokens = tokens_of(provider.vocab_size)
    taps = model.forward_to_taps(microbatch(tokens))
    for head in model.exits:
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "export" / f"hf_exit_{head.exit.name}")(
            tokens
        ).logits
        hidden = head(taps.taps[head.exit.stop], rotary_pos_emb=taps.rotary_pos_emb)
        logits = sum(inputs @ weight.t() for inputs, weight in head.output_terms(hidden))
        logits = logits[..., : provider.vocab_size].transpose(0, 1)
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max(), head.exit.name
    with NemoArchive(tmp_path / "complete.nemo") as ours, NemoArchive(COMPLETE) as theirs:
        a, b = (ChunkReader(one.folder("model_weights")) for one in (ours, theirs))
        assert {k for k in a.keys() if "_extra" not in k} == {k for k in b.keys() if "_extra" not in k}
        assert ours.config_values()["backbone_fingerprint"] == theirs.config_values()["backbone_fingerprint"]


def test_exits_of_another_backbone_are_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama", hidden_size=48)
    with pytest.raises(ValueError, match="the exits were tuned on the backbone with fingerprint 38959f46"):
        with stored_exits(COMPLETE, HuggingFaceSource(tmp_path)):
            pass


def refusal(folder: Path, block: dict, **fields: object) -> str:
    provider = AutoBridge.from_hf_pretrained(str(folder)).to_megatron_provider()
    with pytest.raises(ValueError) as problem:
        EarlyExitModelProvider.of(provider, block, source=folder, **fields)
    return str(problem.value)


def test_every_problem_is_in_one_message(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama", hidden_size=48)
    text = refusal(tmp_path, {"train": "joint"}, context_parallel_size=2, fp16=True)
    for part in ("early_exit.train='joint'", "names no exits", "context_parallel_size=2", "fp16=True"):
        assert part in text, part
    assert "pipeline_model_parallel_size = 3" in refusal(tmp_path, EXITS, pipeline_model_parallel_size=3)


def test_rotary_scaling_that_bridge_does_not_pass_on_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama-llama3", hidden_size=48)
    assert "rope_scaling.original_max_position_embeddings=64" in refusal(tmp_path, EXITS)


def test_rotary_scaling_of_a_family_for_which_bridge_drops_it_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "qwen2", rope_scaling={"rope_type": "linear", "factor": 2.5})
    assert "rope_scaling linear with factor 2.5: Megatron-Bridge does not pass it on" in refusal(tmp_path, EXITS)


def test_what_cannot_be_written_is_refused(source: Path, tmp_path: Path) -> None:
    model, provider = build(source, EXITS)
    with pytest.raises(ValueError, match="build it with full_depth=True"):
        save(model, provider.exit_config, tmp_path / "x.nemo", HuggingFaceSource(source), complete=True)
    with pytest.raises(ValueError, match="not padded to a multiple of vocab_multiple=7"):
        save(model, provider.exit_config, tmp_path / "x.nemo", HuggingFaceSource(source), vocab_multiple=7)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists; name another directory"):
        save(model, provider.exit_config, tmp_path / "there", HuggingFaceSource(source))
