# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The Megatron-Bridge host: backbones by `AutoBridge`, exits, training step and checkpoint keys by `nemo_ee.megatron`.

It needs megatron-bridge 0.6 and Megatron-core 0.19. It does not import NeMo or `nemo_ee.models`.
"""

from importlib.metadata import PackageNotFoundError, version

_NEEDED = {"megatron-bridge": "0.6", "megatron-core": "0.19"}


def _refuse_other_versions() -> None:
    problems = []
    for name, wanted in _NEEDED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "none"
        if found.split(".")[:2] != wanted.split("."):
            problems.append(f"{name} {wanted} is needed, found {found}")
    if problems:
        raise ImportError(f"nemo_ee.bridge: {'; '.join(problems)}: pip install 'nemo_ee[bridge]', or tune on NeMo 2.4")


_refuse_other_versions()
