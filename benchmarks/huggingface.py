# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Decoding speed of an exported directory: the runtime beside transformers' `generate`, and exits as its draft models.

    python benchmarks/huggingface.py export --json huggingface.json

`export` is the output of scripts/export/export_huggingface.py. Greedy, batch one, one thread, prompts from the first
tokens of held-out files. `runtime_over_generate`: tokens per second of the engine over nemo_ee.runtime at full depth
by those of `generate` on hf_full; `loop_over_generate`: the same without the engine, a bare loop over the runtime.
Per exit, `assisted.<exit>`: `generate(assistant_model=hf_exit_<name>)` by plain `generate`, and the tokens of a pass
of the full model. Times are CPU seconds, not wall-clock seconds, so that other processes count less; the sides take
turns. Tokens are compared too: a faster side must give the same tokens.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.measure import median_of_ratios, provenance  # noqa: E402

HELD_OUT = ROOT / "assets" / "reference-model" / "corpus" / "heldout.jsonl.gz"


def read_prompts(tokenizer, count: int, length: int) -> list[list[int]]:
    """The first `length` tokens of the first `count` held-out files that are long enough."""
    prompts = []
    with gzip.open(HELD_OUT, "rt", encoding="utf-8") as lines:
        for line in lines:
            tokens = tokenizer(json.loads(line)["text"][: 20 * length])["input_ids"]
            if len(tokens) >= length and len(prompts) < count:
                prompts.append(tokens[:length])
    return prompts


class Sides:
    """The ways to decode one prompt; each returns the new tokens."""

    def __init__(self, export: Path, dtype: str, new_tokens: int) -> None:
        from transformers import AutoModelForCausalLM

        from nemo_ee.generation.engine import EarlyExitEngine
        from nemo_ee.runtime.loader import load_model

        kind = getattr(torch, dtype)
        load = AutoModelForCausalLM.from_pretrained
        self.new_tokens = new_tokens
        self.full = load(export / "hf_full", torch_dtype=kind).eval()
        self.drafts = {
            folder.name.removeprefix("hf_exit_"): load(folder, torch_dtype=kind).eval()
            for folder in sorted(export.glob("hf_exit_*"))
        }
        self.runtime = load_model(export / "hf_early_exit", dtype=dtype)
        self.engine = EarlyExitEngine(self.runtime)
        self.passes = 0
        self.full.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.passes += 1

    def by_engine(self, prompt: list[int]) -> list[int]:
        """The engine over the runtime, every token at full depth."""
        return list(self.engine.generate([prompt], max_new_tokens=self.new_tokens, mode="full").tokens[0])

    @torch.inference_mode()
    def by_loop(self, prompt: list[int]) -> list[int]:
        """The runtime without the engine."""
        from nemo_ee.generation.decoding_model import TokenPositions

        model, end, tokens = self.runtime, 2 * self.runtime.num_layers, []
        cache = model.new_cache(1, len(prompt) + self.new_tokens, ())
        inputs, start = prompt, 0
        while len(tokens) < self.new_tokens:
            positions = TokenPositions.of({0: range(start, start + len(inputs))})
            hidden = model.run(model.embed(torch.tensor(inputs), positions), positions, 0, end, cache)
            tokens.append(int(model.exit_logits(None, hidden[-1:], positions, cache).argmax()))
            inputs, start = tokens[-1:], start + len(inputs)
        return tokens

    def by_generate(self, prompt: list[int], draft=None) -> list[int]:
        """transformers' own loop on hf_full, with a draft model or without."""
        return generate(self.full, prompt, self.new_tokens, **({} if draft is None else {"assistant_model": draft}))


@torch.inference_mode()
def generate(model, prompt: list[int], new_tokens: int, **settings) -> list[int]:
    """transformers' own greedy loop; no token ends it. `settings`: of its `generate`."""
    tokens = torch.tensor([prompt])
    output = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new_tokens, do_sample=False,
        eos_token_id=None, pad_token_id=0, **settings,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


def measure(
    sides: Mapping[str, Callable[[Any], Any]], prompts: Sequence[Any]
) -> tuple[dict[str, list[float]], dict[str, list[Any]]]:
    """CPU seconds and results of every side for every prompt; the sides take turns, one round before is not kept."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    tokens: dict[str, list[Any]] = {name: [] for name in sides}
    for turn, prompt in enumerate([prompts[0], *prompts]):
        for name, decode in sides.items():
            start = time.process_time()
            found = decode(prompt)
            if turn:
                seconds[name].append(time.process_time() - start)
                tokens[name].append(found)
    return seconds, tokens


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of the prompts with the very same tokens."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="output of scripts/export/export_huggingface.py")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="new tokens on both sides")
    parser.add_argument("--prompts", type=int, default=8, help="number of held-out files")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--draft-tokens", type=int, default=4, help="drafted before each pass of the full model")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    from nemo_ee.runtime.loader import load_tokenizer

    prompts = read_prompts(load_tokenizer(options.export / "hf_full"), options.prompts, options.prompt_tokens)
    sides = Sides(options.export, options.dtype, options.new_tokens)
    found: dict[str, str | int | float] = provenance()
    found |= {name: value for name, value in vars(options).items() if isinstance(value, int | str)}
    rate = options.new_tokens

    seconds, tokens = measure(
        {"engine": sides.by_engine, "loop": sides.by_loop, "generate": sides.by_generate}, prompts
    )
    for name, side in (("runtime_over_generate", "engine"), ("loop_over_generate", "loop")):
        found[name] = median_of_ratios(seconds["generate"], seconds[side])
        found[f"{name}.same_tokens"] = agreement(tokens[side], tokens["generate"])
    found |= {f"{side}.tokens_per_cpu_s": rate / statistics.median(own) for side, own in seconds.items()}
    for name, draft in sides.drafts.items():
        draft.generation_config.num_assistant_tokens = options.draft_tokens
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0
        plain_passes = sides.passes
        seconds, tokens = measure(
            {"generate": sides.by_generate, "assisted": lambda p, d=draft: sides.by_generate(p, d)}, prompts
        )
        # Plain decoding takes one pass for a token.
        passes = sides.passes - plain_passes - rate * (len(prompts) + 1)
        found[f"assisted.{name}"] = median_of_ratios(seconds["generate"], seconds["assisted"])
        found[f"assisted.{name}.tokens_per_pass"] = rate * (len(prompts) + 1) / passes
        found[f"assisted.{name}.same_tokens"] = agreement(tokens["assisted"], tokens["generate"])
    for name, value in found.items():
        print(f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
