# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Report of a calibration: the table of policies, and a picture of risk and depth along the path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_ee.evaluation.report import escape_text, format_table, save_figure

_RISK, _DEPTH, _CHOSEN = "#D55E00", "#0072B2", "#222222"
_SHOWN_AFTER_FAILURE = 3


def thresholds_text(thresholds: Mapping[str, float]) -> str:
    """Thresholds as text: one number if all exits share it, else a number per exit."""
    values = list(thresholds.values())
    if len(set(values)) == 1:
        return f"{values[0]:g}"
    return " ".join(f"{value:g}" for value in values)


def policy_table(report: Mapping[str, Any]) -> str:
    """Table of policies from the safest to the fastest, up to a few after the first that failed."""
    rows = [("threshold", "risk", "p-value", "mean depth", "layers saved", "")]
    policies, layers = report["policies"], report["num_layers"]
    failed = next((index for index, one in enumerate(policies) if not one["certified"]), len(policies))
    for one in policies[: failed + _SHOWN_AFTER_FAILURE]:
        mark = "chosen" if one["chosen"] else "certified" if one["certified"] else ""
        rows.append(
            (
                thresholds_text(one["thresholds"]),
                f"{one['risk']:.4f}",
                f"{one['p_value']:.2g}",
                f"{one['mean_depth']:.2f}",
                f"{1 - one['mean_depth'] / layers:.1%}",
                mark,
            )
        )
    return format_table(rows)


def draw_calibration(path: str | Path, report: Mapping[str, Any], *, title: str, caption: str) -> None:
    """PNG with the risk and epsilon (above) and the depth (below) of the policies, in the order of the test."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    policies = report["policies"]
    places = range(len(policies))
    certified = sum(one["certified"] for one in policies)
    figure = Figure(figsize=(min(16.0, max(7.5, 2.5 + 0.36 * len(policies))), 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(places, [one["risk"] for one in policies], "o-", color=_RISK, markersize=4, label="risk on the prompts")
    epsilon = report["epsilon"]
    upper.axhline(epsilon, color=_CHOSEN, linestyle="--", linewidth=1, label=f"epsilon = {epsilon:g}")
    upper.set_ylabel(f"{report['risk_name']}\n(mean over prompts)")
    lower.plot(places, [one["mean_depth"] for one in policies], "o-", color=_DEPTH, markersize=4)
    lower.axhline(report["num_layers"], color=_CHOSEN, linestyle=":", linewidth=1)
    lower.set_ylabel(f"mean depth\n(layers of {report['num_layers']})")
    lower.set_ylim(0, report["num_layers"] * 1.08)
    names = [thresholds_text(one["thresholds"]) for one in policies]
    lower.set_xticks(places, names, rotation=60, fontsize=8, ha="right")
    lower.set_xlabel(f"{report['criterion']} threshold, from the safest to the fastest")
    for axes in (upper, lower):
        if certified:
            axes.axvspan(-0.5, certified - 0.5, color="#009E73", alpha=0.12, lw=0, label="certified")
        for place in (index for index, one in enumerate(policies) if one["chosen"]):
            axes.axvline(place, color=_CHOSEN, linewidth=1.6, label="chosen")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.margins(x=0.02)
    upper.set_ylim(bottom=0)
    upper.legend(frameon=False, fontsize=9, ncols=4, loc="lower left", bbox_to_anchor=(0.0, 1.0))
    figure.suptitle(escape_text(title), fontsize=12, x=0.01, ha="left")
    figure.supxlabel(escape_text(caption), fontsize=8, color="#555555", x=0.01, ha="left")
    save_figure(figure, path)


def summary(report: Mapping[str, Any]) -> str:
    """Summary of the result in a few lines."""
    bound = f"{report['risk_name']} <= {report['epsilon']:g} with confidence {1 - report['delta']:g}"
    chosen: Sequence[Mapping[str, Any]] = [one for one in report["policies"] if one["chosen"]]
    if not chosen:
        lines = [f"full depth: no policy has {bound} on {report['num_tested']} prompts"]
    else:
        one = chosen[0]
        lines = [
            f"{report['criterion']} thresholds {one['thresholds']}",
            f"{bound}, tested on {report['num_tested']} prompts",
            f"mean depth {one['mean_depth']:.2f} of {report['num_layers']} layers",
        ]
    if not report["certificate"]["data"]["independent"]:
        lines.append("prompts of one document are not independent: the true confidence is lower than the stated one")
    free = report["free_running"]
    if free is not None:
        lines.append(
            f"decoded freely ({free['num_prompts']} prompts, without guarantee): {free['identical']:.1%} of the "
            f"answers are the full model's, {free['differing']:.1%} of the tokens differ, "
            f"mean depth {free['mean_depth']:.2f}"
        )
    return "\n".join(lines)
