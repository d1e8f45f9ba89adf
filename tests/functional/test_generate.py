# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The generation script, on a converted tiny model, against transformers on the same directory."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.megatron_models import REFERENCE_MODEL, ROOT, reset_batch_sizes, script_config, user_environment

import torch  # isort: skip  # after the CPU host is on

from tests.helpers.huggingface_models import save_tiny_model
from tests.helpers.nemo_files import rewritten
from tests.helpers.served_model import serve_config

SCRIPT = "megatron_gpt_early_exit_generate"
EXITS = [
    {"name": "one-mlp", "layer": 1, "architecture": "mlp"},
    {"name": "two-layer", "layer": 2, "architecture": "layer"},
]
PROMPTS = ["def add(a, b):", "class É", "x"]
NUM_NEW = 12


def run_script(*overrides: str, **changes: Any) -> None:
    """Call the script's `main` with its yaml, overrides, and values set as they are."""
    from omegaconf import OmegaConf

    reset_batch_sizes()
    spec = importlib.util.spec_from_file_location(SCRIPT, ROOT / "examples" / f"{SCRIPT}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with script_config(SCRIPT, overrides) as cfg:
        for key, value in changes.items():
            OmegaConf.update(cfg, key, value)
        os.environ["HYDRA_FULL_ERROR"] = "1"  # problems as the exceptions they are; conftest takes it back
        script.main(cfg)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`path` of an early-exit `.nemo`, converted from `directory`, and the transformers model it came from."""
    from nemo_ee.commands.convert import convert

    folder = tmp_path_factory.mktemp("generate")
    directory = folder / "hugging_face"
    reference = save_tiny_model(directory, "llama", vocab_size=4096)
    for file in REFERENCE_MODEL.glob("*token*.json"):
        (directory / file.name).write_bytes(file.read_bytes())
    reset_batch_sizes()
    overrides = [f"source={directory}", f"output={folder / 'ee.nemo'}", "probe_tokens=8"]
    with script_config("megatron_gpt_early_exit_convert", overrides) as cfg:
        cfg.model.early_exit.exits = EXITS
        convert(cfg)
    return SimpleNamespace(path=folder / "ee.nemo", directory=directory, reference=reference)


@pytest.fixture
def generate(model, tmp_path, capsys):
    """(overrides) -> what the script printed, and the lines of its output file."""

    def call(*overrides: str, **changes: Any) -> tuple[str, list[dict[str, Any]]]:
        output = tmp_path / "out.jsonl"
        capsys.readouterr()
        values = {"prompts": PROMPTS, "tokens_to_generate": NUM_NEW, "output": str(output), "overwrite": True}
        values |= {"model.restore_from_path": str(model.path)}
        run_script(*overrides, **(values | changes))
        return capsys.readouterr().out, [json.loads(line) for line in output.read_text("utf-8").splitlines()]

    return call


@pytest.fixture
def often_met(generate) -> float:
    """A threshold that about half of the tokens beat at the first exit."""
    _, lines = generate(threshold=0.0, greedy=False, exits=["one-mlp"])
    return statistics.median(token["confidence"] for line in lines for token in line["tokens"][1:])


def table_counts(printed: str) -> dict[str, int]:
    """exit -> tokens, as the table says."""
    rows = re.findall(r"(\S+) +\d+/3 +(\d+) +[\d.]+ %", printed)
    return {name: int(count) for name, count in rows}


def test_never_leaving_early_prints_what_transformers_generates(generate, model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.directory)
    _, lines = generate(threshold=0.9999)
    _, full = generate(mode="full")
    assert [line["tokens"] for line in full] == [line["tokens"] for line in lines]
    for prompt, line in zip(PROMPTS, lines, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, do_sample=False
        )[0, ids.shape[1] :].tolist()
        assert line["prompt"] == prompt
        assert [token["id"] for token in line["tokens"]] == expected
        assert line["text"] == "".join(token["text"] for token in line["tokens"])
        assert line["text"] == tokenizer.decode([*ids[0], *expected])[len(prompt) :]
        assert {(token["exit"], token["layer"]) for token in line["tokens"]} == {("final", 3)}
        assert line["finish_reason"] == "length"


def test_ids_that_the_tokenizer_lacks_have_no_text(model):
    from nemo_ee.commands.generate import decode, stored_tokenizer
    from nemo_ee.models.connector import read_config

    tokenizer = stored_tokenizer(model.path, read_config(model.path))
    assert decode(tokenizer, [40, 5000, 41]) == decode(tokenizer, [40, 41]) != ""


def test_exits_are_shown_counted_and_written(generate, often_met):
    printed, lines = generate(threshold=often_met, greedy=False)
    exits = [token["exit"] for line in lines for token in line["tokens"]]
    counts = {name: exits.count(name) for name in ("one-mlp", "two-layer", "final")}
    assert counts["one-mlp"] and counts["final"] > len(PROMPTS), f"{counts}: this would say too little"
    assert table_counts(printed) == counts
    layers = [token["layer"] for line in lines for token in line["tokens"]]
    assert f"{len(layers)} tokens, mean depth {sum(layers) / len(layers):.2f} of 3 layers" in printed
    for line in lines:
        for index, token in enumerate(line["tokens"]):
            assert token["layer"] == {"one-mlp": 1, "two-layer": 2, "final": 3}[token["exit"]]
            assert index or token["exit"] == "final", "the first token is the final exit's"
            assert token["exit"] == "final" or token["confidence"] > often_met
            assert token["logprob"] <= 0
    assert "\x1b" not in printed, "no colours where there is no terminal"
    marks = [line for line in printed.splitlines() if line.strip() and set(line.strip()) <= set("ab.-")]
    assert sum(line.count("a") for line in marks) == counts["one-mlp"]


def test_a_batch_changes_nothing(generate, often_met):
    sampled = {"greedy": False, "temperature": 1.5, "top_k": 50, "seed": 5, "threshold": often_met}
    printed, alone = generate(**sampled)
    together_printed, together = generate(batch_size=3, **sampled)
    assert table_counts(printed) == table_counts(together_printed)
    for one, other in zip(alone, together, strict=True):
        for ours, theirs in zip(one["tokens"], other["tokens"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)


def test_two_pipeline_stages_print_and_write_what_one_does(generate, often_met, model, tmp_path):
    """Exits on either stage; in fp32 up to rounding, in bf16 as many tokens."""
    common = {"greedy": False, "temperature": 1.5, "seed": 5, "threshold": often_met, "batch_size": 2}
    staged = {
        "model.restore_from_path": str(model.path), "prompts": PROMPTS, "tokens_to_generate": NUM_NEW,
        "trainer.devices": 2, "model.pipeline_model_parallel_size": 2, "model.layer_split.layers": [1, 2], **common,
    }  # fmt: skip
    runs = [{**staged, "output": str(tmp_path / "fp32.jsonl")}]
    runs += [{**staged, "output": str(tmp_path / "bf16.jsonl"), "trainer.precision": "bf16"}]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable, "-m", "tests.functional.generate_program", str(tmp_path / "runs.json"), str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, env=user_environment(), capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    printed, expected = generate(**common)
    assert all(table_counts(printed)[name] for name in ("one-mlp", "two-layer", "final"))
    assert table_counts((tmp_path / "run0.rank0.log").read_text()) == table_counts(printed)
    found, half = ([json.loads(line) for line in open(run["output"])] for run in runs)
    for one, other in zip(found, expected, strict=True):
        assert one["text"] == other["text"]
        for ours, theirs in zip(one["tokens"], other["tokens"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)
    assert [len(line["tokens"]) for line in half] == [len(line["tokens"]) for line in expected]


def test_the_same_seed_gives_the_same_text(generate):
    sampled = {"greedy": False, "temperature": 2.0, "threshold": 1.0}
    texts = [[line["text"] for line in generate(seed=seed, **sampled)[1]] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_only_the_exits_asked_for_are_used(generate):
    printed, _ = generate(threshold=0.0, exits=["two-layer"])
    counts = table_counts(printed)
    assert counts == {"one-mlp": 0, "two-layer": len(PROMPTS) * (NUM_NEW - 1), "final": len(PROMPTS)}


def test_self_speculation_writes_what_the_full_model_does(generate):
    """Greedy: the same tokens. Sampled: a token of every draft's check, and the same again with the same seed."""
    _, full = generate(mode="full")
    printed, lines = generate(mode="self_speculative", threshold=0.0, num_draft_tokens=3, batch_size=2)
    for one, other in zip(full, lines, strict=True):
        assert [token["id"] for token in one["tokens"]] == [token["id"] for token in other["tokens"]]
        assert [token["logprob"] for token in one["tokens"]] == pytest.approx(
            [token["logprob"] for token in other["tokens"]], abs=1e-4
        )
    drafted, rate = re.search(r"(\d+) tokens drafted, ([\d.]+) % accepted, [\d.]+ per verification", printed).groups()
    accepted = sum(token["exit"] != "final" for line in lines for token in line["tokens"])
    assert int(drafted) >= 3 * NUM_NEW // 2 and float(rate) == pytest.approx(100 * accepted / int(drafted), abs=0.06)
    sampled = {"mode": "self_speculative", "threshold": 0.0, "num_draft_tokens": 2, "greedy": False, "seed": 3}
    assert generate(**sampled)[1] == generate(**sampled)[1]


def test_an_end_string_ends_where_transformers_ends(generate, model):
    """Against `generate(stop_strings=...)`, with a string of the second prompt's own answer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.directory)
    _, free = generate(mode="full")
    string = "".join(token["text"] for token in free[1]["tokens"][3:6])
    assert len(string) > 1
    for mode in ("full", "self_speculative"):
        _, lines = generate(mode=mode, threshold=0.0, max_pending_tokens=3, num_draft_tokens=3, end_strings=[string])
        for prompt, line in zip(PROMPTS, lines, strict=True):
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            expected = model.reference.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, do_sample=False,
                stop_strings=string, tokenizer=tokenizer,
            )[0, ids.shape[1] :].tolist()  # fmt: skip
            assert [token["id"] for token in line["tokens"]] == expected
        assert lines[1]["finish_reason"] == "stop" and len(lines[1]["tokens"]) <= 6


def test_static_depth_reads_from_one_exit(generate):
    printed, lines = generate(mode="static_depth", exits=["two-layer"])
    assert {token["exit"] for line in lines for token in line["tokens"]} == {"two-layer"}
    assert table_counts(printed) == {"one-mlp": 0, "two-layer": len(PROMPTS) * NUM_NEW, "final": 0}


def test_colours_on_request(generate, often_met):
    for batch_size in (1, 3):
        printed, lines = generate(threshold=often_met, greedy=False, colour="always", batch_size=batch_size)
        assert "\x1b[30;48;5;" in printed
        plain = re.sub(r"\x1b\[[0-9;]*m", "", printed)
        for line in lines:
            assert line["prompt"] in plain


def test_prompts_file_and_half_precision(generate, often_met, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"id": i, "prompt": prompt}) + "\n" for i, prompt in enumerate(PROMPTS)))
    _, from_list = generate(threshold=often_met)
    _, from_file = generate(threshold=often_met, prompts=[], prompts_file=str(file))
    assert from_file == [{"id": i, **line} for i, line in enumerate(from_list)]
    _, half = generate("trainer.precision=bf16", threshold=often_met)
    assert [len(line["tokens"]) for line in half] == [NUM_NEW] * 3


@pytest.fixture
def no_weights(monkeypatch):
    """Restoring a model fails the test: the problem must be seen before."""
    from nemo_ee.models.megatron_early_exit_gpt_model import MegatronEarlyExitGPTModel

    def restore(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(MegatronEarlyExitGPTModel, "restore_from", restore)


@pytest.mark.parametrize("mode", ["early_exit", "static_depth"])
def test_problems_that_the_file_shows_come_before_its_weights_and_at_once(mode, model, no_weights):
    with pytest.raises(ValueError) as caught:
        run_script(
            **{
                "model.restore_from_path": str(model.path),
                "prompts": ["", "x " * 40, "x"],
                "exits": ["one-mpl"],
                "mode": mode,
                "tokens_to_generate": 20,
            }
        )
    message = str(caught.value)
    assert "'one-mpl', which the model does not have (did you mean one-mlp?)" in message
    assert "prompt 0 ('') has no tokens; write something or set add_BOS=True" in message
    too_long = r"prompt 1: \d+ prompt tokens \+ tokens_to_generate = 20 are more than the model's 32 positions; "
    assert re.search(too_long + r"shorten the prompt by at least \d+ tokens", message)
    assert "prompt 2" not in message


def test_a_begin_of_text_token_makes_an_empty_prompt_a_prompt(generate):
    _, lines = generate(prompts=[""], add_BOS=True)
    assert len(lines[0]["tokens"]) == NUM_NEW


def test_a_model_without_exits_says_what_to_do(model, no_weights, tmp_path):
    from nemo_ee.checkpoint.nemo_archive import write_nemo
    from nemo_ee.models.connector import read_config

    config = read_config(model.path)
    config.early_exit = None
    from omegaconf import OmegaConf

    plain = write_nemo(tmp_path / "plain.nemo", {"model_config.yaml": OmegaConf.to_yaml(config)})
    with pytest.raises(ValueError, match="has no exits; .*convert.py, or use mode=full"):
        run_script(**{"model.restore_from_path": str(plain), "prompts": ["x"]})


def test_a_bad_request_ends_the_process_with_one_message_before_nemo_is_loaded():
    command = [sys.executable, str(ROOT / "examples" / f"{SCRIPT}.py"), "trainer.accelerator=cpu", "mode=fast"]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ran.returncode == 2
    for part in ("mode='fast' must be one of", "no prompts are given", "restore_from_path is needed and not given"):
        assert part in ran.stderr
    assert "NeMo" not in ran.stdout + ran.stderr.replace(".nemo", "")


def test_the_script_writes_every_answer_and_then_fails(generate, monkeypatch, tmp_path):
    from nemo_ee.megatron.decoding.decoding_adapter import MegatronDecodingModel

    plain = MegatronDecodingModel.exit_logits

    def broken(self, name, hidden, positions, cache):
        logits = plain(self, name, hidden, positions, cache)
        logits[positions.sequence == 1] = float("nan")
        return logits

    monkeypatch.setattr(MegatronDecodingModel, "exit_logits", broken)
    with pytest.raises(RuntimeError, match="1 of 3 answers failed; see their messages"):
        generate(batch_size=3)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert [line["finish_reason"] for line in lines] == ["length", "error", "length"]


@pytest.mark.parametrize("colour", ["never", "always"])
def test_prompts_that_only_the_loaded_tokenizer_can_refuse_are_refused_at_once(colour, generate, monkeypatch, capsys):
    """Without a stored tokenizer: both problems, with the prompts' own numbers, before anything is generated."""
    from nemo_ee.commands import generate as module

    monkeypatch.setattr(module, "stored_tokenizer", lambda path, stored: None)
    with pytest.raises(ValueError) as caught:
        generate(prompts=["x", "", "y", "z " * 40], colour=colour)
    assert "prompt 1 ('') has no tokens" in str(caught.value) and "prompt 3: " in str(caught.value)
    assert "prompt 0" not in str(caught.value) and "mean depth" not in capsys.readouterr().out


# -- what ends a text, and what begins a prompt ---------------------------------------------------------------------


@pytest.fixture
def ended(model, generate, tmp_path) -> SimpleNamespace:
    """The model with `eos_token_id: [0, n]` in generation_config.json, n from the middle of the first answer: `path`,
    `directory`, `export`, `stops`, and `expected`, new tokens by transformers."""
    import shutil

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nemo_ee.export.huggingface.exporter import HuggingFaceSettings, export_huggingface

    _, free = generate(mode="full")
    stops = [0, free[0]["tokens"][4]["id"]]
    directory = shutil.copytree(model.directory, tmp_path / "hugging_face")
    text = json.dumps({"eos_token_id": stops, "pad_token_id": 3})
    (directory / "generation_config.json").write_text(text)
    path = rewritten(model.path, tmp_path / "ended.nemo", {"tokenizer/generation_config.json": text.encode()})
    export = export_huggingface(HuggingFaceSettings(checkpoint=path, output=tmp_path / "export", progress=False))
    tokenizer, expected = AutoTokenizer.from_pretrained(directory), []
    reference = AutoModelForCausalLM.from_pretrained(directory)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        new = reference.generate(ids, max_new_tokens=NUM_NEW, do_sample=False)[0, ids.shape[1] :]
        expected.append(new.tolist())
    assert len(expected[0]) <= 5 < max(map(len, expected)), "control: one ends early, another does not"
    return SimpleNamespace(path=path, directory=directory, export=export, stops=stops, expected=expected)


def test_everything_ends_a_text_where_transformers_does(ended, generate, tmp_path, monkeypatch, caplog):
    """generate on a `.nemo`, calibrate, every directory of an export, the server: with two end tokens, one of which is
    the tokenizer's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nemo_ee.calibration.calibrate import Calibrator, calibrate
    from nemo_ee.calibration.calibration_request import CalibrationRequest
    from nemo_ee.serving.protocol import Limits, read_request
    from nemo_ee.serving.serve import make_server
    from nemo_ee.serving.settings import ServerSettings

    _, lines = generate(**{"model.restore_from_path": str(ended.path), "mode": "full"})
    assert [[token["id"] for token in line["tokens"]] for line in lines] == ended.expected
    _, lines = generate(**{"model.restore_from_path": str(ended.path), "mode": "full", "stop_on_eos": False})
    assert {len(line["tokens"]) for line in lines} == {NUM_NEW}, "control"

    tokenizer = AutoTokenizer.from_pretrained(ended.directory)
    server = make_server(ServerSettings.from_config(serve_config(ended.export / "hf_early_exit"))).model
    assert server.end_of_text.ids == tuple(ended.stops)
    full = AutoModelForCausalLM.from_pretrained(ended.export / "hf_full")
    remote = AutoModelForCausalLM.from_pretrained(ended.export / "hf_early_exit", trust_remote_code=True)
    for prompt, expected in zip(PROMPTS, ended.expected, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        early, _ = remote.generate(ids, max_new_tokens=NUM_NEW, return_result=True)
        for own in (full.generate(ids, max_new_tokens=NUM_NEW), early):
            assert own[0, ids.shape[1] :].tolist() == expected
        body = {"prompt": prompt, "max_tokens": NUM_NEW, "temperature": 0, "early_exit": {"mode": "full"}}
        session = server.start_session(1)
        session.add(server.prepare(read_request(body, chat=False, limits=Limits(64, 1))).requests[0])
        new = []
        while not session.finished:
            new += [event.token for event in session.step()]
        assert new == expected
    written = {path.read_text() for path in ended.export.glob("hf_*/generation_config.json")}
    assert len(written) == 1 and json.loads(written.pop())["eos_token_id"] == ended.stops
    assert len(list(ended.export.glob("hf_exit_*/generation_config.json"))) == 2

    answers: list[list[int]] = []

    def run(calibrator: Calibrator) -> None:
        for result in calibrator._generate(range(len(PROMPTS)), None):
            answers.extend(map(list, result.tokens))
        raise InterruptedError

    monkeypatch.setattr(Calibrator, "run", run)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    reset_batch_sizes()
    with script_config("megatron_gpt_early_exit_calibrate", []) as cfg:
        cfg.model.restore_from_path, cfg.data, cfg.output = (
            str(ended.path),
            str(tmp_path / "data.jsonl"),
            str(tmp_path),
        )
        cfg.tokens_to_generate, cfg.epsilon, cfg.delta, cfg.certificate = NUM_NEW, 0.6, 0.5, None
        from omegaconf import OmegaConf

        with pytest.raises(InterruptedError):
            calibrate(cfg, CalibrationRequest.from_config(OmegaConf.to_container(cfg, resolve=True)))
    assert sorted(answers) == sorted(ended.expected)


def test_a_prompt_is_the_same_tokens_everywhere(model, tmp_path):
    """With a tokenizer that adds its begin-of-text token as Llama's does, and one that adds none: typed or added it is
    there once, in generate, calibrate and the server, and in chats whose template writes it."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    from nemo_ee.commands.generate import prompt_ids, stored_tokenizer
    from nemo_ee.exits.config import ExitConfig
    from nemo_ee.generation.policy import ExitPolicy
    from nemo_ee.models.connector import read_config
    from nemo_ee.serving.exit_choice import ExitChoice
    from nemo_ee.serving.protocol import Limits, read_request
    from nemo_ee.serving.served_model import ServedModel
    from nemo_ee.text.special_tokens import EndOfText
    from tests.helpers.stub_models import TinyTransformer

    stub = TinyTransformer([ExitConfig("one", 1, "mlp", "random", "own")], num_layers=2)
    stub.vocab_size = 4096
    for adds_bos in (False, True):
        own = AutoTokenizer.from_pretrained(model.directory)
        bos = own.bos_token
        if adds_bos:
            own.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
        own.chat_template = "{{ bos_token }}{{ messages[0].content }}"
        own.save_pretrained(tmp_path / f"{adds_bos}")
        files = {f"tokenizer/{file.name}": file.read_bytes() for file in (tmp_path / f"{adds_bos}").iterdir()}
        path = rewritten(model.path, tmp_path / f"{adds_bos}.nemo", files)
        stored = stored_tokenizer(path, read_config(path))
        served = ServedModel(
            "demo", stub, own, ExitChoice("full", ExitPolicy(0.5)), EndOfText((0,), 0), None, 4
        )  # fmt: skip

        def ids(body: dict[str, Any], chat: bool = False, served: Any = served) -> list[int]:
            call = read_request({"max_tokens": 1, **body}, chat=chat, limits=Limits(64, 1))
            return list(served.prepare(call).requests[0].prompt)

        plain = own("def f(x):", add_special_tokens=False).input_ids
        for text in ("def f(x):", f"{bos}def f(x):"):
            expected = [0, *plain] if adds_bos or text.startswith(bos) else plain
            assert prompt_ids(stored, text, None) == ids({"prompt": text}) == expected
            assert prompt_ids(stored, text, True) == [0, *plain]
        assert prompt_ids(stored, "def f(x):", False) == plain
        assert ids({"messages": [{"role": "user", "content": "def f(x):"}]}, chat=True) == [0, *plain]
