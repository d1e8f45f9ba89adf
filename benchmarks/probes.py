# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Early exit by probes beside early exit by full heads, at equal agreement with the full model.

    python benchmarks/probes.py export/hf_early_exit prompts.jsonl --json probes.json

The model has probes (megatron_gpt_early_exit_probe.py, fitted on other prompts). Greedy, batch one, one thread. On the
first prompts each side gets the lowest threshold, one for its exits, at which at most --may-disagree of the tokens are
not the full model's; on the next prompts answers of --new-tokens tokens are timed, the sides in turns.

    all     every exit of the model is active on both sides
    best    each side has the set of exits that reads the fewest weights on the first prompts

`probe_over_full_heads` is tokens/s over tokens/s, the median over the prompts (target: 1.2); `bound` the same ratio of
the weights that are read for the timed answers. `agreement` is measured on the timed prompts along the full model's
answers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.huggingface import measure  # noqa: E402
from benchmarks.measure import median_of_ratios, provenance  # noqa: E402
from nemo_ee.calibration.calibration_prompts import read_entries  # noqa: E402
from nemo_ee.evaluation.touched_weights import CountingModel, head_weights  # noqa: E402
from nemo_ee.exits.criteria import NEVER_LEAVES, OF_LOGITS, PROBE  # noqa: E402
from nemo_ee.generation.engine import EarlyExitEngine, GenerationResult  # noqa: E402
from nemo_ee.generation.exit_trace import ExitTrace, TracePass  # noqa: E402
from nemo_ee.generation.policy import ExitPolicy  # noqa: E402
from nemo_ee.runtime.loader import load_model, load_tokenizer  # noqa: E402
from nemo_ee.text.special_tokens import prompt_ids  # noqa: E402

TARGET = 1.2
CRITERIA = {"probe": PROBE, "full_heads": OF_LOGITS[0]}
GRID = [share / 100 for share in range(99, -1, -1)]
BATCH = 20


class Side(NamedTuple):
    """A policy, and the weights per token that it reads on the first prompts."""

    policy: ExitPolicy
    reads: float


class Comparison:
    """One model, and its own answers.

    Args:
        directory: of the model.
        prompts: texts.
        new_tokens: tokens of an answer.
    """

    def __init__(self, directory: Path, prompts: Sequence[str], new_tokens: int) -> None:
        tokenizer = load_tokenizer(directory)
        self.model = CountingModel(load_model(directory))
        self.engine = EarlyExitEngine(self.model)
        self.prompts = [prompt_ids(tokenizer, text) for text in prompts]
        self.new_tokens = new_tokens
        a = self.model.architecture
        self.layer, self.heads = a.attention_size + a.mlp_size, head_weights(self.model.config)

    def decode(self, prompts: Sequence[Sequence[int]], **how: Any) -> tuple[GenerationResult, int]:
        """The answers, and the weights that were read for them."""
        before = self.model.touched
        result = self.engine.generate(prompts, max_new_tokens=self.new_tokens, **how)
        return result, self.model.touched - before

    def traces(self, prompts: Sequence[Sequence[int]]) -> dict[str, ExitTrace]:
        """By criterion, all exits along the full model's answers."""
        passes = {name: TracePass(self.model, None, criterion) for name, criterion in CRITERIA.items()}
        parts: dict[str, list[ExitTrace]] = {name: [] for name in CRITERIA}
        for first in range(0, len(prompts), BATCH):
            batch = prompts[first : first + BATCH]
            answers = self.decode(batch, mode="full")[0].tokens
            texts = [[*prompt, *answer] for prompt, answer in zip(batch, answers, strict=True)]
            for name, run in passes.items():
                parts[name].append(run.run(texts, [len(prompt) for prompt in batch]))
        return {name: ExitTrace.join(own) for name, own in parts.items()}

    def side(self, trace: ExitTrace, active: Sequence[str], may_disagree: float) -> Side:
        """The lowest threshold of these exits that loses no more agreement."""
        never = NEVER_LEAVES[trace.criterion]
        found = None
        for threshold in GRID:
            thresholds = [threshold if point.name in active else never for point in trace.exits]
            if disagreement(trace, thresholds) > may_disagree:
                break
            policy = ExitPolicy(threshold, trace.criterion, active=tuple(active))
            found = Side(policy, self.reads(trace, thresholds, active))
        return found or Side(ExitPolicy(never, trace.criterion), self.reads(trace, [never] * len(trace.exits), ()))

    def reads(self, trace: ExitTrace, thresholds: Sequence[float], active: Sequence[str]) -> float:
        """Weights per token: layers below the exit, and the heads that are evaluated."""
        choice, total = trace.choices(thresholds)[:, 1:], 0
        for index in range(len(trace.exits) + 1):
            count = int((choice == index).sum())
            at_end = index == len(trace.exits)
            layers = trace.num_layers if at_end else trace.exits[index].layer
            heads = {None if at_end else trace.exits[index].name}
            if trace.criterion != PROBE:
                heads |= {point.name for point in trace.exits[: index + 1] if point.name in active}
            total += count * (layers * self.layer + sum(self.heads[name] for name in heads))
        return total / choice.numel()


def disagreement(trace: ExitTrace, thresholds: Sequence[float]) -> float:
    """Share of the tokens, the first of each answer apart, at which the exits would choose another one."""
    agrees = torch.cat([trace.agrees, torch.ones_like(trace.valid)[..., None]], dim=2)
    choice = trace.choices(thresholds)
    return float((~agrees.gather(2, choice[..., None])[:, 1:, 0]).double().mean())


def compare(own: Comparison, options: argparse.Namespace) -> dict[str, Any]:
    """The result for `all` and for `best`."""
    tuning, timed = own.prompts[: options.tuning], own.prompts[options.tuning : options.tuning + options.timed]
    traces, names = own.traces(tuning), [point.name for point in own.model.exits]
    sets = [active for count in range(1, len(names) + 1) for active in itertools.combinations(names, count)]
    chosen = {
        f"all {name}": own.side(trace, names, options.may_disagree) for name, trace in traces.items()
    } | {
        f"best {name}": min((own.side(trace, active, options.may_disagree) for active in sets), key=lambda s: s.reads)
        for name, trace in traces.items()
    }  # fmt: skip
    sides = {"full depth": lambda prompt: own.decode([prompt], mode="full")}
    for name, side in chosen.items():
        sides[name] = lambda prompt, policy=side.policy: own.decode([prompt], policy=policy)
    seconds, results = measure(sides, timed)
    reads = {name: sum(read for _, read in found) for name, found in results.items()}
    tested = own.traces(own.prompts[options.tuning :])
    result: dict[str, Any] = {"full_depth_tokens_per_s": own.new_tokens / statistics.median(seconds["full depth"])}
    for kind in ("all", "best"):
        probe, heads = f"{kind} probe", f"{kind} full_heads"
        result[kind] = {
            "probe_over_full_heads": median_of_ratios(seconds[heads], seconds[probe]),
            "bound": reads[heads] / reads[probe],
        }
        for name in CRITERIA:
            policy, side = chosen[f"{kind} {name}"].policy, f"{kind} {name}"
            never = NEVER_LEAVES[policy.criterion]
            active = names if policy.active is None else policy.active
            thresholds = [policy.thresholds if one in active else never for one in names]
            early = [event.exit is not None for found, _ in results[side] for event in found.events]
            result[kind][name] = {
                "over_full_depth": median_of_ratios(seconds["full depth"], seconds[side]),
                "bound": reads["full depth"] / reads[side],
                "exits": list(active),
                "threshold": policy.thresholds,
                "left_early": sum(early) / len(early),
                "agreement": 1 - disagreement(tested[name], thresholds),
            }
    return result


def main() -> None:
    """Measure, print, and with --json write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="hf_early_exit of an export with probes")
    parser.add_argument("prompts", type=Path, help='.jsonl with lines {"prompt": ...}, others than the probes saw')
    parser.add_argument("--tuning", type=int, default=40, help="first prompts, which choose the thresholds")
    parser.add_argument("--timed", type=int, default=8, help="prompts after them that are timed")
    parser.add_argument("--num-prompts", type=int, default=80)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--may-disagree", type=float, default=0.05)
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    machine = provenance()
    torch.set_num_threads(1)
    texts = [entry.text for entry in read_entries(options.prompts)[0] if not entry.is_document]
    texts = texts[: options.num_prompts]
    if len(texts) < options.tuning + options.timed:
        raise SystemExit(f"{options.prompts} has {len(texts)} prompts; give {options.tuning + options.timed}")
    result = {**machine, "target": TARGET, "prompts": options.prompts.name, "new_tokens": options.new_tokens}
    result |= compare(Comparison(options.model, texts, options.new_tokens), options)
    print(json.dumps(result, indent=2))
    for kind in ("all", "best"):
        own = result[kind]
        print(f"{kind}: probe_over_full_heads {own['probe_over_full_heads']:.2f}, bound {own['bound']:.2f}, "
              f"target {TARGET}")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
