# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Reports: valid JSON, whole files only, pictures whose text is escaped, tables that line up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_ee.checkpoint.atomic import atomic_file, write_json
from nemo_ee.evaluation.report import (
    compare,
    comparison_table,
    draw_comparison,
    draw_quality,
    escape_text,
    quality_table,
)

NAN = float("nan")


def evaluation(*losses: float, tokens: int = 100) -> dict:
    """What an evaluation of two exits reports."""
    exits = [
        {
            "name": name, "layer": layer, "architecture": "mlp", "loss": loss, "perplexity": 2 * loss,
            "agreement": loss / 10, "trainable_parameters": 1234,
        }
        for name, layer, loss in zip(("layer2-mlp", "other"), (2, 5), losses, strict=True)
    ]  # fmt: skip
    return {"exits": exits, "full_model": {"loss": 2.5, "perplexity": 12.2}, "tokens": tokens}


def test_json_is_read_back_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.json"
    write_json(path, {"a": 1.5, "b": [NAN, float("inf"), {"c": (1, 2)}], "d": "né\n"})
    assert json.loads(path.read_text()) == {"a": 1.5, "b": [None, None, {"c": [1, 2]}], "d": "né\n"}
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"old": True})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    with pytest.raises(OSError, match="disk full"), atomic_file(path) as partial:
        partial.write_text('{"ha')
        raise OSError("disk full")
    assert json.loads(path.read_text()) == {"old": True}
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_compare_puts_two_evaluations_side_by_side() -> None:
    first, second = compare(evaluation(9.0, 7.0), evaluation(4.0, 3.0))
    assert first == {
        "name": "layer2-mlp", "layer": 2, "architecture": "mlp", "loss_before": 9.0, "loss_after": 4.0,
        "agreement_before": 0.9, "agreement_after": 0.4, "trainable_parameters": 1234,
    }  # fmt: skip
    assert (second["loss_before"], second["loss_after"]) == (7.0, 3.0)


def test_compare_refuses_what_cannot_be_compared() -> None:
    other = evaluation(4.0, 3.0)
    other["exits"][0]["name"] = "new"
    with pytest.raises(ValueError, match="different exits: .*layer2-mlp.* and .*new"):
        compare(evaluation(9.0, 7.0), other)
    with pytest.raises(ValueError, match=r"different tokens \(100 and 1,000\); use the same data"):
        compare(evaluation(9.0, 7.0), evaluation(4.0, 3.0, tokens=1000))


def test_tables_line_up() -> None:
    lines = quality_table(evaluation(9.0, 7.123456)).splitlines()
    assert "7.1235" in lines[3]
    assert "1,234" in lines[3]
    assert lines[-1].split() == ["full", "model", "2.5000", "12.20"]
    ends = {line.index(text) + len(text) for line, text in zip(lines[2:], ("9.0000", "7.1235", "2.5000"), strict=True)}
    assert len(ends) == 1, "numbers of a column end in one column"
    table = comparison_table(compare(evaluation(9.0, NAN), evaluation(4.0, 3.0)))
    assert "9.000  4.000" in table
    assert "nan" in table


def test_text_is_escaped() -> None:
    assert escape_text("a$x^2$\n\x1b[31m") == r"a\$x^2\$\n\x1b[31m"
    assert escape_text("größe 3") == "größe 3"


@pytest.mark.parametrize("losses", [(9.0, 7.0), (NAN, 3.0)])
def test_pictures_are_drawn_from_any_numbers_and_names(tmp_path: Path, losses: tuple[float, float]) -> None:
    pytest.importorskip("matplotlib")
    report = evaluation(*losses)
    report["exits"][1]["name"] = r"$\frac{1}$"  # as mathematics this would not even parse
    draw_quality(tmp_path / "exits.png", report, title="$_$ <b>x</b>", caption="100 tokens")
    both = {"exits": compare(report, report), "full_model": report["full_model"]}
    draw_comparison(tmp_path / "losses.png", both, title="before and after")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["exits.png", "losses.png"]
    for file in tmp_path.iterdir():
        assert file.read_bytes().startswith(b"\x89PNG")
        assert file.stat().st_size > 5000


def test_reports_need_neither_torch_nor_nemo() -> None:
    """The demo's own process imports them."""
    code = "import sys, nemo_ee.evaluation.report; print(sorted({'torch', 'nemo', 'megatron'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
