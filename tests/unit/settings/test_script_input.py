# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A script's config becomes a model: what is missing, unknown, a library's, or computed from other keys."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from omegaconf import OmegaConf

from nemo_ee.exits.block_reader import integer
from nemo_ee.settings.fields import FilePath, Label, Names, Precision
from nemo_ee.settings.script_input import ScriptInput, script_problems
from nemo_ee.settings.user_input import Positive, Text, UserInput


class Block(UserInput):
    size: Positive
    name: Label | None


class Script(ScriptInput):
    headline: ClassVar = "nothing was done"
    libraries: ClassVar = {"block": lambda: {"width": integer(2), "inner": lambda value: value}}

    output: FilePath
    files: Names
    precision: Precision
    block: Block


RIGHT = {"output": "a", "files": "one", "precision": 32, "block": {"size": 2, "name": 2024}}


def texts(**changes: Any) -> list[str]:
    return [one.text for one in script_problems(Script, OmegaConf.create({**RIGHT, **changes}))]


def test_a_plain_config_and_omegaconfs_are_read_alike() -> None:
    plain, config = Script.from_config(RIGHT), Script.from_config(OmegaConf.create(RIGHT))
    assert plain == config and plain.files == ("one",) and plain.precision == "32" and plain.block.name == "2024"


def test_every_setting_that_is_needed_is_named_with_its_rule() -> None:
    assert texts(output="???", block={"size": "???", "name": None}) == [
        "output is needed and not given; it must be the name of a file or directory",
        "block.size is needed and not given; it must be a whole number of at least 1",
    ]


def test_a_key_that_a_copied_yaml_lacks_is_no_mistake_of_the_command_line() -> None:
    assert texts(block={"size": 1}) == [
        "block.name is not in the config; take its line over from the script's yaml in conf/"
    ]

    class Lenient(Script):
        may_lack: ClassVar = ("block.",)

    assert script_problems(Lenient, OmegaConf.create({**RIGHT, "block": {}})) == []


def test_unknown_keys_are_refused_with_the_one_that_was_meant() -> None:
    assert texts(block={"size": 1, "name": None, "nme": 1}, size=3) == [
        "block.nme=1 is not a setting here (did you mean block.name?); nothing reads it, leave it out",
        "size=3 is not a setting here (did you mean block.size?); nothing reads it, leave it out",
    ]
    assert texts(block=3)[0] == "block=3 must be a block of settings, such as block.size, block.name"


def test_the_keys_of_a_library_are_taken_and_checked() -> None:
    block = {"size": 1, "name": None, "inner": {"a": 1}}
    assert texts(block={**block, "width": 2}) == []
    assert texts(block={**block, "width": 1}) == ["block.width=1 must be an integer of at least 2"]
    assert "did you mean block.width" in texts(block={**block, "widht": 1})[0]


def test_a_value_that_is_worked_out_is_named_alone_with_what_it_comes_from() -> None:
    assert texts(output="???", files="${output}") == [
        "output is needed and not given; it must be the name of a file or directory"
    ]
    assert texts(block={"size": 0, "name": "${block.size}"}) == ["block.size=0 must be a whole number of at least 1"]
    assert texts(files="${nowhere}")[0].startswith("files cannot be computed: Interpolation key 'nowhere' not found")


def test_helper_keys_that_others_take_over_are_read() -> None:
    assert texts(mine={"x": "a"}, output="${mine.x}") == []
    assert texts(mine="???", output="${mine}") == ["mine is needed and not given"]
    assert texts(mine=1)[0].startswith("mine=1 is not a setting here"), "control"


def test_all_problems_come_in_one_message() -> None:
    with pytest.raises(ValueError) as found:
        Script.from_config({**RIGHT, "files": [""], "block": {"size": "2", "name": ["a"], "nam": 1}})
    assert str(found.value).splitlines() == [
        "nothing was done:",
        "  block.nam=1 is not a setting here (did you mean block.name?); nothing reads it, leave it out",
        "  files[0]='' must be a text with something in it",
        "  block.size='2' must be a whole number of at least 1; '2' is a text, write the number without quotes",
        "  block.name=['a'] must be a text with something in it, or null",
    ]


def test_text_is_no_path() -> None:
    class Named(ScriptInput):
        name: Text

    with pytest.raises(ValueError, match="name=3 must be a text with something in it; write a number that is meant"):
        Named.from_config({"name": 3})
