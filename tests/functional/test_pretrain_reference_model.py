# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""scripts/pretrain_reference_model.py on a model of two layers: its files against transformers' own readers, its
attention against torch's kernel, a killed run against an uninterrupted one (bitwise).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "pretrain_reference_model.py"
CONFIG = ROOT / "conf" / "pretrain_reference_model.yaml"
END = 256
TINY = {
    "model": {
        "family": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "vocab_size": 320,
        "tie_word_embeddings": False,
    },
    "sequence_length": 48,
    "batch_size": 4,
    "steps": 40,
    "warmup_steps": 4,
    "decay_steps": 8,
    "lr": 1e-2,
    "save_every": 4,
    "validate_every": 10,
    "validation_windows": 4,
    "final_validation_windows": 6,
}
# The same few lines over and over, with a name that varies: learnt in seconds, but not at once.
TEXTS = [f"def name_{i}(value):\n    return value + {i}\n" * 6 for i in range(40)]
HELD_OUT = ["def held_out(value):\n    return value * 3\n" * 40]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script as a module, importable together with the files beside it."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import pretrain_reference_model

        yield pretrain_reference_model
    finally:
        sys.path.remove(str(SCRIPT.parent))


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A training file that also has the held-out text, and the held-out file."""
    folder = tmp_path_factory.mktemp("data")
    records = [{"text": text, "source": f"a/{i}.py"} for i, text in enumerate([*TEXTS, *HELD_OUT])]
    held_out = [{"text": text, "source": "h.py"} for text in HELD_OUT]
    return {
        "data": str(write_jsonl(folder / "train.jsonl", records)),
        "held_out": str(write_jsonl(folder / "held_out.jsonl", held_out)),
    }


def settings(**changed: Any) -> dict[str, Any]:
    defaults = OmegaConf.to_container(OmegaConf.load(CONFIG))
    return {**{key: value for key, value in defaults.items() if key not in ("hydra", "defaults")}, **TINY, **changed}


def train(script: ModuleType, data: dict[str, str], output: Path, **changed: Any) -> Path | None:
    return script.pretrain(script.PretrainConfig.from_config(settings(**data, output=str(output), **changed)))


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "checkpoint.pt", weights_only=True)["model"]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def finished(script: ModuleType, data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a whole run."""
    output = tmp_path_factory.mktemp("finished")
    assert train(script, data, output) == output / "model"
    return output


def test_it_learns(finished: Path) -> None:
    losses = [line["loss"] for line in lines(finished) if "loss" in line]
    validated = [line["step"] for line in lines(finished) if "held_out_loss" in line]
    assert len(losses) == 4 and validated == [10, 20, 30, 40]
    assert losses[0] > 4.0 and losses[-1] < 2.0 and losses == sorted(losses, reverse=True)


def test_transformers_loads_the_model_and_finds_the_same_loss(finished: Path) -> None:
    """Held-out loss by stock classes in fp32: within 2 %, the rounding of bf16 autocast."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished / "model", torch_dtype="auto")
    assert model.dtype == torch.bfloat16 and model.config.vocab_size == 320
    assert model.config.bos_token_id == model.config.eos_token_id == model.config.pad_token_id == END
    assert model.generation_config.eos_token_id == END
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    ids = torch.tensor([*tokenizer(HELD_OUT[0]).input_ids, END])
    windows = ids[: 1 + (len(ids) - 1) // 48 * 48].unfold(0, 49, 48)
    assert len(windows) > 6, "more than the run looks at: it takes a part"
    with torch.no_grad():
        losses = [model.float()(row[None], labels=row[None]).loss.item() for row in windows]
    (ours,) = [line["final_held_out_loss"] for line in lines(finished) if "final_held_out_loss" in line]
    assert min(losses) <= ours <= max(losses)
    assert ours == pytest.approx(sum(losses) / len(losses), rel=0.05)
    assert ours < math.log(256) / 2


def test_a_gpt2_learns_and_has_the_losses_of_transformers(
    script: ModuleType, data: dict[str, str], tmp_path: Path
) -> None:
    """Trained along with an exit; the losses of the saved model by transformers' own attention."""
    from transformers import GPT2LMHeadModel

    shape = {**TINY["model"], "family": "gpt2", "tie_word_embeddings": True}
    folder = train(script, data, tmp_path, model=shape, exit_layers=[1])
    losses = [line["loss"] for line in lines(tmp_path) if "loss" in line]
    assert losses[0] > 4.0 and losses[-1] < 2.5
    model = GPT2LMHeadModel.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager").eval()
    assert (model.config.n_layer, model.config.n_embd, model.config.n_inner, model.config.n_positions) == (
        2,
        32,
        64,
        64,
    )
    tokens = torch.randint(0, 256, (2, 49), generator=torch.Generator().manual_seed(1))
    config = script.PretrainConfig.from_config(
        settings(**data, output=str(tmp_path / "other"), model=shape, start_from=str(folder))
    )
    with torch.no_grad():
        found = script.losses_of(script.build_model(config).eval(), tokens, "fp32", [1])
        result = model(tokens[:, :-1], output_hidden_states=True)
        exit_logits = model.lm_head(model.transformer.ln_f(result.hidden_states[1]))
        for ours, logits in zip(found, (result.logits, exit_logits), strict=True):
            expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            assert ours.item() == pytest.approx(expected.item(), rel=1e-4)
    assert found[0] != found[1], "control"
    with pytest.raises(ValueError, match="another n_head"):
        script.build_model(
            config.model_copy(update={"model": config.model.model_copy(update={"num_attention_heads": 4})})
        )


def test_the_tokenizer_reads_and_writes_every_byte(finished: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished / "model", trust_remote_code=False)
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == END == len(tokenizer) - 1
    # All of ASCII and of two bytes, then every leading byte of three and of four: 243 byte values, all UTF-8 has.
    points = [*range(0x800), *range(0x800, 0xD800, 61), *range(0xE000, 0x10000, 61), *range(0x10000, 0x110000, 4099)]
    text = "".join(map(chr, points))
    expected = list(text.encode("utf-8"))
    assert len(set(expected)) == 243
    assert tokenizer(text).input_ids == expected
    assert tokenizer.decode(expected) == text
    # The 13 others never occur in text; each is still a token of its own, decoded as a broken character.
    others = sorted(set(range(256)) - set(expected))
    assert len(others) == 13 and all(tokenizer.decode([byte]) == "\ufffd" for byte in others)
    assert len(set(tokenizer.convert_ids_to_tokens(range(257)))) == 257
    assert tokenizer("a<|endoftext|>b").input_ids == [97, END, 98]
    assert tokenizer.decode([97, END, 98], skip_special_tokens=True) == "ab"


def test_ids_are_what_training_saw(script: ModuleType, finished: Path) -> None:
    from lib.byte_tokenizer import encode
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    for text in ("naïve = 'café'\n", TEXTS[0], "\t\x00\r\n", "数"):
        assert encode(text).tolist() == [*tokenizer(text).input_ids, END]


@pytest.mark.parametrize("length", [48, 200])
def test_attention_in_blocks_is_torchs(script: ModuleType, length: int) -> None:
    """Outputs and gradients in fp32, within 1e-5; without the mask they differ."""
    shape = (2, 3, length, 16)
    ours = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    theirs = [one.detach().clone().requires_grad_() for one in ours]
    upstream = torch.randn(2, length, 3, 16)
    out, nothing = script.blocked_causal_attention(None, *ours, None, scaling=0.25)
    expected = torch.nn.functional.scaled_dot_product_attention(*theirs, is_causal=True, scale=0.25).transpose(1, 2)
    out.backward(upstream)
    expected.backward(upstream)
    assert nothing is None
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-5)
    unmasked = torch.nn.functional.scaled_dot_product_attention(*theirs, scale=0.25).transpose(1, 2)
    assert (unmasked - expected).abs().max() > 0.1


# The command, which kills itself while it writes its third checkpoint.
KILLED = """
import os, signal, sys
import pretrain_reference_model as script
replace, done = os.replace, []
def third_time_never(source, target):
    done.append(target)
    if len(done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = third_time_never
script.main()
"""


def test_a_killed_run_goes_on_bit_for_bit(
    script: ModuleType, finished: Path, data: dict[str, str], tmp_path: Path
) -> None:
    """SIGKILL in the worst moment, then the rest: the bits of the uninterrupted run."""
    output = tmp_path / "killed"
    OmegaConf.save(OmegaConf.create(settings(**data, output=str(output))), tmp_path / "settings.yaml")
    paths = os.pathsep.join([str(SCRIPT.parent), str(ROOT)])
    run = subprocess.run(
        [sys.executable, "-c", KILLED, "--config-path", str(tmp_path), "--config-name", "settings", "hydra.run.dir=."],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint.pt", "checkpoint.pt.partial", "log.jsonl"]
    assert torch.load(output / "checkpoint.pt", weights_only=True)["progress"]["step"] == 8
    assert train(script, data, output) is not None
    assert equal(weights(output), weights(finished))


def test_exit_losses_are_the_logit_lens(script: ModuleType, finished: Path) -> None:
    """The loss after a layer is that of a stock model cut there, whose last hidden state meets norm and output."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(finished / "model", torch_dtype=torch.float32)
    cut = AutoModelForCausalLM.from_pretrained(finished / "model", torch_dtype=torch.float32, num_hidden_layers=1)
    rows = torch.tensor(list(HELD_OUT[0].encode())[:45])[None]
    with torch.no_grad():
        losses = script.losses_of(model, rows, "fp32", [1])
        expected = [one(rows, labels=rows).loss for one in (model, cut)]
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-5, atol=0)
    assert losses[1] > losses[0] + 0.1, "the control: they differ"


def test_exits_are_trained_with_the_model(
    script: ModuleType, finished: Path, data: dict[str, str], tmp_path: Path
) -> None:
    """From a finished model's weights, once with and once without the losses of a layer."""
    from transformers import AutoModelForCausalLM

    start = {"start_from": str(finished / "model"), "steps": 40, "warmup_steps": 2, "decay_steps": 4, "seed": 5}
    plain, taught = tmp_path / "plain", tmp_path / "taught"
    assert train(script, data, plain, **start)
    assert train(script, data, taught, **start, exit_layers=[1], exit_loss_weight=2.0)
    first = [next(line["loss"] for line in lines(output) if "loss" in line) for output in (plain, finished)]
    assert first[0] < first[1] / 2, "it began where the other run ended"
    model = script.build_model(script.PretrainConfig.from_config(settings(**data, output="x", **start)))
    assert equal(
        {key: value.bfloat16() for key, value in weights(finished).items()},
        {key: value.bfloat16() for key, value in model.state_dict().items()},
    )
    (end,) = [line for line in lines(taught) if "final_held_out_loss" in line]
    rows = torch.tensor(list(TEXTS[0].encode())[:49])[None]
    with torch.no_grad():
        losses = [
            script.losses_of(AutoModelForCausalLM.from_pretrained(output / "model").float(), rows, "fp32", [1])[1]
            for output in (plain, taught)
        ]
    assert losses[1] < losses[0] / 2, losses
    assert list(end["final_held_out_loss_of_exits"]) == ["1"]
    with pytest.raises(ValueError, match="was made with other exit_loss_weight; give the settings"):
        train(script, data, taught, **start, exit_layers=[1], exit_loss_weight=0.5)
    with pytest.raises(ValueError, match=r"another hidden_size \(32, not 64\); set model to its shape"):
        train(script, data, tmp_path / "x", **start, model={**TINY["model"], "hidden_size": 64})


def test_another_seed_gives_other_weights(script: ModuleType, finished: Path, data: dict, tmp_path: Path) -> None:
    assert train(script, data, tmp_path / "other", seed=2) is not None
    assert not equal(weights(tmp_path / "other"), weights(finished))


def test_a_run_is_ended_early_by_a_file(script: ModuleType, data: dict[str, str], tmp_path: Path) -> None:
    assert train(script, data, tmp_path, max_steps_this_run=10) is None
    (tmp_path / "decay").write_text("5\n")
    assert train(script, data, tmp_path, max_steps_this_run=3) is None, "10 + 3 of 15 steps"
    assert train(script, data, tmp_path) == tmp_path / "model"
    progress = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]
    assert progress == {"step": 15, "decay_start": 10, "decay_steps": 5}
    (tmp_path / "decay").write_text("soon")
    with pytest.raises(ValueError, match="'soon'; write a number of steps"):
        script.Progress(0, 8, 4).heed(tmp_path / "decay")


def test_a_run_is_made_shorter_or_longer_between_two_starts(
    script: ModuleType, data: dict[str, str], tmp_path: Path
) -> None:
    assert train(script, data, tmp_path, max_steps_this_run=10) is None
    assert train(script, data, tmp_path, steps=60, max_steps_this_run=2) is None
    assert train(script, data, tmp_path, steps=14, decay_steps=6) == tmp_path / "model"
    progress = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]
    # 14 - 6 = 8 lies behind: the decay starts at once, whole.
    assert progress == {"step": 18, "decay_start": 12, "decay_steps": 6}
    assert train(script, data, tmp_path, steps=100) == tmp_path / "model", "a decay that is over is not taken back"


def test_the_learning_rate_rises_stays_and_falls(script: ModuleType, tmp_path: Path) -> None:
    config = script.PretrainConfig.from_config(settings(data="x", output=str(tmp_path)))
    rates = [script.Progress(step, 32, 8).learning_rate(config) for step in range(40)]
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert rates[4:33] == [0.01] * 29
    assert rates[33:] == pytest.approx([0.01 * (1 - math.sqrt(i / 8)) for i in range(1, 8)])


def test_held_out_files_stay_out(script: ModuleType) -> None:
    from lib.packed_bytes import Document, PackedWindows, without

    held_out = [Document("held = 1\n", "test/a.py")]
    documents = [
        Document("held = 1\n", "copy.py"),
        Document("another version\n", "test/a.py"),
        Document("kept = 1\n", "a.py"),
    ]
    assert without(documents, held_out) == documents[2:]
    windows = PackedWindows(without(documents * 3, held_out), length=8, seed=1)
    seen = b"".join(bytes(row[row < 256].astype("uint8")) for row in map(windows.window, range(len(windows))))
    assert b"kept" in seen and b"held" not in seen and b"another" not in seen


def test_an_epoch_has_every_window_once_and_the_next_another_order(script: ModuleType) -> None:
    from lib.packed_bytes import Document, PackedWindows

    windows = PackedWindows([Document(text, str(i)) for i, text in enumerate(TEXTS)], length=16, seed=3)
    epochs = [[windows.window(n).tobytes() for n in range(e * len(windows), (e + 1) * len(windows))] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    tokens = sum(len(text.encode()) + 1 for text in TEXTS)
    assert len(windows) == (tokens - 1) // 16


def test_bad_settings_are_refused_together(script: ModuleType, tmp_path: Path) -> None:
    model = {**TINY["model"], "hidden_size": 30, "vocab_size": 256}
    wrong = {"model": model, "sequence_length": 65, "decay_steps": 41, "precision": "fp16", "data": []}
    with pytest.raises(ValueError) as error:
        script.PretrainConfig.from_config(settings(output=str(tmp_path), **wrong))
    message = str(error.value)
    for part in ("data=[] must be one or more names", "precision='fp16'"):
        assert part in message
    with pytest.raises(ValueError) as error:
        script.PretrainConfig.from_config(settings(output=str(tmp_path), **{**wrong, "data": "x"}))
    message = str(error.value)
    for part in ("hidden_size=30", "vocab_size=256", "sequence_length=65", "warmup_steps=4 and decay_steps=41"):
        assert part in message
    with pytest.raises(ValueError, match="steps=0 must be a whole number"):
        script.PretrainConfig.from_config(settings(output=str(tmp_path), data="x", steps=0))
    exits = {"exit_layers": [1, 1, 2], "exit_loss_weight": 0, "start_from": str(tmp_path / "none")}
    with pytest.raises(ValueError) as error:
        script.PretrainConfig.from_config(settings(output=str(tmp_path), data="x", **exits))
    for part in ("[2] must be whole numbers from 1 to 1", "a layer twice", "exit_loss_weight=0", "no config.json"):
        assert part in str(error.value)
    for wrong in (
        {"exit_layers": None},
        {"exit_layers": "a"},
        {"exit_loss_weight": "a"},
        {"exit_loss_weight": math.inf},
    ):
        (key,) = wrong
        with pytest.raises(ValueError, match=f"{key}=.* must be"):
            script.PretrainConfig.from_config(settings(output=str(tmp_path), data="x", **wrong))


def test_weights_of_another_kind_are_refused(
    script: ModuleType, data: dict[str, str], finished: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    shutil.copytree(finished / "model", start)
    config = json.loads((start / "config.json").read_text())
    for key, value in (("num_key_value_heads", 1), ("model_type", "qwen2")):
        (start / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(ValueError, match=f"another {key} \\({value}, not "):
            train(script, data, tmp_path / "out", start_from=str(start))
    (start / "config.json").write_text("{")
    with pytest.raises(ValueError, match="start_from: .* cannot be read as a model"):
        train(script, data, tmp_path / "out", start_from=str(start))


def test_a_checkpoint_that_knows_nothing_of_exits_goes_on(
    script: ModuleType, data: dict[str, str], tmp_path: Path
) -> None:
    assert train(script, data, tmp_path, max_steps_this_run=2) is None
    identity = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["identity"]
    assert not {"start_from", "exit_layers", "exit_loss_weight"} & set(identity)
    with pytest.raises(ValueError, match="was made with other exit_layers, exit_loss_weight; give the settings"):
        train(script, data, tmp_path, exit_layers=[1])
    assert train(script, data, tmp_path, exit_loss_weight=3.0, max_steps_this_run=1) is None, "without exits no effect"


def test_bad_files_are_refused(script: ModuleType, data: dict[str, str], finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere.jsonl does not exist; scripts/data/collect_python_sources.py"):
        train(script, {**data, "data": str(tmp_path / "nowhere.jsonl")}, tmp_path / "out")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(ValueError, match=r"broken.jsonl:2: no object with a text"):
        train(script, {**data, "data": str(broken)}, tmp_path / "out")
    short = write_jsonl(tmp_path / "short.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match="2 tokens of text are less than a window of 49"):
        train(script, {**data, "data": str(short)}, tmp_path / "out")
    with pytest.raises(ValueError, match="was made with other batch_size, lr; give the settings"):
        train(script, data, finished, batch_size=8, lr=0.5)
