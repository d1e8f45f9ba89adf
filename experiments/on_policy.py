# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""On-policy tuning against offline distillation at equal tokens, on one exit of SmolLM2-135M-Instruct.

    python scripts/data/collect_debian_texts.py output=data/english.jsonl.gz
    python experiments/on_policy.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --documents data/english.jsonl.gz \
        --output outputs/on-policy

    the model writes questions -> prompts, some held out
    documents:   offline distillation from the final exit
    own_answers: the same on answers that the full model sampled to these prompts
    on_policy:   examples/megatron_gpt_early_exit_on_policy.py on these prompts, KL first, reward in the last rounds
    imitation:   the same without the reward

All start from the same copied exit and have the same steps, learning rate and tokens (those that run in a step,
prompts included). Each is then measured on the held-out prompts by greedy self-speculation that drafts every token:
`accepted` drafts of a verification, of at most `--drafts`. The full model's own answers are the kind of text on which
is measured, documents are not: the ratio to `own_answers` says what the verdicts are worth, that to `documents` what
all of it is worth.

Plain Megatron-core, one rank, bf16, no NeMo. A step whose file is there is not repeated.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "data")]

from nemo_ee import cpu_host  # noqa: E402

TARGET = 1.15
ON_POLICY = {"on_policy": 0.8, "imitation": 1.0}  # share of the rounds without reward
OFFLINE = ("own_answers", "documents")
ENTRY = {"name": "layer25-low", "layer": 25, "architecture": "mlp", "output": "low_rank", "rank": 64}
RATIOS = (
    ("on_policy_over_offline_accepted", "on_policy", "documents"),
    ("on_policy_over_own_answers", "on_policy", "own_answers"),
    ("imitation_over_offline_accepted", "imitation", "documents"),
    ("imitation_over_own_answers", "imitation", "own_answers"),
)
WINDOWS = 4  # of a step on documents
QUESTIONS = {
    "held_out_share": 0.0, "min_question_characters": 8, "max_question_tokens": 64, "question_temperature": 1.0,
    "answer_temperature": 0.7, "top_k": 50, "seed": 1234, "threads": 1, "overwrite": False,
}  # fmt: skip


class Comparison:
    """All runs; see the module.

    Args:
        options: of the command line.
        folder: an empty one, for config and tokenizer of the model.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        from nemo_ee.checkpoint.gguf_source import GgufSource
        from nemo_ee.commands.on_policy import one_rank
        from nemo_ee.runtime.loader import load_tokenizer
        from nemo_ee.text.special_tokens import end_of_text_of

        self.options, self.folder, self.output = options, folder, options.output
        self.source = GgufSource(options.gguf, dequantised=torch.bfloat16)
        self.source.write_model_files(folder)
        self.tokenizer = load_tokenizer(folder)
        self.stops = end_of_text_of(folder, self.tokenizer.eos_token_id).ids
        self.entry = {**ENTRY, "layer": min(ENTRY["layer"], self.source.backbone.num_layers - 1)}
        self.prompts, self.start = self.output / "prompts.jsonl", self.output / "start.nemo"
        one_rank()

    def settings(self, seed: int = 1234, arm: str = "on_policy") -> Any:
        """The settings of an on-policy run: the yaml's, with the sizes of this comparison."""
        from omegaconf import OmegaConf

        from nemo_ee.commands.on_policy_settings import OnPolicySettings

        values = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "megatron_gpt_early_exit_on_policy.yaml"))
        own = self.options
        values = {key: value for key, value in values.items() if key not in ("defaults", "hydra")} | {
            "source": str(own.gguf),
            "gguf_dtype": "bfloat16",
            "exits": str(self.start),
            "prompts": str(self.prompts),
            "folder": str(self.output / f"{arm}-{seed}"),
            "output": str(self.output / f"{arm}-{seed}.nemo"),
            "imitation_share": ON_POLICY[arm],
            "rounds": own.rounds,
            "steps_per_round": own.steps,
            "tokens_per_step": own.tokens_per_step,
            "seed": seed,
        }
        values["answers"] |= {"prompts_per_round": own.answers, "max_new_tokens": own.new_tokens}
        values["answers"] |= {"num_draft_tokens": own.drafts}
        values["trainer"]["accelerator"] = own.device
        return OnPolicySettings.from_config(values)

    def stage(self, exits: Path | None) -> tuple:
        """A model with the exit of a file, or with a copied one."""
        from nemo_ee.checkpoint.exits_file import stored_exits
        from nemo_ee.commands.on_policy import build

        if exits is None:
            return build(self.source, [self.entry], None, self.seedless())
        with stored_exits(exits, self.source) as (block, weights):
            return build(self.source, block["exits"], weights, self.settings())

    def seedless(self) -> Any:
        """Settings before there are prompts and exits."""
        for path in (self.prompts, self.start):
            if not path.exists():
                path.touch()
        settings = self.settings()
        for path in (self.prompts, self.start):
            if not path.stat().st_size:
                path.unlink()
        return settings

    def write_start(self) -> None:
        """The copied exit as a file."""
        from nemo_ee.checkpoint.exits_file import save

        if not self.start.exists():
            model, early_exit, _ = self.stage(None)
            save(model, early_exit, self.start, self.source)

    def write_prompts(self) -> None:
        """Questions of the model (Magpie, see scripts/data/collect_own_chats.py) and its sampled answers; the last
        ones are held out."""
        from collect_own_chats import ChatWriter, OwnChatSettings, with_runtime

        from nemo_ee.megatron.decoding.decoding_adapter import MegatronDecodingModel

        own, held = self.options, self.output / "held-out.jsonl"
        if held.exists():
            return
        count = own.prompts + own.held_out
        settings = OwnChatSettings.from_config(
            QUESTIONS
            | {"model": str(self.folder), "output": str(self.output / "chats.jsonl"), "conversations": count}
            | {"max_answer_tokens": own.new_tokens, "batch_size": min(128, count)}
        )
        model = MegatronDecodingModel(self.stage(None)[0])
        writer = ChatWriter(settings, self.tokenizer, with_runtime(model), max_positions=model.max_positions)
        chats = []
        for chat in writer.chats():
            chats.append(json.dumps(chat, ensure_ascii=False) + "\n")
            print(f"{len(chats)} of {count} conversations", end="\r", file=sys.stderr)
        self.prompts.write_text("".join(chats[: own.prompts]), encoding="utf-8")
        held.write_text("".join(chats[own.prompts :]), encoding="utf-8")

    # -- runs ------------------------------------------------------------------------------------------------------

    def run(self, arm: str, seed: int, tokens: int) -> dict[str, Any]:
        """A row of the result.

        Args:
            tokens: of the run's steps, for the offline ones.
        """
        numbers = self.on_policy(arm, seed) if arm in ON_POLICY else self.offline(arm, seed, tokens)
        measured = self.evaluate(self.output / f"{arm}-{seed}.nemo")
        print(f"{arm}, seed {seed}: {measured['accepted']:.3f} accepted", flush=True)
        return {"arm": arm, "seed": seed, **numbers, **measured}

    def on_policy(self, arm: str, seed: int) -> dict[str, Any]:
        """The run of the script. Returns its numbers, round by round."""
        from nemo_ee.commands.on_policy import run

        settings = self.settings(seed, arm)
        if not settings.output.exists():
            for line in run(settings):
                print(f"  {line}", flush=True)
        (state,) = settings.folder.glob("round-*/state.json")
        log = json.loads(state.read_text(encoding="utf-8"))["log"]
        return {"tokens": sum(one["tuned_tokens"] for one in log), "rounds": log}

    def offline(self, arm: str, seed: int, tokens: int) -> dict[str, Any]:
        """Distillation on given text with about so many tokens, in as many steps as the other run has."""
        from nemo_ee.checkpoint.exits_file import save
        from nemo_ee.megatron.pipeline.exit_tuner import ExitTuner

        settings, output = self.settings(seed), self.output / f"{arm}-{seed}.nemo"
        steps = settings.rounds * settings.steps_per_round
        batches: Callable = {"documents": self.document_batches, "own_answers": self.answer_batches}[arm]
        ran, numbers = 0, {}
        if not output.exists():
            model, early_exit, placements = self.stage(self.start)
            optim = {"optim": settings.model.optim.model_dump(), "max_norm": settings.trainer.gradient_clip_val}
            tuner = ExitTuner(model, early_exit, placements, num_steps=steps, **optim)
            for step, (own, count) in zip(range(steps), batches(seed, tokens // steps), strict=False):
                losses = tuner.tune(own, log=step + 1 == steps)
                ran += count
            numbers = {"tokens": ran, "loss": losses[self.entry["name"]]["loss"]}
            save(model, early_exit, output, self.source)
            output.with_suffix(".json").write_text(json.dumps(numbers), encoding="utf-8")
        return json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))

    def document_batches(self, seed: int, tokens: int) -> Iterator[tuple[list[Any], int]]:
        """Windows of the documents, joined by the end-of-text token, in another order for each seed."""
        from nemo_ee.megatron.model.microbatch import MicroBatch

        ids: list[int] = []
        with gzip.open(self.options.documents, "rt", encoding="utf-8") as file:
            for line in file:
                text = json.loads(line)["text"]
                ids += [*self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], self.stops[0]]
        length, text = max(1, tokens // WINDOWS), torch.tensor(ids)
        places = torch.arange(length + 1)
        order = torch.randperm((len(ids) - 1) // length, generator=torch.Generator().manual_seed(seed))
        for part in order.split(WINDOWS):
            rows = text[part[:, None] * length + places]
            ones, positions = torch.ones(len(part), length), places[:-1].expand(len(part), -1)
            values = (rows[:, :-1], rows[:, 1:], ones, positions)
            yield [MicroBatch(*(value.to(self.device) for value in values))], rows.numel() - len(part)

    def answer_batches(self, seed: int, tokens: int) -> Iterator[tuple[list[Any], int]]:
        """Own answers, sampled at full depth; every token counts."""
        from nemo_ee.data.replay_buffer import Answer, ReplayBuffer, draft_batches

        texts = [json.loads(line)["messages"] for line in self.prompts.read_text(encoding="utf-8").splitlines()]
        texts = [self.tokenizer.apply_chat_template(one, tokenize=False) for one in texts]
        answers = [
            Answer(tuple(ids), ((1, len(ids) - 1),))
            for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        ]
        buffer = ReplayBuffer(sum(len(one.tokens) for one in answers), answers)
        ran, step = 0, 0
        while True:
            # A draw is cut at a whole answer; what is missing is made up for by the next.
            drawn = draft_batches(buffer.draw((step + 1) * tokens - ran, seed + step), 1, self.device)
            count = sum(one.num_tokens for one in drawn)
            ran, step = ran + count, step + 1
            yield [one.batch for one in drawn], count

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device("cpu" if cpu_host.enabled() else "cuda")

    def evaluate(self, exits: Path) -> dict[str, float]:
        """Self-speculation on the held-out prompts."""
        from nemo_ee.commands.on_policy import read_prompts
        from nemo_ee.generation.engine import EarlyExitEngine
        from nemo_ee.generation.policy import ExitPolicy
        from nemo_ee.megatron.decoding.decoding_adapter import MegatronDecodingModel

        held, file = self.output / "held-out.jsonl", exits.with_suffix(".measured.json")
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
        prompts = read_prompts(self.settings().model_copy(update={"prompts": held}), self.tokenizer)
        engine = EarlyExitEngine(MegatronDecodingModel(self.stage(exits)[0]))
        policy = ExitPolicy(0.0, num_draft_tokens=self.options.drafts)
        call = {"max_new_tokens": self.options.new_tokens, "stop_tokens": self.stops}
        stats = engine.generate(prompts, mode="self_speculative", policy=policy, **call).stats
        measured = {"accepted": stats.mean_accepted_length, "acceptance_rate": stats.acceptance_rate}
        file.write_text(json.dumps(measured), encoding="utf-8")
        return measured


def compared(rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """The ratios of the arms, by seed and their median, as far as there are rows."""
    accepted = {(row["arm"], row["seed"]): row["accepted"] for row in rows}
    result = {}
    for name, own, other in RATIOS:
        both = [seed for seed in seeds if (own, seed) in accepted and accepted.get((other, seed))]
        if not both:
            continue
        ratios = [accepted[own, seed] / accepted[other, seed] for seed in both]
        result[name] = statistics.median(ratios)
        result[f"{name}_by_seed"] = dict(zip(map(str, both), ratios, strict=True))
    return result


def main(arguments: list[str] | None = None) -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="SmolLM2-135M-Instruct, or another small chat model")
    parser.add_argument("--documents", type=Path, required=True, help='.jsonl.gz with lines {"text": ...}')
    parser.add_argument("--output", type=Path, required=True, help="folder for exits and result.json")
    parser.add_argument("--device", default="cpu", choices=("cuda", "cpu"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 4321])
    for name, value, what in (
        ("prompts", 320, "prompts to tune on"),
        ("held-out", 60, "prompts to measure on"),
        ("new-tokens", 96, "tokens of an answer at most"),
        ("drafts", 4, "drafts before a verification"),
        ("rounds", 8, "rounds of the on-policy run"),
        ("answers", 40, "prompts answered in a round"),
        ("steps", 8, "steps of a round"),
        ("tokens-per-step", 1024, "tokens of a step at most"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{what} (default {value})")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        cpu_host.enable()
    from benchmarks.measure import provenance
    from nemo_ee.checkpoint.atomic import write_json

    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    result = {**provenance(), **{key: value for key, value in vars(options).items() if isinstance(value, int)}}
    with TemporaryDirectory(prefix="nemo_ee_on_policy_") as folder:
        comparison = Comparison(options, Path(folder))
        comparison.write_prompts()
        comparison.write_start()
        rows = [{"arm": "start", "seed": None, "tokens": 0, **comparison.evaluate(comparison.start)}]
        print(f"start: {rows[0]['accepted']:.3f} accepted of {options.drafts}", flush=True)
        result |= {"exit": comparison.entry, "seeds": options.seeds, "rows": rows}
        order = [(arm, seed) for seed in options.seeds for arm in ("on_policy", *OFFLINE)]
        tokens = {}
        for arm, seed in [*order, *(("imitation", seed) for seed in options.seeds)]:
            rows.append(comparison.run(arm, seed, tokens.get(seed, 0)))
            tokens.setdefault(seed, rows[-1]["tokens"])
            result |= compared(rows, options.seeds)
            write_json(options.output / "result.json", result)
    numbers = ", ".join(f"{name} {result[name]:.2f}" for name, *_ in RATIOS if name in result)
    print(
        f"{numbers} (target of the first: {TARGET}); {len(options.seeds)} seeds, {rows[1]['tokens']} tokens each; at "
        f"most {options.drafts} drafts can be accepted, and {rows[0]['accepted']:.2f} were before tuning"
    )


if __name__ == "__main__":
    main()
