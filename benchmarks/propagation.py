# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Loss of quality of `kv: propagate` and of one decision for a whole batch, on held-out text. No timing.

    python benchmarks/propagation.py export/hf_early_exit --json propagation.json

Every threshold scores the same given text: `carry`, the exact engine, each sequence for itself; `propagate`,
nemo_ee.runtime.propagation with batches of the given sizes, as the TensorRT-LLM model files compute it. The numbers
are the perplexity of the tokens after the context, each read where it would leave, and the mean number of layers below
that.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks.huggingface import read_prompts  # noqa: E402
from benchmarks.measure import provenance  # noqa: E402
from nemo_ee.generation.engine import EarlyExitEngine  # noqa: E402
from nemo_ee.generation.policy import ExitPolicy  # noqa: E402
from nemo_ee.runtime.loader import load_model, load_tokenizer  # noqa: E402
from nemo_ee.runtime.model import RuntimeModel  # noqa: E402
from nemo_ee.runtime.propagation import PropagatingBatch  # noqa: E402


class Quality(NamedTuple):
    """Perplexity over the scored tokens, and the mean number of layers below the exits they were read at."""

    perplexity: float
    mean_depth: float


def carried(model: RuntimeModel, texts: Sequence[Sequence[int]], context: int, policy: ExitPolicy) -> Quality:
    """The exact engine. `texts`: token ids; `context`: leading tokens that are not scored."""
    events = EarlyExitEngine(model).score(texts, context, policy=policy).events
    surprise = -sum(event.logprob for event in events)
    return Quality(math.exp(surprise / len(events)), sum(event.layer for event in events) / len(events))


def propagated(
    model: RuntimeModel, texts: Sequence[Sequence[int]], context: int, policy: ExitPolicy, batch_size: int
) -> Quality:
    """`kv: propagate`, `batch_size` texts of equal length at a time."""
    evaluated = policy.evaluated_exits(model.exits)
    layers = {exit.point.name: exit.point.layer for exit in evaluated} | {None: model.num_layers}
    surprise, depth, count = 0.0, 0, 0
    for first in range(0, len(texts), batch_size):
        group = texts[first : first + batch_size]
        length = len(group[0])
        batch = PropagatingBatch(model, [evaluated] * len(group), policy.criterion, length)
        exits, logits = batch.run({i: (0, text[:context]) for i, text in enumerate(group)}, evaluating=False)
        for position in range(context, length):
            targets = torch.tensor([text[position] for text in group], device=logits.device)
            surprise += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            depth += sum(layers[exit] for exit in exits)
            count += len(group)
            if position + 1 < length:
                step = {i: (position, [text[position]]) for i, text in enumerate(group)}
                exits, logits = batch.run(step, evaluating=True)
    return Quality(math.exp(surprise / count), depth / count)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and with --json write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="hf_early_exit of an export")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.95, 0.9, 0.8, 0.6, 0.4])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4], help="sequences that decide together")
    parser.add_argument("--texts", type=int, default=16, help="held-out files")
    parser.add_argument("--length", type=int, default=192, help="tokens of each")
    parser.add_argument("--context", type=int, default=64, help="tokens of each that are not scored")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = load_model(options.directory, dtype="float32")
    texts = read_prompts(load_tokenizer(options.directory), options.texts, options.length)
    rows = []
    for threshold in tqdm([1.0, *options.thresholds], desc="thresholds"):
        policy = ExitPolicy(threshold)
        row = {"threshold": threshold, "carry": carried(model, texts, options.context, policy)._asdict()}
        for size in options.batches if threshold < 1.0 else ():
            row[f"propagate_{size}"] = propagated(model, texts, options.context, policy, size)._asdict()
        rows.append(row)
    for row in rows:
        cells = [f"{k} {q['perplexity']:.2f} at {q['mean_depth']:.2f}" for k, q in row.items() if k != "threshold"]
        print(f"threshold {row['threshold']}: {'; '.join(cells)}")
    if options.json is not None:
        sizes = {"texts": len(texts), "length": options.length, "context": options.context}
        facts = {"provenance": provenance(), "sizes": sizes, "layers": model.num_layers, "rows": rows}
        options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
