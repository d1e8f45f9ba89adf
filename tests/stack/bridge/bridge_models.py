# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Models, files and exports of the tests on Megatron-Bridge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.bridge import AutoBridge

from nemo_ee.bridge.provider import EarlyExitModelProvider
from nemo_ee.bridge.tuning_run import start_ranks
from nemo_ee.checkpoint.chunk_reader import ChunkReader, WeightSource
from nemo_ee.checkpoint.nemo_archive import NemoArchive
from nemo_ee.export.huggingface.exporter import HuggingFaceSettings, export_huggingface
from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel
from nemo_ee.megatron.model.microbatch import MicroBatch

ROOT = Path(__file__).parents[3]
EARLIER = ROOT / "tests" / "data" / "earlier"  # written by the NeMo host
COMPLETE = EARLIER / "complete.nemo"

torch.set_num_threads(1)


def export(checkpoint: Path, output: Path, *targets: str) -> Path:
    """scripts/export/export_huggingface.py."""
    config = yaml.safe_load((ROOT / "conf" / "export_huggingface.yaml").read_text(encoding="utf-8"))
    del config["hydra"], config["defaults"]
    given = {"checkpoint": str(checkpoint), "output": str(output), "targets": list(targets), "progress": False}
    export_huggingface(HuggingFaceSettings.from_config({**config, **given}))
    return output


def build(
    source: Path, early_exit: Mapping[str, Any], exits: WeightSource | None = None, **fields: Any
) -> tuple[EarlyExitGPTModel, EarlyExitModelProvider]:
    """The model of a Hugging Face directory, as `AutoBridge` and the hooks load it."""
    bridge = AutoBridge.from_hf_pretrained(str(source))
    provider = EarlyExitModelProvider.of(
        bridge.to_megatron_provider(), early_exit, source=source, exits=exits, **fields
    )
    provider.finalize()
    start_ranks(provider, timeout_minutes=1)
    (model,) = provider.provide_distributed_model(
        wrap_with_ddp=False, mixed_precision_wrapper=None, use_cpu_initialization=True
    )
    return model, provider


def microbatch(
    tokens: torch.Tensor, labels: torch.Tensor | None = None, mask: torch.Tensor | None = None
) -> MicroBatch:
    """A microbatch of tokens [b, s]; by default every position counts and each label is the next token."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    labels = tokens.roll(-1, dims=1) if labels is None else labels
    return MicroBatch(tokens, labels, torch.ones(tokens.shape) if mask is None else mask, positions)


def exit_weights_in(path: Path) -> dict[str, torch.Tensor]:
    """Every exit tensor of a `.nemo` or of its directory."""
    with NemoArchive(path) as archive:
        reader = ChunkReader(archive.folder("exit_weights"), prefix="exits.")
        return {key: reader.read(key, (0,) * len(info.shape), info.shape) for key, info in reader.keys().items()}
