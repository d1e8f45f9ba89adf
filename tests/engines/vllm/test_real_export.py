# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The export of the byte-level reference model, whose exits are tuned: exits in vLLM, and exits as draft models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.runtime.loader import load_model, load_tokenizer
from nemo_ee.runtime.propagation import generate_propagating
from tests.engines.vllm.engine import generate, model_of, served

EXPORT = Path(os.environ["NEMO_EE_STACK"]) / "bytes" / "export"  # of benchmarks.decoding_inputs.make_models
TEXTS = (
    "def add(a, b):\n    return",
    "import os\n\n\nclass Stack:\n    def __init__(self",
    "for x in range(10):\n    print(",
)
NEW_TOKENS = 48
EXITS = ("layer2-mlp", "layer4-mlp", "layer6-mlp", "layer8-mlp")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(EXPORT / "hf_full")
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def metric(llm: Any, name: str) -> Any:
    (found,) = [one for one in llm.get_metrics() if one.name == name]
    return getattr(found, "values", None) or found.value


def test_exits(prompts: list[list[int]]) -> None:
    policy = ExitPolicy(0.6, active=EXITS)
    expected = generate_propagating(
        load_model(EXPORT / "hf_early_exit", dtype="float32"), prompts, max_new_tokens=[NEW_TOKENS] * 3,
        policy=policy, row_by_row=True,
    )  # fmt: skip
    settings = {"thresholds": 0.6, "active": list(EXITS), "only_if_faster": False}
    with served(EXPORT / "hf_early_exit", settings, enable_prefix_caching=True) as llm:
        assert generate(llm, prompts, [NEW_TOKENS] * 3, [None] * 3) == [list(own) for own in expected.tokens]
        assert model_of(llm).counts.by_exit(0)["layer2-mlp"] > NEW_TOKENS, "control: most bytes leave early"
        assert not llm.llm_engine.vllm_config.cache_config.enable_prefix_caching


def test_prompts_given_as_embeddings(prompts: list[list[int]]) -> None:
    """`--enable-prompt-embeds`: the same tokens as from the ids, and the control: other embeddings, other tokens."""
    from vllm import SamplingParams

    settings = {"thresholds": 0.6, "active": list(EXITS), "only_if_faster": False}
    with served(EXPORT / "hf_early_exit", settings, enable_prompt_embeds=True) as llm:
        expected = generate(llm, prompts, [NEW_TOKENS] * 3, [None] * 3)
        left = [model_of(llm).counts.by_exit(0)["layer2-mlp"]]
        words = load_model(EXPORT / "hf_full", dtype="float32").weights.embedding.float()
        parameters = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        found = []
        for rows in (words, words.roll(1, 0)):
            embedded = [{"prompt_embeds": rows[prompt].clone()} for prompt in prompts]
            outputs = llm.generate(embedded, parameters, use_tqdm=False)
            found.append([list(own.outputs[0].token_ids) for own in outputs])
            left.append(model_of(llm).counts.by_exit(0)["layer2-mlp"])
    assert found[0] == expected != found[1]
    assert left[1] == 2 * left[0] > 2 * NEW_TOKENS, "the same bytes leave early"


def test_bf16_agrees_mostly(prompts: list[list[int]]) -> None:
    """No equality in half precision: the share of tokens before the first other one."""
    settings = {"thresholds": 0.6, "active": list(EXITS), "only_if_faster": False}
    found = {}
    for dtype in ("float32", "bfloat16"):
        with served(EXPORT / "hf_early_exit", settings, dtype=dtype) as llm:
            found[dtype] = generate(llm, prompts, [NEW_TOKENS] * 3, [None] * 3)
    pairs = zip(found["float32"], found["bfloat16"], strict=True)
    agreed = [next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), NEW_TOKENS) for pair in pairs]
    assert sum(agreed) > NEW_TOKENS, agreed


@pytest.mark.parametrize("draft", ["layer2-norm", "layer4-mlp"])
def test_an_exit_as_draft_model(draft: str, prompts: list[list[int]]) -> None:
    expected = EarlyExitEngine(load_model(EXPORT / "hf_full", dtype="float32")).generate(
        prompts, max_new_tokens=NEW_TOKENS, mode="full"
    )
    speculative = {"method": "draft_model", "model": str(EXPORT / f"hf_exit_{draft}"), "num_speculative_tokens": 3}
    arguments = {"speculative_config": speculative, "disable_log_stats": False}
    with served(EXPORT / "hf_full", **arguments) as llm:
        assert generate(llm, prompts, [NEW_TOKENS] * 3, [None] * 3) == [list(own) for own in expected.tokens]
        drafted = metric(llm, "vllm:spec_decode_num_drafts")
        accepted = metric(llm, "vllm:spec_decode_num_accepted_tokens_per_pos")
    assert len(accepted) == 3 and drafted > accepted[0] > accepted[2] > 0
