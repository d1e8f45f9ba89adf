# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs a calibration: from its config to its certificate.

request -> model -> prompts -> the full model's continuations -> table of all exits -> Learn then Test
        -> the chosen policy decoded freely -> certificate in the `.nemo`, calibration.json, calibration.png
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from nemo_ee.calibration.calibration_checks import check_model, checked_prompts
from nemo_ee.calibration.calibration_prompts import CalibrationPrompts
from nemo_ee.calibration.calibration_report import draw_calibration
from nemo_ee.calibration.calibration_request import CalibrationRequest
from nemo_ee.calibration.learn_then_test import (
    Measure,
    PolicyResult,
    divergence,
    fastest,
    learn_then_test,
    measure_on,
    one_threshold_path,
    pareto_path,
    split_prompts,
)
from nemo_ee.certificates.certificate import Certificate, Guarantee, Identity, store_certificate
from nemo_ee.certificates.validity import identify
from nemo_ee.checkpoint.atomic import write_json
from nemo_ee.checkpoint.tokenizer_files import stored_end_of_text
from nemo_ee.commands.console import messages
from nemo_ee.commands.generate import decode, stored_tokenizer
from nemo_ee.exits.criteria import NEVER_LEAVES
from nemo_ee.generation.decoding_model import DecodingModel
from nemo_ee.generation.engine import EarlyExitEngine, GenerationResult
from nemo_ee.generation.exit_trace import ExitTrace, TracePass
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.sampling import SamplingParams
from nemo_ee.megatron.decoding.decoding_adapter import MegatronDecodingModel
from nemo_ee.models.connector import EarlyExitSaveRestoreConnector, read_config
from nemo_ee.models.megatron_early_exit_gpt_model import MegatronEarlyExitGPTModel
from nemo_ee.models.run_config import merge_model_config
from nemo_ee.models.trainer import single_run_trainer

logger = logging.getLogger(__name__)

Score = Callable[[int, str], float]  # (index of the prompt, text of the answer) -> 0..1, 1 = best


def calibrate(cfg: DictConfig, request: CalibrationRequest) -> dict[str, Any]:
    """Run a calibration. Every rank must call it; rank 0 writes.

    Args:
        cfg: conf/megatron_gpt_early_exit_calibrate.yaml; `trainer` and `model` are read.
        request: made from the same config.

    Returns:
        The content of calibration.json.

    Raises:
        ValueError: problems of the file's config and of the prompts, all of them before weights are loaded. Without a
            Hugging Face tokenizer in the file, the prompts are checked after the weights are loaded.
    """
    stored = read_config(request.path)
    model_config = merge_model_config(stored, cfg.model)
    # One pipeline stage holds all layers, also of a file that was tuned with more stages.
    model_config.update({"full_depth": True, "sequence_parallel": False, "pipeline_model_parallel_size": 1})
    positions = stored.get("max_position_embeddings") or stored.encoder_seq_length
    probes = check_model(request, stored, positions)
    tokenizer = stored_tokenizer(request.path, stored)
    # Problems of the prompts are reported before weights are read.
    prompts = None if tokenizer is None else checked_prompts(request, tokenizer, positions, stored.get("vocab_size"))
    identity = identify(request.path)
    trainer = single_run_trainer(cfg)
    model = MegatronEarlyExitGPTModel.restore_from(
        str(request.path),
        override_config_path=model_config,
        trainer=trainer,
        save_restore_connector=EarlyExitSaveRestoreConnector(verify=cfg.model.verify),
    )
    if request.setting.precision == "bf16":
        model.model.bfloat16()
    prompts = prompts or checked_prompts(request, model.tokenizer, positions, model.vocab_size)
    end = stored_end_of_text(request.path, model.tokenizer.eos_id)
    if request.setting.stop_on_eos and end.differs and trainer.is_global_zero:
        logger.warning("%s: %s", request.path, end.differs)
    decoder = MegatronDecodingModel(model.model, probes=probes)
    calibrator = Calibrator(decoder, model.tokenizer, request, prompts, end_of_text=end.ids)
    report = calibrator.run()
    certificate = _certificate(request, report, identity, prompts, calibrator.stops)
    report["certificate"] = certificate.to_mapping()
    if trainer.is_global_zero:
        _write(request, report, certificate)
    return report


class Calibrator:
    """Learn then Test of one request on a model and its prompts.

    Args:
        model: the model that decodes.
        tokenizer: NeMo's tokenizer; the task risk reads the text of answers.
        request: see `CalibrationRequest`.
        prompts: the calibration prompts.
        score: score of an answer for the task risk, in 0..1; None = exact match with the prompt's answer.
        end_of_text: token ids that end an answer under `stop_on_eos`; None = the tokenizer's end-of-text token.

    Attributes:
        stops: token ids that end an answer.
    """

    def __init__(
        self,
        model: DecodingModel,
        tokenizer: Any,
        request: CalibrationRequest,
        prompts: CalibrationPrompts,
        score: Score | None = None,
        end_of_text: Sequence[int] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.request, self.prompts = model, tokenizer, request, prompts
        self.engine = EarlyExitEngine(model)
        self.score = score or self._exact_match
        self.exits = tuple(p for p in model.exits if request.exits is None or p.name in request.exits)
        if end_of_text is None:
            end_of_text = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        self.stops = tuple(end_of_text) if request.setting.stop_on_eos else ()

    def run(self) -> dict[str, Any]:
        """The report: settings, policies in the order of the test, free-running divergence."""
        request, everyone = self.request, range(len(self.prompts.ids))
        full = self._generate(everyone, None)
        path = one_threshold_path(request.grid, len(self.exits))
        tested = list(everyone)
        if request.risk == "task":
            measure = self._measure_task(full)
        else:
            table = self._table(full)
            if request.split:
                found_on, tested = split_prompts(len(tested), request.split, request.seed)
                simulate, never = self._simulate(table.select(found_on)), NEVER_LEAVES[request.criterion]
                path = pareto_path(request.grid, len(self.exits), never, simulate)
            measure = self._simulate(table.select(tested))
        results = learn_then_test(
            path, measure, epsilon=request.epsilon, delta=request.delta, all_of_it=request.risk != "task"
        )
        chosen = fastest(results)
        free = None if chosen is None else self._free_running(full, tested[: request.free_running], chosen)
        return self._report(results, chosen, free, len(tested))

    def policy(self, thresholds: Sequence[float]) -> ExitPolicy:
        """The policy with these thresholds."""
        named = {point.name: value for point, value in zip(self.exits, thresholds, strict=True)}
        return ExitPolicy(
            named,
            criterion=self.request.criterion,
            active=tuple(named),
            max_pending_tokens=self.request.max_pending_tokens,
        )

    def _sampling(self, index: int) -> SamplingParams:
        # A seed for each prompt: prompts that share random numbers would not be independent.
        sampling = self.request.sampling
        return dataclasses.replace(sampling, seed=sampling.seed + index)

    def _generate(self, indices: Sequence[int], policy: ExitPolicy | None) -> list[GenerationResult]:
        """Answers to these prompts, decoded a batch at a time; without a policy by the full model."""
        size = self.request.batch_size
        batches = [indices[first : first + size] for first in range(0, len(indices), size)]
        what = "full model" if policy is None else "early exit"
        return [
            self.engine.generate(
                [self.prompts.ids[index] for index in batch],
                max_new_tokens=self.request.setting.tokens_to_generate,
                mode="full" if policy is None else "early_exit",
                policy=policy,
                sampling=[self._sampling(index) for index in batch],
                stop_tokens=self.stops,
            )
            for batch in tqdm(batches, desc=f"{what}, batches of {size}", mininterval=1.0, file=messages())
        ]

    def _table(self, full: Sequence[GenerationResult]) -> ExitTrace:
        run = TracePass(self.model, [point.name for point in self.exits], self.request.criterion)
        tables, first = [], 0
        for result in tqdm(full, desc="all exits, batches", mininterval=1.0, file=messages()):
            own = self.prompts.ids[first : first + len(result.tokens)]
            sequences = [[*prompt, *new] for prompt, new in zip(own, result.tokens, strict=True)]
            sampling = [self._sampling(first + index) for index in range(len(own))]
            tables.append(run.run(sequences, [len(prompt) for prompt in own], sampling))
            first += len(own)
        return ExitTrace.join(tables)

    def _simulate(self, table: ExitTrace) -> Measure:
        return measure_on(table, self.request.risk, self.request.clip_nats, self.request.max_pending_tokens)

    def _measure_task(self, full: Sequence[GenerationResult]) -> Measure:
        """Losses of the task risk: the full model's score minus that of the policy's freely decoded answer."""
        best = self._scores(full)

        def measure(thresholds: Sequence[float]) -> tuple[torch.Tensor, float]:
            results = self._generate(range(len(self.prompts.ids)), self.policy(thresholds))
            return (best - self._scores(results)).clamp(min=0.0), _mean_depth(results)

        return measure

    def _scores(self, results: Sequence[GenerationResult]) -> torch.Tensor:
        answers = [tokens for result in results for tokens in result.tokens]
        texts = [decode(self.tokenizer, [t for t in answer if t not in self.stops]) for answer in answers]
        scores = torch.tensor([self.score(index, text) for index, text in enumerate(texts)], dtype=torch.float64)
        # A difference of scores would be clipped into 0..1 and look like a loss.
        outside = scores[~((scores >= 0) & (scores <= 1))]
        if outside.numel():
            raise ValueError(f"scores must lie in 0..1, but one is {outside[0].item()}; scale them")
        return scores

    def _exact_match(self, index: int, text: str) -> float:
        if self.request.answer_until is not None:
            text = text.partition(self.request.answer_until)[0]
        return float(text.strip() == (self.prompts.answers[index] or "").strip())

    def _free_running(
        self, full: Sequence[GenerationResult], indices: Sequence[int], chosen: PolicyResult
    ) -> dict[str, Any] | None:
        if not indices:
            return None
        results = self._generate(indices, self.policy(chosen.thresholds))
        theirs = [tokens for result in full for tokens in result.tokens]
        ours = [tokens for result in results for tokens in result.tokens]
        return {**divergence(ours, [theirs[index] for index in indices]), "mean_depth": _mean_depth(results)}

    def _report(
        self,
        results: Sequence[PolicyResult],
        chosen: PolicyResult | None,
        free: dict[str, Any] | None,
        num_tested: int,
    ) -> dict[str, Any]:
        request = self.request
        names = [point.name for point in self.exits]
        policies = [
            {
                **dataclasses.asdict(one),
                "thresholds": dict(zip(names, one.thresholds, strict=True)),
                "chosen": one is chosen,
            }
            for one in results
        ]
        return {
            "model": str(request.path),
            "risk_name": request.risk,
            "epsilon": request.epsilon,
            "delta": request.delta,
            "criterion": request.criterion,
            "num_layers": self.model.num_layers,
            "num_tested": num_tested,
            "policies": policies,
            "free_running": free,
        }


def _mean_depth(results: Sequence[GenerationResult]) -> float:
    tokens = sum(one.stats.num_tokens for one in results)
    return sum(one.stats.mean_depth * one.stats.num_tokens for one in results) / tokens


def definition_of(request: CalibrationRequest) -> str:
    """The risk in words."""
    if request.risk == "disagreement":
        return "share of a full-model continuation's tokens that the exit they are read at would have chosen otherwise"
    if request.risk == "nll_excess":
        return (
            "mean nats by which a full-model continuation is less likely at the exits it is read at, clipped to "
            f"0..{request.clip_nats:g} and divided by that"
        )
    until = "" if request.answer_until is None else f", up to {request.answer_until!r}"
    return f"exact match of the full model's answer minus that of the freely decoded answer, at least 0{until}"


def _certificate(
    request: CalibrationRequest,
    report: dict[str, Any],
    identity: Identity,
    prompts: CalibrationPrompts,
    stops: Sequence[int],
) -> Certificate:
    chosen = next((one for one in report["policies"] if one["chosen"]), None)
    guarantee = Guarantee(
        risk=request.risk,
        definition=definition_of(request),
        epsilon=request.epsilon,
        delta=request.delta,
        empirical_risk=0.0 if chosen is None else chosen["risk"],
        p_value=None if chosen is None else chosen["p_value"],
        mean_depth=float(report["num_layers"]) if chosen is None else chosen["mean_depth"],
        num_layers=report["num_layers"],
        answer_until=request.answer_until if request.risk == "task" else None,
    )
    return Certificate(
        name=request.certificate or "not-stored",
        created=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        model=identity,
        setting=dataclasses.replace(request.setting, stop_tokens=tuple(sorted(stops)) or None),
        criterion=request.criterion,
        thresholds={} if chosen is None else chosen["thresholds"],
        max_pending_tokens=request.max_pending_tokens,
        guarantee=guarantee,
        data={**prompts.facts, "num_tested": report["num_tested"], "split": request.split},
        free_running=report["free_running"],
    )


def _write(request: CalibrationRequest, report: dict[str, Any], certificate: Certificate) -> None:
    output = Path(request.output)
    write_json(output / "calibration.json", report)
    facts = certificate.data
    draw_calibration(
        output / "calibration.png",
        report,
        title=f"Calibration of {request.path.name}: {request.risk} at most {request.epsilon:g} "
        f"with confidence {1 - request.delta:g}",
        caption=f"{report['num_tested']} prompts of {facts['file']}, {request.setting.tokens_to_generate} new tokens",
    )
    logger.info("wrote %s and %s", output / "calibration.json", output / "calibration.png")
    if request.certificate is not None:
        where = store_certificate(request.path, certificate, request.save_to)
        logger.info("stored certificate %r in %s", request.certificate, where)
