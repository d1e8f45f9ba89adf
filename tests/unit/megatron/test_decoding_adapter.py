# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Decoding over Megatron modules against transformers' `generate` and cache and against whole-sequence passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_ee.checkpoint.huggingface import HuggingFaceSource
from nemo_ee.exits.confidence import confidence
from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.exits.placement import place_exits
from nemo_ee.generation.decoding_model import TokenPositions
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.request import Request
from nemo_ee.generation.sampling import SamplingParams
from tests.helpers.huggingface_models import TINY_MODELS, reference_logits, save_tiny_model
from tests.unit.checkpoint.conftest import megatron  # noqa: F401  (fixture)

pytestmark = pytest.mark.usefixtures("megatron")

ARCHITECTURES = ("embedding", "norm", "mlp", "layer")
# Two exits share a tap, one `layer` exit stands at the very end, low-rank linears and outputs are among them.
EXITS = [
    {"name": "mlp1", "layer": 1, "architecture": "mlp", "output": "shared"},
    {"name": "norm1", "layer": 1, "architecture": "norm", "output": "low_rank"},
    {"name": "layer1", "layer": 1, "architecture": "layer", "init": "lora", "rank": 3},
    {"name": "mlp2", "layer": 2, "architecture": "mlp"},
    {"name": "embedding2", "layer": 2, "architecture": "embedding"},
    {"name": "layer2", "layer": 2, "architecture": "layer"},
]
# Left to be greedy, a tiny random model soon repeats itself.
VARIED = SamplingParams(greedy=False, temperature=2.0, seed=3)
NEVER_MET = 1.0 - 1e-7  # asked all the same, unlike 1.0
FAMILIES = sorted(TINY_MODELS)


def build(
    directory: Path,
    exits: Sequence[dict[str, Any]] = EXITS,
    *,
    full_depth: bool = True,
    rotary_percent: float = 1.0,
    drawn: bool = True,
    layers_per_stage: Sequence[int] | None = None,
) -> Any:
    """An `EarlyExitGPTModel` with the weights of a Hugging Face directory, this rank's stage of it.

    Exits are drawn at random, or initialised as their `init` says (the same values under any layout).
    """
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from nemo_ee.checkpoint.megatron_model import load_stage, stage_of

    source = HuggingFaceSource(directory)
    a = source.backbone
    early_exit = EarlyExitConfig.from_mapping({"exits": list(exits)}, num_layers=a.num_layers)
    placements = place_exits(
        early_exit.exits,
        num_layers=a.num_layers,
        num_stages=parallel_state.get_pipeline_model_parallel_world_size(),
        full_depth=full_depth,
        layers_per_stage=layers_per_stage,
    )
    settings = {"vocab_multiple": 16, "use_cpu_initialization": True, "init_method_std": 0.2}
    model = stage_of(a, early_exit, placements, full_depth=full_depth, **settings)
    if rotary_percent != 1.0:
        model.rotary_pos_emb = RotaryEmbedding(
            a.kv_channels, rotary_percent, rotary_base=a.rotary_base, use_cpu_initialization=True
        )
    load_stage(model, source, None, early_exit=early_exit, seed=3)
    if drawn:
        draw_exits(model)
    return model


@torch.no_grad()
def draw_exits(model: Any) -> None:
    """Every parameter of every exit at random, norms, biases and low-rank updates included."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.exits.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm_weight = parameter.ndim == 1 and name.endswith("weight")
        parameter.copy_(1 + 0.3 * noise if is_norm_weight else (0.3 if parameter.ndim == 1 else 0.2) * noise)


def engine_of(model: Any) -> EarlyExitEngine:
    from nemo_ee.megatron.decoding.decoding_adapter import MegatronDecodingModel

    return EarlyExitEngine(MegatronDecodingModel(model))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SimpleNamespace]:
    """name -> a tiny model of that family in transformers, and the directory it is saved in. Saved once."""
    made: dict[str, SimpleNamespace] = {}

    def get(name: str) -> SimpleNamespace:
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            made[name] = SimpleNamespace(path=path, reference=save_tiny_model(path, name))
        return made[name]

    return get


@pytest.fixture(scope="module")
def llama(directory, megatron) -> Any:  # noqa: F811
    """A grouped-query Llama with every kind of exit."""
    return build(directory("llama").path)


def some_prompts(vocab_size: int, lengths: Sequence[int] = (5, 1, 9)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


@dataclasses.dataclass(frozen=True)
class Expected:
    """What transformers' own greedy `generate` says: new tokens, their ln p, their logits' lead over the second."""

    tokens: list[int]
    logprobs: list[float]
    leads: list[float]


def huggingface_greedy(model: Any, prompt: Sequence[int], num_new: int) -> Expected:
    result = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=num_new,
        min_new_tokens=0,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = result.sequences[0, len(prompt) :].tolist()
    logits = [step[0].float() for step in result.logits]
    top = [own.topk(2).values for own in logits]
    return Expected(
        tokens,
        [float(own.log_softmax(-1)[token]) for own, token in zip(logits, tokens, strict=True)],
        [float(first - second) for first, second in top],
    )


def assert_same(events: Sequence[Any], expected: Expected) -> None:
    """Equal up to the first position where the reference itself is undecided (lead below 1e-4).

    The ln p are compared too: a tiny model with tied embeddings says the same token whatever its attention does.
    """
    decided = next((index for index, lead in enumerate(expected.leads) if lead < 1e-4), len(expected.leads))
    assert decided > len(expected.leads) // 2, "the reference is undecided almost at once: this would say nothing"
    assert [event.token for event in events[:decided]] == expected.tokens[:decided]
    assert [event.logprob for event in events[:decided]] == pytest.approx(expected.logprobs[:decided], abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_thresholds_never_met_give_transformers_greedy_tokens(family, directory):
    tiny = directory(family)
    exits = [exit for exit in EXITS if exit["layer"] < tiny.reference.config.num_hidden_layers]
    engine = engine_of(build(tiny.path, exits))
    prompts = some_prompts(engine.model.vocab_size)
    result = engine.generate(prompts, max_new_tokens=14, policy=ExitPolicy(NEVER_MET))
    assert all(result.stats.evaluations[exit["name"]] == 3 * 13 for exit in exits), (
        "every exit is asked about every token"
    )
    for index, prompt in enumerate(prompts):
        assert_same(result.events_of(index), huggingface_greedy(tiny.reference, prompt, 14))
    assert engine.generate(prompts, max_new_tokens=14, mode="full").tokens == result.tokens


def test_prompt_logits_are_those_of_transformers(directory, llama):
    engine = engine_of(llama)
    prompt = some_prompts(133, [12])[0]
    scored = engine.score([prompt], 1, mode="full")
    logits = reference_logits(directory("llama").reference, torch.tensor([prompt]))[0]
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(scored.logprobs[0]), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("mistake", ["all zero", "one behind while decoding"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_control_wrong_positions_are_noticed(family, mistake, directory):
    """What a wrong rotary or learned position does to the comparison above."""
    tiny = directory(family)
    engine = engine_of(build(tiny.path, []))
    model = engine.model

    def wrong(positions: TokenPositions) -> torch.Tensor:
        if mistake == "all zero":
            return torch.zeros_like(positions.position)
        return positions.position - 1 if len(positions) == 1 else positions.position

    prompt = some_prompts(model.vocab_size, (5,))[0]
    expected = huggingface_greedy(tiny.reference, prompt, 14)
    assert_same(engine.generate([prompt], max_new_tokens=14, mode="full").events, expected)
    if family == "llama":
        table = model._rotary
        model._rotary = SimpleNamespace(at=lambda positions: table._table[wrong(positions)][:, None])
    else:
        embed = model.embed
        model.embed = lambda tokens, positions: embed(tokens, SimpleNamespace(position=wrong(positions)))
    with pytest.raises(AssertionError):
        assert_same(engine.generate([prompt], max_new_tokens=14, mode="full").events, expected)


def often_met(model: Any, exits: Sequence[str]) -> ExitPolicy:
    """Thresholds at which about half of the questions to each exit are answered with yes."""
    engine = engine_of(model)
    tokens = some_prompts(engine.model.vocab_size, (30, 30))
    taps, rotary = whole_sequence_taps(model, tokens)
    thresholds = {}
    for name in exits:
        logits = whole_sequence_logits(model, name, taps, rotary)
        thresholds[name] = float(confidence(logits, "max_probability").median())
    return ExitPolicy(thresholds, active=tuple(exits))


def whole_sequence_taps(model: Any, tokens: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """Megatron's own forward pass over whole sequences of one length."""
    from nemo_ee.megatron.model.microbatch import MicroBatch

    ids = torch.tensor(tokens)
    length = ids.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    batch = MicroBatch(ids, ids, torch.ones(ids.shape), torch.arange(length).expand_as(ids), mask)
    stage = model.forward_to_taps(batch)
    return stage, mask


@torch.no_grad()
def whole_sequence_logits(model: Any, name: str | None, stage: Any, mask: torch.Tensor) -> torch.Tensor:
    """[b, s, vocab_size] of one exit (None: the final one) from `whole_sequence_taps`."""
    if name is None:
        terms = [(stage.hidden, model.backbone_output_weight())]
    else:
        head = model.exits[name]
        tap = stage.taps[head.exit.stop]
        terms = head.output_terms(head(tap, attention_mask=mask, rotary_pos_emb=stage.rotary_pos_emb))
    logits = sum(own @ weight.t() for own, weight in terms)
    return logits.transpose(0, 1)[..., : model.true_vocab_size].float()


@pytest.mark.parametrize(("family", "rotary_percent"), [("llama", 1.0), ("llama", 0.4), ("gpt2", 1.0)])
def test_each_token_leaves_where_a_whole_sequence_pass_says(family, rotary_percent, directory):
    model = build(directory(family).path, rotary_percent=rotary_percent)
    names = tuple(point.name for point in engine_of(model).model.exits)
    policy = often_met(model, names)
    for prompt in some_prompts(131, (4, 7)):
        engine = engine_of(model)
        result = engine.generate([prompt], max_new_tokens=24, policy=policy, sampling=VARIED)
        sequence = [*prompt, *result.tokens[0]]
        stage, mask = whole_sequence_taps(model, [sequence])
        logits = {name: whole_sequence_logits(model, name, stage, mask)[0] for name in (*names, None)}
        certainty = {name: confidence(values, "max_probability").tolist() for name, values in logits.items()}
        left_at = set()
        for event in result.events:
            row = event.position - 1  # the token was read from the position before it
            sure = [name for name in names if certainty[name][row] > policy.thresholds[name]]
            expected = sure[0] if sure and event.position > len(prompt) else None
            assert event.exit == expected
            assert event.confidence == pytest.approx(certainty[expected][row], abs=1e-5)
            assert event.logprob == pytest.approx(float(logits[expected][row].log_softmax(-1)[event.token]), abs=1e-4)
            left_at.add(expected)
        assert len(left_at) >= 3, f"tokens left only at {left_at}: the test says too little"


@pytest.mark.parametrize("exit", EXITS, ids=lambda exit: exit["name"])
def test_after_flush_the_cache_is_that_of_a_full_depth_run(exit, directory, llama):
    engine = engine_of(llama)
    policy = often_met(llama, [exit["name"]])
    prompts = some_prompts(133, (6, 2))
    session = engine.start([Request(tuple(prompt), 24, VARIED) for prompt in prompts], policy=policy)
    events = []
    while len(events) < 30 or not any(session.num_pending(index) for index in range(2)):
        assert not session.finished, "nothing waits, so flush() has nothing to do"
        events += session.step()
    left = sum(event.exit is not None for event in events)
    assert 5 < left < len(events) - 5, f"{left} of {len(events)} tokens left early: the test says too little"
    session.flush()
    assert not any(session.num_pending(index) for index in range(2))
    for index, prompt in enumerate(prompts):
        # The last token is never fed.
        fed = [*prompt, *(event.token for event in events if event.sequence == index)][:-1]
        reference = directory("llama").reference(torch.tensor([fed]), use_cache=True).past_key_values
        for layer, (keys, values) in enumerate(reference, start=1):
            assert session.cache.valid(layer)[index].tolist() == [
                position < len(fed) for position in range(session.cache.max_length)
            ]
            found = session.cache.keys(layer)[index, :, : len(fed)], session.cache.values(layer)[index, :, : len(fed)]
            torch.testing.assert_close(found[0], keys[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found[1], values[0], atol=1e-5, rtol=1e-5)
        if exit["architecture"] == "layer":
            alone = engine.model.new_cache(1, 32, (exit["name"],))
            positions = TokenPositions.of({0: range(len(fed))})
            stop = next(point.stop for point in engine.model.exits if point.name == exit["name"])
            hidden = engine.model.run(engine.model.embed(torch.tensor(fed), positions), positions, 0, stop, alone)
            engine.model.write_exit_kv(exit["name"], hidden, positions, alone)
            for side in ("keys", "values"):
                torch.testing.assert_close(
                    getattr(session.cache, side)(exit["name"])[index, :, : len(fed)],
                    getattr(alone, side)(exit["name"])[0, :, : len(fed)],
                    atol=1e-5,
                    rtol=1e-5,
                )
