# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/decoding.py` with few tokens: every number arrives. What they are is not looked at.

What they are made of is: forced decoding against `EarlyExitEngine.score` and transformers (logarithms to 1e-4, fp32
sums over fp16 weights; exits equal), the weights it reads against the parameters of transformers' linears (exact).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nemo")

from tests.functional.test_export_huggingface import export
from tests.helpers.megatron_models import (
    REFERENCE_MODEL,
    ROOT,
    exit_entry,
    model_from_hugging_face,
    user_environment,
)

import torch  # isort: skip  # after the CPU host is on

from benchmarks.exit_frontier import FRONTIER, repeated_share
from nemo_ee.evaluation.forced_decoding import (
    agreement,
    excess_nats,
    force,
    mean_depth,
    measured_costs,
    perplexity,
    policy_of,
    threshold_search,
    trace,
)
from nemo_ee.evaluation.touched_weights import CountingModel
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.planning.threshold_search import THRESHOLDS, ThresholdSearch
from nemo_ee.runtime.loader import load_model, load_tokenizer

EXITS = [exit_entry(6, "norm"), exit_entry(9, "mlp")]
NUMBERS = {
    "runtime_over_hf", "self_speculative_over_runtime", "self_speculative_over_hf_assistant", "forced_speed_at_1pct",
    "forced_speed_at_5pct", "forced_over_bound", "batch1_early_exit_over_full", "batch4_early_exit_over_full",
    "batch16_early_exit_over_full", "batch64_early_exit_over_full", "pp2_early_exit_over_full",
}  # fmt: skip
COLUMNS = ("speed", "perplexity", "agreement", "mean_depth", "repeated_8grams")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With model.nemo and its export, out/."""
    folder = tmp_path_factory.mktemp("reference")
    model = model_from_hugging_face(REFERENCE_MODEL, EXITS)
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    model.bundled_files = {f"tokenizer/{name}": REFERENCE_MODEL / name for name in names}
    model.save_to(str(folder / "model.nemo"))
    export(folder / "model.nemo", folder / "out", dtype="bfloat16")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> CountingModel:
    return CountingModel(load_model(folder / "out" / "hf_early_exit"))


@pytest.fixture(scope="module")
def window() -> list[int]:
    text = Path(__file__).read_text()
    return load_tokenizer(REFERENCE_MODEL)(text)["input_ids"][:80]


def test_forced_decoding_is_what_score_says(model: CountingModel, window: list[int]) -> None:
    depths = []
    for policy in (ExitPolicy(0.3), ExitPolicy(0.05, max_pending_tokens=3), ExitPolicy(1.0)):
        ours, theirs = force(model, window, policy), EarlyExitEngine(model).score([window], 1, policy=policy)
        assert ours.layers == [event.layer for event in theirs.events]
        torch.testing.assert_close(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs[0]), atol=1e-4, rtol=0)
        depths.append(mean_depth([ours]))
    assert depths[0] < 12 and depths[1] < 12 and depths[2] == 12


def test_full_depth_is_transformers(folder: Path, model: CountingModel, window: list[int]) -> None:
    from transformers import LlamaForCausalLM

    full, ours = LlamaForCausalLM.from_pretrained(folder / "out" / "hf_full"), force(model, window, None)
    with torch.inference_mode():
        logprobs = full.float()(torch.tensor([window])).logits[0].log_softmax(dim=1)
    expected = logprobs[range(79), window[1:]]
    torch.testing.assert_close(torch.tensor(ours.logprobs), expected, atol=1e-4, rtol=0)
    assert ours.choices == logprobs[:-1].argmax(dim=1).tolist()
    linears = [own for own in full.modules() if isinstance(own, torch.nn.Linear)]
    assert ours.touched == 79 * sum(own.weight.numel() for own in linears)


def test_weights_of_a_token_that_leaves_are_those_above_its_exit(model: CountingModel, window: list[int]) -> None:
    """Threshold 0: after the first token, six layers and the head of the exit; then the layers once for all that
    wait."""
    policy = ExitPolicy(0.0, active=("l6-norm-copy-own",), max_pending_tokens=4)
    ours, full = force(model, window[:7], policy), force(model, window[:2], None).touched
    output = 256 * 4096
    above = (full - output) // 2
    assert ours.layers == [12, 6, 6, 6, 6, 12]
    # Asked at layer 6 four times; the fifth token may not leave and is not asked.
    assert ours.touched == 2 * full + 4 * (above + output)


def search_on(model: CountingModel, window: list[int]) -> ThresholdSearch:
    table = trace(model, [window])
    return threshold_search(table, excess_nats(table), measured_costs(model))


def test_a_policy_keeps_its_limit_and_a_greater_one_is_no_slower(model: CountingModel, window: list[int]) -> None:
    search, full = search_on(model, window), [force(model, window, None)]
    choices = {limit: search.fastest(math.log1p(limit)) for limit in (0.0, 0.5, 100.0)}
    found = {limit: [force(model, window, policy_of(choice))] for limit, choice in choices.items()}
    for limit, choice in choices.items():  # the first token, the final exit's, is in the perplexity alone
        lost = math.log(perplexity(found[limit]) / perplexity(full)) * (len(window) - 1) / (len(window) - 2)
        assert choice.lost == pytest.approx(lost, rel=1e-3, abs=1e-4)
    for limit, own in found.items():
        assert perplexity(own) <= (1 + limit) * perplexity(full) * (1 + 1e-4)
    assert found[100.0][0].touched < full[0].touched
    assert agreement(full, full) == 1.0 > agreement(found[100.0], full)


def test_the_policy_of_one_exit_is_the_best_of_all(model: CountingModel, window: list[int]) -> None:
    """Against every exit and threshold tried one by one; two exits are no slower."""
    choice = search_on(model, window)
    size = len(choice.names)
    trials = [
        (*(1.0,) * own, number, *(1.0,) * (size - own - 1)) for own in range(size) for number in (*THRESHOLDS, 1.0)
    ]
    for limit in (0.2, 1.0):
        outcomes = [choice._outcome(trial) for trial in trials]
        best = min(seconds for excess, seconds in outcomes if excess <= math.log1p(limit))
        found = []
        for count in (1, 2):
            by_name = choice.fastest(math.log1p(limit), count).thresholds
            found.append(choice._outcome([by_name.get(name, 1.0) for name in choice.names])[1])
        assert found[0] == pytest.approx(best, rel=1e-6) and found[1] <= best * (1 + 1e-6)


def test_repeated_grams_are_counted() -> None:
    assert repeated_share([range(20)]) == 0.0 == repeated_share([[1] * 7])
    assert repeated_share([[1, 2] * 8]) == pytest.approx(7 / 9) and repeated_share([range(20), range(20)]) == 0.0


def test_its_numbers_are_printed_and_written(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "decoding.json"
    command = [
        sys.executable, str(ROOT / "benchmarks" / "decoding.py"), "--quick", "--export", str(folder / "out"),
        "--nemo", str(folder / "model.nemo"), "--json", str(file),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=user_environment())
    assert done.returncode == 0, done.stderr[-3000:]
    found, text = json.loads(file.read_text()), (ROOT / "docs" / "benchmarks.md").read_text()
    assert {"cpu", "commit", "new_tokens", "prompts_file", "threads"} | NUMBERS <= found.keys()
    for name in NUMBERS:
        assert found[name] > 0 and f"{name} {found[name]:.3f}" in done.stdout and f"`{name}`" in text
    same = ("runtime_over_hf", "self_speculative_over_runtime", "self_speculative_over_hf_assistant")
    assert all(found[f"{name}.same_tokens"] == 1.0 for name in same)
    for threshold in FRONTIER:
        assert all(f"frontier.{threshold}.{column}" in found for column in COLUMNS)
    assert found["frontier.1.0.agreement"] == 1.0 and found["frontier.1.0.mean_depth"] == 12
    assert found["frontier.1.0.perplexity"] == pytest.approx(found["frontier.full_perplexity"], rel=1e-6)
    assert found["frontier.0.2.mean_depth"] <= found["frontier.0.9.mean_depth"] <= 12
    assert file.with_suffix(".png").stat().st_size > 1000 and "`frontier`" in text
