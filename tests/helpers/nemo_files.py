# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Make, open and take apart `.nemo` files in this process; import it after tests.helpers.megatron_models."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tests.helpers.megatron_models import REFERENCE_MODEL, cpu_trainer, reset_batch_sizes, script_config

SCRIPT = "megatron_gpt_early_exit_convert"


def run_convert(source: Path, output: Path, exits: Sequence[dict] = (), *overrides: str, **early_exit: Any):
    """`convert` with the script's yaml."""
    import nemo_ee.models  # noqa: F401
    from nemo_ee.commands.convert import convert

    reset_batch_sizes()
    given = [f"source={source}", f"output={output}", "probe_tokens=16", "model.make_vocab_size_divisible_by=16"]
    with script_config(SCRIPT, [*given, *overrides]) as cfg:
        cfg.model.early_exit = OmegaConf.merge(cfg.model.early_exit, {"exits": list(exits), **early_exit})
        return convert(cfg)


def restore(path: Path, *, verify: str = "stored", exits_only: bool = False, **changes: Any):
    """The model of a `.nemo`, full depth."""
    import nemo_ee.models  # noqa: F401
    from nemo_ee.models.connector import EarlyExitSaveRestoreConnector, read_config
    from nemo_ee.models.megatron_early_exit_gpt_model import MegatronEarlyExitGPTModel
    from nemo_ee.models.run_config import merge_model_config

    reset_batch_sizes()
    config = merge_model_config(read_config(path), OmegaConf.create({"full_depth": True, **changes}))
    return MegatronEarlyExitGPTModel.restore_from(
        str(path),
        override_config_path=config,
        trainer=cpu_trainer(),
        save_restore_connector=EarlyExitSaveRestoreConnector(verify=verify, exits_only=exits_only),
    )


def with_tokenizer(folder: Path) -> Path:
    for file in REFERENCE_MODEL.glob("*token*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def with_moved_exits(path: Path, output: Path) -> Path:
    """The model of a `.nemo` with every trainable parameter of its exits moved, as tuning would leave it."""
    import torch

    model = restore(path)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.model.exits.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_to(str(output))
    return output


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {
            info.name.removeprefix("./"): tar.extractfile(info).read() for info in tar.getmembers() if info.isreg()
        }


def rewritten(path: Path, output: Path, changes: Mapping[str, bytes | None]) -> Path:
    """A copy of an archive with members replaced; None leaves one out."""
    content: dict[str, bytes | None] = {**members(path), **changes}
    with tarfile.open(output, "w") as tar:
        for name, data in content.items():
            if data is None:
                continue
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return output
