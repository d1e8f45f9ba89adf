# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Known text on an early-exit `.nemo`, against transformers on the same weights: lm-eval's own evaluator, offline, and
scripts/sweep_thresholds.py.
"""

from __future__ import annotations

import importlib.util
import json
import math
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.megatron_models import REFERENCE_MODEL, ROOT, reset_batch_sizes, script_config

import torch  # isort: skip  # after the CPU host is on

from tests.helpers.huggingface_models import save_tiny_model
from tests.helpers.lm_eval_hf import hugging_face_lm
from tests.helpers.nemo_files import rewritten

lm_eval = pytest.importorskip("lm_eval", reason="the extra eval is not installed")

EXITS = [
    {"name": "one-mlp", "layer": 1, "architecture": "mlp"},
    {"name": "two-layer", "layer": 2, "architecture": "layer"},
]
QUESTIONS = [
    {"question": "def add(a, b):\n    return", "choices": [" a + b", " None", " b"], "answer": 0},
    {"question": "import", "choices": [" os", " numpy as np"], "answer": 1},
    {"question": "", "choices": ["class A:", "x"], "answer": 0},
    {"question": "for i in range(10):\n    print(", "choices": ["i)", "'é')", "1"], "answer": 0},
]
TEXTS = ["def add(a, b):\n    return a + b\n", "class Point:\n    def __init__(self, x, y):\n" * 9, "x"]
TASKS = {
    "choose": """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "read": """
task: read
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "write": """
task: write
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/texts.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: ""
generation_kwargs: {until: ["STOP"], max_gen_toks: 10, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`path` of an early-exit `.nemo`, and transformers' model and tokenizer of the same weights."""
    from transformers import AutoTokenizer

    from nemo_ee.commands.convert import convert

    folder = tmp_path_factory.mktemp("lm_eval")
    directory = folder / "hugging_face"
    reference = save_tiny_model(directory, "llama", vocab_size=4096)
    for file in REFERENCE_MODEL.glob("*token*.json"):
        (directory / file.name).write_bytes(file.read_bytes())
    reset_batch_sizes()
    overrides = [f"source={directory}", f"output={folder / 'ee.nemo'}", "probe_tokens=8"]
    with script_config("megatron_gpt_early_exit_convert", overrides) as cfg:
        cfg.model.early_exit.exits = EXITS
        convert(cfg)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return SimpleNamespace(path=folder / "ee.nemo", reference=reference, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of task files with their data."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, records in (("questions", QUESTIONS), ("texts", [{"text": text} for text in TEXTS])):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)), encoding="utf-8")
    return folder


def evaluate(model: SimpleNamespace, tasks: Path, names: list[str], batch_size: int | str = 3, **changed: Any) -> dict:
    """lm-eval's results, samples included."""
    import nemo_ee.evaluation.lm_eval_adapter  # noqa: F401

    reset_batch_sizes()
    return lm_eval.simple_evaluate(
        model="nemo_ee",
        model_args={"path": str(model.path), **changed},
        tasks=names,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=batch_size,
        device="cpu",
        bootstrap_iters=0,
    )


def responses(results: dict, task: str) -> list[Any]:
    """What the model answered to each document, in their order."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


def reference_logprobs(model: SimpleNamespace, ids: list[int], context: int) -> tuple[float, bool]:
    """(ln p, greedy) of `ids[context:]`, by transformers."""
    with torch.no_grad():
        logprobs = model.reference(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    rows = range(context - 1, len(ids) - 1)
    greedy = all(int(logprobs[row].argmax()) == ids[row + 1] for row in rows)
    return sum(logprobs[row, ids[row + 1]].item() for row in rows), greedy


@pytest.fixture(scope="module")
def full(model: SimpleNamespace, tasks: Path) -> dict:
    """All tasks with the backbone alone."""
    return evaluate(model, tasks, list(TASKS), mode="full")


def test_full_depth_gives_transformers_log_likelihoods(model: SimpleNamespace, full: dict) -> None:
    """Within 1e-4, fp32."""
    encode = model.tokenizer.encode
    for question, answered in zip(QUESTIONS, responses(full, "choose"), strict=True):
        text = question["question"]
        context = encode(text) if text else [model.tokenizer.bos_token_id]
        for choice, (logprob, greedy) in zip(question["choices"], answered, strict=True):
            # As lm-eval cuts: the context's own tokens, then what the whole has after as many.
            ids = [*context, *(encode(text + choice)[len(context) :] if text else encode(choice))]
            expected, is_greedy = reference_logprobs(model, ids, len(context))
            assert logprob == pytest.approx(expected, abs=1e-4) and greedy == is_greedy


def test_long_texts_are_scored_in_windows_each_token_once(model: SimpleNamespace, full: dict) -> None:
    """Within 1e-4 per text. The second text is longer than the model's positions."""
    limit, bos = model.reference.config.max_position_embeddings, model.tokenizer.bos_token_id
    lengths = []
    for text, answered in zip(TEXTS, responses(full, "read"), strict=True):
        ids = model.tokenizer.encode(text)
        lengths.append(len(ids))
        # The first window predicts `limit` tokens after the begin-of-text token; a later one is filled up with what
        # comes before it.
        expected = reference_logprobs(model, [bos, *ids[:limit]], 1)[0]
        for begin in range(limit, len(ids), limit):
            end = min(begin + limit, len(ids))
            expected += reference_logprobs(model, ids[end - limit - 1 : end], limit + 1 - (end - begin))[0]
        assert answered[0] == pytest.approx(expected, abs=1e-4)
    assert max(lengths) > limit


def test_generation_is_transformers(model: SimpleNamespace, full: dict) -> None:
    limit = model.reference.config.max_position_embeddings
    for text, (answered,) in zip(TEXTS, responses(full, "write"), strict=True):
        ids = torch.tensor([model.tokenizer.encode(text)[-(limit - 10) :]])
        new = model.reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, eos_token_id=0
        )[0, ids.shape[1] :]
        assert answered == model.tokenizer.decode(new, skip_special_tokens=True)


@pytest.fixture(scope="module")
def early(model: SimpleNamespace, tasks: Path) -> dict:
    """All tasks with a threshold that everything beats at the first exit."""
    return evaluate(model, tasks, list(TASKS), threshold=0.0)


def test_tokens_are_read_where_they_leave(model: SimpleNamespace, tasks: Path, full: dict, early: dict) -> None:
    """Thresholds that nothing beats change nothing; below that the numbers differ, and say at which exits."""
    never = evaluate(model, tasks, ["choose"], threshold=1.0)
    assert responses(never, "choose") == responses(full, "choose")
    assert full["config"]["tokens_per_exit"].keys() == {"final"} and full["config"]["mean_depth"] == 3.0
    counts = early["config"]["tokens_per_exit"]
    assert counts["one-mlp"] > 100 and set(counts) == {"one-mlp", "final"} and early["config"]["mean_depth"] < 2.0
    for task in ("choose", "read"):
        assert responses(early, task) != responses(full, task)


def test_the_engine_says_the_same(model: SimpleNamespace, early: dict) -> None:
    from nemo_ee.evaluation.lm_eval_adapter import EarlyExitLM
    from nemo_ee.generation.policy import ExitPolicy

    reset_batch_sizes()
    lm = EarlyExitLM(str(model.path), threshold="one-mlp:0.0+two-layer:0.5", device="cpu")
    assert lm._request.policy == ExitPolicy({"one-mlp": 0.0, "two-layer": 0.5})
    text, choice = QUESTIONS[0]["question"], QUESTIONS[0]["choices"][0]
    ids, context = model.tokenizer.encode(text + choice), len(model.tokenizer.encode(text))
    scored = lm._engine.score([ids], context, policy=lm._request.policy)
    assert sum(scored.logprobs[0]) == pytest.approx(responses(early, "choose")[0][0][0], abs=1e-5)
    assert scored.exits[0][0] is None and set(scored.exits[0][1:]) == {"one-mlp"}


# -- lm-eval's own `hf` model on the same weights ---------------------------------------------------------------------

# Lengths around the model's 32 positions, and far beyond.
LINES = "import os\n" * 900
ODD_TEXTS = [
    "",
    "x",
    " ",
    "\n",
    "é",
    "\U0001f600 日本語 naïve",
    "<|endoftext|>",
    "a <|endoftext|> b",
    "def f():\n    return 1  \n",
    LINES,
]


class Both:
    """Our model for lm-eval and lm-eval's `hf`, with one tokenizer.

    Args:
        adds_bos: the tokenizer puts its begin-of-text token in front, as Llama's does.
    """

    def __init__(self, model: SimpleNamespace, adds_bos: bool, batch_size: int = 3, **settings: Any) -> None:
        from tokenizers.processors import TemplateProcessing

        from nemo_ee.evaluation.lm_eval_adapter import EarlyExitLM

        reset_batch_sizes()
        self.ours = EarlyExitLM(str(model.path), mode="full", device="cpu", batch_size=batch_size, **settings)
        self.tokenizer = self.ours.tokenizer
        if adds_bos:
            bos, number = self.tokenizer.bos_token, self.tokenizer.bos_token_id
            template = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
            self.tokenizer.backend_tokenizer.post_processor = template
            assert self.tokenizer("x").input_ids[0] == number
        self.theirs = hugging_face_lm(model.reference, self.tokenizer, batch_size=1, **settings)
        self.length = self.theirs.max_length
        assert self.length == self.ours.max_length

    def ask(self, kind: str, arguments: list[tuple], whom: Any) -> list[Any]:
        from lm_eval.api.instance import Instance

        requests = [Instance(kind, {}, own, index) for index, own in enumerate(arguments)]
        return getattr(whom, kind)(requests, disable_tqdm=True)

    def text(self, length: int, chance: random.Random) -> str:
        """A text of exactly so many tokens, special ones not counted."""
        words = ["x", "def", " a", " =", "\n", "import", " os", "1", "(", ")", "é"]
        for _ in range(1000):
            text = "x"  # a context of whitespace alone is refused by lm-eval's `hf`
            while len(self.tokenizer(text, add_special_tokens=False).input_ids) < length:
                text += chance.choice(words)
            if len(self.tokenizer(text, add_special_tokens=False).input_ids) == length:
                return text
        raise AssertionError(f"no text of {length} tokens")


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "adds_bos"])
def both(request: pytest.FixtureRequest, model: SimpleNamespace) -> Both:
    return Both(model, request.param)


def test_rolling_log_likelihoods_are_those_of_lm_eval_s_hf(both: Both) -> None:
    """Of odd texts, of every length around multiples of the window, and of random ones; within 1e-5 relative."""
    chance, limit = random.Random(7), both.length
    lengths = [1, 2, *range(limit - 2, limit + 3), *range(2 * limit - 2, 2 * limit + 2), 3 * limit, 5 * limit + 1]
    texts = [*ODD_TEXTS, *(both.text(n, chance) for n in [*lengths, *(chance.randrange(1, 150) for _ in range(12))])]
    arguments = [(text,) for text in texts]
    expected = both.ask("loglikelihood_rolling", arguments, both.theirs)
    assert both.ask("loglikelihood_rolling", arguments, both.ours) == pytest.approx(expected, rel=1e-5)


def test_log_likelihoods_are_those_of_lm_eval_s_hf(both: Both) -> None:
    """Over contexts and continuations of every length, empty contexts among them."""
    chance, limit = random.Random(8), both.length
    pairs = [("", text) for text in ODD_TEXTS[1:5]] + [
        (LINES, "import"),
        ("x", both.text(limit - 1, chance)),
        ("é", "é"),
    ]
    pairs += [("", both.text(length, chance)) for length in (1, limit - 1, limit)]
    for context in (1, limit - 1, limit, limit + 1, 3 * limit):
        pairs += [(both.text(context, chance), "\n" + both.text(n, chance)) for n in (1, 2, limit // 2, limit - 3)]
    pairs += [
        (both.text(chance.randrange(1, 70), chance), "\n" + both.text(chance.randrange(1, limit - 2), chance))
        for _ in range(20)
    ]
    expected = both.ask("loglikelihood", pairs, both.theirs)
    ours = both.ask("loglikelihood", pairs, both.ours)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in expected]
    assert [own for own, _ in ours] == pytest.approx([own for own, _ in expected], rel=1e-5)
    # What lm-eval's `hf` fails on.
    assert both.ask("loglikelihood", [("", ""), ("x", "")], both.ours) == [(0.0, True)] * 2
    blank, none = both.ask("loglikelihood", [("\n", "x"), ("", "\nx")], both.ours)
    assert blank == none


def test_texts_are_those_of_lm_eval_s_hf(both: Both, model: SimpleNamespace) -> None:
    """Contexts of every length, stop texts, and end-of-text tokens that are not the tokenizer's."""
    chance, limit = random.Random(9), both.length
    contexts = [both.text(n, chance) for n in (1, 5, limit - 11, limit - 10, limit - 9, limit, 3 * limit)]
    contexts += ["<|endoftext|>x", "é 日本", LINES]
    plain = {"max_gen_toks": 10, "until": []}
    free = both.ask("generate_until", [(own, plain) for own in contexts], both.ours)
    stop = free[0][2:4]
    arguments = [(own, settings) for own in contexts for settings in (plain, {**plain, "until": [stop, free[1][:1]]})]
    expected = both.ask("generate_until", arguments, both.theirs)
    assert both.ask("generate_until", arguments, both.ours) == expected
    assert any(one != other for one, other in zip(expected[::2], expected[1::2], strict=True))


def test_texts_end_where_those_of_lm_eval_s_hf_end(
    model: SimpleNamespace, full: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At tokens that generation_config.json names and the tokenizer does not; they are no special tokens, so they are
    part of the text."""
    whole = [answer for (answer,) in responses(full, "write")]
    stops = [model.tokenizer(own, add_special_tokens=False).input_ids[3] for own in whole[:2]]
    data = json.dumps({"eos_token_id": stops}).encode()
    path = rewritten(model.path, tmp_path / "ended.nemo", {"tokenizer/generation_config.json": data})
    monkeypatch.setattr(model.reference.generation_config, "eos_token_id", stops)
    both = Both(SimpleNamespace(path=path, reference=model.reference), adds_bos=False)
    arguments = [(text, {"max_gen_toks": 10, "until": []}) for text in TEXTS]
    expected = both.ask("generate_until", arguments, both.theirs)
    assert both.ask("generate_until", arguments, both.ours) == expected
    assert len(expected[0]) < len(whole[0])


@pytest.mark.parametrize("batch_size", ["auto"])
def test_batches_change_nothing(model: SimpleNamespace, tasks: Path, early: dict, batch_size: str) -> None:
    results = evaluate(model, tasks, ["choose", "write"], batch_size=batch_size, threshold=0.0)
    assert responses(results, "write") == responses(early, "write")
    for one, other in zip(responses(results, "choose"), responses(early, "choose"), strict=True):
        for (logprob, greedy), (expected, is_greedy) in zip(one, other, strict=True):
            assert logprob == pytest.approx(expected, abs=1e-5) and greedy == is_greedy


def test_stop_texts_end_an_answer(model: SimpleNamespace, full: dict) -> None:
    from lm_eval.api.instance import Instance

    from nemo_ee.evaluation.lm_eval_adapter import EarlyExitLM

    reset_batch_sizes()
    lm = EarlyExitLM(str(model.path), mode="full", device="cpu", batch_size=2)
    other = rewritten(model.path, model.path.with_name("other.nemo"), {"tokenizer/special_tokens_map.json": b"{}"})
    same = shutil.copy(model.path, model.path.with_name("same.nemo"))
    names = [lm.tokenizer_name]
    for path in (same, other):  # lm-eval keeps requests by this name: it says what the tokenizer is, not where
        lm._request = lm._request.model_copy(update={"model": SimpleNamespace(restore_from_path=Path(path))})
        names.append(lm.tokenizer_name)
    assert names[0] == names[1] != names[2] and "/" not in names[0]
    lm._request = lm._request.model_copy(update={"model": SimpleNamespace(restore_from_path=model.path)})
    whole = [answer for (answer,) in responses(full, "write")]
    stop = whole[0][3:5]

    def ask(**settings: Any) -> list[str]:
        settings = {"max_gen_toks": 10, **settings}
        requests = [Instance("generate_until", {}, (text, settings), i) for i, text in enumerate(TEXTS)]
        return lm.generate_until(requests, disable_tqdm=True)

    assert ask(until=[stop]) == [text.split(stop)[0] for text in whole]
    assert ask(until=stop, max_gen_toks=4)[0] in whole[0][: whole[0].find(stop)]
    assert ask(until=[], do_sample=True, temperature=2.0) != whole
    with pytest.raises(ValueError, match="num_beams: not supported"):
        ask(num_beams=2)
    with pytest.raises(ValueError, match="max_gen_toks=4096 leaves no room"):
        ask(max_gen_toks=4096)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "quick"}, "mode='quick' must be one of"),
        ({"threshold": 1.5}, "threshold = 1.5"),
        ({"threshold": "one-mlp:x"}, "must be a number, or exit:number"),
        ({"exits": "one-mlp+three"}, "three"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_length": 100000}, "max_length=100000 must be from 1 to the model's"),
        ({"path": "/nowhere.nemo"}, "/nowhere.nemo' does not exist"),
    ],
)
def test_problems_are_named(model: SimpleNamespace, settings: dict[str, Any], message: str) -> None:
    from nemo_ee.evaluation.lm_eval_adapter import EarlyExitLM

    reset_batch_sizes()
    with pytest.raises(ValueError, match=message):
        EarlyExitLM(**{"path": str(model.path), "device": "cpu", **settings})


def test_the_command(
    model: SimpleNamespace, tasks: Path, tmp_path: Path, full: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_ee.evaluation.lm_eval_adapter import main

    # What takes lm-eval half a minute: the list of its thousands of tasks, and of the packages that pip knows.
    own_tasks = lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **settings: own_tasks)
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")
    reset_batch_sizes()
    arguments = ["run", "--model", "nemo_ee", "--model_args", f"path={model.path},mode=full", "--tasks", "choose"]
    arguments += ["--include_path", str(tasks), "--batch_size", "2", "--device", "cpu", "--output_path", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    main()
    (written,) = tmp_path.rglob("results_*.json")
    results = json.loads(written.read_text(encoding="utf-8"))
    assert results["results"]["choose"]["acc,none"] == full["results"]["choose"]["acc,none"]
    assert results["config"]["mean_depth"] == 3.0 and results["config"]["tokens_per_exit"].keys() == {"final"}


def sweep(model: SimpleNamespace, folder: Path, **changed: Any) -> dict[str, Any]:
    """What scripts/sweep_thresholds.py reports."""
    import numpy
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    if not (folder / "text.idx").exists():
        builder = IndexedDatasetBuilder(str(folder / "text.bin"), dtype=numpy.uint16)
        ids = model.tokenizer.encode("".join(TEXTS))
        builder.add_document(torch.tensor(ids), [len(ids)])
        builder.finalize(str(folder / "text.idx"))
    spec = importlib.util.spec_from_file_location("sweep_thresholds", ROOT / "scripts" / "sweep_thresholds.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    reset_batch_sizes()
    with script_config("sweep_thresholds", [f"data={folder / 'text'}", "length=16"]) as cfg:
        cfg.model.restore_from_path = str(model.path)
        cfg.update(changed)
        report = script.sweep(cfg)
    assert len(script.table(report).splitlines()) == 2 + len(report["rows"])
    return report


def test_thresholds_are_swept(model: SimpleNamespace, tmp_path: Path) -> None:
    """Full depth within 1e-4 of transformers; a threshold that nothing beats is full depth, bit for bit."""
    report = sweep(model, tmp_path, thresholds=[1.0, 0.0])
    ids = model.tokenizer.encode("".join(TEXTS))
    logprobs = [reference_logprobs(model, ids[i : i + 16], 1)[0] for i in range(0, len(ids) - 1, 15)]
    never, always = report["rows"]
    assert report["tokens"] == len(ids) - 1
    assert report["full"] == pytest.approx(math.exp(-sum(logprobs) / report["tokens"]), rel=1e-4)
    assert never["perplexity"] == report["full"] and never["ratio"] == 1.0 and never["depth"] == 3.0
    # The first token of every window is read from the final exit.
    counts = {"one-mlp": report["tokens"] - len(logprobs), "two-layer": 0, "final": len(logprobs)}
    assert always["tokens_per_exit"] == always["evaluated_per_exit"] == counts
    assert always["evaluated"] == pytest.approx(1 - len(logprobs) / report["tokens"]) and never["evaluated"] == 0.0
    assert 1.0 < always["depth"] < 1.3 and abs(always["ratio"] - 1.0) > 1e-3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"thresholds": []}, "thresholds=\\[\\] must be a list of one or more finite numbers"),
        ({"thresholds": [1.5]}, "threshold = 1.5"),
        ({"length": 1}, "length=1 must be"),
        ({"data": "/nowhere"}, "/nowhere.bin"),
    ],
)
def test_problems_of_a_sweep_are_named(model: SimpleNamespace, tmp_path: Path, changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(model, tmp_path, **changed)
