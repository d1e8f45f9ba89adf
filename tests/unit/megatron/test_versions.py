# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""An unsupported version of Megatron-core is refused in one line, before anything of it is imported."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from nemo_ee.megatron import versions


@pytest.mark.parametrize("found", ["0.13.0", "0.13.0rc4", "0.13.1", "0.16.1", "0.19.2", "0.19.0+abc"])
def test_supported(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda name: found)
    versions.refuse_unsupported_version()


@pytest.mark.parametrize("found", ["0.12.3", "0.20.0", "1.0", "main"])
def test_unsupported(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda name: found)
    with pytest.raises(ImportError) as refused:
        versions.refuse_unsupported_version()
    assert str(refused.value) == (
        f"megatron-core {found} is not supported, 0.13 to 0.19 are: pip install 'megatron-core~=0.13.0' (with "
        "NeMo) or 'megatron-core~=0.19.0' (without)"
    )


def test_a_checkout_without_a_package_is_left_to_its_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", missing)
    versions.refuse_unsupported_version()


@pytest.mark.parametrize("first", ["nemo_ee.megatron.model.exit_head", "nemo_ee.checkpoint.module_weights"])
def test_the_first_import_refuses(first: str) -> None:
    program = (
        "import importlib.metadata as metadata, sys\n"
        "metadata.version = lambda name: '0.12.3'\n"
        f"try:\n    import {first}\n"
        "except ImportError as error:\n    print(error, 'megatron.core' in sys.modules)"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, timeout=120)
    assert done.stdout.startswith("megatron-core 0.12.3 is not supported") and done.stdout.endswith("False\n"), done
