# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Write a `.nemo` as GGUF files for llama.cpp. See conf/export_gguf.yaml.

python scripts/export/export_gguf.py checkpoint=tuned.nemo output=gguf

Needs neither a GPU, nor NeMo, nor llama.cpp.
"""

import hydra
from omegaconf import DictConfig

from nemo_ee.commands.command import command
from nemo_ee.commands.console import show


@hydra.main(version_base="1.3", config_path="../../conf", config_name="export_gguf")
def main(cfg: DictConfig) -> None:
    """Export."""
    with command(cfg):
        from nemo_ee.export.gguf.gguf_exporter import GgufSettings, export_gguf

        export_gguf(GgufSettings.from_config(cfg))
        show(f"exported: {cfg.output}")


if __name__ == "__main__":
    main()
