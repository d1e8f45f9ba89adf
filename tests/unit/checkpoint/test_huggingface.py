# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Hugging Face directories as Megatron weights: logits equal to transformers' own, any chunk, and every refusal.

Exactness: logits to 1e-5 of the largest, fp32; chunks and dtypes bitwise.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_ee.checkpoint.chunk_reader import TensorInfo, WeightSource
from nemo_ee.checkpoint.huggingface import HuggingFaceSource, read_backbone
from tests.helpers.huggingface_models import TINY_MODELS, change_config, reference_logits, save_tiny_model, tiny_model
from tests.unit.checkpoint.reference_gpt import build_gpt, fill, gpt_logits

FC1 = "decoder.layers.mlp.linear_fc1.weight"
QKV = "decoder.layers.self_attention.linear_qkv.weight"
PROJ_BIAS = "decoder.layers.self_attention.linear_proj.bias"
WORDS = "embedding.word_embeddings.weight"


class Changed:
    """A source with one tensor altered, for controls."""

    def __init__(self, source: WeightSource, key: str, change: Any) -> None:
        self.source, self.key, self.change = source, key, change

    def keys(self) -> dict[str, TensorInfo]:
        return self.source.keys()

    def read(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...], **options: bool) -> torch.Tensor:
        if key != self.key:
            return self.source.read(key, offset, shape, **options)
        whole = self.change(self.source.read(key, (0,) * len(shape), self.keys()[key].shape))
        return whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]


def _difference(source: HuggingFaceSource, model: Any, filled_from: WeightSource | None = None) -> float:
    """Largest difference of the two models' logits, relative to the largest logit."""
    config = source.backbone.nemo_config()
    gpt = build_gpt(config)
    keys = fill(gpt, filled_from or source)
    assert keys == source.keys().keys()
    tokens = torch.randint(config["vocab_size"], (2, 32), generator=torch.Generator().manual_seed(1))
    expected = reference_logits(model, tokens)
    assert expected.abs().max() > 0.1
    actual = gpt_logits(gpt, tokens, config["vocab_size"])
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_megatron_computes_the_same_logits(megatron: None, tmp_path: Path, name: str) -> None:
    model = save_tiny_model(tmp_path, name)
    assert _difference(HuggingFaceSource(tmp_path), model) < 1e-5


@pytest.mark.parametrize(
    ("name", "key", "change"),
    [
        ("llama", FC1, lambda w: torch.cat(w.chunk(2, 1)[::-1], 1)),  # up before gate
        ("llama", QKV, lambda w: torch.cat([w[:, 30:40], w[:, :30], w[:, 40:]], 1)),  # a key among the queries
        ("llama-mlp-bias", "decoder.layers.mlp.linear_fc1.bias", torch.zeros_like),
        ("gpt2", QKV, lambda w: w.flip(1)),
        ("opt", "embedding.position_embeddings.weight", lambda w: w.roll(1, 0)),  # positions one off
    ],
)
def test_control_a_misplaced_weight_shows_in_the_logits(
    megatron: None, tmp_path: Path, name: str, key: str, change: Any
) -> None:
    model = save_tiny_model(tmp_path, name)
    source = HuggingFaceSource(tmp_path)
    assert _difference(source, model, Changed(source, key, change)) > 1e-3


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama-linear", "seq_len_interpolation_factor", None),
        ("llama-llama3", "low_freq_factor", 2.0),
        ("llama-llama3", "scale_positional_embedding", False),
        ("llama-llama3", "rotary_base", 10000.0),
        ("gpt2", "openai_gelu", False),
        ("mistral", "layernorm_epsilon", 1e-6),
    ],
)
def test_control_a_wrong_config_value_shows_in_the_logits(
    megatron: None, tmp_path: Path, name: str, key: str, value: object
) -> None:
    model = save_tiny_model(tmp_path, name)
    source = HuggingFaceSource(tmp_path)
    config = source.backbone.nemo_config()
    assert config[key] != value
    gpt = build_gpt(config | {key: value})
    fill(gpt, source)
    tokens = torch.arange(32)[None]
    expected = reference_logits(model, tokens)
    difference = (gpt_logits(gpt, tokens, config["vocab_size"]) - expected).abs().max() / expected.abs().max()
    assert difference > 3e-5


FORMATS = [
    {"safetensors": safetensors, "shard_bytes": shard_bytes}
    for safetensors, shard_bytes in itertools.product((True, False), (None, 8_000))
]


@pytest.mark.parametrize("name", ["llama-bias", "gpt2", "opt", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_file_format_gives_the_same_tensors_in_the_stored_dtype(tmp_path: Path, name: str, dtype) -> None:
    sources = []
    for index, form in enumerate(FORMATS):
        save_tiny_model(tmp_path / str(index), name, dtype=dtype, **form)
        sources.append(HuggingFaceSource(tmp_path / str(index)))
    assert len(list((tmp_path / "1").glob("*.safetensors"))) > 2 and len(list((tmp_path / "3").glob("*.bin"))) > 2
    for key, info in sources[0].keys().items():
        tensors = [source.read(key, (0,) * len(info.shape), info.shape) for source in sources]
        assert info.dtype == dtype and all(tensor.dtype == dtype for tensor in tensors)
        assert all(torch.equal(tensor, tensors[0]) for tensor in tensors), key


@pytest.mark.parametrize("name", ["llama-attention-bias", "gpt2", "opt"])
def test_any_chunk_is_exactly_the_slice(tmp_path: Path, name: str) -> None:
    save_tiny_model(tmp_path, name)
    source = HuggingFaceSource(tmp_path)
    assert isinstance(source, WeightSource)
    generator = torch.Generator().manual_seed(3)
    for key, info in source.keys().items():
        whole = source.read(key, (0,) * len(info.shape), info.shape)
        assert tuple(whole.shape) == info.shape
        for _ in range(20):
            ends = [sorted(torch.randint(size + 1, (2,), generator=generator).tolist()) for size in info.shape]
            chunk = source.read(key, tuple(a for a, _ in ends), tuple(b - a for a, b in ends))
            assert torch.equal(chunk, whole[tuple(slice(a, b) for a, b in ends)]), key


def test_reading_a_layer_touches_only_that_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path, "llama")
    source = HuggingFaceSource(tmp_path)
    touched: list[tuple[str, tuple[tuple[int, int], ...]]] = []
    read = source._files.read
    monkeypatch.setattr(
        source._files, "read", lambda name, ranges: (touched.append((name, ranges)), read(name, ranges))[1]
    )
    source.read(FC1, (1, 10, 4), (1, 20, 3))
    assert touched == [("model.layers.1.mlp.gate_proj.weight", ((10, 30), (4, 7)))]
    touched.clear()
    source.read(QKV, (2, 40, 0), (1, 10, 40))  # the value head of the first of two groups
    assert touched == [("model.layers.2.self_attn.v_proj.weight", ((0, 10), (0, 40)))]


def test_rows_past_the_vocabulary_are_zeros_only_on_request(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, "llama")
    source = HuggingFaceSource(tmp_path)
    chunk = source.read(WORDS, (130, 0), (6, 40), allow_missing_rows=True)
    assert torch.equal(chunk[:3], model.model.embed_tokens.weight[130:]) and not chunk[3:].any()
    with pytest.raises(ValueError, match="lies outside of it"):
        source.read(WORDS, (130, 0), (6, 40))
    with pytest.raises(KeyError, match="no tensor 'x'"):
        source.read("x", (0,), (1,))


def test_biases_that_only_some_linears_have_are_completed_with_zeros(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "mlp", "llama-mlp-bias")
    source = HuggingFaceSource(tmp_path / "mlp")
    assert source.backbone.bias and not source.backbone.nemo_config()["qkv_bias"]
    assert not source.read(PROJ_BIAS, (0, 0), source.keys()[PROJ_BIAS].shape).any()
    save_tiny_model(tmp_path / "qwen2", "qwen2")
    source = HuggingFaceSource(tmp_path / "qwen2")
    assert source.backbone.qkv_bias and not source.backbone.bias and PROJ_BIAS not in source.keys()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_bare_models_without_the_base_prefix_are_read(tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny_model(tmp_path, name)
    expected = HuggingFaceSource(tmp_path)
    prefix = "transformer." if name == "gpt2" else "model."
    stored = {key.removeprefix(prefix): value for key, value in load_file(tmp_path / "model.safetensors").items()}
    extra = {"h.0.attn.bias": torch.ones(1, 1, 32, 32), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    extra = extra if name == "gpt2" else {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}
    save_file(stored | (extra if name != "opt" else {}), tmp_path / "model.safetensors")
    bare = HuggingFaceSource(tmp_path)
    for key, info in expected.keys().items():
        arguments = (key, (0,) * len(info.shape), info.shape)
        assert torch.equal(bare.read(*arguments), expected.read(*arguments))


def test_parts_of_different_dtype_are_read_in_the_wider_one(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny_model(tmp_path, "llama", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    stored[name] = stored[name].float() + 1e-6
    save_file(stored, tmp_path / "model.safetensors")
    source = HuggingFaceSource(tmp_path)
    assert source.keys()[FC1].dtype == torch.float32 and source.keys()[QKV].dtype == torch.bfloat16
    assert torch.equal(source.read(FC1, (1, 56, 0), (1, 56, 40))[0], stored[name])


def test_weights_and_config_that_do_not_fit_give_all_faults_at_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny_model(tmp_path, "llama")
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.layers.1.mlp.up_proj.weight"]
    stored["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    stored["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(2)
    stored["model.norm.weight"] = torch.zeros(41)
    stored["lm_head.weight"] = torch.zeros(133, 40, dtype=torch.int8)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        HuggingFaceSource(tmp_path)
    for part in (
        "layers.1.mlp.up_proj.weight is missing",
        "model.layers.9.mlp.up_proj.weight is not read",
        "model.layers.0.self_attn.q_norm.weight is not read",
        "model.norm.weight has shape [41], must be [40]",
        "lm_head.weight has dtype I8, must be a floating one",
        "5 faults",
    ):
        assert part in str(caught.value)


def test_tied_models_may_store_the_output_matrix_again(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny_model(tmp_path, "llama-tied")
    stored = load_file(tmp_path / "model.safetensors")
    save_file(stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors")
    assert "output_layer.weight" not in HuggingFaceSource(tmp_path).keys()
    change_config(tmp_path, tie_word_embeddings=False)
    assert "output_layer.weight" in HuggingFaceSource(tmp_path).keys()


# What each family refuses: model, config values, words of the reason.
REFUSED = [
    ("llama", {"model_type": "gemma"}, "'gemma' is not supported; supported are llama, mistral, qwen2, gpt2, opt"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn' .* default, linear, llama3"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
    ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope' is not supported"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor: None, must be a number above 0"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor: None.*high_freq_fac"),
    ("llama", {"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}}, "disagree"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one set per kind of layer"),
    ("llama", {"rope_scaling": "yes"}, "rope_scaling: 'yes', must be a mapping"),
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
    for name in ("llama", "mistral", "qwen2", "gpt2", "opt"):
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
    with pytest.raises(ValueError, match="hidden_act.*sliding_window.*yarn.*vocab_size"):
        read_backbone(tmp_path / "model")


def test_a_window_is_no_fault_where_it_does_not_bite(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "mistral", tmp_path / "mistral")
    change_config(tmp_path / "mistral", sliding_window=None)
    assert read_backbone(tmp_path / "mistral").sequence_length == 32
    change_config(tmp_path / "mistral", sliding_window=16)
    config = read_backbone(tmp_path / "mistral", sequence_length=16).nemo_config()
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
    assert read_backbone(saved / "gpt2", sequence_length=8).nemo_config()["encoder_seq_length"] == 32


def test_the_newer_spelling_of_rope_is_read(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "llama", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    values = json.loads(path.read_text())
    del values["rope_theta"], values["rope_scaling"]
    values["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 12345.0}
    path.write_text(json.dumps(values))
    config = read_backbone(tmp_path / "model").nemo_config()
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
    for text, message in (("{", "damaged"), ("[1]", "holds no mapping"), ("{}", "model_type: None is not supported")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_backbone(tmp_path)
    shutil.copy(saved / "llama" / "config.json", tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"no weights \(model.safetensors,"):
        HuggingFaceSource(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="merge it into its base model"):
        HuggingFaceSource(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((saved / "llama" / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model.safetensors: missing or damaged"):
        HuggingFaceSource(tmp_path)


def test_broken_indices_name_every_fault(tmp_path: Path) -> None:
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
