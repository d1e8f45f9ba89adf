# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Hugging Face directories that cannot be read as they are: refused with every reason, and nothing in them is run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from nemo_ee.checkpoint.huggingface import HuggingFaceSource, read_backbone
from nemo_ee.checkpoint.nemo_config import nemo_config
from nemo_ee.families.registry import FAMILIES
from tests.helpers.huggingface_models import change_config, save_tiny_model, tiny_model

WORDS = "embedding.word_embeddings.weight"
REFUSED = [
    ("llama", {"model_type": "gemma"}, "'gemma' is not supported; supported are llama, mistral, .*, gpt2"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn' .* default, linear, llama3"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
    ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope' is not supported"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor: None, must be a number above 0"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor: None.*high_freq_fac"),
    ("llama", {"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}}, "disagree"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one set per kind of layer"),
    ("llama", {"rope_scaling": "yes"}, "rope_scaling: 'yes', must be a mapping"),
    ("llama", {"rope_parameters": {"rope_theta": 5e5}}, "rope_theta 10000.0 and rope_parameters.rope_theta 5"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5, only 1.0"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantised weights are not read"),
    ("llama", {"num_local_experts": 8}, "num_local_experts: 8, mixtures of experts"),
    ("llama", {"use_parallel_residual": True}, "attention and MLP in parallel"),
    ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling.My"}}, "auto_map: .* own code, which is never run"),
    ("llama", {"hidden_act": "quick_gelu"}, "hidden_act: 'quick_gelu' is not supported; supported are silu"),
    ("llama", {"head_dim": 9}, "head_dim: 9, rotary positions need an even number"),
    ("llama", {"num_key_value_heads": 4}, "num_key_value_heads: 4, does not divide num_attention_heads 6"),
    ("llama", {"hidden_size": 0}, "hidden_size: 0, must be a whole number of at least 1"),
    ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps: 'small', must be a number above 0"),
    ("mistral", {"sliding_window": 31}, "sliding_window: 31 is shorter than the sequence length 32.*at most 31"),
    ("mistral", {"sliding_window": "x"}, "sliding_window: 'x', must be a whole number or null"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding_window: 8 is"),
    ("qwen3", {"attention_bias": True}, "attention_bias: true, a Qwen3 with biases is not supported"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding_window: 8 is"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: true"),
    ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn: true"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: false"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention: true"),
    ("gpt2", {"activation_function": "tanh"}, "activation_function: 'tanh' is not supported"),
    ("gpt2", {"n_head": 5}, "n_embd: 24, not a multiple of n_head 5"),
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before: false"),
    ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim: 16, projected embeddings"),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm: true"),
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    for name in FAMILIES:
        save_tiny_model(root / name, name)
    return root


@pytest.mark.parametrize(("name", "changes", "reason"), REFUSED)
def test_what_cannot_be_computed_is_refused_with_its_reason(
    saved: Path, tmp_path: Path, name, changes, reason
) -> None:
    shutil.copytree(saved / name, tmp_path / "model")
    read_backbone(tmp_path / "model")
    change_config(tmp_path / "model", **changes)
    with pytest.raises(ValueError, match=reason):
        read_backbone(tmp_path / "model")


def test_all_reasons_come_in_one_message(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "mistral", tmp_path / "model")
    changes = {"sliding_window": 4, "hidden_act": "relu", "rope_scaling": {"rope_type": "yarn"}, "vocab_size": None}
    change_config(tmp_path / "model", **changes)
    with pytest.raises(ValueError) as caught:
        read_backbone(tmp_path / "model")
    assert all(word in str(caught.value) for word in ("hidden_act", "sliding_window", "yarn", "vocab_size"))


def test_a_window_is_no_problem_where_it_does_not_bite(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "mistral", tmp_path / "mistral")
    change_config(tmp_path / "mistral", sliding_window=None)
    assert read_backbone(tmp_path / "mistral").sequence_length == 32
    change_config(tmp_path / "mistral", sliding_window=16)
    config = nemo_config(read_backbone(tmp_path / "mistral", sequence_length=16))
    assert (config["encoder_seq_length"], config["max_position_embeddings"]) == (16, 32)
    with pytest.raises(ValueError, match="sequence length 33: must lie in 1..32"):
        read_backbone(tmp_path / "mistral", sequence_length=33)
    # Absent means 4096 to transformers.
    values = json.loads((tmp_path / "mistral" / "config.json").read_text()) | {"max_position_embeddings": 5000}
    del values["sliding_window"]
    (tmp_path / "mistral" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="sliding_window: 4096 is shorter than the sequence length 5000"):
        read_backbone(tmp_path / "mistral")
    shutil.copytree(saved / "qwen2", tmp_path / "qwen2")
    change_config(tmp_path / "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=3)
    read_backbone(tmp_path / "qwen2")
    # Learned positions are stored: a shorter use does not cut them.
    assert nemo_config(read_backbone(saved / "gpt2", sequence_length=8))["encoder_seq_length"] == 32


def test_the_newer_spelling_of_rope_is_read(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "llama", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    values = json.loads(path.read_text())
    del values["rope_theta"], values["rope_scaling"]
    values["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 12345.0}
    path.write_text(json.dumps(values))
    config = nemo_config(read_backbone(tmp_path / "model"))
    assert (config["rotary_base"], config["seq_len_interpolation_factor"]) == (12345.0, 4.0)
    assert config["rope_scaling"] == {"type": "linear", "factor": 4.0}


def test_absent_optional_keys_mean_what_they_mean_to_transformers(tmp_path: Path) -> None:
    from transformers import AutoConfig

    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 32}
    sizes |= {"intermediate_size": 96, "max_position_embeddings": 64}
    for family in ("llama", "mistral", "qwen2"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family} | sizes))
        backbone, reference = read_backbone(tmp_path), AutoConfig.from_pretrained(tmp_path)
        assert backbone.num_query_groups == reference.num_key_value_heads, family
        assert backbone.norm_epsilon == reference.rms_norm_eps
        assert backbone.rotary_base == reference.rope_theta
        assert backbone.tied == reference.tie_word_embeddings


def test_unreadable_directories_give_one_clear_error(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no config.json; give the directory"):
        read_backbone(tmp_path)
    for text, message in (
        ("{", "damaged"),
        ("[1]", "a JSON list, not an object"),
        ('{"a":\n' + "[" * 3000, r"config\.json:2: nested too deeply"),
        (
            '{"hidden_size": ' + "9" * 5000 + "}",
            r"config\.json:1: holds the number 9+, which does",
        ),
        ("{}", "model_type: None is not supported"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_backbone(tmp_path)
    shutil.copy(saved / "llama" / "config.json", tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"no weights \(model.safetensors,"):
        HuggingFaceSource(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a PEFT adapter, not a model; merge it first"):
        HuggingFaceSource(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((saved / "llama" / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model.safetensors: missing or damaged"):
        HuggingFaceSource(tmp_path)


def test_an_adapter_is_refused_with_the_code_that_merges_it(tmp_path: Path) -> None:
    """As PEFT saves one: no config.json."""
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base", "peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="PEFT adapter of some/base, not a model; merge it first:") as caught:
        HuggingFaceSource(tmp_path)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:3]]
    assert lines[0] == "from peft import AutoPeftModelForCausalLM"
    assert lines[1].startswith(f"AutoPeftModelForCausalLM.from_pretrained({str(tmp_path)!r}).merge_and_unload()")
    compile("\n".join(lines), "lines", "exec")


def test_broken_indices_name_every_problem(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama", shard_bytes=20_000)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, second, *_ = sorted(set(index["weight_map"].values()))
    (tmp_path / first).unlink()
    moved = next(name for name, file in index["weight_map"].items() if file != second and file != first)
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {moved: second}}))
    with pytest.raises(ValueError, match=f"{first}: missing.*the index places '{moved}' there, but it is not"):
        HuggingFaceSource(tmp_path)
    for name, message in (
        ("../outside.safetensors", "not a file name"),
        ("/etc/passwd", "not a file name"),
        ("x.py", "nor"),
    ):
        path.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ValueError, match=f"refused, it points to .*{message}"):
            HuggingFaceSource(tmp_path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="index.json: damaged"):
        HuggingFaceSource(tmp_path)


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_a_bin_file_runs_no_code(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama", safetensors=False)
    bait = tmp_path / "executed"
    weights = tmp_path / "pytorch_model.bin"
    for zipped in (True, False):
        torch.save({"model.norm.weight": _Touch(bait)}, weights, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match="refused or damaged, not a plain file of tensors.*safetensors version"):
            HuggingFaceSource(tmp_path)
        assert not bait.exists()
    torch.load(weights, weights_only=False)
    assert bait.exists(), "control: an unrestricted load runs it"
    torch.save({"a": 1}, weights)
    with pytest.raises(ValueError, match="does not hold a mapping from names to tensors"):
        HuggingFaceSource(tmp_path)
    weights.write_bytes(b"PK\x03\x04" + os.urandom(100))
    with pytest.raises(ValueError, match="damaged"):
        HuggingFaceSource(tmp_path)


def test_bin_files_from_old_pytorch_are_read(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    source = HuggingFaceSource(tmp_path)
    assert torch.equal(source.read(WORDS, (0, 0), (131, 24)), model.transformer.wte.weight)


def test_symbolic_links_of_a_download_cache_are_followed(saved: Path, tmp_path: Path) -> None:
    for file in (saved / "llama").iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert HuggingFaceSource(tmp_path).keys().keys() == HuggingFaceSource(saved / "llama").keys().keys()
