# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Free-running answers over thresholds, beside the full model's own: the paper's Figure 5 on prompts.

    python scripts/data/collect_prompts.py output=data/prompts tokenizer=export/hf_early_exit
    python experiments/answers.py export/hf_early_exit data/prompts/mt-bench.jsonl --json mt-bench.json

Greedy. For each threshold, all exits: share of the prompts whose answer is the full model's to the last token, ROUGE-L
(F, 0..1) of the texts, and mean depth as a share of the layers, from batches. Speed is that of whole answers of
`--new-tokens` tokens, prompt included, at batch one, over full depth, the median over a few prompts; `reads` is the
number of weights that full depth reads for them by those read here. The texts differ, so for early exit this is no
bound on the same tokens (the report has that one).

The same for self-speculation, whose answers are the full model's: the exit, threshold and draft length that read the
fewest weights on the tuning prompts, which are not measured; and the same exit with drafts by value. There `reads` is
the bound.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # isort: skip  # after the path is set

from rouge_score.rouge_scorer import RougeScorer

from benchmarks.huggingface import agreement, measure
from benchmarks.measure import median_of_ratios, provenance
from nemo_ee.calibration.calibration_prompts import read_entries
from nemo_ee.checkpoint.atomic import write_json
from nemo_ee.evaluation.report import format_table
from nemo_ee.evaluation.touched_weights import CountingModel
from nemo_ee.generation.engine import EarlyExitEngine, GenerationResult
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.runtime.loader import load_model, load_tokenizer
from nemo_ee.text.special_tokens import prompt_ids

THRESHOLDS = (0.9, 0.8, 0.6, 0.4, 0.2)  # with 1.0, full depth, those of the paper
FULL, SPECULATIVE, BY_VALUE = "full depth", "self-speculative", "self-speculative by value"


class Answers:
    """Answers of one model to some prompts.

    Args:
        directory: of the model.
        prompts: texts.
        new_tokens: of an answer at most.
        batch_size: prompts decoded together where speed is not measured.
    """

    def __init__(self, directory: Path, prompts: Sequence[str], new_tokens: int, batch_size: int) -> None:
        self.tokenizer = load_tokenizer(directory)
        self.model = CountingModel(load_model(directory))
        self.engine = EarlyExitEngine(self.model)
        self.prompts = [prompt_ids(self.tokenizer, text) for text in prompts]
        self.new_tokens, self.batch_size = new_tokens, batch_size
        end = self.tokenizer.eos_token_id
        self.stops = () if end is None else (end,)

    def decode(self, prompts: Sequence[Sequence[int]], **how: Any) -> tuple[GenerationResult, int]:
        """The result, all answers of the same length, and the weights that were read for it."""
        before = self.model.touched
        result = self.engine.generate(prompts, max_new_tokens=self.new_tokens, **how)
        return result, self.model.touched - before

    def all(self, **how: Any) -> tuple[list[list[int]], float]:
        """The answers to all prompts, and their mean depth in layers."""
        tokens: list[list[int]] = []
        layers: list[int] = []
        for first in range(0, len(self.prompts), self.batch_size):
            batch = self.prompts[first : first + self.batch_size]
            result, _ = self.decode(batch, stop_tokens=self.stops, **how)
            tokens += [[*own] for own in result.tokens]
            layers += [event.layer for event in result.events]
        return tokens, statistics.fmean(layers)

    def text(self, tokens: Sequence[int]) -> str:
        """An answer's text."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def drafts(self, prompts: Sequence[Sequence[int]]) -> ExitPolicy:
        """One exit, a threshold and a draft length that read the fewest weights for the same answers."""
        trials = [
            ExitPolicy({point.name: threshold}, active=(point.name,), num_draft_tokens=cap)
            for point in self.model.exits
            for threshold in (0.0, 0.4, 0.6, 0.8)
            for cap in (2, 4)
        ]
        read = [
            sum(self.decode([prompt], mode="self_speculative", policy=own)[1] for prompt in prompts) for own in trials
        ]
        return trials[read.index(min(read))]


def quality(answers: Answers, full: list[list[int]]) -> list[dict[str, Any]]:
    """A row per threshold: exact matches, ROUGE-L, mean depth."""
    scorer = RougeScorer(["rougeL"])
    rows = []
    for threshold in THRESHOLDS:
        own, depth = answers.all(mode="early_exit", policy=ExitPolicy(thresholds=threshold))
        pairs = [(answers.text(a), answers.text(b)) for a, b in zip(full, own, strict=True)]
        rouge = statistics.fmean(scorer.score(a, b)["rougeL"].fmeasure for a, b in pairs)
        row = {"threshold": threshold, "exact": agreement(own, full), "rouge_l": rouge}
        rows.append({**row, "depth": depth / answers.model.num_layers})
    return rows


def speed(answers: Answers, tuning: int, measured: int) -> dict[str, Any]:
    """Speed over full depth at batch one; the sides take turns, prompt by prompt."""
    drafts = answers.drafts(answers.prompts[:tuning])
    sides = {FULL: lambda prompt: answers.decode([prompt], mode="full")}
    for threshold in THRESHOLDS:
        policy = ExitPolicy(thresholds=threshold)
        sides[f"{threshold:g}"] = lambda prompt, own=policy: answers.decode([prompt], mode="early_exit", policy=own)
    sides[SPECULATIVE] = lambda prompt: answers.decode([prompt], mode="self_speculative", policy=drafts)
    by_value = ExitPolicy(0.0, active=drafts.active, draft_rule="value")
    sides[BY_VALUE] = lambda prompt: answers.decode([prompt], mode="self_speculative", policy=by_value)
    seconds, results = measure(sides, answers.prompts[tuning : tuning + measured])
    read = {name: sum(own for _, own in results[name]) for name in sides}
    found: dict[str, Any] = {
        name: {"speed": median_of_ratios(seconds[FULL], seconds[name]), "reads": read[FULL] / read[name]}
        for name in sides
        if name != FULL
    }
    tokens = {name: [[*result.tokens[0]] for result, _ in results[name]] for name in (FULL, SPECULATIVE, BY_VALUE)}
    fixed = f"{drafts.active[0]} above {drafts.thresholds[drafts.active[0]]}, {drafts.num_draft_tokens} drafts"
    for name, policy in ((SPECULATIVE, fixed), (BY_VALUE, f"{drafts.active[0]} by value")):
        stats = [result.stats for result, _ in results[name]]
        accepted = sum(own.accepted for own in stats)
        found[name] |= {
            "same_answers": agreement(tokens[name], tokens[FULL]),
            "acceptance": accepted / max(1, sum(own.drafted for own in stats)),
            "accepted_per_check": accepted / max(1, sum(own.num_verifications for own in stats)),
            "policy": policy,
        }
    found["full_depth_tokens_per_s"] = answers.new_tokens / statistics.median(seconds[FULL])
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="hf_early_exit of an export")
    parser.add_argument("prompts", type=Path, help='.jsonl with lines {"prompt": ...}')
    parser.add_argument("--num-prompts", type=int, default=80, help="prompts to answer")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of an answer at most")
    parser.add_argument("--batch", type=int, default=40, help="prompts decoded together, where speed is not measured")
    parser.add_argument("--tuning-prompts", type=int, default=2, help="first prompts, which choose the drafts")
    parser.add_argument("--measured-prompts", type=int, default=4, help="prompts after them, for speed at batch one")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args(arguments)
    entries, _ = read_entries(options.prompts)
    prompts = [one.text for one in entries if not one.is_document][: options.num_prompts]
    if len(prompts) <= options.tuning_prompts:
        raise SystemExit(f'{options.prompts} has {len(prompts)} lines {{"prompt": ...}}; give more')
    machine = provenance()
    torch.set_num_threads(1)
    answers = Answers(options.model, prompts, options.new_tokens, options.batch)
    full, _ = answers.all(mode="full")
    rows = quality(answers, full)
    speeds = speed(answers, options.tuning_prompts, options.measured_prompts)
    for row in rows:
        row |= speeds.pop(f"{row['threshold']:g}")
    result = {
        **machine,
        "prompts": options.prompts.name,
        "num_prompts": len(prompts),
        "new_tokens": options.new_tokens,
        "measured_prompts": options.measured_prompts,
        "thresholds": rows,
        **speeds,
    }
    heading = ("threshold", "exact", "ROUGE-L", "depth", "speed", "reads")
    shown = [
        (f"{row['threshold']:g}", *(f"{row[key]:.2f}" for key in ("exact", "rouge_l", "depth", "speed", "reads")))
        for row in rows
    ]
    print(format_table([heading, *shown]))
    for name in (SPECULATIVE, BY_VALUE):
        print(f"{name}: {json.dumps(result[name])}")
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
