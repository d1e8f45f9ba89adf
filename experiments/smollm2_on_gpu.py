# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Exits of SmolLM2 tuned on one GPU in minutes, on a hundred times the tokens of experiments/smollm2.yaml.

    python experiments/smollm2_on_gpu.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --documents data/documents \
        --held-out data/documents-heldout --output outputs/smollm2-on-gpu

    GGUF file -> its own conversations (transformers, Magpie) -\
    documents, tokenised by scripts/data/preprocess_text.py ----> exits tuned on each, equal tokens -> numbers, exits

Plain Megatron-core, one rank, bf16; no NeMo, no network. Every token counts. The minutes are shared out: a third for
writing conversations, the rest for the two runs; the number of steps follows from the speed of the first ones.
Besides what scripts/gpu_check.py needs: gguf, accelerate, omegaconf and hydra.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "data")]

from benchmarks.measure import provenance  # noqa: E402
from experiments.run import exits_of, table  # noqa: E402

EXITS = [
    {"name": "layer{layer}-{architecture}", "layer": [5, 10, 15, 20, 25], "architecture": ["norm", "mlp", "layer"],
     "output": "shared"},
    {"name": "layer{layer}-low", "layer": [15, 20, 25], "architecture": "mlp", "output": "low_rank", "rank": 64},
    {"name": "layer25-own", "layer": 25, "architecture": "mlp", "output": "own"},
]  # fmt: skip
SAVED = ("layer15-mlp", "layer20-mlp", "layer25-mlp", "layer20-low", "layer25-low", "layer20-layer", "layer25-layer")
OPTIM = {"name": "adamw", "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.01}
LENGTH, BATCH, HELD_OUT_WINDOWS = 512, 32, 64  # tokens of a window; windows of a step and of an evaluation
TEACHER_TOKENS = 64
WARM_UP_STEPS = 2  # not in the time of a step
SHARE_OF_WRITING, TRIAL_STEPS, MOST_STEPS, LEARNING_RATE_FLOOR = 0.33, 5, 4000, 5e-5
CHATS = {
    "conversations": 20000, "held_out_share": 0.05, "min_question_characters": 8, "max_question_tokens": 64,
    "max_answer_tokens": 256, "question_temperature": 1.0, "answer_temperature": 0.7, "top_k": 50, "batch_size": 1024,
    "seed": 1234, "threads": 1, "overwrite": False,
}  # fmt: skip


class Text:
    """Tokens on the device, cut into windows.

    Args:
        tokens: all of it.
        length: tokens that a window predicts.
        device: where it goes.
    """

    def __init__(self, tokens: np.ndarray, length: int, device: str) -> None:
        self.tokens, self.length = torch.from_numpy(tokens.astype(np.int64)).to(device), length
        self.windows = (len(tokens) - 1) // length
        if self.windows < 1:
            raise ValueError(f"a text of {len(tokens)} tokens has no window of {length} + 1; give more text")

    def batch(self, windows: Tensor) -> Any:
        """A `MicroBatch` of these windows."""
        from nemo_ee.megatron.model.microbatch import MicroBatch

        offsets = torch.arange(self.length + 1, device=self.tokens.device)
        rows = self.tokens[windows.to(self.tokens.device)[:, None] * self.length + offsets]
        ones = torch.ones(len(rows), self.length, device=rows.device)
        return MicroBatch(rows[:, :-1], rows[:, 1:], ones, offsets[:-1].expand(len(rows), -1))

    def shuffled(self, size: int, seed: int = 1234) -> Iterator[Any]:
        """Batches without end, every epoch in another order."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(self.windows, generator=generator)
            yield from (self.batch(part) for part in order.split(size) if len(part) == min(size, self.windows))

    def spread(self, count: int, size: int) -> list[list[Any]]:
        """Batches of windows from all over the text."""
        kept = torch.arange(min(count, self.windows)) * self.windows // min(count, self.windows)
        return [[self.batch(part)] for part in kept.split(size)]


def dtype_on(device: str) -> torch.dtype:
    """bf16, which most CPUs have no instructions for."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def write_chats(gguf: Path, folder: Path, output: Path, device: str, seconds: float, **changed: Any) -> None:
    """Let the model write conversations for some seconds, see scripts/data/collect_own_chats.py."""
    from collect_own_chats import ChatWriter, OwnChatSettings
    from transformers import AutoModelForCausalLM

    from nemo_ee.runtime.loader import load_tokenizer

    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    model = model.to(device, dtype_on(device)).eval()

    def generate(prompts, *, most, temperature, top_k, seeds, stops):
        torch.manual_seed(seeds[0])
        longest = max(map(len, prompts))
        padded = torch.tensor([[min(stops)] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        drawn = model.generate(
            input_ids=padded.to(device), attention_mask=mask.to(device), max_new_tokens=most, do_sample=True,
            temperature=temperature, top_k=top_k, eos_token_id=sorted(stops), pad_token_id=min(stops),
        )  # fmt: skip
        for tokens in drawn[:, longest:].tolist():
            ends = [index for index, token in enumerate(tokens) if token in stops]
            yield tokens[: ends[0] + 1] if ends else tokens

    settings = OwnChatSettings.from_config({**CHATS, **changed, "model": str(folder), "output": str(output)})
    writer = ChatWriter(settings, tokenizer, generate, max_positions=model.config.max_position_embeddings)
    partial, end = output.with_name(f"{output.name}.partial"), time.monotonic() + seconds
    with gzip.open(partial, "wt", encoding="utf-8") as file:
        for chat in writer.chats():
            file.write(json.dumps(chat, ensure_ascii=False) + "\n")
            if time.monotonic() > end:
                break
    partial.rename(output)


def chat_tokens(path: Path, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the conversations to train on and of every 20th, which is held out."""
    from nemo_ee.runtime.loader import load_tokenizer

    tokenizer = load_tokenizer(folder)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        texts = [tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False) for line in file]
    each = tokenizer(texts, add_special_tokens=False)["input_ids"]
    train = [token for index, ids in enumerate(each) if index % 20 for token in ids]
    return np.array(train), np.array([token for ids in each[::20] for token in ids])


def document_tokens(prefix: Path, vocab_size: int, length: int) -> np.ndarray:
    """The documents of a .bin/.idx pair, one after the other; `TokenWindows` refuses what cannot be read."""
    from nemo_ee.data.token_files import open_data
    from nemo_ee.data.token_windows import TokenWindows

    TokenWindows(str(prefix), seq_length=length, vocab_size=vocab_size)
    data = open_data(str(prefix))
    return np.concatenate([data.get(index) for index in range(len(data))])


class Tuning:
    """A stage with exits, and its numbers.

    Args:
        source: the backbone.
        exits: entries of the `early_exit` block.
        device: cuda or cpu.
    """

    def __init__(self, source: Any, exits: Sequence[dict[str, Any]], device: str) -> None:
        from nemo_ee.checkpoint.megatron_model import load_stage, stage_of
        from nemo_ee.exits.config import EarlyExitConfig
        from nemo_ee.exits.placement import place_exits

        num_layers = source.backbone.num_layers
        block = {"exits": list(exits), "objective": "distillation", "distillation": {"top_k": TEACHER_TOKENS}}
        self.early_exit = EarlyExitConfig.from_mapping(block, num_layers=num_layers)
        self.stages = place_exits(self.early_exit.exits, num_layers=num_layers, num_stages=1, full_depth=True)
        settings = {"params_dtype": dtype_on(device), "bf16": device != "cpu"}
        settings |= {"use_cpu_initialization": True} if device == "cpu" else {}
        self.model = stage_of(source.backbone, self.early_exit, self.stages, **settings).to(device)
        load_stage(self.model, source, None, early_exit=self.early_exit, seed=1234)

    def run(self, text: Text, size: int, num_steps: int) -> tuple[float, dict[str, float]]:
        """Tune, once: a second tuner of this model would take its gradients over.

        Returns:
            Seconds of a step after the first ones, and the last losses by exit.
        """
        from nemo_ee.megatron.pipeline.exit_tuner import ExitTuner

        sched = {"name": "CosineAnnealing", "warmup_steps": num_steps // 20, "min_lr": LEARNING_RATE_FLOOR}
        run = {"optim": {**OPTIM, "sched": sched}, "num_steps": num_steps, "max_norm": 1.0}
        tuner = ExitTuner(self.model, self.early_exit, self.stages, **run)
        batches, start, losses = text.shuffled(size), time.monotonic(), {}
        for step in range(num_steps):
            if step == WARM_UP_STEPS:
                start = time.monotonic()
            losses = tuner.tune([next(batches)], log=step + 1 == num_steps)
        tuner.context.drain()
        seconds = (time.monotonic() - start) / max(1, num_steps - WARM_UP_STEPS)
        return seconds, {name: row["loss"] for name, row in losses.items()}

    def evaluate(self, text: Text, windows: int, size: int) -> dict[str, dict[str, float]]:
        """Loss and agreement by exit, and the full model's loss."""
        from nemo_ee.exits.objective import Objective
        from nemo_ee.megatron.loss.exit_metrics import ExitSums
        from nemo_ee.megatron.pipeline.stage_context import StageContext
        from nemo_ee.megatron.pipeline.stage_forward import hidden_state_transport
        from nemo_ee.megatron.pipeline.tuning_step import evaluate_global_batch

        names = self.early_exit.names
        objectives = {name: Objective.of(self.early_exit, name) for name in names}
        context = StageContext(self.model, hidden_state_transport(), objectives)
        sums = ExitSums(names, context.device)
        for batches in text.spread(windows, size):
            evaluate_global_batch(context, batches, sums=sums, agreement=True)
        return sums.reduce()

    def keep(self, source: Any, names: Sequence[str], output: Path, device: str) -> None:
        """Write some of the exits as an exits-only `.nemo`."""
        from nemo_ee.checkpoint.exits_file import save

        entries = [entry for entry in exits_of(EXITS) if entry["name"] in names]
        kept = Tuning(source, entries, device)
        for head in kept.model.exits:
            head.load_state_dict(self.model.exits[head.exit.name].state_dict())
        save(kept.model, kept.early_exit, output, source)


def rows_of(run: str, text: str, before: dict, after: dict, parameters: dict[str, int]) -> Iterator[dict[str, Any]]:
    """A row for every exit, as experiments/run.py has them."""
    for entry in exits_of(EXITS):
        name = entry["name"]
        if name not in after:
            continue
        row = {"run": run, "text": text, **entry, "parameters": parameters[name]}
        for key in ("loss", "agreement"):
            row |= {f"{key}_before": round(before[name][key], 4), key: round(after[name][key], 4)}
        yield {**row, "full_loss": round(after["full_model"]["loss"], 4)}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True, help="SmolLM2-135M-Instruct, or another small chat model")
    parser.add_argument("--documents", type=Path, required=True, help="prefix of a .bin/.idx pair")
    parser.add_argument("--held-out", type=Path, required=True, help="prefix of a .bin/.idx pair")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for chats.jsonl.gz, exits.nemo, result.json"
    )
    parser.add_argument("--minutes", type=float, default=6.0, help="to share out")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="two steps, to try it")
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error(f"--minutes {options.minutes} must be greater than 0")
    with TemporaryDirectory(prefix="nemo_ee_smollm2_") as folder:
        try:
            run(options, Path(folder))
        except ValueError as problem:
            raise SystemExit(f"error: {problem}") from problem


def run(options: argparse.Namespace, folder: Path) -> None:
    """All steps; `result.json` is written after each run.

    Args:
        folder: an empty one, for config and tokenizer of the model.
    """
    device, start = options.device, time.monotonic()
    if device == "cpu":
        from nemo_ee import cpu_host

        cpu_host.enable()
    from benchmarks.gpu_groups import one_rank
    from nemo_ee.checkpoint.atomic import write_json
    from nemo_ee.checkpoint.gguf_source import GgufSource
    from nemo_ee.exits.config import EarlyExitConfig

    seconds = 60 * options.minutes
    length, size, windows = (16, 2, 2) if options.quick else (LENGTH, BATCH, HELD_OUT_WINDOWS)
    output = options.output
    chats, file = output / "chats.jsonl.gz", output / "result.json"
    source = GgufSource(options.gguf, dequantised=torch.bfloat16)
    vocab_size, num_layers = source.backbone.vocab_size, source.backbone.num_layers
    entries = list(exits_of(EXITS))
    if options.quick:
        entries = [entry for entry in entries if entry["layer"] <= num_layers]
    EarlyExitConfig.from_mapping({"exits": entries}, num_layers=num_layers)
    documents, held_out = (
        document_tokens(prefix, vocab_size, length) for prefix in (options.documents, options.held_out)
    )
    output.mkdir(parents=True, exist_ok=True)
    one_rank(device)
    source.write_model_files(folder)
    if not chats.exists():
        few = {"conversations": 25, "batch_size": 40, "max_answer_tokens": 4} if options.quick else {}
        write_chats(options.gguf, folder, chats, device, seconds * SHARE_OF_WRITING, **few)
    texts, held = {"documents": documents}, {"documents": held_out}
    texts["chats"], held["chats"] = chat_tokens(chats, folder)
    result: dict[str, Any] = {"title": "SmolLM2's exits on a GPU", "quick": options.quick, **provenance()}
    result |= {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "rows": []}
    result |= {f"{name}_tokens": len(tokens) for name, tokens in texts.items()}
    result["prepared_s"] = round(time.monotonic() - start, 1)
    print(f"{result['prepared_s']} s: {len(texts['chats'])} tokens of chats", flush=True)
    texts, held = ({name: Text(own[name], length, device) for name in own} for own in (texts, held))
    trial = Tuning(source, entries, device)
    parameters = {
        head.exit.name: sum(value.numel() for value in head.parameters() if value.requires_grad)
        for head in trial.model.exits
    }
    before = {name: trial.evaluate(text, windows, size) for name, text in held.items()}
    step_s, _ = trial.run(texts["chats"], size, WARM_UP_STEPS + TRIAL_STEPS)
    left = seconds - (time.monotonic() - start)
    num_steps = 2 if options.quick else max(20, min(MOST_STEPS, int(0.85 * left / 2 / step_s)))
    result |= {"steps": num_steps, "tokens": num_steps * size * length, "trial_step_s": step_s}
    print(f"{num_steps} steps of {size} x {length} tokens, {step_s:.3f} s each", flush=True)
    del trial
    kept = [own for own in SAVED if own in parameters] or list(parameters)
    for name in ("chats", "documents"):
        tuning = Tuning(source, entries, device)
        result[f"{name}_step_s"], result[f"{name}_last_losses"] = tuning.run(texts[name], size, num_steps)
        for text, own in held.items():
            after = tuning.evaluate(own, windows, size)
            result["rows"] += rows_of(name, text, before[text], after, parameters)
        tuning.keep(source, kept, output / f"{name}.nemo", device)
        result["seconds"] = round(time.monotonic() - start, 1)
        write_json(file, result)
        print(f"{result['seconds']} s: {name} done", flush=True)
        del tuning
    print(table(result["rows"]))


if __name__ == "__main__":
    main()
