# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A picture of a tuning run with many exits: one curve per exit over the steps, grouped by the exits' settings.

Panels, colours and line styles each show one setting of the exits (architecture, init, layer, output, lr, ...): nine
exits become three panels of three lines instead of nine lines in one panel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_ee.evaluation.report import escape_text, save_figure

# Colour-blind safe (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
_STYLES = ("-", "--", ":", "-.")

Curve = Sequence[tuple[int, float]]


def check_settings(exits: Mapping[str, Mapping[str, Any]], **keys: str | None) -> None:
    """Raises ValueError if panels, colours or styles are to show a setting that exits do not have.

    Args:
        exits: exit name -> its settings.
        keys: panels, colours, styles -> name of a setting, or None.
    """
    known = sorted(set.intersection(*(set(settings) for settings in exits.values())) - {"name"}) if exits else []
    problems = [
        f"{what}: {key!r} is no setting of the exits" for what, key in keys.items() if key and key not in known
    ]
    if problems:
        raise ValueError(f"{'; '.join(problems)}; use one of {', '.join(known)}, or null")


def draw_tuning_curves(
    path: str | Path,
    curves: Mapping[str, Curve],
    exits: Mapping[str, Mapping[str, Any]],
    *,
    validation: Mapping[str, Curve] | None = None,
    panels: str | None = "architecture",
    colours: str | None = "init",
    styles: str | None = None,
    quantity: str = "loss (nats per token, lower is better)",
    title: str = "",
    caption: str = "",
) -> None:
    """PNG with one panel per value of a setting, all on the same axes.

    Args:
        path: file to write.
        curves: exit name -> [(step, value)], ascending steps; values that are not finite are left out.
        exits: exit name -> its settings, in the order of the legend; at least those of `curves`.
        validation: the same for validation, drawn as circles.
        panels, colours, styles: settings that they show; None = none.
        quantity: label of the values' axis.
        title, caption: above and below the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {name: settings for name, settings in exits.items() if name in curves}
    check_settings(shown, panels=panels, colours=colours, styles=styles)
    parts = _values(shown, panels)
    figure = Figure(figsize=(min(18.0, 1.4 + 3.3 * max(2, len(parts))), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    figure.suptitle(escape_text(title), fontsize=12, x=0.01, ha="left")
    if caption:
        figure.supxlabel(escape_text(caption), fontsize=8, color="#555555", x=0.01, ha="left")
    handles: dict[str, Any] = {}
    for panel, part in zip(axes, parts, strict=True):
        drawn = {name: settings for name, settings in shown.items() if _value(settings, panels) == part}
        for name, label in _labels(drawn, colours, styles).items():
            look = {
                "color": _pick(COLOURS, _values(shown, colours), _value(shown[name], colours)),
                "linestyle": _pick(_STYLES, _values(shown, styles), _value(shown[name], styles)),
            }
            line = _draw(panel, curves[name], (validation or {}).get(name, ()), look)
            handles.setdefault(label, line)
        _dress(panel, part if panels else "")
    axes[0].set_ylabel(escape_text(quantity))
    if handles:
        figure.legend(
            list(handles.values()), list(handles), frameon=False, loc="outside upper right", fontsize=9,
            ncols=min(5, len(handles)),
        )  # fmt: skip
    save_figure(figure, path, dpi=100)


def _value(settings: Mapping[str, Any], key: str | None) -> str:
    return str(settings[key]) if key else ""


def _values(exits: Mapping[str, Mapping[str, Any]], key: str | None) -> list[str]:
    """The different values of a setting, in the exits' order."""
    return list(dict.fromkeys(_value(settings, key) for settings in exits.values()))


def _pick(looks: Sequence[str], values: Sequence[str], value: str) -> str:
    return looks[values.index(value) % len(looks)]


def _labels(exits: Mapping[str, Mapping[str, Any]], colours: str | None, styles: str | None) -> dict[str, str]:
    """Exit name -> its label in the legend: its settings, or its name if another exit has the same settings."""
    labels = {
        name: ", ".join(
            value if key in ("init", "architecture", "output") else f"{key} {value}"
            for key in dict.fromkeys((colours, styles))
            if key and (value := _value(settings, key))
        )
        for name, settings in exits.items()
    }
    texts = list(labels.values())
    return {name: escape_text(text if text and texts.count(text) == 1 else name) for name, text in labels.items()}


def _draw(panel, curve: Curve, validation: Curve, look: Mapping[str, str]):
    """One exit's line, its validation circles and its last value; returns the line."""
    points = [(step, value) for step, value in curve if math.isfinite(value)]
    checked = [(step, value) for step, value in validation if math.isfinite(value)]
    (line,) = panel.plot([step for step, _ in points], [value for _, value in points], linewidth=1.8, **look)
    panel.plot(
        [step for step, _ in checked], [value for _, value in checked], linestyle="none", marker="o", markersize=5,
        markerfacecolor="white", markeredgecolor=look["color"],
    )  # fmt: skip
    if points:
        panel.annotate(
            f"{points[-1][1]:#.3g}", points[-1], xytext=(4, 0), textcoords="offset points", fontsize=8,
            color=look["color"], va="center", annotation_clip=False,
        )  # fmt: skip
    return line


def _dress(panel, title: str) -> None:
    panel.set_title(escape_text(title), fontsize=10, loc="left")
    panel.set_xlabel("step")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", alpha=0.25)
    panel.margins(x=0.02)
