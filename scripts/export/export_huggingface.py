# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Write a `.nemo` as Hugging Face directories. See conf/export_huggingface.yaml.

python scripts/export/export_huggingface.py checkpoint=tuned.nemo output=export

Needs neither a GPU nor NeMo.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from nemo_ee.commands.command import command, names
from nemo_ee.settings.files import EXPORT_HUGGINGFACE


@hydra.main(version_base="1.3", config_path="../../conf", config_name="export_huggingface")
def main(cfg: DictConfig) -> None:
    """Export."""
    with command(cfg, EXPORT_HUGGINGFACE):
        from nemo_ee.export.huggingface.exporter import HuggingFaceSettings, export_huggingface

        export_huggingface(
            HuggingFaceSettings(
                checkpoint=Path(cfg.checkpoint),
                output=Path(cfg.output),
                backbone=None if cfg.backbone is None else Path(cfg.backbone),
                targets=names(cfg.targets),
                exits=names(cfg.exits),
                dtype=cfg.dtype,
                shard_gigabytes=cfg.shard_gigabytes,
                thresholds=OmegaConf.to_container(cfg).get("thresholds"),
                criterion=cfg.criterion,
                parity_gigabytes=cfg.parity_gigabytes,
                progress=cfg.progress,
            )
        )


if __name__ == "__main__":
    main()
