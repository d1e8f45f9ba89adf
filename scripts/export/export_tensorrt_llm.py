# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Write a `.nemo` as TensorRT-LLM unified checkpoints. See conf/export_tensorrt_llm.yaml.

python scripts/export/export_tensorrt_llm.py checkpoint=tuned.nemo output=export tensor_parallel=2

Needs neither a GPU, nor NeMo, nor TensorRT-LLM.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from nemo_ee.commands.command import command, names
from nemo_ee.settings.files import EXPORT_TENSORRT_LLM


@hydra.main(version_base="1.3", config_path="../../conf", config_name="export_tensorrt_llm")
def main(cfg: DictConfig) -> None:
    """Export."""
    with command(cfg, EXPORT_TENSORRT_LLM):
        from nemo_ee.export.tensorrt_llm.unified_checkpoint import TensorRTLLMSettings, export_checkpoint

        export_checkpoint(
            TensorRTLLMSettings(
                checkpoint=Path(cfg.checkpoint),
                output=Path(cfg.output),
                backbone=None if cfg.backbone is None else Path(cfg.backbone),
                tensor_parallel=cfg.tensor_parallel,
                pipeline_parallel=cfg.pipeline_parallel,
                draft_tensor_parallel=cfg.draft_tensor_parallel,
                dtype=cfg.dtype,
                exits=names(cfg.exits),
                drafts=names(cfg.drafts),
                max_position_embeddings=cfg.max_position_embeddings,
                thresholds=OmegaConf.to_container(cfg).get("thresholds"),
                criterion=cfg.criterion,
                parity_gigabytes=cfg.parity_gigabytes,
                progress=cfg.progress,
            )
        )


if __name__ == "__main__":
    main()
