# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The picture of an experiment on tuning: loss and agreement by depth, a line for each kind of exit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_ee.evaluation.report import escape_text, save_figure

# Colour-blind safe (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
_MARKS = "osD^vPX"


def draw_result(path: Path, result: Mapping[str, Any], series: Sequence[str]) -> None:
    """PNG of the rows of a result.

    Args:
        series: settings that make a line; exits of a line at one layer are drawn at their mean, with all as points.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = result["rows"]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(escape_text(result["title"]), x=0.01, ha="left")
    panels = figure.subplots(1, 2)
    lines: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for row in rows:
        label = ", ".join(str(row[key]) for key in series)
        lines.setdefault(label, {}).setdefault(row["layer"], []).append(row)
    for panel, key, factor, quantity in (
        (panels[0], "loss", 1, "loss (nats per token, lower is better)"),
        (panels[1], "agreement", 100, "same most likely token as the full model (%)"),
    ):
        for index, (label, layers) in enumerate(lines.items()):
            colour, mark = _COLOURS[index % len(_COLOURS)], _MARKS[index % len(_MARKS)]
            depths = sorted(layers)
            means = [factor * sum(row[key] for row in layers[depth]) / len(layers[depth]) for depth in depths]
            panel.plot(depths, means, color=colour, label=escape_text(label))
            points = [(depth, factor * row[key]) for depth in depths for row in layers[depth]]
            panel.scatter(*zip(*points, strict=True), color=colour, marker=mark, s=22)
        panel.set_xlabel("exit after layer")
        panel.set_xticks(sorted({row["layer"] for row in rows}))
        panel.set_ylabel(quantity)
        panel.grid(axis="y", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for text in dict.fromkeys(row["text"] for row in rows):
        full = next(row["full_loss"] for row in rows if row["text"] == text)
        panels[0].axhline(
            full, color="#222222", linestyle="--", linewidth=1.1, label=f"full model, {escape_text(text)}"
        )
    panels[0].legend(frameon=False, fontsize=8)
    save_figure(figure, path)
