# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What exports take from the `tokenizer/` of a `.nemo` that anybody may have made: named files, and token ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("nemo")

from tests.helpers.megatron_models import exit_entry

import torch  # isort: skip  # after the CPU host is on

from nemo_ee.checkpoint.tokenizer_files import special_token_ids
from nemo_ee.export.huggingface.remote_code import remote_code
from nemo_ee.export.manifest import MANIFEST
from nemo_ee.families.registry import FAMILIES
from tests.functional import test_export_tensorrt_llm
from tests.functional.test_export_huggingface import Made, export, stock
from tests.helpers.nemo_files import members, rewritten

EXITS = [exit_entry(1, "norm"), exit_entry(2, "mlp")]
HOSTILE = {
    "modeling_early_exit.py": b"raise SystemExit",
    "model.safetensors": b"other weights",
    "model.safetensors.index.json": b"{}",
    "pytorch_model.bin": b"a pickle",
    "early_exit_trtllm/__init__.py": b"raise SystemExit",
    "tokenizer.json/deeper": b"a folder of a good name",
    "generation_config.json": b'["no object"]',
}
GOOD = {"tokenizer_config.json": b'{"eos_token": "</s>"}', "vocab.json": b'{"</s>": 9}'}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("llama"), "llama", EXITS, bundled=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != MANIFEST
    }


def with_tokenizer(one: Made, path: Path, files: dict[str, bytes]) -> Path:
    return rewritten(one.path, path, {f"tokenizer/{name}": data for name, data in files.items()})


def test_only_the_tokenizer_s_own_files_come_along(one: Made, tmp_path: Path) -> None:
    """Bitwise the export of a `.nemo` with nothing else in its tokenizer/."""
    hostile = with_tokenizer(one, tmp_path / "hostile.nemo", GOOD | HOSTILE)
    good = with_tokenizer(one, tmp_path / "good.nemo", GOOD)
    expected = contents(export(good, tmp_path / "expected"))
    assert contents(export(hostile, tmp_path / "out")) == expected
    for folder in ("hf_full", "hf_early_exit"):
        assert all(expected[f"{folder}/{name}"] == data for name, data in GOOD.items())
    for path, name in ((good, "trt_expected"), (hostile, "trt")):
        test_export_tensorrt_llm.export(path, tmp_path / name)
    assert contents(tmp_path / "trt") == contents(tmp_path / "trt_expected")
    assert contents(tmp_path / "trt" / "tokenizer") == GOOD


def test_code_that_a_stranger_s_tokenizer_names_does_not_run(
    one: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not for those who say `trust_remote_code=True`, as our own model file asks them to."""
    from transformers import AutoTokenizer, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    bait, words = tmp_path / "executed", {"a": 0, "<s>": 1}
    code = f"open({str(bait)!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast\n".encode()
    code += b"class Evil(PreTrainedTokenizerFast): pass\n"  # transformers marks the class that it finds
    named = {"auto_map": {"AutoTokenizer": [None, "evil.Evil"], "AutoConfig": "evil.Evil"}}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", **named}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "a"}
    hostile = {
        "tokenizer.json": json.dumps({"version": "1.0", "added_tokens": [], "model": model}).encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "special_tokens_map.json": json.dumps({"bos_token": "<s>", **named}).encode(),
        "generation_config.json": json.dumps(named).encode(),
        "evil.py": code,
        "custom_generate/generate.py": code,
    }  # fmt: skip
    path = with_tokenizer(one, tmp_path / "hostile.nemo", hostile)
    output, engine = export(path, tmp_path / "out"), test_export_tensorrt_llm.export(path, tmp_path / "trt")
    for folder in [*output.glob("hf_*"), engine / "tokenizer"]:
        made = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("a<s>")
        assert dict(made) == {"input_ids": [0, 1], "attention_mask": [1, 1]}
        for file in folder.glob("*.json"):
            assert "evil" not in file.read_text(), file
        ours = {"early_exit_trtllm", *remote_code(FAMILIES["llama"])} if folder.name == "hf_early_exit" else set()
        assert {file.relative_to(folder).parts[0] for file in folder.rglob("*.py")} <= ours
    assert not bait.exists()
    for name in ("tokenizer.json", "tokenizer_config.json", "evil.py"):
        (output / "hf_full" / name).write_bytes(hostile[name])
    AutoTokenizer.from_pretrained(output / "hf_full", trust_remote_code=True)
    assert bait.exists(), "control: the folder as it came runs it"


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_links_are_not_followed(linked: str, one: Made, tmp_path: Path) -> None:
    secret, extracted = tmp_path / "secret", tmp_path / "extracted"
    secret.mkdir()
    (secret / "vocab.txt").write_text("somebody's")
    (secret / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for name, data in members(one.path).items():
        (extracted / name).parent.mkdir(parents=True, exist_ok=True)
        (extracted / name).write_bytes(data)
    if linked == "folder":
        (extracted / "tokenizer").symlink_to(secret)
    else:
        (extracted / "tokenizer").mkdir()
        for file in secret.iterdir():
            (extracted / "tokenizer" / file.name).symlink_to(file)
        (extracted / "tokenizer" / "merges.txt").write_text("its own")
    output = export(extracted, tmp_path / "out", targets=("full",))
    own = {"hf_full/merges.txt"} if linked == "file" else set()
    assert contents(output).keys() == own | {f"hf_full/{name}" for name in FILES}


FILES = ("config.json", "generation_config.json", "model.safetensors")


# -- special tokens without a bundled config.json -------------------------------------------------------------------


def ids_of(path: Path) -> dict[str, int | None]:
    values = json.loads(path.read_text())
    return {name: values[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def test_without_a_tokenizer_no_token_is_special(one: Made, tmp_path: Path) -> None:
    output = export(one.path, tmp_path / "out", targets=("full", "early_exit"))
    for file in [*output.rglob("config.json"), *output.rglob("generation_config.json")]:
        assert set(ids_of(file).values()) == {None}
    model = stock(output / "hf_full")
    assert type(model.config)().eos_token_id == 2, "control: the class has a default of its own"
    assert model.config.eos_token_id is None and model.generation_config.eos_token_id is None


def test_the_end_token_of_the_tokenizer_s_files_ends_a_text(one: Made, tmp_path: Path) -> None:
    """In transformers' `generate` and in the directory's own, asked for nothing."""
    from transformers import AutoModelForCausalLM

    prompt = torch.tensor([[5, 71, 13]])
    call = {"max_new_tokens": 12, "attention_mask": torch.ones_like(prompt)}
    free = stock(export(one.path, tmp_path / "free", targets=("full",)) / "hf_full").generate(prompt, **call)
    assert free.shape[1] == 15
    end = free[0, 8].item()
    length = free[0, 3:].tolist().index(end) + 4
    files = {
        "tokenizer_config.json": json.dumps({"eos_token": {"content": "</s>"}, "bos_token": "<far>"}).encode(),
        "added_tokens.json": json.dumps({"</s>": end, "<far>": 10_000}).encode(),
    }
    path = with_tokenizer(one, tmp_path / "one.nemo", files)
    output = export(path, tmp_path / "out", targets=("full", "early_exit"))
    for file in [*output.rglob("config.json"), *output.rglob("generation_config.json")]:
        assert ids_of(file) == {"bos_token_id": None, "eos_token_id": end, "pad_token_id": None}
    model = stock(output / "hf_full")
    assert torch.equal(model.generate(prompt, **call), free[:, :length])
    remote = AutoModelForCausalLM.from_pretrained(output / "hf_early_exit", trust_remote_code=True)
    assert torch.equal(remote.generate(prompt, **call, return_result=True)[0], free[:, :length])
    engines = test_export_tensorrt_llm.export(path, tmp_path / "trt")
    written = [json.loads(file.read_text()) for file in engines.glob("*/generation_config.json")]
    assert len(written) == 3 and {one["eos_token_id"] for one in written} == {end}, "the checkpoint and two drafts"


def test_an_original_without_generation_config_keeps_its_class_s_tokens(one: Made, tmp_path: Path) -> None:
    """The file's values are those that transformers makes of config.json, with its class's default where that says
    nothing."""
    values = json.loads((one.source / "config.json").read_text())
    del values["eos_token_id"]
    path = with_tokenizer(one, tmp_path / "one.nemo", {"config.json": json.dumps(values).encode()})
    folder = export(path, tmp_path / "out", targets=("full",)) / "hf_full"
    expected = {"bos_token_id": values["bos_token_id"], "eos_token_id": 2, "pad_token_id": values["pad_token_id"]}
    assert json.loads((folder / "generation_config.json").read_text()) == expected
    model = stock(folder)
    assert model.config.eos_token_id == 2 and model.generation_config.eos_token_id == 2


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {}),
        ({"tokenizer_config.json": {"eos_token": "</s>"}}, {}),
        ({"tokenizer_config.json": {"eos_token": "</s>"}, "vocab.json": {"a": 0, "</s>": 4}}, {"eos": 4}),
        ({"special_tokens_map.json": {"pad_token": "p"}, "added_tokens.json": {"p": 7}}, {"pad": 7}),
        (
            {
                "tokenizer_config.json": {"bos_token": "b", "added_tokens_decoder": {"3": {"content": "b"}}},
                "tokenizer.json": {"added_tokens": [{"id": 9, "content": "b"}]},
            },
            {"bos": 3},
        ),
        (
            {
                "tokenizer_config.json": {"bos_token": "b", "eos_token": "e"},
                "tokenizer.json": {
                    "added_tokens": [{"id": 9, "content": "b"}],
                    "model": {"vocab": [["a", 0], ["e", 0]]},
                },
            },
            {"bos": 9, "eos": 1},
        ),
        ({"tokenizer_config.json": {"eos_token": 5, "added_tokens_decoder": []}, "vocab.json": ["x"]}, {}),
    ],
)
def test_special_tokens_by_file(files: dict, expected: dict[str, int], tmp_path: Path) -> None:
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    assert special_token_ids(tmp_path) == {f"{role}_token_id": expected.get(role) for role in ("bos", "eos", "pad")}


# -- certificates ---------------------------------------------------------------------------------------------------


def test_certificates_are_read_once_and_before_anything_is_written(
    one: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[list[str]] = []

    def valid(_: Path) -> list:
        written.append([path.name for path in tmp_path.iterdir()])
        return []

    monkeypatch.setattr("nemo_ee.export.source.valid_certificates", valid)
    export(one.path, tmp_path / "a")
    test_export_tensorrt_llm.export(one.path, tmp_path / "b")
    assert written == [[], ["a"]]
