# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Places on disk in a `.nemo`: what is stored, and how it is found again after a move."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from nemo_ee.checkpoint.nemo_archive import NemoArchive, write_nemo
from nemo_ee.checkpoint.portable import (
    backbone_of,
    config_elsewhere,
    find_backbone,
    portable_tokenizer,
    stored_backbone_path,
    without_code_files,
    without_machine_paths,
)


@pytest.mark.parametrize(
    ("backbone", "stored"),
    [
        ("home/run/ee.nemo", "ee.nemo"),
        ("home/run/base/ee.nemo", "base/ee.nemo"),
        ("home/ee.nemo", "../ee.nemo"),
        ("home/models/ee.nemo", "../models/ee.nemo"),
        ("ee.nemo", "../../ee.nemo"),
        ("../data/models/ee.nemo", "ee.nemo"),  # elsewhere: a hint
    ],
)
def test_what_is_stored_is_seen_from_the_file(backbone: str, stored: str, tmp_path: Path) -> None:
    assert stored_backbone_path(tmp_path / backbone, tmp_path / "home/run/exits.nemo") == stored


def test_a_path_relative_to_the_working_directory(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert stored_backbone_path("ee.nemo", "out/exits.nemo") == "../ee.nemo"


def _touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_where_a_backbone_is_looked_for(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    exits = tmp_path / "run" / "exits.nemo"
    with pytest.raises(ValueError, match=r"its base model \('../ee.nemo'\) was not found .*give model.backbone"):
        find_backbone(exits, stored="../ee.nemo", given=None)
    working = _touch(tmp_path / "elsewhere" / "ee.nemo")
    assert find_backbone(exits, stored="ee.nemo", given=None).resolve() == working
    beside = _touch(tmp_path / "run" / "ee.nemo")
    assert find_backbone(exits, stored="ee.nemo", given=None) == beside, "wins over the working directory"
    assert find_backbone(exits, stored="/gone/away/ee.nemo", given=None) == beside, "as earlier versions stored it"
    assert find_backbone(exits, stored=r"C:\gone\ee.nemo", given=None) == beside
    above = _touch(tmp_path / "ee.nemo")
    assert find_backbone(exits, stored="../ee.nemo", given=None).resolve() == above
    assert find_backbone(exits, stored=str(working), given=None) == working, "an absolute path that is still true"
    assert find_backbone(exits, stored="../ee.nemo", given=working) == working, "what the user says wins"


@pytest.mark.parametrize("stored", [None, "ee.nemo"])
def test_a_path_that_the_user_gives_is_not_replaced_by_another(stored: str | None, tmp_path: Path) -> None:
    _touch(tmp_path / "ee.nemo")
    with pytest.raises(ValueError, match=r"\('/nowhere/ee.nemo'\) was not found: give backbone=<the .nemo"):
        find_backbone(tmp_path / "exits.nemo", stored=stored, given="/nowhere/ee.nemo", option="backbone")


def test_a_copy_elsewhere_sees_the_backbone_from_there(tmp_path: Path) -> None:
    exits, copy = tmp_path / "run" / "exits.nemo", tmp_path / "out" / "deep" / "exits.nemo"
    _touch(tmp_path / "ee.nemo")
    _touch(exits)
    for stored in ("../ee.nemo", "'../ee.nemo'", '"../ee.nemo"'):
        text = f"num_layers: 3\nbackbone_path: {stored}\nlast: {{backbone_path: x}}\n"
        moved = config_elsewhere(text, exits, copy)
        assert moved == 'num_layers: 3\nbackbone_path: "../../ee.nemo"\nlast: {backbone_path: x}\n'
        assert config_elsewhere(text, exits, exits.with_name("x.nemo")) == text, "same directory"
    gone = "backbone_path: ../gone/ee.nemo\n"
    assert config_elsewhere(gone, exits, copy) == 'backbone_path: "ee.nemo"\n', "a hint"
    assert config_elsewhere("a: 1\n", exits, copy) == "a: 1\n"


@pytest.mark.parametrize(
    "name",
    [
        "the base " + 12 * "of a long name " + "ee.nemo",  # over 80 columns: written as several lines
        "somebody's ee.nemo",
        'a "base": ee.nemo',
        "ünïcode # 1.nemo",
        "12",
        "null",
    ],
)
@pytest.mark.parametrize("style", [None, "'", '"', "|", ">"])
def test_any_name_of_a_backbone_survives_a_copy(name: str, style: str | None, tmp_path: Path) -> None:
    """Whatever way the value is written; the rest of the text, comments too, stays."""
    exits, copy = tmp_path / "run" / "exits.nemo", tmp_path / "out" / "deep" / "exits.nemo"
    _touch(tmp_path / name)
    _touch(exits)
    value = yaml.dump({"backbone_path": f"../{name}"}, default_style=style, allow_unicode=True)
    before, after = "num_layers: 3  # kept\n", "last: 1e-5 # kept\n"
    moved = config_elsewhere(before + value + after, exits, copy)
    assert moved.startswith(before) and moved.endswith(f"\n{after}")
    assert yaml.safe_load(moved) == {"num_layers": 3, "backbone_path": f"../../{name}", "last": "1e-5"}


@pytest.mark.parametrize("value", ["null", "", "7", "[ee.nemo]", "*other"])
def test_what_is_no_path_stays(value: str, tmp_path: Path) -> None:
    text = f"name: &other ee.nemo\nbackbone_path: {value}\nnum_layers: 3\n"
    assert config_elsewhere(text, tmp_path / "exits.nemo", tmp_path / "out" / "exits.nemo") == text


def test_a_config_that_is_not_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exits.nemo: model_config.yaml is damaged"):
        config_elsewhere("a: [", tmp_path / "exits.nemo", tmp_path / "out" / "exits.nemo")


@pytest.mark.parametrize("stored", [7, ["ee.nemo"], {"a": 1}, "x/" * 3000])
def test_a_stored_path_that_is_none(stored: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"exits.nemo is damaged: its backbone_path is .{3,50}, which is not a path"):
        find_backbone(tmp_path / "exits.nemo", stored=stored, given=None)
    _touch(tmp_path / "ee.nemo")
    assert find_backbone(tmp_path / "exits.nemo", stored=stored, given=tmp_path / "ee.nemo") == tmp_path / "ee.nemo"


def test_a_name_longer_than_file_systems_take_is_not_there(tmp_path: Path) -> None:
    for said in ({"stored": "x" * 300, "given": None}, {"stored": None, "given": "x" * 300}):
        with pytest.raises(ValueError, match="was not found"):
            find_backbone(tmp_path / "exits.nemo", **said)


def test_what_the_user_says_is_his_even_where_the_file_says_the_same(tmp_path: Path, monkeypatch) -> None:
    """Relative to the working directory, not to the file."""
    _touch(tmp_path / "run" / "ee.nemo")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="was not found: give"):
        find_backbone(tmp_path / "run" / "exits.nemo", stored="ee.nemo", given="ee.nemo")
    working = _touch(tmp_path / "elsewhere" / "ee.nemo")
    assert find_backbone(tmp_path / "run" / "exits.nemo", stored="ee.nemo", given="ee.nemo").resolve() == working


def test_a_tokenizer_directory_is_bundled(tmp_path: Path, caplog) -> None:
    block = {"library": "huggingface", "type": str(tmp_path), "use_fast": True}
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("not a tokenizer's")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert portable_tokenizer(block, ()) == (block, {}), "its class is not known without config.json"
    assert "names no tokenizer_class" in caplog.text
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.other")
    assert portable_tokenizer(block, ()) == (block, {}), "without a vocabulary"
    assert "there is none of tokenizer.json, tokenizer.model, vocab.json, vocab.txt" in caplog.text
    (tmp_path / "tokenizer.other").rename(tmp_path / "tokenizer.json")
    stored, files = portable_tokenizer(block, ())
    assert stored == {**block, "type": "tokenizer"}
    assert files == {f"tokenizer/{name}": tmp_path / name for name in ("tokenizer.json", "tokenizer_config.json")}
    assert portable_tokenizer(block, {"tokenizer/tokenizer.json"}) == ({**block, "type": "tokenizer"}, {})
    hub = {**block, "type": "meta-llama/Llama-2-7b-hf"}
    assert portable_tokenizer(hub, ()) == (hub, {}), "a name on the hub means the same everywhere"


def test_single_tokenizer_files_become_artifacts_of_nemo(tmp_path: Path) -> None:
    (tmp_path / "spm.model").write_text("x")
    block = {"library": "sentencepiece", "type": None, "model": str(tmp_path / "spm.model"), "vocab_file": "nemo:v"}
    stored, files = portable_tokenizer(block, (), own={"model"})
    assert stored == {**block, "model": "nemo:model_spm.model"}
    assert files == {"model_spm.model": tmp_path / "spm.model"}


def test_a_file_that_a_foreign_config_names_is_not_packed(tmp_path: Path, caplog) -> None:
    (tmp_path / "id_rsa").write_text("secret")
    block = {"library": "huggingface", "type": "gpt2", "merge_file": str(tmp_path / "id_rsa"), "vocab_file": "/gone"}
    stored, files = portable_tokenizer(block, {"exit_weights"})
    assert stored == {"library": "huggingface", "type": "gpt2"} and files == {}
    assert "tokenizer.merge_file=" in caplog.text and "not stored" in caplog.text
    stored, files = portable_tokenizer(block, (), own={"merge_file"})
    assert files == {"merge_file_id_rsa": tmp_path / "id_rsa"} and "vocab_file" not in stored, "control"
    old = {"library": "sentencepiece", "model": "/where/it/was/spm.model"}
    assert portable_tokenizer(old, {"spm.model"}) == ({**old, "model": "nemo:spm.model"}, {}), "it is in the archive"


@pytest.mark.parametrize("linked", ["files", "folder"])
def test_links_of_a_directory_are_followed(linked: str, tmp_path: Path) -> None:
    """As in the cache of the Hugging Face hub, snapshots/<revision>/<name> -> blobs/<hash>."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    contents = {"tokenizer.json": "{}", "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}'}
    for folder in (blobs, snapshot.parent):
        folder.mkdir()
    for number, (name, text) in enumerate(contents.items()):
        (blobs / (str(number) if linked == "files" else name)).write_text(text)
    if linked == "folder":
        snapshot.symlink_to(blobs)
    else:
        snapshot.mkdir()
        for number, name in enumerate(contents):
            (snapshot / name).symlink_to(f"../../blobs/{number}")
    stored, files = portable_tokenizer({"library": "huggingface", "type": str(snapshot)}, ())
    assert stored["type"] == "tokenizer" and files.keys() == {f"tokenizer/{name}" for name in contents}
    archive = write_nemo(tmp_path / "x.nemo", {"model_config.yaml": "a: 1", **files})
    with NemoArchive(archive) as found:
        for name, text in contents.items():
            assert found.open_member(f"tokenizer/{name}").read().decode() == text


def test_how_a_directory_s_tokenizer_is_read_does_not_change(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    for said, fast in (({}, False), ({"use_fast": None}, False), ({"use_fast": True}, True)):
        block = {"library": "huggingface", "type": str(tmp_path), "special_tokens": {"pad_token": "<p>"}, **said}
        assert portable_tokenizer(block, ())[0] == {**block, "type": "tokenizer", "use_fast": fast}
    block = {"library": "huggingface", "type": "tokenizer"}
    assert portable_tokenizer(block, {"tokenizer/vocab.json"})[0] == {**block, "use_fast": True}, "as it was loaded"


def test_code_does_not_get_into_an_archive(tmp_path: Path, caplog) -> None:
    """From a directory, from memory, from another archive; what needs no change is copied byte for byte."""
    evil, good = b'{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}, "a": "\xc3\xbc"}', b' {"a": 1}\n'
    (tmp_path / "file").write_bytes(evil)
    names = (
        "tokenizer/tokenizer_config.json",
        "tokenizer/config.json",
        "tokenizer/evil.py",
        "evil/x.py",
        "a/vocab.json",
    )
    archive = NemoArchive(write_nemo(tmp_path / "x.nemo", {"model_config.yaml": "a: 1", **dict.fromkeys(names, evil)}))
    for source in (tmp_path / "file", evil, evil.decode(), archive):
        kept = without_code_files(dict.fromkeys(names, source))
        assert kept.keys() == {*names[:2], names[4]} and kept[names[4]] is source
        assert all(json.loads(kept[name]) == {"a": "ü"} for name in names[:2])
    assert "tokenizer/evil.py is code" in caplog.text
    archive.close()
    assert without_code_files({names[0]: good, "tokenizer/special_tokens_map.json": b"[1]"}) == {names[0]: good}


def test_absolute_paths_are_dropped_from_a_config() -> None:
    config = {
        "num_layers": 3,
        "exp_dir": "/scratch/me/run",
        "windows": r"D:\runs\1",
        "prefixes": [0.5, "/data/a"],
        "peft": {"restore_from_path": "/x/y.nemo", "scheme": "lora"},
        "every": "1/4",
        "separator": "/",
        "relative": "data/a",
        "tokenizer": {"type": "/tok"},
    }
    expected = {"num_layers": 3, "peft": {"scheme": "lora"}, "every": "1/4", "separator": "/", "relative": "data/a"}
    assert without_machine_paths(config) == {**expected, "tokenizer": {"type": "/tok"}}


def test_the_backbone_of_a_file(tmp_path: Path) -> None:
    """Itself, or its base; a message for every way it can miss, each with the setting of the script that runs."""
    config = "num_layers: 2\nbackbone_fingerprint: aa\n"
    whole = write_nemo(tmp_path / "ee.nemo", {"model_config.yaml": config, "model_weights/x": b"x"})
    other = write_nemo(
        tmp_path / "other.nemo", {"model_config.yaml": config.replace("aa", "bb"), "model_weights/x": b"x"}
    )
    exits = write_nemo(tmp_path / "exits.nemo", {"model_config.yaml": f"{config}backbone_path: ee.nemo\n"})
    lost = write_nemo(tmp_path / "lost.nemo", {"model_config.yaml": config})
    assert backbone_of(whole) == backbone_of(whole, other) == whole
    assert backbone_of(exits) == backbone_of(lost, whole) == whole
    for option in ("model.backbone_path", "backbone", "backbone_path", "--backbone"):
        way_out = re.escape(f": give {option}=<the .nemo the exits were tuned on>")
        with pytest.raises(ValueError, match=f"lost.nemo holds exits only; it does not name its base model{way_out}"):
            backbone_of(lost, option=option)
        with pytest.raises(ValueError, match=f"base model \\('nowhere.nemo'\\) was not found{way_out}"):
            backbone_of(exits, "nowhere.nemo", option)
        with pytest.raises(ValueError, match=f"holds exits only, and .*lost.nemo has no backbone either{way_out}"):
            backbone_of(exits, lost, option)
        with pytest.raises(ValueError, match=f"fingerprint aa, but .*other.nemo has bb; .*\\({option}=...\\)"):
            backbone_of(exits, other, option)
