# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Curves of a run with many exits: sorted into panels, told apart, and nothing of one lost behind another."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from nemo_ee.evaluation import tuning_curves
from nemo_ee.evaluation.tuning_curves import draw_tuning_curves

EXITS = {
    f"{init}-{shape}": {"name": f"{init}-{shape}", "init": init, "architecture": shape, "layer": 6}
    for init in ("copy", "random", "lora")
    for shape in ("norm", "mlp")
}
CURVES = {name: [(0, 9.0 - index), (2, 8.0 - index), (4, math.nan)] for index, name in enumerate(EXITS)}


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written."""
    written: list[Figure] = []
    save = Figure.savefig

    def remember(self: Figure, *args, **kwargs) -> None:
        written.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)
    return written


def lines_of(panel) -> dict[str, list[tuple[float, float]]]:
    """Colour -> points of every solid line."""
    return {
        line.get_color(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in panel.lines
        if line.get_linestyle() != "None"
    }


def test_a_panel_per_architecture_and_a_colour_per_init(tmp_path: Path, figure: list[Figure]) -> None:
    draw_tuning_curves(tmp_path / "a.png", CURVES, EXITS, validation={"copy-mlp": [(2, 5.0)]}, title="$5 <b>")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (drawn,) = figure
    norm, mlp = drawn.axes
    assert (norm.get_title(loc="left"), mlp.get_title(loc="left")) == ("norm", "mlp")
    assert norm.get_ylim() == mlp.get_ylim(), "panels are compared"
    inits = ["copy", "random", "lora"]
    assert lines_of(mlp) == {tuning_curves.COLOURS[i]: CURVES[f"{init}-mlp"][:2] for i, init in enumerate(inits)}
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == inits
    circles = [line for line in mlp.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in circles] == [(2, 5.0)]
    assert drawn.get_suptitle() == r"\$5 <b>", "matplotlib would read mathematics between two dollars"


def test_exits_that_look_alike_go_by_their_names(tmp_path: Path, figure: list[Figure]) -> None:
    twins = {name: {**EXITS["copy-mlp"], "name": name} for name in ("first", "second")}
    draw_tuning_curves(tmp_path / "a.png", {name: CURVES["copy-mlp"] for name in twins}, twins, panels=None)
    assert [text.get_text() for text in figure[0].legends[0].get_texts()] == ["first", "second"]
    layers = {f"l{k}": {**EXITS["copy-mlp"], "name": f"l{k}", "layer": k} for k in (3, 6)}
    curves = {name: CURVES["copy-mlp"] for name in layers}
    draw_tuning_curves(tmp_path / "b.png", curves, layers, panels=None, styles="layer")
    assert [text.get_text() for text in figure[1].legends[0].get_texts()] == ["copy, layer 3", "copy, layer 6"]
    assert {line.get_linestyle() for line in figure[1].axes[0].lines} >= {"-", "--"}


def test_a_setting_that_exits_do_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"panels: 'depth' is no setting of the exits; use one of architecture, in"):
        draw_tuning_curves(tmp_path / "a.png", CURVES, EXITS, panels="depth")
    assert not list(tmp_path.iterdir())
