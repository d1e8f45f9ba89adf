# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Inputs of benchmarks/decoding.py: the fixed texts, and the model directories made from assets/."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.huggingface import HELD_OUT
from benchmarks.measure import ROOT

REFERENCE = ROOT / "assets" / "reference-model"
BYTES = ROOT / "assets" / "reference-model-bytes"
WORKLOAD = ROOT / "benchmarks" / "decoding_workload.json"
# `--quick`, for tests only.
QUICK = {
    "prompt_tokens": 12, "new_tokens": 12, "batch_new_tokens": 8, "window_tokens": 16, "frontier_windows": 2,
    "rounds": 2, "tuning_tokens": 6,
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """Texts by place, `(line of the held-out file, first token)`, and the lengths to use.

    Attributes:
        prompts, tuning_prompts, windows: places; settings are chosen on the tuning prompts, and no result is reported
            on them.
        prompt_tokens, new_tokens: lengths in generation; `batch_new_tokens`: new tokens of each sequence of the
            batches.
        window_tokens: scored tokens of a window of forced decoding; `frontier_windows`: number of windows of the
            frontier.
        rounds: prompts, or batches of them, on every side.
        tuning_tokens: new tokens of a trial of a setting.
    """

    prompts: list[list[int]]
    tuning_prompts: list[list[int]]
    windows: list[list[int]]
    prompt_tokens: int
    new_tokens: int
    batch_new_tokens: int
    window_tokens: int
    frontier_windows: int
    rounds: int
    tuning_tokens: int

    @staticmethod
    def read(*, quick: bool) -> Workload:
        """Read the file beside this module."""
        values = json.loads(WORKLOAD.read_text(encoding="utf-8"))
        del values["about"]
        own = Workload(**{**values, **(QUICK if quick else {})})
        return Workload(**{**vars(own), "windows": own.windows[:3]}) if quick else own


class Texts:
    """The held-out files as tokens of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        with gzip.open(HELD_OUT, "rt", encoding="utf-8") as lines:
            self._texts = [json.loads(line)["text"] for line in lines]

    def at(self, places: Sequence[Sequence[int]], length: int) -> list[list[int]]:
        """`length` tokens from each place on.

        Raises:
            ValueError: a text has too few tokens.
        """
        found = []
        for line, first in places:
            # No tokenizer here makes a token of more than 20 characters on average.
            text = self._texts[line][: 20 * (first + length)]
            tokens = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            tokens = tokens[first : first + length]
            if len(tokens) < length:
                raise ValueError(
                    f"line {line} of {HELD_OUT} ends before token {first + length} of this tokenizer; "
                    f"give other places in {WORKLOAD}"
                )
            found.append(tokens)
        return found


def make_models(folder: Path) -> tuple[Path, Path, Path]:
    """Export the byte-level model with its tuned exits. Returns (export, exits-only .nemo, .nemo of the backbone).

    Raises:
        ValueError: the tuned exits are missing.
        RuntimeError: a command failed; the message ends with its last lines.
    """
    exits, backbone, export = BYTES / "exits.nemo", folder / "backbone.nemo", folder / "export"
    if not exits.is_file():
        raise ValueError(f"{exits} is missing; give --export (and --nemo) of another model")
    convert = [f"source={BYTES}", f"output={backbone}", "model.early_exit.every=1/2", "trainer.accelerator=cpu"]
    _run("examples/megatron_gpt_early_exit_convert.py", *convert)
    checkpoint = [f"checkpoint={exits}", f"backbone={backbone}", f"output={export}", "progress=False"]
    _run("scripts/export/export_huggingface.py", *checkpoint)
    return export, exits, backbone


def stages_over_full(nemo: Path, backbone: Path | None, arguments: Sequence[str], file: Path) -> dict[str, Any]:
    """The numbers of benchmarks/decoding_pipeline.py, in processes of its own."""
    base = [] if backbone is None else ["--backbone", str(backbone)]
    _run("benchmarks/decoding_pipeline.py", str(nemo), *base, *arguments, "--json", str(file))
    return json.loads(file.read_text(encoding="utf-8"))


def _run(script: str, *arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{script} failed:\n" + "\n".join((done.stdout + done.stderr).splitlines()[-20:]))
