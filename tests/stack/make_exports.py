# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes what tests/stack/transformers/ reads under every version: exports, and what the oldest version makes of them.

python tests/stack/make_exports.py FOLDER      with NeMo and transformers 4.51, from the repository's root

FOLDER/exports/models/<name>/       hf_full, hf_exit_*, hf_early_exit of a tiny random model; reference.json and
                                    reference.safetensors: logits, greedy tokens, tokens with early exit
FOLDER/exports/text/                an export with a tokenizer
FOLDER/exports/saved/               its hf_early_exit, loaded and saved by transformers
FOLDER/exports/tokenizers/<kind>/   a tokenizer as an export has it; reference.json: ids and texts
"""

# ruff: noqa: E402 -- imports after sys.path is set
from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[0] = str(ROOT)  # not this script's folder, in which `transformers` is another
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.helpers.megatron_models import exit_entry  # isort: skip -- switches the CPU host on

import torch
from safetensors.torch import save_file

from nemo_ee.exits.confidence import confidence
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.runtime.loader import load_model
from tests.functional.test_export_huggingface import Made, export, stock
from tests.helpers.huggingface_models import TINY_MODELS, divisible, reference_logits
from tests.stack.small_tokenizers import CHAT, KINDS, TEXTS, save_tokenizer

EXITS = [
    exit_entry(1, "norm", "copy", "low_rank", rank=3),
    exit_entry(1, "mlp", "copy", "shared"),
    exit_entry(2, "mlp", "random"),
    exit_entry(2, "embedding"),
    exit_entry(2, "layer", "copy"),
]
PROMPTS = [[5, 71, 13, 9, 0, 44], [3], [100, 99, 98, 97, 96, 95, 94, 93, 92, 91, 90], [7, 8]]
NEW_TOKENS = 18


def make_model(folder: Path, name: str) -> None:
    """Export a tiny model and write its reference."""
    with tempfile.TemporaryDirectory() as temporary:
        one = Made(Path(temporary), name, EXITS, **divisible(name))
        export(one.path, folder)
    full = stock(folder / "hf_full")
    logits = {"hf_full": reference_logits(full, one.tokens)}
    for directory in sorted(folder.glob("hf_exit_*")):
        logits[directory.name] = reference_logits(stock(directory), one.tokens)
    thresholds = {
        name: confidence(own, "max_probability").flatten().quantile(0.5).item() for name, own in one.exits.items()
    }
    runtime = EarlyExitEngine(load_model(folder / "hf_early_exit"))
    early = runtime.generate(PROMPTS, max_new_tokens=NEW_TOKENS, policy=ExitPolicy(thresholds))
    assert len({event.exit for event in early.events}) > 1, "control: some tokens leave"
    save_file(logits, folder / "reference.safetensors")
    values = {
        "tokens": one.tokens.tolist(),
        "prompts": PROMPTS,
        "greedy": [greedy(full, prompt) for prompt in PROMPTS],
        "thresholds": thresholds,
        "early_exit": [list(own) for own in early.tokens],
        "exits": [[event.exit for event in early.events_of(row)] for row in range(len(PROMPTS))],
    }
    (folder / "reference.json").write_text(json.dumps(values))


def greedy(model: Any, prompt: list[int]) -> list[int]:
    """New tokens of transformers' `generate`."""
    ids = torch.tensor([prompt])
    call = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW_TOKENS, "do_sample": False}
    return model.generate(ids, **call, eos_token_id=None, pad_token_id=1)[0, len(prompt) :].tolist()


def make_tokenizer(folder: Path, kind: str) -> None:
    """Export a tokenizer and write what the source's own class makes of the texts."""
    from transformers import AutoTokenizer

    from nemo_ee.export.tokenizer import write_tokenizer

    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "source"
        save_tokenizer(source, kind)
        shutil.copy(source / "config.json", folder)
        assert write_tokenizer(source, folder)
        tokenizer = AutoTokenizer.from_pretrained(source)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    values = {
        "ids": ids,
        "plain_ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS],
        "texts": [tokenizer.decode(own) for own in ids],
        "texts_without_special": [tokenizer.decode(own, skip_special_tokens=True) for own in ids],
        "chat": tokenizer.apply_chat_template(CHAT, tokenize=True, add_generation_prompt=True),
        "chat_text": tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True),
        "special": {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")},
    }
    (folder / "reference.json").write_text(json.dumps(values))


def main(folder: Path) -> None:
    """Write everything to `folder`/exports, which must not exist."""
    from transformers import AutoModelForCausalLM

    exports = folder / "exports"
    exports.mkdir(parents=True)
    for name in TINY_MODELS:
        make_model(exports / "models" / name, name)
    export(ROOT / "tests" / "data" / "earlier" / "complete.nemo", exports / "text")
    AutoModelForCausalLM.from_pretrained(exports / "text" / "hf_early_exit", trust_remote_code=True).save_pretrained(
        exports / "saved"
    )
    for kind in KINDS:
        make_tokenizer(exports / "tokenizers" / kind, kind)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
