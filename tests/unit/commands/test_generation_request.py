# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Problems of a generation request: all of them at once, each with its value, the rule and the way out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_ee.commands.generation_request import OUTPUT_KEYS, GenerationRequest

YAML = Path(__file__).parents[3] / "conf" / "megatron_gpt_early_exit_generate.yaml"


def config(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """The yaml's defaults with a model file that exists and a prompt; `model_x` and `trainer_x` reach into blocks."""
    values = OmegaConf.to_container(OmegaConf.load(YAML))
    del values["hydra"], values["defaults"]
    nemo = tmp_path / "model.nemo"
    nemo.touch()
    values["model"]["restore_from_path"] = str(nemo)
    values["prompts"] = ["def f():"]
    for key, value in changes.items():
        block, _, rest = key.partition("__")
        assert (block in values) and (not rest or rest in values[block]), key
        if rest:
            values[block][rest] = value
        else:
            values[block] = value
    return values


def problem(tmp_path: Path, **changes: Any) -> str:
    with pytest.raises(ValueError) as caught:
        GenerationRequest.from_config(config(tmp_path, **changes))
    return str(caught.value)


def test_the_yamls_defaults_are_a_request(tmp_path):
    request = GenerationRequest.from_config(config(tmp_path))
    assert request.mode == "early_exit" and request.policy.thresholds == 0.9 and request.sampling.greedy
    assert request.sampling.top_k is None, "NeMo's top_k=0 keeps every token"
    assert request.prompts == ("def f():",) and request.output is None


def test_thresholds_and_exits_reach_the_policy(tmp_path):
    request = GenerationRequest.from_config(
        config(tmp_path, threshold={"a": 0.5, "b": 1}, exits=["a", "b"], criterion="margin", max_pending_tokens=4)
    )
    assert request.policy.thresholds == {"a": 0.5, "b": 1} and request.policy.active == ("a", "b")
    assert request.policy.criterion == "margin" and request.policy.max_pending_tokens == 4


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"mode": "fast"}, ["mode='fast' must be one of", "early_exit, self_speculative, static_depth, full"]),
        ({"criterion": "surest"}, ["criterion='surest' must be one of", "max_probability, margin, entropy"]),
        ({"threshold": 1.5}, ["1.5", "0..1"]),
        ({"threshold": "0.5"}, ["'0.5'", "must be a finite number"]),
        ({"threshold": {"a": -1}}, ["exit 'a' = -1", "in 0..1"]),
        ({"exits": "a"}, ["exits='a' must be a list"]),
        ({"max_pending_tokens": -1}, ["max_pending_tokens=-1", "null for no cap"]),
        ({"temperature": 0}, ["temperature=0", "above 0"]),
        ({"top_p": 1.1}, ["top_p=1.1"]),
        ({"top_k": -3}, ["top_k=-3"]),
        ({"repetition_penalty": 0}, ["repetition_penalty=0"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"tokens_to_generate": 0}, ["tokens_to_generate=0 must be a whole number of at least 1"]),
        ({"tokens_to_generate": 2.5}, ["tokens_to_generate=2.5"]),
        ({"min_tokens_to_generate": 65}, ["min_tokens_to_generate=65 is more than tokens_to_generate=64"]),
        ({"cost_rule": "maybe"}, ["cost_rule='maybe'", "none, fallback"]),
        ({"cost_table": "costs.json"}, ["cost_table=", "no effect with cost_rule=none and draft_rule=fixed"]),
        ({"draft_rule": "worth"}, ["draft_rule='worth'", "fixed, value"]),
        (
            {"draft_rule": "value"},
            ["draft_rule='value'", "no effect in this mode; use fixed, or mode="],
        ),
        (
            {"mode": "self_speculative", "draft_rule": "value", "criterion": "entropy", "threshold": 1.0},
            ["draft_rule = 'value' needs the head's confidence from 0 to 1"],
        ),
        (
            {
                "mode": "self_speculative",
                "draft_rule": "value",
                "trainer__devices": 2,
                "model__tensor_model_parallel_size": 2,
            },
            ["draft_rule=value", "use draft_rule=fixed"],
        ),
        ({"cost_rule": "fallback", "cost_table": "no/costs.json"}, ["cost_table=", "a file in a folder that exists"]),
        (
            {"cost_rule": "fallback", "trainer__devices": 2, "model__tensor_model_parallel_size": 2},
            ["cost_rule=fallback", "use cost_rule=none"],
        ),
        ({"batch_size": 0}, ["batch_size=0"]),
        ({"end_strings": "x"}, ["end_strings='x' must be a list of texts"]),
        ({"end_strings": ["x", ""]}, ["end_strings[1]='' must be a text with something in it"]),
        ({"colour": "pink"}, ["colour='pink'", "auto, always, never"]),
        ({"greedy": "yes"}, ["greedy='yes' must be True or False"]),
        ({"add_BOS": 1}, ["add_BOS=1 must be True or False, or null"]),
        (
            {"model__restore_from_path": "???"},
            ["restore_from_path is needed and not given; it must be the name of an early-exit .nemo"],
        ),
        ({"model__restore_from_path": "no.nemo"}, ["no.nemo' does not exist; give an early-exit .nemo"]),
        ({"model__pipeline_model_parallel_size": 2}, ["pipeline_model_parallel_size=2", "make the two equal"]),
        ({"model__tensor_model_parallel_size": 2}, ["tensor_model_parallel_size=2", "make the two equal"]),
        ({"trainer__precision": 16}, ["trainer.precision=16", "must be one of 32, 32-true, bf16"]),
        ({"prompts": []}, ["no prompts are given"]),
        ({"prompts": "text"}, ["must be a list"]),
        ({"prompts": ["a", 3]}, ["prompts[1]=3 must be a text", "quotes"]),
        ({"prompts_file": "p.txt"}, ["both prompts and prompts_file"]),
        ({"prompts": [], "prompts_file": "absent.txt"}, ["prompts_file: absent.txt: cannot be read: No such file"]),
        ({"output": "absent/x.jsonl"}, ["the folder absent does not exist"]),
        ({"output": "."}, ["is a directory"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_each_problem_names_the_value_and_the_rule(changes, parts, tmp_path):
    message = problem(tmp_path, **changes)
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) == 2, "one problem, one line"


def test_all_problems_come_at_once(tmp_path):
    message = problem(tmp_path, mode="fast", threshold=2, top_p=0, prompts=[], colour="pink")
    for part in ("fast", "threshold = 2", "top_p=0", "no prompts", "pink"):
        assert part in message


def test_an_existing_output_is_kept_unless_told_otherwise(tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("mine")
    assert "overwrite=True" in problem(tmp_path, output=str(output))
    assert GenerationRequest.from_config(config(tmp_path, output=str(output), overwrite=True)).output == output
    assert output.read_text() == "mine"


def test_prompts_from_a_text_file_are_its_lines(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("one\r\n\n  two \u2028 still two\nthrée".encode())
    request = GenerationRequest.from_config(config(tmp_path, prompts=[], prompts_file=str(file)))
    assert request.prompts == ("one", "  two \u2028 still two", "thrée")


def test_prompts_from_jsonl(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a\\nb", "id": 1}\n\n{"prompt": ""}\n')
    request = GenerationRequest.from_config(config(tmp_path, prompts=[], prompts_file=str(file)))
    assert request.prompts == ("a\nb", "") and request.labels == ({"id": 1}, {})


def test_a_gzipped_file_reads_as_what_is_in_it(tmp_path):
    for name, content in (("p.jsonl.gz", b'{"prompt": "one"}'), ("p.txt.gz", b"one")):
        (tmp_path / name).write_bytes(gzip.compress(content))
        given = config(tmp_path, prompts=[], prompts_file=str(tmp_path / name))
        assert GenerationRequest.from_config(given).prompts == ("one",)
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"one")[:-4])
    assert "cut.gz:1: cannot be read" in problem(tmp_path, prompts=[], prompts_file=str(tmp_path / "cut.gz"))


def test_every_bad_line_of_a_jsonl_is_named(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\nnope\n{"text": "a"}\n["prompt"]\n{"prompt": 3}\n')
    message = problem(tmp_path, prompts=[], prompts_file=str(file))
    assert [f"p.jsonl:{number}:" in message for number in range(1, 6)] == [False, True, True, True, True]


def test_keys_that_the_output_has_itself_are_refused_with_line_and_key(tmp_path):
    file = tmp_path / "p.jsonl"
    lines = [{"id": 1}, *({key: "mine", "id": 2} for key in OUTPUT_KEYS if key != "prompt")]
    file.write_text("".join(json.dumps({"prompt": "a", **line}) + "\n" for line in lines))
    message = problem(tmp_path, prompts=[], prompts_file=str(file))
    for number, key in enumerate(["text", "finish_reason", "tokens", "error"], start=2):
        assert f'p.jsonl:{number}: the key "{key}" is also a key of the output; rename it' in message
    assert "line 1:" not in message


@pytest.mark.parametrize(
    "line", ['{"prompt": "a \\ud800"}', '{"prompt": "a", "id": ["\\udc00"]}', '{"prompt": "", "\\ud83d": 1}']
)
def test_half_of_a_surrogate_pair_is_refused_where_it_is_read(line, tmp_path):
    """UTF-8 cannot hold one, so writing the output would fail after the answer was made."""
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "\\ud83d\\ude00", "id": "\\ud83d\\ude00"}\n' + line + "\n")
    message = problem(tmp_path, prompts=[], prompts_file=str(file))
    assert "p.jsonl:2: holds half a character" in message and "p.jsonl:1" not in message
    assert "half of a surrogate pair" in problem(tmp_path, prompts=["fine", "a \udcff"])


def test_a_file_of_only_bad_lines_does_not_fill_the_screen(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text("nope\n" * 500)
    message = problem(tmp_path, prompts=[], prompts_file=str(file))
    assert "and 480 more" in message and len(message.splitlines()) == 22


@pytest.mark.parametrize(("content", "part"), [(b"\n \n", "holds no prompt"), (b"caf\xe9", "not UTF-8")])
def test_files_that_hold_no_text(content, part, tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes(content)
    assert part in problem(tmp_path, prompts=[], prompts_file=str(file))
