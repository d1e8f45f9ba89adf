# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Decoding over two pipeline stages, one process and one torch thread each: early exit against full depth.

    make demo                                                    # tunes exits on the reference model
    python benchmarks/decoding_pipeline.py outputs/demo/tuned.nemo --json stages.json

`pp2_early_exit_over_full` is the throughput of `early_exit` by that of `full` on the same prompts, one at a time, for
the best of the thresholds; beside it each threshold's ratio, mean depth and tokens per second. All sides take turns,
prompt by prompt, and a ratio is the median over the turns.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import ROOT, provenance
from benchmarks.processes import run_in_processes

CORPUS = ROOT / "assets" / "reference-model" / "corpus" / "heldout.jsonl.gz"
TARGET = 1.1


def decode_on_stage(rank: int, options: argparse.Namespace) -> dict[str, Any]:
    """Load this rank's stage; the first one decodes and returns seconds by side and turn."""
    from hydra import compose, initialize_config_dir

    from nemo_ee.commands.generate import open_generator
    from nemo_ee.commands.generation_request import GenerationRequest

    overrides = [
        f"model.restore_from_path={options.model.resolve()}", "trainer.accelerator=cpu", "trainer.devices=2",
        "model.pipeline_model_parallel_size=2", "prompts=[x]", f"tokens_to_generate={options.new_tokens}",
    ]  # fmt: skip
    if options.backbone:
        overrides.append(f"model.backbone_path={options.backbone.resolve()}")
    if options.layers:
        overrides.append(f"model.layer_split.layers={options.layers}")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("megatron_gpt_early_exit_generate", overrides=overrides)
    generator = open_generator(cfg, GenerationRequest.from_config(cfg))
    if generator is None:
        return {}
    with generator:
        return time_sides(generator, options)


def time_sides(generator: Any, options: argparse.Namespace) -> dict[str, Any]:
    """side -> seconds of every turn, its mean depth, and its share of tokens from each exit."""
    from nemo_ee.commands.generate import prompt_ids
    from nemo_ee.generation.engine import EarlyExitEngine
    from nemo_ee.generation.policy import ExitPolicy

    if options.run_pending_after is not None:
        generator.model.run_pending_after = options.run_pending_after or None
    engine = EarlyExitEngine(generator.model)
    policies = {f"early_exit_{number:g}": ExitPolicy(number, active=options.exits) for number in options.thresholds}
    sides: dict[str, dict[str, Any]] = {
        name: {"seconds": [], "depth": [], "exits": {}} for name in ["full", *policies]
    }
    with gzip.open(CORPUS, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(options.rounds + 1), strict=False)]
    for turn, text in enumerate(texts):
        prompt = list(prompt_ids(generator.tokenizer, text, None))[: options.prompt_tokens]
        for name, side in sides.items():
            # The same number of tokens everywhere: no token ends an answer.
            mode, policy = ("full", None) if name == "full" else ("early_exit", policies[name])
            start = time.perf_counter()
            result = engine.generate([prompt], max_new_tokens=options.new_tokens, mode=mode, policy=policy)
            if turn:  # the first one warms up
                side["seconds"].append(time.perf_counter() - start)
                side["depth"].append(result.stats.mean_depth)
                for exit, count in result.stats.tokens_per_exit.items():
                    side["exits"][exit] = side["exits"].get(exit, 0) + count
    return sides


def report(sides: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Print every side and return the numbers."""
    full, numbers = sides["full"]["seconds"], {}
    for name, side in sides.items():
        ratio = statistics.median(base / own for base, own in zip(full, side["seconds"], strict=True))
        rate = options.new_tokens / statistics.median(side["seconds"])
        depth = statistics.mean(side["depth"])
        numbers |= {f"{name}_over_full": round(ratio, 3), f"{name}_tokens_per_s": round(rate, 1)}
        numbers[f"{name}_depth"] = round(depth, 2)
        print(f"{name}: {ratio:.3f} x full, {rate:.1f} tokens/s, mean depth {depth:.2f}, {side['exits']}", flush=True)
    best = max(value for key, value in numbers.items() if key.startswith("early_exit") and key.endswith("_over_full"))
    print(f"pp2_early_exit_over_full {best:.3f} (target {TARGET})", flush=True)
    return {"pp2_early_exit_over_full": best, **numbers}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an early-exit .nemo of the reference model with tuned exits")
    parser.add_argument("--backbone", type=Path, help=".nemo of the base model, where `model` holds exits only")
    parser.add_argument("--json", type=Path, help="file for the numbers, one flat object")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.9, 0.8, 0.6, 0.4, 0.2])
    parser.add_argument("--rounds", type=int, default=8, help="prompts, one after the other on every side")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--layers", help="layers per stage, e.g. [4,8]; default: even")
    parser.add_argument("--exits", nargs="+", help="exits at which tokens may leave; default: all")
    parser.add_argument("--run-pending-after", type=int, help="pending tokens in a batch; 0: until one goes deeper")
    options = parser.parse_args()
    from nemo_ee import cpu_host

    cpu_host.enable()
    import nemo_ee.commands.generate  # noqa: F401  (imported once, before the forks)

    about: dict[str, Any] = {
        **provenance(), "prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens,
        "rounds": options.rounds, "layers": options.layers or "even", "exits": " ".join(options.exits or ["all"]),
    }  # fmt: skip
    print(", ".join(f"{key}={value}" for key, value in about.items()), flush=True)
    sides, _ = run_in_processes(partial(decode_on_stage, options=options), 2, threads=1, timeout=1500)
    result = {**about, **report(sides, options)}
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
