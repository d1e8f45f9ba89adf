# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Write a `.nemo` as TensorRT-LLM unified checkpoints. See conf/export_tensorrt_llm.yaml.

python scripts/export/export_tensorrt_llm.py checkpoint=tuned.nemo output=export tensor_parallel=2

Needs neither a GPU, nor NeMo, nor TensorRT-LLM.
"""

import hydra
from omegaconf import DictConfig

from nemo_ee.commands.command import command
from nemo_ee.commands.console import show


@hydra.main(version_base="1.3", config_path="../../conf", config_name="export_tensorrt_llm")
def main(cfg: DictConfig) -> None:
    """Export."""
    with command(cfg):
        from nemo_ee.export.tensorrt_llm.unified_checkpoint import TensorRTLLMSettings, export_checkpoint

        export_checkpoint(TensorRTLLMSettings.from_config(cfg))
        show(f"exported: {cfg.output}")


if __name__ == "__main__":
    main()
