# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What a user of transformers types on `hf_early_exit` with `trust_remote_code`: it works, or is refused by name.

Tokens at full depth are compared with `hf_full` in the same version, tokens with early exit with nemo_ee's own runtime
on the same directory.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)

from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.runtime.loader import load_model

THRESHOLD, NEW = 0.03, 16
TEXT = "for i in range(7):\n"


@pytest.fixture(scope="module")
def folder(exports: Path) -> Path:
    return exports / "text" / "hf_early_exit"


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def model(folder: Path) -> Any:
    return load(folder)


def load(folder: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings)


@pytest.fixture(scope="module")
def full(exports: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(exports / "text" / "hf_full")


@pytest.fixture(scope="module")
def prompt(tokenizer: Any) -> dict[str, torch.Tensor]:
    return dict(tokenizer(TEXT, return_tensors="pt"))


@pytest.fixture(scope="module")
def expected(folder: Path, prompt: dict) -> list[int]:
    """Prompt and new tokens with early exit, by the runtime."""
    tokens = prompt["input_ids"][0].tolist()
    engine = EarlyExitEngine(load_model(folder))
    result = engine.generate([tokens], max_new_tokens=NEW, policy=ExitPolicy(THRESHOLD))
    assert len({event.exit for event in result.events}) > 1 and result.finish_reasons == ("length",)
    return tokens + list(result.tokens[0])


def early(model: Any, prompt: dict, **settings: Any) -> Any:
    return model.generate(**prompt, early_exit_threshold=THRESHOLD, **{"max_new_tokens": NEW, **settings})


# -- the stock class ------------------------------------------------------------------------------------------------


def test_without_early_exit_everything_is_the_stock_class_s(model: Any, full: Any, prompt: dict) -> None:
    assert isinstance(model, type(full)) and isinstance(model, torch.nn.Module)
    assert torch.equal(model(**prompt).logits, full(**prompt).logits)
    assert model(**prompt, labels=prompt["input_ids"]).loss.requires_grad
    call = {**prompt, "max_new_tokens": NEW, "do_sample": False}
    greedy = full.generate(**call)
    for settings in ({}, {"num_beams": 1, "use_cache": True}, {"num_beams": 3}, {"no_repeat_ngram_size": 1}):
        assert torch.equal(model.generate(**call, **settings), full.generate(**call, **settings))
    assert torch.equal(model.generate(**call, assistant_model=full), greedy)
    assert not torch.equal(early(model, prompt), greedy), "control"
    engine, result = model.generate(**call, return_result=True)
    assert torch.equal(engine, greedy) and {event.exit for event in result.events} == {None}


def test_what_is_saved_loads_again(
    model: Any, prompt: dict, expected: list[int], exports: Path, tmp_path: Path
) -> None:
    """Parameters, Python files and config; saved by this version in one file and in several, and by 4.51."""
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "several", max_shard_size="8KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1
    for saved in (tmp_path / "one", tmp_path / "several", exports / "saved"):
        again, report = load(saved, output_loading_info=True)
        assert not any(report.values()), report
        assert early(again, prompt)[0].tolist() == expected
        runtime = EarlyExitEngine(load_model(saved))
        tokens = expected[: prompt["input_ids"].shape[1]]
        result = runtime.generate([tokens], max_new_tokens=NEW, policy=ExitPolicy(THRESHOLD))
        assert tokens + list(result.tokens[0]) == expected
        config = json.loads((saved / "config.json").read_text())
        assert {"rope_theta", "rope_parameters"} <= config.keys(), "each version finds its spelling"


def test_both_spellings_follow_the_config(exports: Path, tmp_path: Path) -> None:
    scaled = load(exports / "models" / "llama-llama3" / "hf_early_exit")
    scaled.save_pretrained(tmp_path / "scaled")
    config = json.loads((tmp_path / "scaled" / "config.json").read_text())
    assert config["rope_theta"] == 5000.0 and config["rope_scaling"]["rope_type"] == "llama3"
    assert config["rope_parameters"] == {**config["rope_scaling"], "rope_theta": 5000.0}


# -- lengths, ends, sampling ----------------------------------------------------------------------------------------


def test_lengths(model: Any, prompt: dict, expected: list[int]) -> None:
    length = prompt["input_ids"].shape[1]

    def new(**settings: Any) -> list[int]:
        return model.generate(**prompt, early_exit_threshold=THRESHOLD, **settings)[0].tolist()

    assert new(max_length=length + 5) == expected[: length + 5]
    assert new(generation_config=GenerationConfig(max_new_tokens=3)) == expected[: length + 3]
    assert len(new()) == length + 20, "transformers' default"
    end = expected[length + 1]
    assert new(max_new_tokens=NEW, eos_token_id=end, pad_token_id=0) == expected[: length + 2]
    for least in ({"min_new_tokens": 6}, {"min_length": length + 6}):
        longer = new(max_new_tokens=NEW, eos_token_id=[end], pad_token_id=0, **least)
        assert len(longer) >= length + 6 and end not in longer[length : length + 6]
    with pytest.raises(ValueError, match="more than the model's 64 positions"):
        new(max_new_tokens=60)


def test_stopping_criteria(model: Any, prompt: dict, expected: list[int]) -> None:
    length = prompt["input_ids"].shape[1]

    class Third(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.tensor([row.tolist() == expected[: length + 3] for row in input_ids])

    stopped = early(model, prompt, stopping_criteria=StoppingCriteriaList([Third()]), pad_token_id=0)
    assert stopped[0].tolist() == expected[: length + 3]


def test_stop_strings(model: Any, prompt: dict, expected: list[int], tokenizer: Any) -> None:
    text = tokenizer.decode(expected[-3])
    first = next(i for i in range(len(prompt["input_ids"][0]), len(expected)) if text in tokenizer.decode(expected[i]))
    stopped = early(model, prompt, stop_strings=[text], tokenizer=tokenizer, pad_token_id=0)
    assert stopped[0].tolist() == expected[: first + 1]


def test_a_batch_is_padded_on_either_side(model: Any, prompt: dict, expected: list[int]) -> None:
    ids, pad = prompt["input_ids"], torch.zeros((1, 4), dtype=torch.int64)
    rows = torch.cat((torch.cat((pad, ids), 1), torch.cat((ids, pad), 1)))
    mask = torch.cat((torch.cat((pad, torch.ones_like(ids)), 1), torch.cat((torch.ones_like(ids), pad), 1)))
    tokens = early(model, {"input_ids": rows, "attention_mask": mask}, pad_token_id=0)
    assert tokens.shape == (2, rows.shape[1] + NEW) and torch.equal(tokens[:, : rows.shape[1]], rows)
    assert tokens[:, rows.shape[1] :].tolist() == [expected[ids.shape[1] :]] * 2


def test_sampling(model: Any, prompt: dict) -> None:
    """Seeds come from torch's generator, one for each sequence; the settings of transformers have their effect."""
    call = {"do_sample": True, "top_k": 40, "top_p": 0.95, "min_p": 0.001, "temperature": 1.5, "pad_token_id": 0}
    call |= {"repetition_penalty": 1.1, "num_return_sequences": 3}
    transformers.set_seed(1)
    one, other = early(model, prompt, **call), early(model, prompt, **call)
    transformers.set_seed(1)
    assert torch.equal(early(model, prompt, **call), one) and not torch.equal(one, other)
    assert len({tuple(row) for row in one.tolist()}) == 3
    seeded = [early(model, prompt, **call, seed=seed) for seed in (5, 5, 6)]
    assert torch.equal(seeded[0], seeded[1]) and torch.equal(seeded[0][1:], seeded[2][:2])
    greedy = early(model, prompt)
    for settings in ({"top_k": 1}, {"temperature": 1e-4}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert torch.equal(early(model, prompt, do_sample=True, **settings), greedy), settings
    assert not torch.equal(early(model, prompt, repetition_penalty=5.0), greedy)


# -- around generate ------------------------------------------------------------------------------------------------


def test_streamer(model: Any, prompt: dict, expected: list[int], tokenizer: Any) -> None:
    class Kept:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Kept()
    early(model, prompt, streamer=streamer)
    assert streamer.tokens == expected and streamer.ended
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    call = {"early_exit_threshold": THRESHOLD, "max_new_tokens": NEW, "streamer": streamer}
    thread = threading.Thread(target=model.generate, kwargs={**prompt, **call})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(expected[prompt["input_ids"].shape[1] :])


def test_pipeline(folder: Path, model: Any, tokenizer: Any, expected: list[int]) -> None:
    call = {"early_exit_threshold": THRESHOLD, "max_new_tokens": NEW, "do_sample": False}
    for made in (
        pipeline("text-generation", model=str(folder), trust_remote_code=True),
        pipeline("text-generation", model=model, tokenizer=tokenizer),
    ):
        assert made(TEXT, **call)[0]["generated_text"] == tokenizer.decode(expected)


def test_return_dict(model: Any, prompt: dict, expected: list[int]) -> None:
    output = early(model, prompt, return_dict_in_generate=True)
    assert output.sequences[0].tolist() == expected


@pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="device_map needs accelerate")
def test_device_map(folder: Path, prompt: dict, expected: list[int], tmp_path: Path) -> None:
    assert early(load(folder, device_map="auto"), prompt)[0].tolist() == expected
    assert early(load(folder, device_map={"": "cpu"}), prompt)[0].tolist() == expected
    disk = {"model": "disk", "lm_head": "cpu", "exit_heads": "cpu"}
    spread = load(folder, device_map=disk, offload_folder=str(tmp_path))
    assert spread.generate(**prompt, max_new_tokens=2, do_sample=False)[0].tolist(), "the stock class runs"
    with pytest.raises(ValueError, match="early exit needs all parameters on one device, and they are on cpu, meta"):
        early(spread, prompt)


def test_dtype(folder: Path, prompt: dict, expected: list[int]) -> None:
    for settings in ({"dtype": torch.bfloat16}, {"torch_dtype": torch.bfloat16}, {"torch_dtype": "bfloat16"}):
        model = load(folder, **settings)
        assert model.dtype is torch.bfloat16 and early(model, prompt).shape == (1, len(expected))
    assert early(load(folder).to("cpu", torch.float32), prompt)[0].tolist() == expected
    with pytest.raises(ValueError, match="bfloat16, float16, float32, and some are in torch.float64"):
        early(load(folder).double(), prompt)


# -- the engine over the model's parameters -------------------------------------------------------------------------


def changed_in_place(model: Any) -> None:
    with torch.no_grad():
        next(iter(model.exit_heads.parameters())).mul_(-3)


def changed_through_data(model: Any) -> None:
    model.lm_head.weight.data.mul_(-1)


def changed_by_assignment(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())


def changed_by_load(model: Any) -> None:
    model.load_state_dict({name: -value for name, value in model.state_dict().items()})


@pytest.mark.parametrize("change", [changed_in_place, changed_through_data, changed_by_assignment, changed_by_load])
def test_changed_parameters_are_decoded(change: Any, model: Any, prompt: dict, expected: list[int], tmp_path: Path):
    assert early(model, prompt)[0].tolist() == expected
    assert model.engine is model.engine, "made once"
    before = model.engine
    change(model)
    assert model.engine is not before
    tokens = early(model, prompt, eos_token_id=None, pad_token_id=0)
    model.save_pretrained(tmp_path / "changed")
    assert torch.equal(tokens, early(load(tmp_path / "changed"), prompt, eos_token_id=None, pad_token_id=0))


def test_copies_are_models_of_their_own(model: Any, prompt: dict, expected: list[int]) -> None:
    early(model, prompt)
    other = copy.deepcopy(model)
    changed_through_data(other)
    assert early(model, prompt)[0].tolist() == expected and early(other, prompt)[0].tolist() != expected


def test_weights_that_need_no_change_are_shared(model: Any) -> None:
    shared = model.engine.model.weights.embedding
    assert shared.data_ptr() == model.get_input_embeddings().weight.data_ptr()


# -- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_beams": 2}, "num_beams=2: not supported with early exit; leave it out"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size=3: not supported"),
        ({"generation_config": GenerationConfig(typical_p=0.5, do_sample=True)}, "typical_p=0.5: not supported"),
        ({"use_cache": False}, "use_cache=False: not supported"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores=True: not supported"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3: not supported"),
        ({"logits_processor": [print]}, "logits_processor: not supported"),
        ({"prefix_allowed_tokens_fn": print}, "prefix_allowed_tokens_fn: not supported"),
        ({"early_exit_treshold": 0.5}, "early_exit_treshold: not supported"),
        ({"max_waiting": 3}, "max_waiting is now max_pending_tokens"),
        ({"early_exit_threshold": 2.0}, r"threshold = 2.0 must be a number in 0..1"),
        ({"early_exits": ["x"]}, "active names the exit 'x', which the model does not have"),
        ({"early_exits": "x"}, "must be a list of exit names"),
        ({"early_exit_threshold": None, "max_pending_tokens": 3}, "max_pending_tokens=3: without effect"),
        ({"early_exit_criterion": "probe"}, "early_exit_criterion='probe': a loaded model has no probes"),
    ],
)
def test_refusals(settings: dict, words: str, model: Any, prompt: dict) -> None:
    with pytest.raises(ValueError, match=words):
        model.generate(**prompt, **{"early_exit_threshold": 0.5, **settings})


def test_every_problem_at_once(model: Any, prompt: dict) -> None:
    with pytest.raises(ValueError, match=r"2 problems:(.|\n)*num_beams=2(.|\n)*use_cache=False"):
        early(model, prompt, num_beams=2, use_cache=False)
    with pytest.raises(ValueError, match="arguments after generation_config need their names"):
        model.generate(prompt["input_ids"], None, None, early_exit_threshold=0.5)


def test_a_missing_parameter_is_named(model: Any, prompt: dict) -> None:
    model.resize_token_embeddings(300)
    words = r"the model: model.embed_tokens.weight has shape \[300, 16\], must be \[257, 16\]"
    with pytest.raises(ValueError, match=words):
        early(model, prompt)
