# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""On-policy tuning: the model answers prompts by self-speculation, and the verdicts tune the exit that drafts.

    a round:  prompts -> drafts and verdicts -> replay buffer -> steps on answers drawn from it
    a step:   the final exit's distribution at drafted positions (imitation), then the expected accepted length

After DVI (arXiv 2510.05421): frozen backbone, replay buffer, KL first, reward later. Its reward is a policy gradient
over the drafts; here it is the exact gradient (`megatron.loss.accepted_length`). One process, one device, no NeMo.

A round that has ended is kept in `folder`. A killed run continues from there and ends with the same losses, on the CPU
bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_ee.checkpoint.atomic import atomic_directory, write_json
from nemo_ee.checkpoint.distributed_checkpoint import load_distributed, save_distributed
from nemo_ee.commands.on_policy_settings import OnPolicySettings
from nemo_ee.data.replay_buffer import Answer, ReplayBuffer, draft_batches
from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.exits.objective import CROSS_ENTROPY
from nemo_ee.exits.placement import StagePlacement
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.sampling import SamplingParams
from nemo_ee.generation.stats import TokenEvent
from nemo_ee.megatron.decoding.decoding_adapter import MegatronDecodingModel
from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel
from nemo_ee.megatron.pipeline.draft_weights import DraftWeights
from nemo_ee.megatron.pipeline.exit_tuner import ExitTuner

_STATE, _WEIGHTS, _ROUND = "state.json", "weights", "round-"
# Settings that may differ when a run is continued.
_FREE = {"folder", "output", "prompts", "source", "exits", "exit"}


def draft_runs(events: Sequence[TokenEvent]) -> tuple[tuple[int, int], ...]:
    """The draft runs of one answer: position of the first token, number of drafts that were verified.

    Args:
        events: the answer's, in order. A token of the final exit ends a run; it replaces a rejected draft or follows
            accepted ones.
    """
    runs, verified = [], 0
    for event in events:
        drafted = event.exit is not None or event.rejected is not None
        verified += drafted
        if event.exit is None and verified:
            runs.append((event.position + drafted - verified, verified))
            verified = 0
    if verified:
        runs.append((events[-1].position + 1 - verified, verified))
    return tuple(runs)


class OnPolicyTuner:
    """The rounds of a run.

    Args:
        model: a full-depth stage whose only exit is tuned, its weights on their device.
        early_exit: that exit.
        placements: the one stage.
        prompts: token ids of each.
        stop_tokens: ids that end an answer.
        settings: the script's.
        facts: of model and prompts, which must be the same where a run is continued.

    Attributes:
        round: rounds that have ended.
        log: the numbers of each.
        buffer: the answers.
    """

    def __init__(
        self,
        model: EarlyExitGPTModel,
        early_exit: EarlyExitConfig,
        placements: Sequence[StagePlacement],
        *,
        prompts: Sequence[Sequence[int]],
        stop_tokens: Collection[int],
        settings: OnPolicySettings,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.facts = dict(facts or {})
        (self.exit,) = early_exit.names
        self.settings, self.prompts, self.stop_tokens = settings, prompts, frozenset(stop_tokens)
        self.tuner = ExitTuner(
            model,
            early_exit,
            placements,
            optim=settings.model.optim.model_dump(),
            num_steps=settings.rounds * settings.steps_per_round,
            max_norm=settings.trainer.gradient_clip_val,
        )
        self.engine = EarlyExitEngine(MegatronDecodingModel(model))
        own = settings.answers
        self.policy = ExitPolicy(own.threshold, num_draft_tokens=own.num_draft_tokens)
        self.buffer = ReplayBuffer(settings.buffer_tokens)
        self.round, self.log = 0, []

    def answer(self) -> dict[str, float]:
        """Answer the prompts of this round into the buffer. Returns sums over its verdicts."""
        own, count = self.settings.answers, self.settings.answers.prompts_per_round
        numbers = range(self.round * count, (self.round + 1) * count)
        prompts = [self.prompts[self._place(number)] for number in numbers]
        seeds = [self.settings.seed + number for number in numbers]
        sampling = [SamplingParams(greedy=own.greedy, temperature=own.temperature, seed=seed) for seed in seeds]
        result = self.engine.generate(
            prompts,
            max_new_tokens=own.max_new_tokens,
            mode="self_speculative",
            policy=self.policy,
            sampling=sampling,
            stop_tokens=self.stop_tokens,
        )
        events: list[list[TokenEvent]] = [[] for _ in prompts]
        for event in result.events:
            events[event.sequence].append(event)
        for prompt, tokens, own_events in zip(prompts, result.tokens, events, strict=True):
            if runs := draft_runs(own_events):  # nothing is learned from an answer without drafts
                self.buffer.add(Answer((*prompt, *tokens), runs))
        if not self.buffer.answers:
            raise ValueError(
                f"no token was drafted in round {self.round + 1}, so there is nothing to learn from: exit {self.exit} "
                f"is never more confident than answers.threshold={own.threshold}; lower it, or raise "
                "answers.max_new_tokens"
            )
        stats = result.stats
        return {
            "answered_tokens": stats.num_tokens,
            "acceptance_rate": stats.acceptance_rate,
            "accepted_per_verification": stats.mean_accepted_length,
        }

    def _place(self, number: int) -> int:
        """Index of the prompt that is answered as the `number`-th; every epoch has another order."""
        epoch, index = divmod(number, len(self.prompts))
        generator = torch.Generator().manual_seed(self.settings.seed + epoch)
        return int(torch.randperm(len(self.prompts), generator=generator)[index])

    def tune(self) -> dict[str, float]:
        """The steps of this round. Returns the tokens that ran, and the loss and expected accepted length."""
        own, tuner = self.settings, self.tuner
        tokens, rewards, losses = 0, [], {}
        for step in range(own.steps_per_round):
            drawn = draft_batches(
                self.buffer.draw(own.tokens_per_step, own.seed + tuner.step),
                own.answers.num_draft_tokens,
                tuner.context.device,
            )
            tokens += sum(one.num_tokens for one in drawn)
            batches, last = [one.batch for one in drawn], step + 1 == own.steps_per_round
            if self.round < own.imitation_rounds:
                losses = tuner.tune(batches, log=last)
            else:
                weigh = DraftWeights([(one.batch, one.runs) for one in drawn])
                losses = tuner.tune(batches, log=last, objective=CROSS_ENTROPY, weigh=weigh)
                rewards.append(weigh.expected)
        numbers = losses[self.exit]
        found = {"tuned_tokens": tokens, **{key: numbers[key] for key in ("loss", "lr") if key in numbers}}
        return found | ({"expected_accepted": sum(rewards) / len(rewards)} if rewards else {})

    def rounds(self) -> Iterator[dict[str, Any]]:
        """Run the rounds that are left; yields each one's numbers, once it is kept."""
        while self.round < self.settings.rounds:
            numbers = {"round": self.round + 1, **self.answer(), **self.tune()}
            self.round += 1
            self.log.append(numbers)
            self.keep()
            yield numbers

    # -- what is kept ----------------------------------------------------------------------------------------------

    def _shards(self) -> dict[str, Any]:
        exits = self.tuner.context.model.exit_sharded_state_dict()
        return {"exits": exits, "optimizer": self.tuner.optimizers.sharded_state_dict(exits)}

    def _identity(self) -> dict[str, Any]:
        """What makes a run this one."""
        plain = self.settings.model_dump(mode="json")
        settings = {key: value for key, value in plain.items() if key not in _FREE}
        return {"exit": self.exit, **self.facts, **settings}

    def keep(self) -> None:
        """Keep the round that has ended, then drop the one before."""
        folder = self.settings.folder / f"{_ROUND}{self.round:05d}"
        state = {
            "run": self._identity(),
            "round": self.round,
            "step": self.tuner.step,
            "log": self.log,
            "answers": self.buffer.to_plain(),
        }
        num_bytes = 16 * sum(value.numel() for value in self.tuner.context.model.exits.parameters())
        with atomic_directory(folder, num_bytes) as partial:
            save_distributed(self._shards(), partial / _WEIGHTS)
            write_json(partial / _STATE, state, indent=None)
        for other in _kept(self.settings.folder):
            if other != folder:
                shutil.rmtree(other)

    def resume(self) -> None:
        """Continue from the last round that was kept, if there is one.

        Raises:
            ValueError: it belongs to a run with other settings.
        """
        kept = _kept(self.settings.folder)
        if not kept:
            return
        state = json.loads((kept[-1] / _STATE).read_text(encoding="utf-8"))
        own = json.loads(json.dumps(self._identity()))
        if differing := [key for key in own if state["run"].get(key) != own[key]]:
            raise ValueError(
                f"folder={self.settings.folder} holds a run with other settings ({', '.join(differing)}); restore "
                "them to continue it, or name another folder"
            )
        loaded = load_distributed(self._shards(), kept[-1] / _WEIGHTS)
        self.tuner.optimizers.load_state_dict(loaded["optimizer"])
        self.tuner.step = state["step"]
        self.tuner.learning_rates.load_state_dict({"last_epoch": state["step"]})
        self.round, self.log = state["round"], state["log"]
        self.buffer = ReplayBuffer.from_plain(self.buffer.max_tokens, state["answers"])


def _kept(folder: Path) -> list[Path]:
    """Rounds that were kept, oldest first."""
    found = folder.glob(f"{_ROUND}*") if folder.is_dir() else ()
    return sorted(path for path in found if path.is_dir() and not path.name.endswith(".partial"))
