# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The picture of an experiment on tuning: loss and agreement by depth, a line for each kind of exit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_ee.evaluation.report import escape_text, save_figure
from nemo_ee.evaluation.tuning_curves import COLOURS

_MARKS = "osD^vPX"
_STYLES = ("-", "--", ":")
_FULL_STYLES = ("--", ":", "-.", (0, (8, 3)))


def draw_result(path: Path, result: Mapping[str, Any], series: Sequence[str]) -> None:
    """PNG of the rows of a result.

    Args:
        result: an experiment's JSON: `title`, `rows`.
        series: settings of an exit, or `run`, `text`, `name`; a line for each combination. A line goes through the
            mean of its exits at a layer; each exit is a point.
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
    assert len(lines) <= len(COLOURS) * len(_STYLES), f"{len(lines)} lines are more than there are looks"
    for panel, key, factor, quantity in (
        (panels[0], "loss", 1, "loss (nats per token, lower is better)"),
        (panels[1], "agreement", 100, "same most likely token as the full model (%)"),
    ):
        for index, (label, layers) in enumerate(lines.items()):
            again, place = divmod(index, len(COLOURS))
            mark = _MARKS[(place + 3 * again) % len(_MARKS)]
            look = {"color": COLOURS[place], "linestyle": _STYLES[again], "marker": mark}
            depths = sorted(layers)
            means = [factor * sum(row[key] for row in layers[depth]) / len(layers[depth]) for depth in depths]
            panel.plot(depths, means, label=escape_text(label), markersize=5, **look)
            points = [(depth, factor * row[key]) for depth in depths for row in layers[depth]]
            panel.scatter(*zip(*points, strict=True), color=COLOURS[place], marker=mark, s=18)
        panel.set_xlabel("exit after layer")
        panel.set_xticks(sorted({row["layer"] for row in rows}))
        panel.set_ylabel(quantity)
        panel.grid(axis="y", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    # A run that trains the backbone has a full model of its own.
    full: dict[float, list[str]] = {}
    for row in rows:
        names, name = full.setdefault(round(row["full_loss"], 4), []), f"{row['run']} on {row['text']}"
        names += [name] * (name not in names)
    for index, (loss, names) in enumerate(full.items()):
        label = "full model" if len(full) == 1 else f"full model: {', '.join(names)}"
        look = {"color": "#222222", "linestyle": _FULL_STYLES[index % len(_FULL_STYLES)], "linewidth": 1.1}
        panels[0].axhline(loss, label=escape_text(label), **look)
    panels[1].legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="upper left",
                     bbox_to_anchor=(1.0, 1.0))  # fmt: skip
    save_figure(figure, path)
