# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Speed against quality over thresholds: a check of free-running text for repetition, and the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

FRONTIER = (1.0, 0.9, 0.8, 0.6, 0.4, 0.2)


def repeated_share(texts: Sequence[Sequence[int]], size: int = 8) -> float:
    """Share of the n-grams that occur earlier in the same text; 0.0 without n-grams."""
    repeated = total = 0
    for tokens in texts:
        grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) + 1 - size)]
        repeated += len(grams) - len(set(grams))
        total += len(grams)
    return repeated / total if total else 0.0


def draw(rows: Mapping[float, Mapping[str, float]], full_perplexity: float, file: Path) -> None:
    """Plot speed and mean depth over the increase of perplexity, a point for each threshold."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    costs = [100 * (row["perplexity"] / full_perplexity - 1) for row in rows.values()]
    panels = {"speed": "times the speed of full depth", "mean_depth": "layers below the exits, on average"}
    for axes, (name, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        values = [row[name] for row in rows.values()]
        axes.plot(costs, values, marker="o")
        for threshold, cost, value in zip(rows, costs, values, strict=True):
            axes.annotate(f"{threshold:g}", (cost, value), textcoords="offset points", xytext=(5, 5), fontsize=8)
        axes.set_xlabel("perplexity above full depth, %")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
    figure.suptitle("Forced decoding over confidence thresholds", x=0.01, ha="left")
    figure.savefig(file, dpi=150)
