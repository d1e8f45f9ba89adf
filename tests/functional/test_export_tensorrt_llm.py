# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM unified checkpoints against transformers, against the exits, and against Megatron-core's converter.

Logits come from a plain-torch reader of the format (tests/helpers/tensorrt_llm_reference.py), which runs every rank's
shards; no TensorRT-LLM is involved. Tolerance 1e-5 of the largest logit in fp32, weights bitwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nemo")

from tests.helpers.megatron_models import exit_entry, exit_logits, random_tokens, relative_difference, tiny_pair

import torch  # isort: skip  # after the CPU host is on

from nemo_ee.families import registry
from tests.helpers.huggingface_models import reference_logits as transformers_logits
from tests.helpers.tensorrt_llm_reference import (
    read_config,
    read_ranks,
    reference_exit_logits,
    reference_logits,
    stock_tensors,
)

TOLERANCE = 1e-5
FOUR_LAYERS = {"num_hidden_layers": 4}
# name of the tiny model -> (changes, stock class). Even layers for two stages; Llama has eight heads, two of them
# key-value heads, so that four ranks have to share those.
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({**FOUR_LAYERS, "num_attention_heads": 8}, "LlamaForCausalLM"),
    "llama-tied": (FOUR_LAYERS, "LlamaForCausalLM"),
    "llama-bias": (FOUR_LAYERS, "LlamaForCausalLM"),
    "llama-linear": (FOUR_LAYERS, "LlamaForCausalLM"),
    "llama-llama3": (FOUR_LAYERS, "LlamaForCausalLM"),
    "mistral": (FOUR_LAYERS, "LlamaForCausalLM"),
    "qwen2": (FOUR_LAYERS, "Qwen2ForCausalLM"),
    "gpt2": ({"n_layer": 4}, "GPTForCausalLM"),
    "opt": (FOUR_LAYERS, "OPTForCausalLM"),
}
FAMILIES |= {
    name: ({family.keys["num_layers"]: 4}, family.engine.architecture)
    for name, family in registry.FAMILIES.items()
    if name not in FAMILIES and family.engine is not None
}
EXITS = [
    exit_entry(1, "mlp", "random"),
    exit_entry(2, "norm", "lora", "low_rank", rank=3),
    exit_entry(3, "mlp", "lora", rank=2),
    exit_entry(2, "layer", "lora", "shared", rank=2),
    exit_entry(4, "layer", "copy"),
    exit_entry(4, "embedding"),
    exit_entry(3, "embedding", output="shared"),
]
DRAFTS = [exit["name"] for exit in EXITS if exit["architecture"] != "embedding"]


def moved(model) -> None:
    """Every trainable parameter as tuning would leave it; what starts at zero no longer is."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


class Made:
    """A tiny model as transformers', as NeMo's and as a `.nemo`."""

    def __init__(self, folder: Path, name: str, exits: Sequence[dict] = EXITS, **settings: Any) -> None:
        self.reference, self.model = tiny_pair(folder / "hf", name, exits, changes=FAMILIES[name][0], **settings)
        moved(self.model)
        self.path = folder / f"{name}.nemo"
        self.model.save_to(str(self.path))
        self.tokens = random_tokens(self.model, length=12)
        self.logits = transformers_logits(self.reference, self.tokens)
        self.exits = exit_logits(self.model, self.tokens)


def each_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """name -> `Made`, each made once."""
    kept: dict[str, Made] = {}

    def of(name: str) -> Made:
        if name not in kept:
            kept[name] = Made(tmp_path_factory.mktemp(name), name)
        return kept[name]

    return of


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    return each_once(tmp_path_factory)


def export(checkpoint: Path, output: Path, **settings: Any) -> Path:
    from nemo_ee.export.tensorrt_llm.unified_checkpoint import TensorRTLLMSettings, export_checkpoint

    settings = {"dtype": None, "progress": False, **settings}
    return export_checkpoint(TensorRTLLMSettings.from_config({"checkpoint": checkpoint, "output": output, **settings}))


def backbone_only(ranks: list[dict]) -> list[dict]:
    return [{name: t for name, t in rank.items() if not name.startswith("exit_heads.")} for rank in ranks]


LAYOUTS = [(name, tp, pp) for name in FAMILIES for tp, pp in ((1, 1), (2, 1), (1, 2), (2, 2))] + [("llama", 4, 1)]


@pytest.mark.parametrize(("name", "tp", "pp"), LAYOUTS)
def test_it_is_what_the_stock_class_asks_for_and_computes_the_model(
    name: str, tp: int, pp: int, made, tmp_path: Path
) -> None:
    one = made(name)
    folder = export(one.path, tmp_path / "out", tensor_parallel=tp, pipeline_parallel=pp, drafts=()) / "trtllm_ckpt"
    config, ranks = read_config(folder), read_ranks(folder)
    assert config["architecture"] == FAMILIES[name][1] and config["mapping"] == {
        "world_size": tp * pp, "tp_size": tp, "pp_size": pp
    }  # fmt: skip
    for rank, tensors in enumerate(backbone_only(ranks)):
        assert {key: tuple(t.shape) for key, t in tensors.items()} == stock_tensors(config, rank)
    assert all("lm_head" not in key for rank in ranks for key in rank if key.startswith("exit_heads."))
    assert relative_difference(reference_logits(folder, one.tokens), one.logits) <= TOLERANCE
    exits = reference_exit_logits(folder, one.tokens)
    assert exits.keys() == one.exits.keys()
    for exit, logits in exits.items():
        assert relative_difference(logits, one.exits[exit]) <= TOLERANCE, exit


def test_control_a_wrong_shard_gives_other_logits(made, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    one = made("llama")
    folder = export(one.path, tmp_path / "out", tensor_parallel=2, drafts=()) / "trtllm_ckpt"
    path = folder / "rank1.safetensors"
    tensors = load_file(path)
    qkv = tensors["transformer.layers.1.attention.qkv.weight"]
    tensors["transformer.layers.1.attention.qkv.weight"] = qkv.roll(10, dims=0)  # one head further
    save_file(tensors, path)
    assert relative_difference(reference_logits(folder, one.tokens), one.logits) > 100 * TOLERANCE


# -- an oracle that others wrote ------------------------------------------------------------------------------------


class Mapping:
    """What Megatron-core's converter asks of TensorRT-LLM's `Mapping`."""

    def __init__(self, tp: int, pp: int, rank: int) -> None:
        self.tp_size, self.pp_size, self.tp_rank, self.pp_rank = tp, pp, rank % tp, rank // tp

    def pp_layers(self, num_layers: int) -> list[int]:
        each = num_layers // self.pp_size
        return list(range(self.pp_rank * each, (self.pp_rank + 1) * each))

    def is_first_pp_rank(self) -> bool:
        return self.pp_rank == 0

    def is_last_pp_rank(self) -> bool:
        return self.pp_rank == self.pp_size - 1


def megatron_ranks(one: Made, tp: int, pp: int, monkeypatch) -> list[dict]:
    """The backbone's tensors per rank from Megatron-core's own converter."""
    from megatron.core.export.data_type import DataType
    from megatron.core.export.export_config import ExportConfig
    from megatron.core.export.trtllm.model_to_trllm_mapping.default_conversion_dict import DEFAULT_CONVERSION_DICT
    from megatron.core.export.trtllm.trtllm_weights_converter import single_device_trtllm_model_weights_converter as m

    from nemo_ee.checkpoint.chunk_reader import ChunkReader
    from nemo_ee.checkpoint.unpacked import open_nemo

    # The two functions it would import from tensorrt_llm.
    monkeypatch.setattr(m, "pad_vocab_size", lambda size, ranks: -(-size // ranks) * ranks)
    monkeypatch.setattr(m, "str_dtype_to_torch", lambda dtype: torch.float32)
    with open_nemo(one.path) as archive:
        reader = ChunkReader(archive.folder("model_weights"))
        state = {key: reader.read(key, (0,) * len(i.shape), i.shape) for key, i in reader.keys().items()}
    vocabulary, embedding = one.model.vocab_size, "embedding.word_embeddings.weight"
    output = state.get("output_layer.weight", state[embedding])[:vocabulary]
    padding = torch.zeros(-vocabulary % tp, output.shape[1])
    state |= {embedding: state[embedding][:vocabulary], "output_layer.weight": torch.cat((output, padding))}
    config = one.model.transformer_config
    converter = m.SingleDeviceTRTLLMModelWeightsConverter(
        ExportConfig(inference_tp_size=tp, inference_pp_size=pp), config, DataType.float32,
        activation="swiglu" if config.gated_linear_unit else "gelu",
    )  # fmt: skip
    converter.convert(state, DEFAULT_CONVERSION_DICT, state_dict_split_by_layer_numbers=False)
    return [converter.get_local_model_weights_per_gpu(Mapping(tp, pp, rank), None) for rank in range(tp * pp)]


@pytest.mark.parametrize("name", ["llama", "llama-bias", "qwen2", "gpt2", "opt"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_the_backbone_is_bitwise_megatron_core_s_own_export(
    name: str, tp: int, pp: int, made, tmp_path: Path, monkeypatch
) -> None:
    one = made(name)
    expected = megatron_ranks(one, tp, pp, monkeypatch)
    output = export(one.path, tmp_path / "out", tensor_parallel=tp, pipeline_parallel=pp, drafts=())
    ranks = backbone_only(read_ranks(output / "trtllm_ckpt"))
    if tp * pp == 1 and read_config(output / "trtllm_ckpt")["tie_word_embeddings"]:
        assert torch.equal(expected[0].pop("lm_head.weight"), ranks[0]["transformer.vocab_embedding.weight"])
    for ours, theirs in zip(ranks, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


_COLUMNS = re.compile(r"(attention\.dense|mlp\.proj)\.weight")
_ROWS = re.compile(r"(mlp\.(fc|gate)|lm_head|unembed)\.(weight|bias)")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_two_ranks_joined_are_one_rank(name: str, made, tmp_path: Path) -> None:
    """Bitwise, exits included."""
    one = made(name)
    whole = read_ranks(export(one.path, tmp_path / "one", drafts=()) / "trtllm_ckpt")[0]
    folder = export(one.path, tmp_path / "two", drafts=(), tensor_parallel=2) / "trtllm_ckpt"
    config, (first, second) = read_config(folder), read_ranks(folder)
    sizes = [config["head_size"] * config[key] // 2 for key in ("num_attention_heads", *["num_key_value_heads"] * 2)]
    assert first.keys() == second.keys() == whole.keys() | {"lm_head.weight"}
    for key, expected in whole.items():
        if "attention.qkv." in key:
            joined = torch.cat([t for pair in zip(first[key].split(sizes), second[key].split(sizes), strict=True)
                                for t in pair])  # fmt: skip
        elif _COLUMNS.search(key):
            joined = torch.cat((first[key], second[key]), dim=1)
        elif _ROWS.search(key):
            joined = torch.cat((first[key], second[key]))[: expected.shape[0]]
        else:
            joined = first[key]
            assert torch.equal(joined, second[key])
        assert torch.equal(joined, expected), key


# -- draft models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tp"), [("llama", 1), ("llama", 2), ("llama", 4), ("mistral", 1), ("qwen2", 2), ("qwen3", 2)]
)
def test_a_draft_s_logits_are_the_exit_s(name: str, tp: int, made, tmp_path: Path) -> None:
    one = made(name)
    output = export(one.path, tmp_path / "out", draft_tensor_parallel=tp)
    drafts = sorted(folder.name.removeprefix("draft_") for folder in output.glob("draft_*"))
    assert drafts == sorted(DRAFTS)
    for exit in EXITS:
        if exit["name"] not in DRAFTS:
            continue
        folder = output / f"draft_{exit['name']}"
        config, ranks = read_config(folder), read_ranks(folder)
        assert config["num_hidden_layers"] == exit["layer"] + (exit["architecture"] == "layer")
        assert config["vocab_size"] == one.model.vocab_size and "early_exit" not in config
        assert [{k: tuple(t.shape) for k, t in r.items()} for r in ranks] == [
            stock_tensors(config, r) for r in range(tp)
        ]
        logits = reference_logits(folder, one.tokens)
        assert relative_difference(logits, one.exits[exit["name"]]) <= TOLERANCE
        assert relative_difference(logits, one.logits) > 100 * TOLERANCE, "control: not the full model's"


def test_which_exits_are_drafts_is_a_choice(made, tmp_path: Path) -> None:
    one = made("llama")
    output = export(one.path, tmp_path / "out", exits=(), drafts=(DRAFTS[0],))
    folders = sorted(path.name for path in output.iterdir() if path.is_dir())
    assert folders == [f"draft_{DRAFTS[0]}", "tokenizer", "trtllm_ckpt"]
    assert read_config(output / "trtllm_ckpt")["early_exit"] == {"exits": []}
    ranks = read_ranks(output / "trtllm_ckpt")
    assert ranks == backbone_only(ranks)
    output = export(one.path, tmp_path / "some", exits=(DRAFTS[1],))
    assert [path.name for path in output.glob("draft_*")] == [f"draft_{DRAFTS[1]}"]
    manifest = json.loads((output / "manifest.json").read_text())
    assert [exit["name"] for exit in manifest["exits"]] == [DRAFTS[1]]


# -- other sources --------------------------------------------------------------------------------------------------


def test_numbers_are_rounded_to_the_asked_dtype(made, tmp_path: Path) -> None:
    one = made("llama")
    output = export(one.path, tmp_path / "out", dtype="bfloat16", drafts=(DRAFTS[0],))
    exact = read_ranks(export(one.path, tmp_path / "exact", drafts=()) / "trtllm_ckpt")[0]
    rounded = read_ranks(output / "trtllm_ckpt")[0]
    assert read_config(output / "trtllm_ckpt")["dtype"] == "bfloat16"
    assert all(torch.equal(rounded[key], exact[key].to(torch.bfloat16)) for key in exact)


def test_exits_only_and_base_give_the_complete_file_s_export(made, tmp_path: Path) -> None:
    one = made("llama")
    from tests.helpers.nemo_files import restore

    model = restore(one.path, exits_only=True)
    small = tmp_path / "exits.nemo"
    model._save_restore_connector.save_to(model, str(small))
    whole, parts = export(one.path, tmp_path / "whole"), export(small, tmp_path / "parts", backbone=one.path)
    for file in whole.rglob("*.safetensors"):
        assert file.read_bytes() == (parts / file.relative_to(whole)).read_bytes()


def test_low_rank_updates_of_the_backbone_are_merged(made, tmp_path: Path) -> None:
    from nemo_ee.megatron.pipeline.stage_forward import full_model_logits
    from tests.helpers.nemo_files import restore

    one = made("llama")
    model = restore(one.path, early_exit={"train": "lora", "lora": {"rank": 2, "merge": False}})
    moved(model)
    model.save_to(str(tmp_path / "lora.nemo"))
    ours = full_model_logits(model.context, one.tokens)
    folder = export(tmp_path / "lora.nemo", tmp_path / "out", tensor_parallel=2, drafts=()) / "trtllm_ckpt"
    assert relative_difference(reference_logits(folder, one.tokens), ours) <= TOLERANCE
    assert relative_difference(ours, one.logits) > 100 * TOLERANCE, "control: the updates do something"
