# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""GGUF exports in llama.cpp's own server: greedy tokens, exits as draft models, tokens of texts.

The references are transformers' models and tokenizers of the Hugging Face export of the same `.nemo`, in fp32. Tokens
are equal up to the first position where the reference's two largest logits are nearer than `NEAR`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nemo")
pytest.importorskip("gguf")

from tests.helpers.megatron_models import exit_entry

import torch  # isort: skip  # after the CPU host is on

from nemo_ee.export.gguf.gguf_exporter import GgufSettings, export_gguf
from nemo_ee.text.tokenizer_json import JsonTokenizer
from tests.engines.llamacpp.server import EXACT, EXACT_DRAFT, serving
from tests.functional.test_export_huggingface import Made, export, stock
from tests.helpers.huggingface_models import TINY_MODELS
from tests.helpers.nemo_files import rewritten
from tests.stack.small_tokenizers import TEXTS, save_tokenizer

EXITS = [exit_entry(1, "mlp", "random"), exit_entry(2, "norm", "copy", "low_rank", rank=3), exit_entry(2, "layer")]
VOCABULARY = 432
# A model of each kind of tensors and rotary positions that llama.cpp has, each with a kind of tokenizer.
MODELS = {
    "llama": "llama3", "llama-tied": "gpt2", "llama-bias": "llama2", "llama-linear": "llama2",
    "llama-llama3": "llama3", "mistral": "llama2", "qwen2": "qwen", "qwen3": "qwen", "gpt2": "gpt2",
}  # fmt: skip
PROMPTS = [[5, 71, 13, 9, 0, 44], [3], [100, 99, 98, 97, 96, 95, 94, 93]]
NEW_TOKENS = 16
NEAR = 1e-4
ENDS = ("<|endoftext|>", "</s>", "<|end|>")  # the tokens that end a text in llama.cpp, some of them by their names


@dataclass
class Exported:
    """One `.nemo` as GGUF files and as Hugging Face directories."""

    gguf: Path
    huggingface: Path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name -> `Exported`, each made once."""
    kept: dict[str, Exported] = {}

    def of(name: str) -> Exported:
        if name not in kept:
            folder = tmp_path_factory.mktemp(name)
            made = Made(folder / "made", name, EXITS, vocab_size=VOCABULARY)
            save_tokenizer(folder / "tokenizer", MODELS[name])
            files = {
                path.name: path.read_bytes() for path in (folder / "tokenizer").glob("*") if path.name != "config.json"
            }
            path = folder / "ee.nemo"
            rewritten(made.path, path, {f"tokenizer/{name}": content for name, content in files.items()})
            settings = {"checkpoint": path, "output": folder / "gguf", "dtype": "float32", "progress": False}
            export(path, folder / "hf", targets=("full", "exits"))
            kept[name] = Exported(export_gguf(GgufSettings.from_config(settings)), folder / "hf")
        return kept[name]

    return of


@torch.no_grad()
def expected_tokens(folder: Path, prompt: list[int]) -> list[int]:
    """Greedy tokens without those that end a text, up to the first that is not clear."""
    model, tokenizer = stock(folder), JsonTokenizer(folder)
    ids = {token: tokenizer(token, add_special_tokens=False)["input_ids"] for token in ENDS}
    named = model.generation_config.eos_token_id
    ends = [own[0] for own in ids.values() if len(own) == 1] + (named if isinstance(named, list) else [named])
    tokens: list[int] = []
    while len(tokens) < NEW_TOKENS:
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1]
        logits[ends] = -torch.inf
        first, second = logits.topk(2).values.tolist()
        if first - second < NEAR:
            break
        tokens.append(int(logits.argmax()))
    return tokens


def names_of(export: Exported) -> list[str]:
    return sorted(path.stem for path in export.gguf.glob("*.gguf"))


def test_every_family_of_llama_cpp_is_tested() -> None:
    from nemo_ee.families.registry import FAMILIES

    assert {TINY_MODELS[name][0] for name in MODELS} == {
        name for name, own in FAMILIES.items() if own.gguf is not None
    }


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_transformers(name: str, exported: Any) -> None:
    one, compared = exported(name), 0
    assert names_of(one) == sorted([*(f"exit_{exit['name']}" for exit in EXITS), "full"])
    answers = {}
    for stem in names_of(one):
        with serving(one.gguf / f"{stem}.gguf", *EXACT) as server:
            for prompt in PROMPTS:
                found = server.greedy(prompt, NEW_TOKENS)["tokens"]
                wanted = expected_tokens(one.huggingface / f"hf_{stem}", prompt)
                assert found[: len(wanted)] == wanted, (stem, prompt)
                compared += len(wanted)
                answers.setdefault(tuple(prompt), set()).add(tuple(found))
    assert compared >= 0.9 * NEW_TOKENS * len(PROMPTS) * len(names_of(one))
    assert all(len(different) > 1 for different in answers.values()), "control: exits give other tokens"


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "qwen3"])
def test_an_exit_as_draft_model_changes_no_token(name: str, exported: Any) -> None:
    one = exported(name)
    with serving(one.gguf / "full.gguf", *EXACT) as server:
        wanted = [server.greedy(prompt, NEW_TOKENS)["tokens"] for prompt in PROMPTS]
    accepted = {}
    for stem in names_of(one):
        draft = ("--model-draft", str(one.gguf / f"{stem}.gguf"), "--spec-type", "draft-simple", *EXACT_DRAFT)
        with serving(one.gguf / "full.gguf", *EXACT, *draft) as server:
            answers = [server.greedy(prompt, NEW_TOKENS) for prompt in PROMPTS]
        assert [answer["tokens"] for answer in answers] == wanted, stem
        drafted, kept = (sum(a["timings"][key] for a in answers) for key in ("draft_n", "draft_n_accepted"))
        assert drafted > 0, stem
        accepted[stem] = kept / drafted
    assert accepted["full"] > 0.5, "control: the model itself as its draft"
    assert max(value for stem, value in accepted.items() if stem != "full") > 0, accepted


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-bias", "qwen3"])
def test_tokens_and_texts_are_those_of_the_tokenizer(name: str, exported: Any) -> None:
    one = exported(name)
    tokenizer = JsonTokenizer(one.huggingface / "hf_full")
    with serving(one.gguf / "full.gguf") as server:
        for text in TEXTS:
            for special in (True, False):
                ids = tokenizer(text, add_special_tokens=special)["input_ids"]
                assert server.tokens(text, special=special) == ids, text
        text = "def f(x):\n    return x + 1\n"
        space = " " if MODELS[name] == "llama2" else ""  # the server keeps the one that SentencePiece puts in front
        assert server.text(tokenizer(text, add_special_tokens=False)["input_ids"]) == space + text
