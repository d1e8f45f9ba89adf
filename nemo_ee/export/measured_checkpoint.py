# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint and a text, loaded for a measurement with the runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_ee.evaluation.exit_report import text_windows
from nemo_ee.evaluation.text_settings import TextSettings
from nemo_ee.export.huggingface.exporter import HuggingFaceSettings, export_huggingface
from nemo_ee.runtime.loader import load_model, load_tokenizer
from nemo_ee.runtime.model import RuntimeModel


@dataclass(frozen=True)
class Loaded:
    """What a measurement needs. `directory`: `hf_early_exit/`, or a stock model's; `windows`: token ids."""

    directory: Path
    model: RuntimeModel
    tokenizer: Any
    windows: list[list[int]]


@contextmanager
def loaded(settings: TextSettings) -> Iterator[Loaded]:
    """The model, on the CPU, and the windows of the text.

    Raises:
        ValueError: a window is longer than the model's context, or the text is too short.
    """
    torch.set_num_threads(settings.threads)
    with exported(settings.checkpoint, settings.backbone) as directory:
        model, tokenizer = load_model(directory, dtype=settings.dtype), load_tokenizer(directory)
        if settings.window_tokens > model.max_positions:
            raise ValueError(
                f"window_tokens={settings.window_tokens} is more than the model's {model.max_positions} positions; "
                "lower it"
            )
        windows = text_windows(
            settings.data, tokenizer, settings.window_tokens, settings.max_windows, settings.max_document_bytes
        )
        yield Loaded(directory, model, tokenizer, windows)


@contextmanager
def exported(checkpoint: Path, backbone: Path | None) -> Iterator[Path]:
    """The directory that the runtime loads: the checkpoint itself, or a temporary export of a `.nemo`."""
    if (checkpoint / "config.json").is_file():
        if backbone is not None:
            raise ValueError(f"backbone={backbone}: only for an exits-only .nemo; {checkpoint} is a directory")
        yield checkpoint
        return
    with tempfile.TemporaryDirectory() as temporary:
        values = {
            "checkpoint": str(checkpoint),
            "backbone": backbone and str(backbone),
            "output": f"{temporary}/export",
            "targets": ["early_exit"],
            "parity_gigabytes": 0.0,  # the model is loaded at once
        }
        yield export_huggingface(HuggingFaceSettings.from_config(values)) / "hf_early_exit"


def facts_of(settings: TextSettings, own: Loaded) -> dict[str, str]:
    """What was measured: name -> value."""
    a = own.model.architecture
    return {
        "checkpoint": settings.checkpoint.name,
        "model": f"{a.num_layers} layers, hidden size {a.hidden_size}, vocabulary {a.vocab_size}",
        "text": settings.data.name,
        "windows": f"{len(own.windows)} of {len(own.windows[0])} tokens",
        "dtype": settings.dtype or "float32",
        "threads": str(settings.threads),
        "torch": torch.__version__,
    }
