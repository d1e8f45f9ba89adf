# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""User input as pydantic models: what is taken, and every problem in one form, without pydantic's own words."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationInfo, field_validator, model_validator

from nemo_ee.settings.user_input import InputError, Positive, Problem, Share, Text, UserInput, read, rule, shortened


class Message(UserInput):
    role: Literal["user", "system"]
    content: Text


class Block(UserInput):
    low: int = 0
    high: int = 1

    @model_validator(mode="after")
    def _order(self) -> Block:
        if self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}; lower it")
        return self


class Request(UserInput):
    flag: bool
    slots: Positive | None = None
    lr: Annotated[float, Field(gt=0)] = 1.0
    share: Share = 0.5
    betas: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(min_length=2, max_length=2)] = (0.9, 0.99)
    stop: str | tuple[Text, ...] | None = None
    messages: tuple[Message, ...] = ()
    bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    limit: float | dict[str, float] = 1.0
    block: Block | None = None
    splits: Annotated[str, Field(pattern=r"^\d+$"), rule("shares as a text, e.g. '99'")] = "1"
    least: int = 0
    most: int = 1

    @field_validator("most")
    @classmethod
    def _not_below(cls, most: int, info: ValidationInfo) -> int:
        if most < info.data.get("least", most):
            raise ValueError("is below least; raise it", "is wrong twice; mend it")
        return most


def problems(**values: Any) -> list[str]:
    with pytest.raises(InputError) as found:
        read(Request, {"flag": True} | values)
    return [one.text for one in found.value.problems]


def test_right_values_are_taken_as_they_are_and_lists_become_tuples() -> None:
    request = read(Request, {"flag": False, "lr": 1, "betas": [0, 0.5], "stop": ["a"], "block": {"high": 2}})
    assert (request.lr, request.betas, request.stop, request.block) == (1.0, (0, 0.5), ("a",), Block(low=0, high=2))
    assert type(request.lr) is float
    with pytest.raises(ValueError, match="frozen"):
        request.lr = 2.0


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"flag": 1}, "flag=1 must be True or False"),
        ({"slots": 0}, "slots=0 must be a whole number of at least 1, or null"),
        ({"slots": True}, "slots=True must be a whole number of at least 1, or null"),
        ({"slots": 1.0}, "slots=1.0 must be a whole number of at least 1, or null"),
        ({"slots": "8"}, "slots='8' must be a whole number of at least 1, or null; '8' is a text, write the number "
                         "without quotes"),
        ({"lr": float("nan")}, "lr=nan must be a finite number above 0"),
        ({"lr": "1e-4"}, "lr='1e-4' must be a finite number above 0; '1e-4' is a text, write the number without "
                         "quotes and with a dot (1.0e-4)"),
        ({"share": 2}, "share=2 must be a finite number from 0 to 1"),
        ({"betas": [0.5]}, "betas=[0.5] must be a list of 2 finite numbers of at least 0 and below 1"),
        ({"betas": [0.5, 1]}, "betas[1]=1 must be a finite number of at least 0 and below 1"),
        ({"stop": 7}, "stop=7 must be a text, or a list of texts with something in it, or null; write a number that "
                      "is meant as a text with quotes: \"'7'\""),
        ({"stop": [""]}, "stop[0]='' must be a text with something in it"),
        ({"stop": 3}, "stop=3 must be a text, or a list of texts with something in it, or null; write a number that "
                      "is meant as a text with quotes: \"'3'\""),
        ({"messages": "hi"}, "messages='hi' must be a list of blocks with the keys role, content"),
        ({"messages": ["hi"]}, "messages[0]='hi' must be a block with the keys role, content"),
        ({"messages": [{"role": "usr", "content": "x"}]},
         "messages[0].role='usr' must be one of user, system (did you mean user?)"),
        ({"messages": [{"role": "user"}]},
         "messages[0].content is needed and not given; it must be a text with something in it"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content=7 must be a text with something in it; "
                                                         "write a number that is meant as a text with quotes: "
                                                         "\"'7'\""),
        ({"bias": {"a": 101}}, "bias.a=101 must be a finite number from -100 to 100"),
        ({"limit": {"a": "x"}}, "limit.a='x' must be a finite number"),
        ({"limit": "x"}, "limit='x' must be a finite number, or a block of finite numbers by key"),
        ({"splits": "a"}, "splits='a' must be shares as a text, e.g. '99'"),
        ({"block": {"low": 3}}, "low=3 is above high=1; lower it"),
        ({"slts": 3}, "slts=3 is not a setting here (did you mean slots?); leave it out"),
        ({"block": {"hgh": 3}}, "block.hgh=3 is not a setting here (did you mean high?); leave it out"),
        ({"zzz": 3}, "zzz=3 is not a setting here; leave it out"),
    ],
    ids=str,
)  # fmt: skip
def test_a_problem_has_the_key_the_value_the_rule_and_the_way_out(values: dict, text: str) -> None:
    assert problems(**values) == [text]


def test_all_problems_come_in_one_message_each_with_its_place() -> None:
    with pytest.raises(ValueError) as found:
        read(Request, {"slots": 0, "slts": 1, "betas": [2, 2]}, headline="nothing was started", where="model")
    assert str(found.value).splitlines() == [
        "nothing was started:",
        "  model.flag is needed and not given; it must be True or False",
        "  model.slots=0 must be a whole number of at least 1, or null",
        "  model.betas[0]=2 must be a finite number of at least 0 and below 1",
        "  model.betas[1]=2 must be a finite number of at least 0 and below 1",
        "  model.slts=1 is not a setting here (did you mean slots?); leave it out",
    ]
    kinds = [(one.where, one.kind) for one in found.value.problems]
    assert kinds[0] == ("model.flag", "missing") and kinds[-1] == ("model.slts", "unknown")
    assert {kind for _, kind in kinds[1:-1]} == {"value"}


def test_a_rule_between_fields_is_checked_where_those_are_right_whatever_the_others_are() -> None:
    both = ["most=1 is below least; raise it", "most=1 is wrong twice; mend it"]
    assert problems(least=2, most=1, lr=0) == ["lr=0 must be a finite number above 0", *both]
    assert problems(least="2", most=1)[0].startswith("least='2' must be a whole number")
    assert len(problems(least="2", most=1)) == 1, "control: it is not checked with a wrong value"


def test_no_more_problems_are_put_into_words_than_are_wanted() -> None:
    with pytest.raises(InputError) as found:
        read(Request, {f"x{number}": 1 for number in range(1000)}, most=3)
    assert [one.where for one in found.value.problems] == ["flag", "x0", "x1"]


def test_what_is_no_block_is_said_once() -> None:
    with pytest.raises(InputError) as found:
        read(Message, [1])
    assert [one.text for one in found.value.problems] == ["the input=[1] must be a block with the keys role, content"]


def test_a_discriminated_union_names_the_key_and_not_the_tag() -> None:
    class User(UserInput):
        role: Literal["user"]
        content: Text

    class System(UserInput):
        role: Literal["system"]

    class Talk(UserInput):
        messages: tuple[Annotated[User | System, Field(discriminator="role")], ...]

    with pytest.raises(InputError) as found:
        read(Talk, {"messages": [{"role": "user", "content": ""}, {"role": "system", "a": 1}]})
    assert [one.where for one in found.value.problems] == ["messages[0].content", "messages[1].a"]


def test_large_values_and_many_problems_stay_readable() -> None:
    assert len(shortened({"a": ["b" * 10**6] * 10**5})) == 80
    assert shortened("a\nb") == "'a\\nb'", "control: on one line, and whole where it is short"
    message = str(InputError("no", [Problem("a", "value", "wrong")] * 110))
    assert message.count("wrong") == 100 and message.endswith("and 10 more")


def test_it_needs_neither_omegaconf_nor_torch() -> None:
    others = "[name for name in ('omegaconf', 'torch', 'nemo') if name in sys.modules]"
    probe = f"import sys, nemo_ee.settings.user_input; print({others})"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.strip() == "[]"
