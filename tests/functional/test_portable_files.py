# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Files that go to another machine: they name no place on the one they were made on, and load without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("nemo")

from tests.helpers.megatron_models import exit_entry, exit_logits, random_tokens
from tests.helpers.nemo_files import members, restore, rewritten, run_convert, with_tokenizer

import torch  # isort: skip  # after the CPU host is on
import yaml

from tests.helpers.huggingface_models import save_tiny_model

EXITS = [exit_entry(1, "mlp"), exit_entry(2, "norm", "random")]


def naming(path: Path, place: Path) -> list[str]:
    """Members of an archive in whose bytes a directory is named."""
    return [name for name, data in members(path).items() if str(place).encode() in data]


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A backbone and exits tuned on it, made in directories that are gone; `logits` are the exits' before the move."""
    here, there = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("there")
    save_tiny_model(here / "source", "llama", vocab_size=4096)
    run_convert(with_tokenizer(here / "source"), here / "ee.nemo", EXITS)
    model = restore(here / "ee.nemo", exits_only=True)
    with torch.no_grad():
        for parameter in model.model.exits.parameters():
            parameter.mul_(1.1)
    (here / "run").mkdir()
    model._save_restore_connector.save_to(model, str(here / "run" / "exits.nemo"))
    model._save_restore_connector.exits_only = False
    model.save_to(str(here / "run" / "whole.nemo"))
    tokens = random_tokens(model)
    logits = exit_logits(model, tokens)
    for path in (here / "ee.nemo", here / "run" / "exits.nemo", here / "run" / "whole.nemo"):
        shutil.copy(path, there)
    shutil.rmtree(here)
    return SimpleNamespace(here=here, there=there, tokens=tokens, logits=logits)


def test_no_member_names_the_machine(moved: SimpleNamespace) -> None:
    """Neither the config nor the checkpoints' own metadata; bytes of all members."""
    for name in ("ee.nemo", "exits.nemo", "whole.nemo"):
        assert naming(moved.there / name, moved.here) == [], name
        config = yaml.safe_load(members(moved.there / name)["model_config.yaml"])
        assert config["tokenizer"]["type"] == "tokenizer"
        assert config.get("backbone_path") == ("../ee.nemo" if name == "exits.nemo" else None)


@pytest.mark.parametrize("name", ["exits.nemo", "whole.nemo"])
def test_moved_files_load(name: str, moved: SimpleNamespace) -> None:
    """Bitwise; the base lay one folder higher, and lies beside its exits now."""
    found = exit_logits(restore(moved.there / name, verify="full"), moved.tokens)
    assert found.keys() == moved.logits.keys()
    assert all(torch.equal(found[exit], moved.logits[exit]) for exit in found)


def test_exits_in_another_dtype(moved: SimpleNamespace, tmp_path: Path) -> None:
    """Half the bytes, each number rounded once; the model that was saved keeps its own."""
    shutil.copy(moved.there / "ee.nemo", tmp_path)
    model = restore(moved.there / "exits.nemo", exits_only=True)
    own = {name: parameter.clone() for name, parameter in model.model.exits.named_parameters()}
    model._save_restore_connector.exits_dtype = torch.bfloat16
    model.save_to(str(tmp_path / "exits.nemo"))
    assert all(torch.equal(value, own[name]) for name, value in model.model.exits.named_parameters())
    sizes = [
        sum(len(data) for name, data in members(folder / "exits.nemo").items() if name.endswith(".distcp"))
        for folder in (moved.there, tmp_path)
    ]
    assert 0.45 < sizes[1] / sizes[0] < 0.6
    found = dict(restore(tmp_path / "exits.nemo").model.exits.named_parameters())
    assert all(torch.equal(found[name].float(), value.bfloat16().float()) for name, value in own.items())


def test_files_of_earlier_versions(moved: SimpleNamespace, tmp_path: Path) -> None:
    """Absolute paths that are gone: the scan sees them, a base of that name beside the file is taken, another place
    has to be said; the tokenizer in the file wins over where it was. Saving such a file anew drops them."""
    exits = moved.there / "exits.nemo"
    config = yaml.safe_load(members(exits)["model_config.yaml"])
    config |= {"backbone_path": str(moved.here / "ee.nemo"), "exp_dir": str(moved.here)}
    config["tokenizer"]["type"] = str(moved.here / "source")
    old = rewritten(exits, tmp_path / "exits.nemo", {"model_config.yaml": yaml.safe_dump(config).encode()})
    assert naming(old, moved.here) == ["model_config.yaml"], "control"
    with pytest.raises(ValueError, match=r"ee.nemo'\) was not found .*: give model.backbone_path=<"):
        restore(old)
    restore(old, backbone_path=str(moved.there / "ee.nemo"))
    shutil.copy(moved.there / "ee.nemo", tmp_path)
    model = restore(old, exits_only=True)
    model._save_restore_connector.save_to(model, str(tmp_path / "new.nemo"))
    assert naming(tmp_path / "new.nemo", moved.here) == naming(tmp_path / "new.nemo", tmp_path) == []
    found = exit_logits(restore(tmp_path / "new.nemo"), moved.tokens)
    assert all(torch.equal(found[exit], moved.logits[exit]) for exit in found)


SPECIAL = {
    "special_tokens": {"pad_token": "<pad>", "eos_token": "<end of turn>"},
    "additional_special_tokens": {"additional_special_tokens": ["<|user|>", "<|tool|>"]},
    "chat_template": "{{ messages[0].content }}",
}


@pytest.mark.parametrize("fast", [None, True, False])
def test_bundling_changes_no_token(fast: bool | None, moved: SimpleNamespace, tmp_path: Path) -> None:
    """A plain `.nemo` that names a directory and special tokens, before and after its directory is in the file."""
    (tmp_path / "source").mkdir()
    source = with_tokenizer(tmp_path / "source")
    names = {name: None for name in members(moved.there / "ee.nemo") if name.startswith("tokenizer/")}
    config = yaml.safe_load(members(moved.there / "ee.nemo")["model_config.yaml"])
    config["tokenizer"] = {"library": "huggingface", "type": str(source), **SPECIAL}
    if fast is not None:
        config["tokenizer"]["use_fast"] = fast
    changes = {**names, "model_config.yaml": yaml.safe_dump(config).encode()}
    model = restore(rewritten(moved.there / "ee.nemo", tmp_path / "plain.nemo", changes))
    model.save_to(str(tmp_path / "ee.nemo"))
    shutil.rmtree(source)
    with pytest.raises(ValueError, match="source"):
        restore(tmp_path / "plain.nemo")
    again = restore(tmp_path / "ee.nemo")
    stored = yaml.safe_load(members(tmp_path / "ee.nemo")["model_config.yaml"])["tokenizer"]
    assert stored == {**config["tokenizer"], "type": "tokenizer", "use_fast": bool(fast)}
    text = "<|user|>def f():<end of turn><|tool|><pad>"
    ids = model.tokenizer.text_to_ids(text)
    assert again.tokenizer.text_to_ids(text) == ids and max(ids) > 4096 > min(ids)
    assert type(again.tokenizer.tokenizer) is type(model.tokenizer.tokenizer)
    assert again.cfg.tokenizer.type == "tokenizer", "no place where the file was unpacked"
    for name in ("eos_id", "bos_id", "pad_id", "additional_special_tokens_ids", "vocab_size"):
        assert getattr(again.tokenizer, name) == getattr(model.tokenizer, name), name
    assert again.tokenizer.tokenizer.chat_template == SPECIAL["chat_template"]


def test_a_stranger_s_code_is_not_packed_again(moved: SimpleNamespace, tmp_path: Path) -> None:
    path, name = moved.there / "ee.nemo", "tokenizer/tokenizer_config.json"
    settings = json.loads(members(path)[name])
    evil = json.dumps({**settings, "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}).encode()
    restore(rewritten(path, tmp_path / "evil.nemo", {name: evil, "tokenizer/evil.py": b"x"})).save_to(
        str(tmp_path / "copy.nemo")
    )
    found = members(tmp_path / "copy.nemo")
    assert json.loads(found[name]) == settings and found.keys() == members(path).keys()


def test_a_foreign_config_packs_no_file_of_mine(moved: SimpleNamespace, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a key of mine")
    path = moved.there / "ee.nemo"
    config = yaml.safe_load(members(path)["model_config.yaml"])
    config["tokenizer"]["model"] = str(secret)
    evil = rewritten(path, tmp_path / "evil.nemo", {"model_config.yaml": yaml.safe_dump(config).encode()})
    restore(evil).save_to(str(tmp_path / "copy.nemo"))
    assert not any(b"a key of mine" in data for data in members(tmp_path / "copy.nemo").values())
    assert naming(tmp_path / "copy.nemo", tmp_path) == [] and naming(evil, tmp_path) != [], "control"
    model = restore(path, tokenizer={"model": str(secret)})
    model.save_to(str(tmp_path / "mine.nemo"))
    assert members(tmp_path / "mine.nemo")["model_secret"] == b"a key of mine", "what the user says is his"


def test_the_exports_find_the_base_too(moved: SimpleNamespace, tmp_path: Path) -> None:
    from nemo_ee.export.source import EarlyExitSource

    with EarlyExitSource(moved.there / "exits.nemo") as source:
        assert source.backbone_names()
    shutil.copy(moved.there / "exits.nemo", tmp_path)
    with pytest.raises(ValueError, match=r"\('../ee.nemo'\) was not found .*: give backbone=<the .nemo"):
        EarlyExitSource(tmp_path / "exits.nemo")
