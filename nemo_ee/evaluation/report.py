# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures of per-exit numbers.

Files get their names only when they are complete. Text from models or users is escaped in pictures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_ee.checkpoint.atomic import atomic_file

# Colour-blind safe (Okabe and Ito); one per series.
_BEFORE, _AFTER, _AGREEMENT, _FULL = "#999999", "#0072B2", "#D55E00", "#222222"


def escape_text(text: str) -> str:
    """One line of plain text for a picture: matplotlib reads `$` as mathematics, control characters do not print."""
    printable = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return printable.replace("$", r"\$")


def quality_table(report: Mapping[str, Any]) -> str:
    """A small text table of one evaluation (see `ExitQuality.to_mapping`), the full model last."""
    rows = [("exit", "layer", "architecture", "loss", "perplexity", "agreement", "trains")]
    for exit in report["exits"]:
        rows.append(
            (
                exit["name"],
                str(exit["layer"]),
                exit["architecture"],
                f"{exit['loss']:.4f}",
                f"{exit['perplexity']:.2f}",
                f"{exit['agreement']:.1%}",
                f"{exit['trainable_parameters']:,}",
            )
        )
    full = report["full_model"]
    rows.append(("full model", "", "", f"{full['loss']:.4f}", f"{full['perplexity']:.2f}", "", ""))
    return format_table(rows)


def comparison_table(exits: Sequence[Mapping[str, Any]]) -> str:
    """A small text table of exits before and after tuning (see `compare`)."""
    rows = [("exit", "layer", "loss before", "after", "agreement before", "after", "trains")]
    for exit in exits:
        losses = tuple(f"{exit[f'loss_{when}']:.3f}" for when in ("before", "after"))
        agreements = tuple(f"{exit[f'agreement_{when}']:.1%}" for when in ("before", "after"))
        rows.append((exit["name"], str(exit["layer"]), *losses, *agreements, f"{exit['trainable_parameters']:,}"))
    return format_table(rows)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as aligned columns: the first row is the heading, the first column is flush left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]  # fmt: skip
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Two evaluations of the same exits on the same tokens, side by side.

    Returns:
        [{name, layer, architecture, loss_before, loss_after, agreement_before, agreement_after, trainable_parameters}]

    Raises:
        ValueError: the exits or the tokens differ.
    """
    names = [[exit["name"] for exit in report["exits"]] for report in (before, after)]
    if names[0] != names[1]:
        raise ValueError(f"the evaluations measure different exits: {names[0]} and {names[1]}; evaluate the same ones")
    if before["tokens"] != after["tokens"]:
        raise ValueError(
            f"the evaluations measure different tokens ({before['tokens']:,} and {after['tokens']:,}); use the same "
            "data, seq_length and max_tokens"
        )
    return [
        {
            **{key: new[key] for key in ("name", "layer", "architecture")},
            "loss_before": old["loss"],
            "loss_after": new["loss"],
            "agreement_before": old["agreement"],
            "agreement_after": new["agreement"],
            "trainable_parameters": new["trainable_parameters"],
        }
        for old, new in zip(before["exits"], after["exits"], strict=True)
    ]


def draw_comparison(path: str | Path, report: Mapping[str, Any], *, title: str, caption: str = "") -> None:
    """PNG of per-exit loss before and after tuning, with the full model's loss as a line.

    Args:
        path: file to write.
        report: {exits: result of `compare`, full_model: {loss, ...}}.
        title, caption: above and below the picture.
    """
    exits = report["exits"]
    with _figure(path, title, caption, panels=1, width=2.2 + 1.5 * max(2, len(exits))) as (axes,):
        for offset, key, label, colour in (
            (-0.2, "loss_before", "before tuning", _BEFORE),
            (0.2, "loss_after", "after tuning", _AFTER),
        ):
            _bars(axes, exits, [exit[key] for exit in exits], "%.2f", colour, offset=offset, width=0.38, label=label)
        _full_model_line(axes, report)
        axes.set_ylabel("loss on held-out text\n(nats per token, lower is better)")
        _legend(axes)


def draw_quality(path: str | Path, report: Mapping[str, Any], *, title: str, caption: str = "") -> None:
    """PNG of one evaluation: per exit the loss (left) and the agreement with the full model (right).

    Args:
        path: file to write.
        report: `ExitQuality.to_mapping()`.
        title, caption: above and below the picture.
    """
    exits = report["exits"]
    with _figure(path, title, caption, panels=2, width=3.0 + 2.0 * max(3, len(exits))) as (left, right):
        _bars(left, exits, [exit["loss"] for exit in exits], "%.2f", _AFTER)
        _full_model_line(left, report)
        left.set_ylabel("loss (nats per token, lower is better)")
        _legend(left)
        _bars(right, exits, [100 * _drawable(exit["agreement"]) for exit in exits], "%.0f %%", _AGREEMENT)
        right.set_ylabel("same most likely token as the full model\n(% of tokens, higher is better)")
        right.set_ylim(0, 105)


def _bars(
    axes,
    exits: Sequence[Mapping[str, Any]],
    values: Sequence[float | None],
    number: str,
    colour: str,
    *,
    offset: float = 0.0,
    width: float = 0.6,
    label: str | None = None,
) -> None:
    positions = [index + offset for index in range(len(exits))]
    bars = axes.bar(positions, [_drawable(value) for value in values], width=width, color=colour, label=label)
    axes.bar_label(bars, fmt=number, padding=2, fontsize=9)
    axes.set_xticks(range(len(exits)), [_label(exit) for exit in exits], fontsize=9)
    axes.margins(y=0.1)


def _label(exit: Mapping[str, Any]) -> str:
    """Label of an exit: its name if that is not the default, layer, architecture."""
    name, layer, architecture = exit["name"], f"layer {exit['layer']}", exit["architecture"]
    if name == f"layer{exit['layer']}-{architecture}":
        lines = [layer, architecture]
    else:
        lines = [name, f"{layer}, {architecture}"]
    return "\n".join(escape_text(line) for line in lines)


def _drawable(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def _full_model_line(axes, report: Mapping[str, Any]) -> None:
    loss = _drawable(report["full_model"]["loss"])
    axes.axhline(loss, color=_FULL, linestyle="--", linewidth=1.2, label=f"full model ({loss:.2f})")


def _legend(axes) -> None:
    """Numbers in a row above the bars, the full model last."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda index: labels[index].startswith("full model"))
    axes.legend(
        [handles[index] for index in order],
        [labels[index] for index in order],
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        borderaxespad=0.2,
        ncols=len(order),
        fontsize=9,
    )


@contextmanager
def _figure(path: str | Path, title: str, caption: str, *, panels: int, width: float) -> Iterator[list]:
    """Axes of a new figure that is written to `path` at the end. No global state of matplotlib is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(width, 18), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06, wspace=0.05)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    figure.suptitle(escape_text(title), fontsize=12, x=0.01, ha="left")
    if caption:
        figure.supxlabel(escape_text(caption), fontsize=8, color="#555555", x=0.01, ha="left")
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.25)
        panel.set_axisbelow(True)
    yield axes
    save_figure(figure, path)


def save_figure(figure: Any, path: str | Path, *, dpi: int = 150) -> None:
    """Write a matplotlib figure in the format of the file's suffix."""
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=dpi, format=Path(path).suffix[1:] or None)
