# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What every test gets: marks that skip with a reason, a clean environment and thread count before and after.

Nothing heavy is imported here; torch is looked at only where a test has loaded it already.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest

# Set before anything imports torch: two threads per test process, no network, no windows.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
if "HF_MODULES_CACHE" not in os.environ:  # where transformers puts code of exported directories: not into the home
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="nemo_ee_modules_")
    atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

# nemo_ee.cpu_host sets these once per process, so a test that switched it on does not lose them again.
CPU_HOST_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "NVIDIA_PYTORCH_VERSION", "CUDA_DEVICE_MAX_CONNECTIONS", "TORCHDYNAMO_DISABLE"
)  # fmt: skip
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow too")


def _browser_missing() -> str | None:
    if any(shutil.which(name) for name in CHROMIUM):
        return None
    return f"browser: none of {', '.join(CHROMIUM)} is installed"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine or this run has no place for, and say why."""
    slow = None if config.getoption("--run-slow") else "slow: takes minutes; run it with --run-slow"
    for mark, missing in (("browser", _browser_missing), ("slow", lambda: slow)):
        marked = [item for item in items if item.get_closest_marker(mark)]
        reason = missing() if marked else None
        for item in marked if reason else ():
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _restore_process_state() -> Iterator[None]:
    """Environment, working directory and thread count after a test are what they were before it."""
    environment = dict(os.environ)
    directory = os.getcwd()
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else None
    yield
    os.chdir(directory)
    cpu_host = sys.modules.get("nemo_ee.cpu_host")
    if cpu_host and cpu_host.enabled():
        environment |= {name: os.environ[name] for name in CPU_HOST_VARIABLES if name in os.environ}
    if dict(os.environ) != environment:
        os.environ.clear()
        os.environ.update(environment)
    if threads and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def _destroy_process_groups() -> Iterator[None]:
    """Take down Megatron's and torch.distributed's groups that a test module left behind.

    Per module, not per test: a module's own fixtures may hold groups for all of its tests.
    """
    yield
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state and parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
