# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The speedup of early exit when decoding: every number beside its baseline, on the models in assets/.

    python benchmarks/decoding.py --json decoding.json         # all of it; at most 20 minutes
    python benchmarks/decoding.py --only forced_speed_at_5pct  # one number and those measured with it

One thread, fp32 sums, CPU seconds; the sides of a ratio take turns, text by text, and a ratio is the median over the
turns. Texts and lengths are in benchmarks/decoding_workload.json. docs/benchmarks.md explains each name.
`runtime_over_hf` is measured on the first reference model, everything else on the byte-level one with its tuned exits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # isort: skip  # after the path is set

from benchmarks.decoding_inputs import REFERENCE, Texts, Workload, make_models, stages_over_full
from benchmarks.exit_frontier import FRONTIER, draw, repeated_share
from benchmarks.huggingface import agreement as same_tokens
from benchmarks.huggingface import generate, measure
from benchmarks.measure import median_of_ratios, provenance
from nemo_ee.evaluation.forced_decoding import (
    agreement,
    excess_nats,
    force,
    mean_depth,
    measured_costs,
    perplexity,
    policy_of,
    threshold_search,
    trace,
)
from nemo_ee.evaluation.touched_weights import CountingModel
from nemo_ee.generation.cost_rule import COST_RULES, measure_costs
from nemo_ee.generation.engine import EarlyExitEngine, GenerationResult
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.planning.threshold_search import ThresholdSearch
from nemo_ee.runtime.loader import load_model, load_tokenizer

LIMITS = {"1pct": 0.01, "5pct": 0.05}
BATCHES = (1, 4, 16, 64)
DRAFT_COUNTS = ("drafted", "accepted", "num_verifications")
# name -> target; None = only reported
TARGETS: dict[str, float | None] = {
    "runtime_over_hf": 3.0, "self_speculative_over_runtime": 2.0, "self_speculative_over_hf_assistant": None,
    "self_speculative_over_runtime.over_bound": 0.9, "self_speculative_over_runtime.over_fixed": 1.0,
    "forced_speed_at_1pct": 1.2, "forced_speed_at_5pct": 1.5, "forced_over_bound": 0.85,
    **{f"batch{size}_early_exit_over_full": 0.98 for size in BATCHES}, "batch16_early_exit_over_full": 1.2,
    "pp2_early_exit_over_full": 1.1,
}  # fmt: skip
Numbers = dict[str, Any]


class Decoding:
    """The measurements. Inputs that several of them share are made at their first use.

    Args:
        options: options of the command line.
        folder: folder for temporary models and files.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder, self.work = options, folder, Workload.read(quick=options.quick)
        self.tables: dict[Any, Any] = {}  # measured costs

    @cached_property
    def paths(self) -> tuple[Path, Path | None, Path | None]:
        """(export, .nemo, .nemo of its backbone)."""
        if self.options.export is None:
            return make_models(self.folder)
        return self.options.export, self.options.nemo, self.options.backbone

    @cached_property
    def model(self) -> CountingModel:
        """The model with exits."""
        return CountingModel(load_model(self.paths[0] / "hf_early_exit"))

    @cached_property
    def texts(self) -> Texts:
        """The held-out texts in the model's tokens."""
        return Texts(load_tokenizer(self.paths[0] / "hf_early_exit"))

    @cached_property
    def windows(self) -> list[list[int]]:
        """The windows of forced decoding."""
        return self.texts.at(self.work.windows, self.work.window_tokens + 1)

    @cached_property
    def policies(self) -> dict[str, ExitPolicy]:
        """The fastest policy within each limit."""
        return {name: self.fastest(name) for name in LIMITS}

    def fastest(self, limit: str, most_active: int | None = None) -> ExitPolicy:
        """The fastest policy within a limit, with at most so many exits."""
        return policy_of(self.search.fastest(math.log1p(LIMITS[limit]), most_active))

    @cached_property
    def search(self) -> ThresholdSearch:
        """The policy search, on the windows of forced decoding, so that the limits hold on the measured text."""
        table = trace(self.model, self.windows)
        return threshold_search(table, excess_nats(table), measured_costs(self.model))

    @cached_property
    def full(self) -> Any:
        """transformers' model of the backbone."""
        return _transformers(self.paths[0] / "hf_full")

    def prompts(self, count: int) -> list[list[int]]:
        """The first `count` prompts."""
        return self.texts.at(self.work.prompts[:count], self.work.prompt_tokens)

    @cached_property
    def engines(self) -> dict[str, EarlyExitEngine]:
        """Engines by cost rule; kept, because a rule's cost table is measured once for each size of batch."""
        return {rule: EarlyExitEngine(self.model, cost_rule=rule, cost_tables=self.tables) for rule in COST_RULES}

    def decode(
        self, prompts: list[list[int]], new_tokens: int, *, cost_rule: str = "none", **how: Any
    ) -> tuple[GenerationResult, int]:
        """The engine's result, and the number of weights that were read for it."""
        before = self.model.touched
        result = self.engines[cost_rule].generate(prompts, max_new_tokens=new_tokens, **how)
        return result, self.model.touched - before

    def runtime(self) -> Numbers:
        """The runtime at full depth against transformers, on the first reference model."""
        model, engine = _transformers(self.options.reference), EarlyExitEngine(load_model(self.options.reference))
        texts, length = Texts(load_tokenizer(self.options.reference)), self.work.new_tokens
        sides: dict[str, Callable[[list[int]], list[int]]] = {
            "runtime": lambda prompt: [*engine.generate([prompt], max_new_tokens=length, mode="full").tokens[0]],
            "hf": lambda prompt: generate(model, prompt, length),
        }
        prompts = texts.at(self.work.prompts[: self.work.rounds], self.work.prompt_tokens)
        seconds, tokens = measure(sides, prompts)
        name = "runtime_over_hf"
        found = {name: median_of_ratios(seconds["hf"], seconds["runtime"])}
        found[f"{name}.same_tokens"] = same_tokens(tokens["runtime"], tokens["hf"])
        return found | _rates(name, seconds, length)

    def self_speculative(self) -> Numbers:
        """Self-speculation by value and at the best fixed setting against full depth and transformers' own."""
        length, mode = self.work.new_tokens, "self_speculative"
        fixed, by_value, (layer, drafted) = self._best_fixed_drafts(), self._best_by_value(), self._best_assistant()
        sides = {
            "full": lambda prompt: self.decode([prompt], length, mode="full"),
            "drafted": lambda prompt: self.decode([prompt], length, mode=mode, policy=by_value),
            "fixed": lambda prompt: self.decode([prompt], length, mode=mode, policy=fixed),
            "hf_assistant": lambda prompt: self._assisted(prompt, length, layer, drafted),
        }
        seconds, results = measure(sides, self.prompts(self.work.rounds))
        name, other = "self_speculative_over_runtime", "self_speculative_over_hf_assistant"
        found: Numbers = {}
        for side, key in (("drafted", name), ("fixed", f"{name}.fixed")):
            found |= self._against_full(key, side, seconds, results)
        found |= {
            f"{name}.over_fixed": median_of_ratios(seconds["fixed"], seconds["drafted"]),
            f"{name}.exits": " ".join(by_value.active),
            f"{name}.fixed.policy": f"{_words(fixed)}, at most {fixed.num_draft_tokens} drafts",
            other: median_of_ratios(seconds["hf_assistant"], seconds["drafted"]),
            f"{other}.same_tokens": same_tokens([[*own.tokens[0]] for own, _ in results["drafted"]],
                                                results["hf_assistant"]),
            f"{other}.setting": f"assistant_early_exit={layer}, num_assistant_tokens={drafted}",
        }  # fmt: skip
        return found | _rates(name, seconds, length)

    def _against_full(self, key: str, side: str, seconds: Numbers, results: Numbers) -> Numbers:
        """Speed of one way to draft over full depth, and what explains it."""
        tokens = {name: [[*own[0].tokens[0]] for own in results[name]] for name in ("full", side)}
        drafts, accepted, checks = (sum(getattr(own.stats, kind) for own, _ in results[side]) for kind in DRAFT_COUNTS)
        touched = {name: sum(own for _, own in results[name]) for name in ("full", side)}
        speed, bound = median_of_ratios(seconds["full"], seconds[side]), touched["full"] / touched[side]
        return {
            key: speed, f"{key}.bound": bound, f"{key}.over_bound": speed / bound,
            f"{key}.acceptance": accepted / max(1, drafts), f"{key}.accepted_per_check": accepted / max(1, checks),
            f"{key}.same_tokens": same_tokens(tokens[side], tokens["full"]),
        }  # fmt: skip

    def _drafted(self, prompt: list[int], length: int, policy: ExitPolicy) -> Any:
        return self.decode([prompt], length, mode="self_speculative", policy=policy)

    def _best_by_value(self) -> ExitPolicy:
        """One or two exits, of all such sets, with which drafts by value read the fewest weights on tuning prompts."""
        names = [point.name for point in self.model.exits]
        trials = [ExitPolicy(1.0, active=own, draft_rule="value")
                  for size in (1, 2) for own in itertools.combinations(names, size)]  # fmt: skip
        table = measure_costs(self.model, names, 1)
        self.tables |= {(1, tuple(sorted(own.active))): table for own in trials}
        prompts = self.texts.at(self.work.tuning_prompts[:2], self.work.prompt_tokens)
        return min(trials, key=lambda own: sum(self._drafted(p, self.work.new_tokens, own)[1] for p in prompts))

    def _best_fixed_drafts(self) -> ExitPolicy:
        """Exits, thresholds and longest draft with the most tokens a second: one exit, or two of the best ones."""
        singles = [
            ExitPolicy({point.name: threshold}, active=(point.name,), num_draft_tokens=cap)
            for point in self.model.exits
            for threshold in (0.0, 0.4, 0.6, 0.8, 0.9)
            for cap in (2, 4, 8)
            if point.layer < self.model.num_layers
        ]

        best = self._quickest(singles, self._drafted, num_prompts=1)[:8]
        pairs = [
            ExitPolicy(both, active=tuple(both), num_draft_tokens=max(one.num_draft_tokens, other.num_draft_tokens))
            for one, other in itertools.combinations(best, 2)
            if len(both := {**one.thresholds, **other.thresholds}) == 2
        ]
        return self._quickest([*best, *pairs], self._drafted, num_prompts=len(self.work.tuning_prompts))[0]

    def _best_assistant(self) -> tuple[int, int]:
        """Layer and length of the drafts with the most tokens a second."""
        layers = sorted({point.layer for point in self.model.exits if point.layer < self.model.num_layers})
        trials = [(layer, drafted) for layer in layers for drafted in (2, 4)]
        best = self._quickest(trials, lambda prompt, length, own: self._assisted(prompt, length, *own), num_prompts=1)
        return best[0]

    def _quickest(
        self, trials: list[Any], decode: Callable[[list[int], int, Any], Any], *, num_prompts: int
    ) -> list[Any]:
        """The trials, the quickest on some tuning prompts first."""
        prompts = self.texts.at(self.work.tuning_prompts[:num_prompts], self.work.prompt_tokens)
        length = self.work.tuning_tokens
        sides = {str(i): lambda prompt, own=own: decode(prompt, length, own) for i, own in enumerate(trials)}
        seconds, _ = measure(sides, prompts)
        return [trials[int(side)] for side in sorted(seconds, key=lambda side: sum(seconds[side]))]

    def _assisted(self, prompt: list[int], length: int, layer: int, drafted: int) -> list[int]:
        """transformers' `assistant_early_exit`, its drafts read from the final exit's head."""
        config = self.full.generation_config
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = drafted, "constant"
        config.assistant_confidence_threshold = 0.0
        return generate(self.full, prompt, length, assistant_early_exit=layer)

    def forced(self) -> Numbers:
        """Speed under the policies on given tokens, beside the bound."""
        sides: dict[str, Callable[[list[int]], Any]] = {"full": lambda own: force(self.model, own, None)}
        sides |= {
            name: lambda own, policy=policy: force(self.model, own, policy) for name, policy in self.policies.items()
        }
        seconds, results = measure(sides, self.windows)
        found: Numbers = {"forced.tokens": self.work.window_tokens * len(self.windows)}
        found["forced.full_perplexity"] = perplexity(results["full"])
        for limit, policy in self.policies.items():
            name = f"forced_speed_at_{limit}"
            speeds = [base / own for base, own in zip(seconds["full"], seconds[limit], strict=True)]
            bounds = [base.touched / own.touched for base, own in zip(results["full"], results[limit], strict=True)]
            found[name] = statistics.median(speeds)
            found[f"{name}.perplexity_over_full"] = perplexity(results[limit]) / perplexity(results["full"])
            found[f"{name}.mean_depth"] = mean_depth(results[limit])
            found[f"{name}.bound"] = statistics.median(bounds)
            found[f"{name}.policy"] = _words(policy)
            over = "forced_over_bound" if limit == "5pct" else f"{name}.over_bound"
            found[over] = median_of_ratios(speeds, bounds)
        return found | _rates("forced", seconds, self.work.window_tokens)

    def batch(self, size: int) -> Numbers:
        """Free-running early exit against full depth, `size` sequences at a time."""
        policy, length = self.policies["5pct"], self.work.batch_new_tokens
        places = self.prompts(len(self.work.prompts))
        batches = [[places[(turn * size + i) % len(places)] for i in range(size)] for turn in range(self.work.rounds)]
        sides = {
            "full": lambda prompts: self.decode(prompts, length, mode="full"),
            "early_exit": lambda prompts: self.decode(prompts, length, policy=policy, cost_rule="fallback"),
            "without_rule": lambda prompts: self.decode(prompts, length, policy=policy),
        }
        seconds, results = measure(sides, batches)
        name = f"batch{size}_early_exit_over_full"
        found: Numbers = {name: median_of_ratios(seconds["full"], seconds["early_exit"])}
        found[f"{name}.without_rule"] = median_of_ratios(seconds["full"], seconds["without_rule"])
        over_exits = median_of_ratios(seconds["without_rule"], seconds["early_exit"])
        found[f"{name}.over_better"] = min(found[name], over_exits)
        found[f"{name}.fallbacks"] = statistics.mean(own.stats.num_fallbacks for own, _ in results["early_exit"])
        found[f"{name}.mean_depth"] = statistics.mean(own.stats.mean_depth for own, _ in results["early_exit"])
        found[f"{name}.bound"] = sum(own for _, own in results["full"]) / sum(own for _, own in results["early_exit"])
        return found | _rates(name, seconds, size * length)

    def stages(self) -> Numbers:
        """Two pipeline stages, by benchmarks/decoding_pipeline.py."""
        _, nemo, backbone = self.paths
        if nemo is None:
            raise ValueError("pp2_early_exit_over_full needs --nemo, the checkpoint that --export was made from")
        # Best with one exit, at the end of the first stage (docs/decoding.md); within 5 % like the others.
        policy = self.fastest("5pct", most_active=1)
        numbers = policy.thresholds.values() if isinstance(policy.thresholds, dict) else [policy.thresholds]
        arguments = ["--thresholds", *map(str, numbers)]
        if policy.active:
            (layer,) = (point.layer for point in self.model.exits if point.name in policy.active)
            arguments += ["--exits", *policy.active, "--layers", f"[{layer},{self.model.num_layers - layer}]"]
        if self.options.quick:
            arguments += ["--rounds", "1", "--prompt-tokens", "6", "--new-tokens", "6"]
        found = stages_over_full(nemo, backbone, arguments, self.folder / "stages.json")
        sides = {key: value for key, value in found.items() if key.startswith(("early_exit", "full"))}
        name = "pp2_early_exit_over_full"
        about = {name: found[name], f"{name}.policy": _words(policy), f"{name}.layers": found["layers"]}
        return about | {f"{name}.{key}": value for key, value in sides.items()}

    def frontier(self) -> Numbers:
        """Speed and quality over thresholds, evaluating the exits of the 5 % policy."""
        active, windows = self.policies["5pct"].active, self.windows[: self.work.frontier_windows]
        policies = {threshold: ExitPolicy(threshold, active=active) for threshold in FRONTIER}
        sides: dict[str, Callable[[list[int]], Any]] = {"full": lambda own: force(self.model, own, None)}
        sides |= {f"{key}": lambda own, by=policy: force(self.model, own, by) for key, policy in policies.items()}
        seconds, results = measure(sides, windows)
        prompts, rows = self.prompts(self.work.rounds), {}
        for threshold, policy in policies.items():
            own = results[str(threshold)]
            said, _ = self.decode(prompts, self.work.new_tokens, policy=policy)
            rows[threshold] = {
                "speed": median_of_ratios(seconds["full"], seconds[str(threshold)]),
                "perplexity": perplexity(own),
                "agreement": agreement(own, results["full"]),
                "mean_depth": mean_depth(own),
                "repeated_8grams": repeated_share(said.tokens),
            }
        if self.options.plot:
            draw(rows, perplexity(results["full"]), self.options.plot)
        about = {"full_perplexity": perplexity(results["full"]), "exits": " ".join(active or ("none",))}
        named = about | {f"{key}.{name}": value for key, row in rows.items() for name, value in row.items()}
        return {f"frontier.{name}": value for name, value in named.items()}

    def groups(self) -> dict[str, Callable[[], Numbers]]:
        """Name of a number -> its measurement."""
        found: dict[str, Callable[[], Numbers]] = {"runtime_over_hf": self.runtime}
        found |= dict.fromkeys(("forced_speed_at_1pct", "forced_speed_at_5pct", "forced_over_bound"), self.forced)
        found |= {f"batch{size}_early_exit_over_full": lambda size=size: self.batch(size) for size in BATCHES}
        found |= dict.fromkeys([name for name in TARGETS if name.startswith("self_")], self.self_speculative)
        return found | {"frontier": self.frontier, "pp2_early_exit_over_full": self.stages}


def _transformers(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32).eval()


def _rates(name: str, seconds: dict[str, list[float]], tokens: int) -> Numbers:
    return {f"{name}.{side}_tokens_per_s": tokens / statistics.median(own) for side, own in seconds.items()}


def _words(policy: ExitPolicy) -> str:
    if isinstance(policy.thresholds, dict):
        return ", ".join(f"{name} above {own}" for name, own in policy.thresholds.items())
    return f"{' '.join(policy.active or ('none',))} above {policy.thresholds}"


def _line(name: str, value: Any) -> str:
    shown = f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
    return shown if TARGETS.get(name) is None else f"{shown} (target {TARGETS[name]})"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print as it comes, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the numbers, one flat object")
    parser.add_argument("--plot", type=Path, help="picture of the frontier; default: beside --json, .png")
    parser.add_argument("--only", action="append", metavar="NAME", choices=[*TARGETS, "frontier"],
                        help="this number and those measured with it; may be given several times")  # fmt: skip
    parser.add_argument("--reference", type=Path, default=REFERENCE, help="Hugging Face directory of the first model")
    parser.add_argument("--export", type=Path, help="output of export_huggingface.py; default: made from assets/")
    parser.add_argument("--nemo", type=Path, help="the checkpoint of --export, for two pipeline stages")
    parser.add_argument("--backbone", type=Path, help=".nemo of its base model, where --nemo holds exits only")
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)  # few tokens, for tests only
    options = parser.parse_args(arguments)
    if options.plot is None and options.json is not None:
        options.plot = options.json.with_suffix(".png")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        decoding = Decoding(options, Path(folder))
        found: Numbers = provenance()
        sizes = {name: value for name, value in vars(decoding.work).items() if isinstance(value, int)}
        found |= sizes | {"prompts_file": "benchmarks/decoding_workload.json", "threads": 1}
        print(", ".join(f"{name}={value}" for name, value in found.items()), flush=True)
        wanted = {name: group for name, group in decoding.groups().items() if name in (options.only or (name,))}
        done: list[Callable[[], Numbers]] = []
        for group in wanted.values():
            if group in done:
                continue
            done.append(group)
            numbers = group()
            found |= numbers
            print("\n".join(_line(name, value) for name, value in numbers.items()), flush=True)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
