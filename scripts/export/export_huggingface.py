# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Write a `.nemo` as Hugging Face directories. See conf/export_huggingface.yaml.

python scripts/export/export_huggingface.py checkpoint=tuned.nemo output=export

Needs neither a GPU nor NeMo.
"""

import hydra
from omegaconf import DictConfig

from nemo_ee.commands.command import command
from nemo_ee.commands.console import show


@hydra.main(version_base="1.3", config_path="../../conf", config_name="export_huggingface")
def main(cfg: DictConfig) -> None:
    """Export."""
    with command(cfg):
        from nemo_ee.export.huggingface.exporter import HuggingFaceSettings, export_huggingface

        export_huggingface(HuggingFaceSettings.from_config(cfg))
        show(f"exported: {cfg.output}")


if __name__ == "__main__":
    main()
