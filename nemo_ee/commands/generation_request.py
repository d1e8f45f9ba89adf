# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What a generation run was asked for, read once from its config; every fault that needs no model, in one message."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ee.commands.decoding_config import (
    model_path_faults,
    precision_faults,
    sampling_of,
    switch_faults,
    whole_number_faults,
)
from nemo_ee.generation.cost_rule import COST_RULES, unknown_cost_rule
from nemo_ee.generation.policy import MODES, ExitPolicy
from nemo_ee.generation.sampling import SamplingParams
from nemo_ee.text.text_files import TextError, is_jsonl, read_json_lines, read_lines, text_line

COLOURS = ("auto", "always", "never")
# Of a line of `output`, beside what the prompt's own line says.
OUTPUT_KEYS = ("prompt", "text", "finish_reason", "tokens", "error")
_SHOWN_FAULTS = 20


@dataclass(frozen=True)
class GenerationRequest:
    """A checked request.

    Attributes:
        path: the `.nemo`.
        prompts: texts, at least one.
        labels: of each prompt, what else its line of a `.jsonl` file says; none of `OUTPUT_KEYS`.
        mode: one of `MODES`.
        policy: when a token may leave; its criterion is reported in every mode.
        sampling: how tokens are chosen.
        min_new_tokens, max_new_tokens: bounds on the length of every answer.
        add_bos: put the begin-of-text token in front; None = as the tokenizer itself does.
        stop_on_eos: the end-of-text token ends an answer.
        end_strings: texts that end an answer, too.
        batch_size: prompts decoded together.
        colour: `auto`, `always` or `never`.
        output: JSONL file to write, or None.
        cost_rule: one of `COST_RULES`.
    """

    path: Path
    prompts: tuple[str, ...]
    labels: tuple[Mapping[str, Any], ...]
    mode: str
    policy: ExitPolicy
    sampling: SamplingParams
    min_new_tokens: int
    max_new_tokens: int
    add_bos: bool | None
    stop_on_eos: bool
    end_strings: tuple[str, ...]
    batch_size: int
    colour: str
    output: Path | None
    cost_rule: str = COST_RULES[0]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GenerationRequest:
        """Read conf/megatron_gpt_early_exit_generate.yaml.

        Args:
            config: the script's config as plain containers.

        Raises:
            ValueError: every fault, in one message.
        """
        faults: list[str] = []
        if config["mode"] not in MODES:
            faults.append(f"mode={config['mode']!r} is unknown; use one of {', '.join(MODES)}")
        if config["colour"] not in COLOURS:
            faults.append(f"colour={config['colour']!r} is unknown; use one of {', '.join(COLOURS)}")
        if config["cost_rule"] not in COST_RULES:
            faults.append(unknown_cost_rule(config["cost_rule"]))
        faults += switch_faults(config, ("greedy", "stop_on_eos", "overwrite"), or_null=("add_BOS",))
        _check_numbers(config, faults)
        policy = _or_fault(faults, lambda: _policy(config))
        sampling = _or_fault(faults, lambda: sampling_of(config))
        _check_ranks(config, faults)
        path, output = _paths(config, faults)
        end_strings = _end_strings(config["end_strings"], faults)
        prompts, labels = _prompts(config, faults)
        _raise(faults)
        return cls(
            path=path,
            prompts=prompts,
            labels=labels,
            mode=config["mode"],
            policy=policy,
            sampling=sampling,
            min_new_tokens=config["min_tokens_to_generate"],
            max_new_tokens=config["tokens_to_generate"],
            add_bos=config["add_BOS"],
            stop_on_eos=config["stop_on_eos"],
            end_strings=end_strings,
            batch_size=config["batch_size"],
            colour=config["colour"],
            output=output,
            cost_rule=config["cost_rule"],
        )


def _raise(faults: list[str]) -> None:
    if faults:
        more = [f"and {len(faults) - _SHOWN_FAULTS} more"] if len(faults) > _SHOWN_FAULTS else []
        raise ValueError("nothing was generated:\n" + "\n".join(f"  {one}" for one in faults[:_SHOWN_FAULTS] + more))


def _or_fault(faults: list[str], make: Callable[[], Any]) -> Any:
    try:
        return make()
    except ValueError as fault:
        faults.append(str(fault))
        return None


def _policy(config: Mapping[str, Any]) -> ExitPolicy:
    return ExitPolicy(
        config["threshold"],
        criterion=config["criterion"],
        active=config["exits"],
        max_pending_tokens=config["max_pending_tokens"],
        num_draft_tokens=config["num_draft_tokens"],
    )


def _check_numbers(config: Mapping[str, Any], faults: list[str]) -> None:
    lowest = {"tokens_to_generate": 1, "min_tokens_to_generate": 0, "batch_size": 1}
    wrong = list(whole_number_faults(config, lowest))
    if wrong:
        faults += wrong
        return
    least, most = config["min_tokens_to_generate"], config["tokens_to_generate"]
    if least > most:
        faults.append(f"min_tokens_to_generate={least} is more than tokens_to_generate={most}; lower it")


def _check_ranks(config: Mapping[str, Any], faults: list[str]) -> None:
    """Generation runs on the ranks of one model."""
    trainer, model = config["trainer"], config["model"]
    stages, tensor = model["pipeline_model_parallel_size"], model["tensor_model_parallel_size"]
    if trainer["devices"] * trainer["num_nodes"] != tensor * stages:
        faults.append(
            f"trainer.devices={trainer['devices']} x trainer.num_nodes={trainer['num_nodes']} ranks, but "
            f"model.tensor_model_parallel_size={tensor} x model.pipeline_model_parallel_size={stages}: generation "
            "runs one model, make the two equal"
        )
    elif tensor * stages > 1 and config["cost_rule"] == "fallback":
        faults.append("cost_rule=fallback measures times on one rank; use cost_rule=none with several")
    faults += precision_faults(config)


def _paths(config: Mapping[str, Any], faults: list[str]) -> tuple[Path, Path | None]:
    path = config["model"]["restore_from_path"]
    faults += model_path_faults(config)
    output = None if config["output"] is None else Path(str(config["output"]))
    if output is not None:
        if output.is_dir():
            faults.append(f"output={output} is a directory; give the name of a .jsonl file")
        elif output.exists() and not config["overwrite"]:
            faults.append(f"output={output} exists; give another name or overwrite=True")
        elif not output.parent.is_dir():
            faults.append(f"output={output}: the folder {output.parent} does not exist; make it first")
    return Path(str(path)), output


def _end_strings(given: Any, faults: list[str]) -> tuple[str, ...]:
    if not isinstance(given, list) or any(not isinstance(one, str) or not one for one in given):
        faults.append(f"end_strings={given!r} must be a list of texts, none empty; write end_strings=['...']")
        return ()
    return tuple(given)


_Prompts = tuple[tuple[str, ...], tuple[Mapping[str, Any], ...]]
_NO_PROMPTS: _Prompts = ((), ())


def _prompts(config: Mapping[str, Any], faults: list[str]) -> _Prompts:
    """The prompts and what else their lines say."""
    given, file = config["prompts"], config["prompts_file"]
    if given and file is not None:
        faults.append("both prompts and prompts_file are given; leave one out")
        return _NO_PROMPTS
    if file is not None:
        return _prompts_of_file(Path(str(file)), faults)
    if given is not None and not isinstance(given, list | tuple):
        faults.append(f"prompts={given!r} must be a list; write prompts=['...']")
        return _NO_PROMPTS
    if not given:
        faults.append("no prompts are given; set prompts=['...'] or prompts_file=<.txt or .jsonl>")
        return _NO_PROMPTS
    for one in given:
        if not isinstance(one, str):
            faults.append(f"prompts holds {one!r}, which is not a text; put it in quotes")
        elif not _is_writable(one):
            faults.append(f"prompts holds {one!r}, with half of a surrogate pair in it; write the whole character")
    return tuple(given), ({},) * len(given)


def _prompts_of_file(path: Path, faults: list[str]) -> _Prompts:
    """One prompt a line; in a `.jsonl` each line is an object with the key `prompt`. Blank lines are left out."""
    wrong: list[str] = []
    if is_jsonl(path):
        found = [line for _, line in read_json_lines(path, _prompt_of_line, faults=wrong)]
    else:
        found = []
        try:
            found += [(text_line(path, number, line), {}) for number, line in read_lines(path)]
        except TextError as fault:
            wrong.append(str(fault))
    if not found and not wrong:
        wrong.append(f"{path}: holds no prompt; put one on each line")
    faults += [f"prompts_file: {one}" for one in wrong]
    return tuple(prompt for prompt, _ in found), tuple(labels for _, labels in found)


def _prompt_of_line(value: Any) -> tuple[str, dict[str, Any]]:
    """The prompt of a line, and what else it says."""
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise ValueError('must be an object with a text under "prompt"')
    labels = {key: own for key, own in value.items() if key != "prompt"}
    taken = ", ".join(f'"{key}"' for key in labels if key in OUTPUT_KEYS)
    if taken:
        raise ValueError(f"the key {taken} is one that the output has itself; rename it or leave it out")
    return value["prompt"], labels


def _is_writable(text: str) -> bool:
    """Whether UTF-8 can hold a text: lone surrogates are in no encoding."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
