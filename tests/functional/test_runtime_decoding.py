# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""An exported directory decodes as the NeMo model does, and exits in transformers' assisted generation are lossless.

Tokens, exit layers and finish reasons are compared exactly, confidences within 1e-5; fp32 on the CPU. Positions at
which a decision hangs on less than 1e-4 would be excused, but with these seeds there are none.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nemo")

from tests.helpers.megatron_models import REFERENCE_MODEL, exit_entry, user_environment

import torch  # isort: skip  # after the CPU host is on
from nemo_ee.exits.confidence import confidence
from nemo_ee.exits.criteria import OF_LOGITS
from nemo_ee.families.registry import FAMILIES
from nemo_ee.generation.engine import EarlyExitEngine, GenerationResult
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.sampling import GREEDY, SamplingParams
from nemo_ee.runtime.loader import load_model
from tests.functional.test_export_huggingface import Made, export, stock
from tests.helpers.huggingface_models import TINY_MODELS

EXITS = [
    exit_entry(1, "norm", "copy", "low_rank", rank=3),
    exit_entry(1, "mlp", "copy", "shared"),
    exit_entry(1, "layer", "lora", rank=2),
    exit_entry(2, "mlp", "random"),
    exit_entry(2, "embedding"),
    exit_entry(2, "layer", "copy"),
]
PROMPTS = [[5, 71, 13, 9, 0, 44], [3], [100, 99, 98, 97, 96, 95, 94, 93, 92, 91, 90], [7, 8]]
NEW_TOKENS = 18
VARIED = SamplingParams(greedy=False, temperature=2.0, seed=3)


class Pair:
    """The same model as NeMo's, behind its adapter, and as an exported directory's in the runtime."""

    def __init__(self, folder: Path, name: str) -> None:
        from nemo_ee.megatron.decoding.decoding_adapter import MegatronDecodingModel

        self.one = Made(folder, name, EXITS)
        self.output = export(self.one.path, folder / "out")
        self.nemo = EarlyExitEngine(MegatronDecodingModel(self.one.model.model))
        self.runtime = EarlyExitEngine(load_model(self.output / "hf_early_exit"))

    def thresholds(self, criterion: str, quantile: float) -> dict[str, float]:
        """Per exit the value that this share of its confidences on random text lies below."""
        return {
            name: confidence(logits, criterion).flatten().quantile(quantile).item()
            for name, logits in self.one.exits.items()
        }


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory):
    """name -> `Pair`, each made once."""
    kept: dict[str, Pair] = {}

    def of(name: str) -> Pair:
        if name not in kept:
            kept[name] = Pair(tmp_path_factory.mktemp(name), name)
        return kept[name]

    return of


def assert_same(ours: GenerationResult, theirs: GenerationResult) -> None:
    assert ours.tokens == theirs.tokens and ours.finish_reasons == theirs.finish_reasons
    assert [event.exit for event in ours.events] == [event.exit for event in theirs.events]
    assert (
        ours.stats.computed_layers == theirs.stats.computed_layers
        and ours.stats.evaluations == theirs.stats.evaluations
    )
    for own, other in zip(ours.events, theirs.events, strict=True):
        assert own.confidence == pytest.approx(other.confidence, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "criterion"),
    [*((name, OF_LOGITS[0]) for name in TINY_MODELS), *(("llama", own) for own in OF_LOGITS[1:])],
)
def test_tokens_and_exit_layers_are_the_nemo_model_s(name: str, criterion: str, pair) -> None:
    """A ragged batch, greedy and sampled, thresholds from never to nearly always, with a cap on waiting tokens."""
    both = pair(name)
    depths = []
    for quantile in (0.1, 0.5, 0.9):
        policy = ExitPolicy(both.thresholds(criterion, quantile), criterion, max_pending_tokens=4)
        for sampling in (GREEDY, VARIED):
            call = {"max_new_tokens": NEW_TOKENS, "policy": policy, "sampling": sampling}
            ours = both.runtime.generate(PROMPTS, **call)
            assert_same(ours, both.nemo.generate(PROMPTS, **call))
            alone = both.runtime.generate([PROMPTS[2]], **call)
            assert alone.tokens[0] == ours.tokens[2], "a batch gives each sequence what it gets alone"
            depths.append(ours.stats.mean_depth)
    assert len(set(depths)) > 3 and min(depths) < both.one.model.cfg.num_layers, "control: thresholds change depths"


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_one_exit_at_a_time(name: str, pair) -> None:
    both = pair(name)
    for exit, threshold in both.thresholds("max_probability", 0.4).items():
        policy = ExitPolicy(threshold, active=(exit,))
        call = {"max_new_tokens": NEW_TOKENS, "policy": policy, "sampling": VARIED}
        ours = both.runtime.generate(PROMPTS, **call)
        assert_same(ours, both.nemo.generate(PROMPTS, **call))
        assert {event.exit for event in ours.events} == {exit, None}, "control: some leave there, some do not"


def greedy(model, prompt: list[int], new_tokens: int, **settings) -> list[int]:
    """New tokens of transformers' `generate`."""
    tokens = torch.tensor([prompt])
    output = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new_tokens, do_sample=False,
        eos_token_id=None, pad_token_id=1, **settings,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_thresholds_that_are_never_met_give_generate_s_tokens(name: str, pair) -> None:
    both = pair(name)
    reference = stock(both.output / "hf_full")
    never = ExitPolicy(1.0 - 1e-7)  # asked all the same, unlike 1.0
    asked = both.runtime.generate(PROMPTS, max_new_tokens=NEW_TOKENS, policy=never)
    full = both.runtime.generate(PROMPTS, max_new_tokens=NEW_TOKENS, mode="full")
    assert asked.tokens == full.tokens and all(event.exit is None for event in asked.events)
    assert asked.stats.evaluations[EXITS[0]["name"]] > 0
    assert [list(own) for own in full.tokens] == [greedy(reference, prompt, NEW_TOKENS) for prompt in PROMPTS]


@pytest.mark.parametrize("name", FAMILIES)
def test_assisted_generation_with_an_exit_is_lossless(name: str, pair) -> None:
    output = pair(name).output
    reference, drafts = stock(output / "hf_full"), sorted(output.glob("hf_exit_*"))
    assert len(drafts) == len(EXITS) - (name != "opt")
    expected = [greedy(reference, prompt, NEW_TOKENS) for prompt in PROMPTS[:3]]
    for folder in drafts:
        draft = stock(folder)
        assisted = [greedy(reference, prompt, NEW_TOKENS, assistant_model=draft) for prompt in PROMPTS[:3]]
        assert assisted == expected, folder.name
        alone = [greedy(draft, prompt, NEW_TOKENS) for prompt in PROMPTS[:3]]
        assert alone != expected, "control: the draft alone says something else"


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
def test_a_static_depth_is_the_exit_s_own_model(name: str, pair) -> None:
    both = pair(name)
    for exit in EXITS:
        folder = both.output / f"hf_exit_{exit['name']}"
        if folder.exists():
            policy = ExitPolicy(1.0, active=(exit["name"],))
            ours = both.runtime.generate(PROMPTS, max_new_tokens=NEW_TOKENS, mode="static_depth", policy=policy)
            expected = [greedy(stock(folder), prompt, NEW_TOKENS) for prompt in PROMPTS]
            assert [list(own) for own in ours.tokens] == expected, exit["name"]


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
def test_self_speculation_gives_the_full_model_s_tokens(name: str, pair) -> None:
    both = pair(name)
    full = both.runtime.generate(PROMPTS, max_new_tokens=NEW_TOKENS, mode="full")
    for quantile in (0.1, 0.5, 0.9):
        policy = ExitPolicy(both.thresholds("max_probability", quantile))
        ours = both.runtime.generate(PROMPTS, max_new_tokens=NEW_TOKENS, mode="self_speculative", policy=policy)
        assert ours.tokens == full.tokens


def test_the_reference_model_s_tokens_are_generate_s() -> None:
    """A trained model: a stock directory, sharded or not, is a model without exits."""
    prompt = [17, 300, 45, 2900, 8]
    engine = EarlyExitEngine(load_model(REFERENCE_MODEL, dtype="float32"))
    assert engine.model.exits == ()
    ours = engine.generate([prompt], max_new_tokens=40, mode="full")
    assert list(ours.tokens[0]) == greedy(stock(REFERENCE_MODEL), prompt, 40)


# -- the directory's own code in transformers -----------------------------------------------------------------------

REMOTE = """
import json, sys
sys.modules["nemo_ee"] = None  # as if it were not installed
import torch
from transformers import AutoConfig, AutoModelForCausalLM
call = json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/hf_early_exit", trust_remote_code=True)
ids, mask = torch.tensor(call["ids"]), torch.tensor(call["mask"])
settings = {"max_new_tokens": call["new"], "eos_token_id": None, "pad_token_id": 1}
inputs = {"input_ids": ids, "attention_mask": mask, "early_exit_threshold": call["thresholds"]}
tokens, result = model.generate(**inputs, return_result=True, **settings)
full = model.generate(input_ids=ids[:1, 2:], do_sample=False, **settings)
problems = []
for wrong in ({"num_beams": 2}, {"early_exit_threshold": 2.0}, {"early_exits": ["x"]}):
    try:
        model.generate(**{**inputs, "early_exit_threshold": 0.5, **wrong})
    except ValueError as problem:
        problems.append(str(problem))
try:
    model.to("meta").generate(**inputs)
except ValueError as problem:
    problems.append(str(problem))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/hf_early_exit", trust_remote_code=True)
stock = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/hf_full")
plain = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/hf_early_exit")
print(json.dumps({
    "tokens": tokens.tolist(), "exits": [event.exit for event in result.events], "full": full.tolist(),
    "classes": [type(m).__name__ for m in (model, stock, plain)], "problems": problems,
    "logits": (model(ids[:1]).logits - stock(ids[:1]).logits).abs().max().item(),
    "same": torch.equal(plain(ids[:1]).logits, stock(ids[:1]).logits),
}))
"""


@pytest.mark.parametrize("name", FAMILIES)
def test_the_directory_s_own_code(name: str, pair, tmp_path: Path) -> None:
    """In a process of its own without nemo_ee: the runtime's tokens; other models of the family stay stock."""
    both = pair(name)
    thresholds = both.thresholds("max_probability", 0.5)
    call = {"ids": [[1, 1, 5, 71, 13], [3, 4, 5, 6, 7]], "mask": [[0, 0, 1, 1, 1], [1] * 5], "new": 12}
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, str(both.output), json.dumps(call | {"thresholds": thresholds})],
        env={**user_environment(), "HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    prompts = [[5, 71, 13], [3, 4, 5, 6, 7]]
    ours = both.runtime.generate(prompts, max_new_tokens=12, policy=ExitPolicy(thresholds))
    assert [row[5:] for row in found["tokens"]] == [list(own) for own in ours.tokens]
    assert found["exits"] == [event.exit for event in ours.events] and len(set(found["exits"])) > 1
    full = both.runtime.generate(prompts[:1], max_new_tokens=12, mode="full")
    assert found["full"] == [prompts[0] + list(full.tokens[0])]
    assert found["classes"] == ["EarlyExitForCausalLM", FAMILIES[name].model_class, FAMILIES[name].model_class]
    assert found["logits"] == 0 and found["same"]
    words = ("num_beams=2: not supported", "threshold = 2.0 must be", "active names the exit 'x'", "on one device")
    assert all(word in problem for word, problem in zip(words, found["problems"], strict=True)), found["problems"]
