# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""How many tokens frozen-backbone exits may take by each criterion, as in DSSD (arXiv 2407.21082, its tables).

    python experiments/criteria.py export/hf_early_exit heldout.jsonl --json criteria.json

Per exit and criterion (largest probability, margin, entropy): the threshold at which 95 % of the tokens that it lets
pass are the full model's, found on one half of the text; on the other half the share of the tokens that pass, and how
many of them are the full model's.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # isort: skip  # after the path is set

from benchmarks.measure import provenance
from nemo_ee.checkpoint.atomic import write_json
from nemo_ee.evaluation.exit_report import text_windows
from nemo_ee.evaluation.report import format_table
from nemo_ee.exits.criteria import CRITERIA, SMALLER_IS_CONFIDENT
from nemo_ee.generation.exit_trace import ExitTrace, TracePass
from nemo_ee.runtime.loader import load_model, load_tokenizer

LEAST = 0.95  # of the tokens that pass are the full model's


def threshold_for(certainty: torch.Tensor, agrees: torch.Tensor) -> float | None:
    """The lowest certainty, both `[n]`, down to which at least `LEAST` of the tokens agree; None: there is none."""
    ordered, order = certainty.sort(descending=True)
    precision = agrees[order].double().cumsum(0) / torch.arange(1, len(order) + 1)
    good = (precision >= LEAST).nonzero()
    return float(ordered[good[-1, 0]]) if len(good) else None


def rows_of(choosing: ExitTrace, holding: ExitTrace, sign: int) -> list[dict[str, Any]]:
    """A row per exit. `sign`: -1 where a small number is a certain one."""
    rows = []
    for index, point in enumerate(choosing.exits):
        sides = []
        for own in (choosing, holding):
            agrees = own.own_tokens[..., index] == own.own_tokens[..., -1]
            sides.append((sign * own.confidences[..., index][own.valid], agrees[own.valid]))
        threshold = threshold_for(*sides[0])
        certainty, agrees = sides[1]
        passes = certainty >= (math.inf if threshold is None else threshold)
        correct = float(agrees[passes].double().mean()) if passes.any() else None
        accepted = float(passes.double().mean())
        row = {"exit": point.name, "layer": point.layer, "criterion": choosing.criterion}
        row["threshold"] = None if threshold is None else sign * threshold
        rows.append({**row, "accepted": accepted, "correct": correct})
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="hf_early_exit of an export")
    parser.add_argument("data", type=Path, help='.jsonl with lines {"text": ...}, or a text')
    parser.add_argument("--windows", type=int, default=40, help="windows of text")
    parser.add_argument("--window-tokens", type=int, default=256, help="tokens of a window")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    tokenizer, model = load_tokenizer(options.model), load_model(options.model)
    windows = text_windows(options.data, tokenizer, options.window_tokens, options.windows, None)
    half, rows = len(windows) // 2, []
    for criterion in CRITERIA:
        passes = TracePass(model, None, criterion)
        traces = [passes.run([window], [1]) for window in windows]
        joined = ExitTrace.join(traces[:half]), ExitTrace.join(traces[half:])
        rows += rows_of(*joined, -1 if criterion in SMALLER_IS_CONFIDENT else 1)
    shown = [
        (row["exit"], row["criterion"], *(
            "none" if row[key] is None else format(row[key], form)
            for key, form in (("threshold", ".3f"), ("accepted", ".1%"), ("correct", ".1%"))
        ))
        for row in rows
    ]  # fmt: skip
    print(format_table([("exit", "criterion", "threshold", "accepted", "of them correct"), *shown]))
    if options.json:
        write_json(options.json, {**provenance(), "tokens": len(windows) * options.window_tokens, "rows": rows})


if __name__ == "__main__":
    main()
