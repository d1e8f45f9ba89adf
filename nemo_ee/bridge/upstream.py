# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What this package uses of Megatron-Bridge, once its version is known to be a supported one.

Raises:
    ImportError: megatron-bridge or Megatron-core is missing, or of another version.
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

from megatron.bridge import AutoBridge  # noqa: E402
from megatron.bridge.models.gpt_provider import GPTModelProvider  # noqa: E402
from megatron.bridge.utils.vocab_utils import calculate_padded_vocab_size  # noqa: E402

__all__ = ["AutoBridge", "GPTModelProvider", "calculate_padded_vocab_size"]
