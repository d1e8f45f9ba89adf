# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Share of tokens that leave at 95 % precision, by criterion, as in DSSD (arXiv 2407.21082).

    python experiments/criteria.py export/hf_early_exit heldout.jsonl --json criteria.json

Per exit and criterion (largest probability, margin, entropy): the threshold at which 95 % of the tokens that leave are
the full model's most likely ones, chosen on one half of the windows; on the other half the share of tokens that leave,
and the share of these that are the full model's.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # isort: skip  # after the path is set
from torch import Tensor

from benchmarks.measure import provenance
from nemo_ee.checkpoint.atomic import write_json
from nemo_ee.evaluation.exit_report import text_windows
from nemo_ee.evaluation.report import format_table
from nemo_ee.exits.confidence import confidence, leaves
from nemo_ee.exits.criteria import OF_LOGITS, SMALLER_IS_CONFIDENT
from nemo_ee.generation.decoding_model import TokenPositions
from nemo_ee.runtime.loader import load_model, load_tokenizer
from nemo_ee.runtime.model import RuntimeModel

PRECISION = 0.95


def threshold_for(confidences: Tensor, agrees: Tensor, criterion: str) -> float | None:
    """The threshold that most tokens pass of those at which at least `PRECISION` of the tokens that leave agree.

    Args:
        confidences: `[n]`, fp32, by the criterion.
        agrees: `[n]`, bool.

    Returns:
        The threshold, as `nemo_ee.exits.confidence.leaves` reads it; None: there is none.
    """
    sign = -1.0 if criterion in SMALLER_IS_CONFIDENT else 1.0
    ordered, order = (sign * confidences).sort(descending=True)
    precision = agrees[order].double().cumsum(0) / torch.arange(1, len(order) + 1)
    below = torch.cat([ordered[1:], ordered.new_full((1,), -math.inf)])  # a threshold lies between two values
    good = ((precision >= PRECISION) & (ordered > below)).nonzero()
    if not len(good):
        return None
    last = int(good[-1, 0])
    return sign * float(below[last] if last + 1 < len(ordered) else torch.nextafter(ordered[last], below[last]))


@torch.inference_mode()
def logits_of(model: RuntimeModel, window: Sequence[int]) -> dict[str | None, Tensor]:
    """Logits `[n, v]` of every exit, in the order of their depth, and of the final exit (None) last."""
    names = tuple(point.name for point in model.exits)
    positions, cache = TokenPositions.of({0: range(len(window))}), model.new_cache(1, len(window), names)
    hidden, start, found = model.embed(torch.tensor(window), positions), 0, {}
    for name, stop in [*((point.name, point.stop) for point in model.exits), (None, 2 * model.num_layers)]:
        hidden = model.run(hidden, positions, start, stop, cache)
        found[name], start = model.exit_logits(name, hidden, positions, cache), stop
    return found


def measured(model: RuntimeModel, windows: Sequence[Sequence[int]]) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """(exit, criterion) -> confidences `[n]` fp32, agreement with the full model's most likely token `[n]` bool."""
    parts: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
    for window in windows:
        logits = logits_of(model, window)
        final = logits.pop(None).argmax(dim=-1)
        for name, own in logits.items():
            agrees = own.argmax(dim=-1) == final
            for criterion in OF_LOGITS:
                parts.setdefault((name, criterion), []).append((confidence(own, criterion), agrees))
    return {
        key: (torch.cat([one for one, _ in own]), torch.cat([two for _, two in own])) for key, own in parts.items()
    }


def rows_of(model: RuntimeModel, windows: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """A row for each exit and criterion; shares are 0..1, `precision` is None where no token leaves."""
    half = len(windows) // 2
    chosen, held_out = measured(model, windows[:half]), measured(model, windows[half:])
    rows = []
    for (name, criterion), (confidences, agrees) in held_out.items():
        threshold = threshold_for(*chosen[name, criterion], criterion)
        left = torch.zeros_like(agrees) if threshold is None else leaves(confidences, threshold, criterion)
        rows.append({
            "exit": name, "criterion": criterion, "threshold": threshold, "left": float(left.double().mean()),
            "precision": float(agrees[left].double().mean()) if left.any() else None,
            "agreement": float(agrees.double().mean()),
        })  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="hf_early_exit of an export")
    parser.add_argument("data", type=Path, help='.jsonl with lines {"text": ...} or {"messages": [...]}, or a text')
    parser.add_argument("--windows", type=int, default=40, help="windows of text")
    parser.add_argument("--window-tokens", type=int, default=256, help="tokens of a window")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args(arguments)
    machine = provenance()
    torch.set_num_threads(options.threads)
    tokenizer, model = load_tokenizer(options.model), load_model(options.model)
    windows = text_windows(options.data, tokenizer, options.window_tokens, options.windows, None)
    rows = rows_of(model, windows)
    shown = [
        (row["exit"], row["criterion"], *(
            "none" if row[key] is None else format(row[key], form)
            for key, form in (("threshold", ".3f"), ("left", ".1%"), ("precision", ".1%"))
        ))
        for row in rows
    ]  # fmt: skip
    print(format_table([("exit", "criterion", "threshold", "tokens that leave", "precision"), *shown]))
    if options.json:
        write_json(options.json, {**machine, "tokens": sum(map(len, windows)), "rows": rows})


if __name__ == "__main__":
    main()
