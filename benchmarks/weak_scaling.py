# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The estimate of memory against dry runs, and weak scaling from 8 to 1,024 GPUs, simulated.

    python benchmarks/weak_scaling.py --json dry-run.json --picture weak-scaling.png      # 3 to 12 minutes on one core

`estimate_over_dry_run` is the estimated peak of the fullest GPU over that of a dry run, on twelve layouts of Llama-2's
7B, 13B and 70B; `weak_scaling_1024_over_8` is simulated tokens per second and GPU. Nothing here ran on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a command, not an installed package

from omegaconf import OmegaConf  # noqa: E402

from benchmarks.measure import provenance  # noqa: E402
from nemo_ee.evaluation.dry_run import DryRunSettings, dry  # noqa: E402
from nemo_ee.evaluation.report import format_table  # noqa: E402

# model, layout, exits
LAYOUTS = [
    ("7B", (1, 1, 1), 1), ("7B", (2, 2, 2), 1), ("7B", (1, 8, 1), 8), ("7B", (8, 8, 16), 8),
    ("13B", (4, 2, 1), 1), ("13B", (1, 8, 1), 8), ("13B", (2, 4, 1), 8), ("13B", (4, 16, 1), 8),
    ("70B", (4, 2, 1), 1), ("70B", (1, 8, 1), 8), ("70B", (8, 4, 2), 1), ("70B", (8, 8, 16), 8),
]  # fmt: skip
SCALING = {"7B": (1, 8), "70B": (1, 8)}  # tensor- and pipeline-parallel size
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
SEQUENCES_PER_PIPELINE = 16
TARGET = 0.05


def settings(model: str, layout: tuple[int, ...], exits: int, **more: Any) -> DryRunSettings:
    """The defaults of conf/dry_run.yaml with these values."""
    values = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "dry_run.yaml"))
    values = {key: value for key, value in values.items() if key not in ("hydra", "defaults")}
    values |= {"sequences": max(16, layout[2]), **more}
    return DryRunSettings.from_config({**values, "model": model, "layout": list(layout), "exits": exits})


def estimates() -> list[dict[str, Any]]:
    """A row for each layout; the peaks are without `fixed_gb`, which is assumed on both sides."""
    rows = []
    for model, layout, exits in LAYOUTS:
        start = time.monotonic()
        found = dry(settings(model, layout, exits, fixed_gb=0.0))
        ratio = found["estimated_gb"] / found["peak_gb"]
        rows.append({"model": model, "layout": list(layout), "exits": exits, "estimate_over_dry_run": ratio})
        rows[-1] |= {key: found[key] for key in ("estimated_gb", "peak_gb")}
        rows[-1]["seconds"] = round(time.monotonic() - start, 1)
        print(rows[-1], flush=True)
    return rows


def scaling() -> list[dict[str, Any]]:
    """A row for each model and number of GPUs: as many sequences for every pipeline."""
    rows = []
    for model, (tensor, pipeline) in SCALING.items():
        for gpus in GPUS:
            data = gpus // (tensor * pipeline)
            layout = (tensor, pipeline, data)
            found = dry(settings(model, layout, 8, sequences=SEQUENCES_PER_PIPELINE * data))
            rows.append({"model": model, "gpus": gpus, "layout": list(layout)})
            rows[-1] |= {name: found[f"{name}_tokens_per_s_per_gpu"] for name in ("decoupled", "drained")}
            print(rows[-1], flush=True)
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens per second and GPU over GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(SCALING), figsize=(9, 3.4), layout="constrained")
    for panel, model in zip(panels, SCALING, strict=True):
        own = [row for row in rows if row["model"] == model]
        for name, style in (("decoupled", "o-"), ("drained", "s--")):
            panel.plot([row["gpus"] for row in own], [row[name] for row in own], style, label=f"{name} stages")
        panel.set_xscale("log", base=2)
        panel.set_xticks(GPUS, [str(gpus) for gpus in GPUS])
        panel.set_ylim(bottom=0)
        panel.set(title=f"Llama-2 {model}, 8 exits", xlabel="GPUs", ylabel="tokens/s per GPU, simulated")
        panel.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--picture", type=Path, help="file for the picture of weak scaling")
    options = parser.parse_args()
    for file in filter(None, (options.json, options.picture)):
        if not file.absolute().parent.is_dir():
            parser.error(f"{file} lies in no existing folder")
    result: dict[str, Any] = {**provenance(), "estimates": estimates(), "weak_scaling": scaling()}
    ratios = [row["estimate_over_dry_run"] for row in result["estimates"]]
    result |= {"estimate_over_dry_run_least": min(ratios), "estimate_over_dry_run_most": max(ratios)}
    for model in SCALING:
        own = [row for row in result["weak_scaling"] if row["model"] == model]
        for name in ("decoupled", "drained"):
            result[f"weak_scaling_1024_over_8_{model}_{name}"] = own[-1][name] / own[0][name]
    lines = [(key, f"{value:.3f}") for key, value in result.items() if isinstance(value, float)]
    met = "met" if max(abs(ratio - 1) for ratio in ratios) <= TARGET else "MISSED"
    print(f"{format_table([('name', 'value'), *lines])}\nestimates: target within {TARGET:.0%}, {met}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.picture:
        draw(result["weak_scaling"], options.picture)


if __name__ == "__main__":
    main()
