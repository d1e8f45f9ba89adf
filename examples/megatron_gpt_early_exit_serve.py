# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Serve an exported early-exit model over HTTP. See conf/megatron_gpt_early_exit_serve.yaml and docs/server.md.

python examples/megatron_gpt_early_exit_serve.py model=export/hf_early_exit

Needs neither a GPU nor NeMo.
"""

import hydra
from omegaconf import DictConfig

from nemo_ee.commands.command import command, refuse_renamed_overrides


@hydra.main(version_base="1.3", config_path="../conf", config_name="megatron_gpt_early_exit_serve")
def main(cfg: DictConfig) -> None:
    """Check, load, serve."""
    with command(cfg):
        try:
            import fastapi  # noqa: F401
            import prometheus_client  # noqa: F401
            import uvicorn  # noqa: F401
        except ImportError as missing:
            raise ValueError(f"{missing.name} is not installed; run pip install -e '.[serving]'") from missing
        from nemo_ee.serving.settings import ServerSettings

        settings = ServerSettings.from_config(cfg)
        from nemo_ee.serving.serve import serve

        serve(settings)


if __name__ == "__main__":
    refuse_renamed_overrides()
    main()
