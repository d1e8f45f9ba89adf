# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""scripts/data/preprocess_text.py, against the tokenizer itself and Megatron-core's own reader of what it writes."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.helpers.huggingface_models import as_transformers_5_saves

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "data" / "preprocess_text.py"
TOKENIZER = ROOT / "assets" / "reference-model"
CONFIG = ROOT / "conf" / "preprocess_text.yaml"
TEXTS = ["def add(a, b):\n    return a + b\n", "x = 'naïve café'\n", "", "import os\n" * 50]
EOD = 0


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("preprocess_text", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(SCRIPT.parent))  # what Python does when the script is run
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return module


@pytest.fixture(scope="module")
def tokenize() -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, local_files_only=True)
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def config(script: ModuleType, output: Path, **settings: Any) -> Any:
    """The settings of the yaml with those given in their place."""
    defaults = OmegaConf.to_container(OmegaConf.load(CONFIG))
    mapping = {key: value for key, value in defaults.items() if key not in ("hydra", "defaults")}
    settings = {"tokenizer": str(TOKENIZER), "output": str(output), **settings}
    return script.PreprocessConfig.from_config({**mapping, **settings})


def write_jsonl(path: Path, records: list[Any]) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read_back(prefix: Path) -> list[list[int]]:
    """Every document, by Megatron-core's reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert len(dataset) == len(dataset.document_indices) - 1, "one sequence per document"
    return [dataset[i].tolist() for i in range(len(dataset))]


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def problems_of(script: ModuleType, run: Any) -> str:
    with pytest.raises(script.PreprocessError) as error:
        script.preprocess(run)
    return str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl_is_read_back_as_the_tokenizer_wrote_it(
    script: ModuleType, tokenize: Any, tmp_path: Path, name: str
) -> None:
    source = write_jsonl(tmp_path / name, [{"text": text, "source": "s"} for text in TEXTS])
    result = script.preprocess(config(script, tmp_path / "out" / "train", input=str(source)))
    expected = [tokenize(text) + [EOD] for text in TEXTS if text]
    assert read_back(tmp_path / "out" / "train") == expected
    assert (result.documents, result.empty_documents, result.dtype) == (3, 1, "uint16")
    assert result.tokens == sum(map(len, expected))
    assert files_in(tmp_path / "out") == ["train.bin", "train.idx"], "no temporary file is left"


@pytest.mark.parametrize(("ends", "warned"), [([0, 12], False), (12, True), ([12, 13], True)])
def test_documents_that_end_with_another_token_than_answers_are_warned_of_once(
    script: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture, ends: Any, warned: bool
) -> None:
    shutil.copytree(TOKENIZER, tmp_path / "model", ignore=shutil.ignore_patterns("corpus", "*.safetensors"))
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    settings = {"input": str(source), "tokenizer": str(tmp_path / "model")}
    script.preprocess(config(script, tmp_path / "train", **settings))
    found = [one.getMessage() for one in caplog.records if "documents end with" in one.getMessage()]
    assert len(found) == warned and all(f"token, {EOD}, but decoding" in one and "stops at 12" in one for one in found)
    script.preprocess(config(script, tmp_path / "plain", append_eod=False, **settings))
    assert sum("documents end with" in one.getMessage() for one in caplog.records) == warned
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": "x"}')
    assert "eos_token_id='x' must be a token id" in problems_of(script, config(script, tmp_path / "b", **settings))


def test_control_without_append_eod_the_documents_do_not_end(
    script: ModuleType, tokenize: Any, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"body": TEXTS[0]}])
    settings = {"input": str(source), "append_eod": False, "text_key": "body", "dtype": "int32"}
    result = script.preprocess(config(script, tmp_path / "train", **settings))
    assert read_back(tmp_path / "train") == [tokenize(TEXTS[0])]
    assert result.dtype == "int32"


def test_directories_and_lists_are_read_in_order(script: ModuleType, tokenize: Any, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "b").mkdir(parents=True)
    (corpus / "b" / "one.py").write_text(TEXTS[0])
    (corpus / "c.txt.gz").write_bytes(gzip.compress(TEXTS[1].encode()))
    write_jsonl(corpus / "d.jsonl", [{"text": TEXTS[3]}])
    (corpus / "picture.png").write_bytes(b"\x89PNG")
    extra = tmp_path / "extra.md"
    extra.write_text("# Title\n")
    script.preprocess(config(script, tmp_path / "train", input=[str(corpus), str(extra)]))
    assert read_back(tmp_path / "train") == [tokenize(t) + [EOD] for t in (TEXTS[0], TEXTS[1], TEXTS[3], "# Title\n")]


@pytest.mark.parametrize("limit", [1, 64, 65])
def test_max_documents_counts_over_batches(script: ModuleType, tmp_path: Path, limit: int) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}, *({"text": f"x = {i}"} for i in range(130))])
    result = script.preprocess(config(script, tmp_path / "train", input=str(source), max_documents=limit))
    assert result.documents == limit == len(read_back(tmp_path / "train"))


def test_all_problems_of_the_settings_come_in_one_message(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.csv").write_text("a,b")
    (tmp_path / "train.bin").write_bytes(b"old")
    names = ["missing.jsonl", "data.csv", "empty"]
    run = config(script, tmp_path / "train", input=[str(tmp_path / name) for name in names], tokenizer="no/such/model")
    message = problems_of(script, run)
    for part in (
        "missing.jsonl does not exist",
        "data.csv has an unknown ending (known endings: .jsonl, .md",
        "empty has no file of a known type",
        "train.bin exist already; choose another prefix or set overwrite=True",
        "no/such/model is not a local directory; nothing is downloaded",
    ):
        assert part in message
    assert (tmp_path / "train.bin").read_bytes() == b"old"


def test_all_problems_in_the_data_come_in_one_message(script: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    lines = ['{"text": "fine"}', '{"body": 1, "id": 2}', "", '{"text": 3}', "[1]", "{", '{"text": "fine too"}']
    source.write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    other = tmp_path / "b.txt"
    other.write_bytes(b"abc\xff")
    cut = tmp_path / "c.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"text": "fine"}\n' * 1000)[:-12])
    output = tmp_path / "out" / "train"
    message = problems_of(script, config(script, output, input=[str(path) for path in (source, other, cut)]))
    for part in (
        "a.jsonl:2: no field 'text' (it has 'body', 'id'); name the field with text_key",
        "a.jsonl:4: field 'text' is a JSON int, not a string",
        "a.jsonl:5: a JSON list, not an object with the field 'text'",
        "a.jsonl:6: not JSON (",
        "a.jsonl:8: not UTF-8 (",
        "b.txt: not UTF-8 (invalid start byte at byte 3)",
        "c.jsonl.gz:",
    ):
        assert part in message
    assert message.count("\n") == 7, "and nothing else"
    assert files_in(output.parent) == [], "nothing is left behind"


def test_text_that_no_model_should_read_is_named_with_its_line(script: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    lines = [
        '{"text": "fine"}',
        '{"text": "cut \\ud83d"}',
        "[" * 3000 + "]" * 3000,
        '{"text": "x", "n": ' + "9" * 5000 + "}",
    ]
    source.write_text("\n".join(lines))
    message = problems_of(script, config(script, tmp_path / "out" / "train", input=str(source)))
    for number, part in (
        (2, "holds half a character (\\ud83d"),
        (3, "nested too deeply"),
        (4, "holds the number 9999"),
    ):
        assert f"{source}:{number}: {part}" in message
    assert message.count("\n") == 3 and files_in(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["b.jsonl", "b.jsonl.gz", "b.txt.gz"])
def test_a_document_beyond_the_limit_is_refused_and_nothing_is_written(
    script: ModuleType, tokenize: Any, tmp_path: Path, name: str
) -> None:
    text = "x = 1\n" * 100
    path = tmp_path / name
    content = (json.dumps({"text": text}) if "jsonl" in name else text).encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    good = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    run = config(script, tmp_path / "out" / "train", input=[str(good), str(path)], max_document_bytes=len(content) - 1)
    message = problems_of(script, run)
    assert f"{name}{':1' if 'jsonl' in name else ''}: more than {len(content) - 1} bytes" in message
    assert "raise max_document_bytes" in message and files_in(tmp_path / "out") == []
    script.preprocess(run.model_copy(update={"max_document_bytes": len(content)}))
    assert read_back(tmp_path / "out" / "train") == [tokenize("x") + [EOD], tokenize(text) + [EOD]]


def test_tokens_that_the_model_lacks_are_named_with_their_text(
    script: ModuleType, tokenize: Any, tmp_path: Path
) -> None:
    """config.json beside the tokenizer says the size; the tokenizer has one token more, and only one text has it."""
    folder = tmp_path / "model"
    shutil.copytree(TOKENIZER, folder, ignore=lambda _, names: [n for n in names if not n.endswith(".json")])
    values = json.loads((folder / "tokenizer.json").read_text())
    values["added_tokens"].append({**values["added_tokens"][0], "id": 4096, "content": "<tool>"})
    (folder / "tokenizer.json").write_text(json.dumps(values))
    settings = {"tokenizer": str(folder), "input": str(tmp_path / "a.jsonl")}
    write_jsonl(tmp_path / "a.jsonl", [{"text": "fine"}, {"text": "x <tool> y"}])
    message = problems_of(script, config(script, tmp_path / "train", **settings))
    assert (
        "a.jsonl:2: the tokenizer gives token 4096 ('<tool>'), which is outside the model's vocabulary 0..4095"
        in message
    )
    assert files_in(tmp_path) == ["a.jsonl", "model"]
    write_jsonl(tmp_path / "a.jsonl", [{"text": "fine"}])
    script.preprocess(config(script, tmp_path / "train", **settings))
    assert read_back(tmp_path / "train") == [tokenize("fine") + [EOD]]


def test_data_made_again_forgets_the_order_of_its_samples(script: ModuleType, tmp_path: Path) -> None:
    """Also where the output is named as one of its files."""
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    script.preprocess(config(script, tmp_path / "train.bin", input=str(source)))
    index = tmp_path / "train" / "cache" / "GPTDataset_indices" / "0123"
    index.mkdir(parents=True)
    other = tmp_path / "train" / "cache" / "mine"
    other.touch()
    script.preprocess(config(script, tmp_path / "train.idx", input=str(source), overwrite=True))
    assert other.exists() and not index.parent.exists()
    other.unlink()
    index.mkdir(parents=True)
    script.preprocess(config(script, tmp_path / "train", input=str(source), overwrite=True))
    assert files_in(tmp_path) == ["a.jsonl", "train.bin", "train.idx"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_damaged_file_of_the_tokenizer_is_named(script: ModuleType, tmp_path: Path, name: str) -> None:
    """transformers fails with a RecursionError."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(TOKENIZER, folder, ignore=lambda _, names: [n for n in names if not n.endswith(".json")])
    (folder / name).write_text("[" * 3000 + "]" * 3000)
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    message = problems_of(script, config(script, tmp_path / "train", input=str(source), tokenizer=str(folder)))
    assert f"{folder / name}:1: nested too deeply" in message


def test_many_problems_are_counted(script: ModuleType, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{}] * 50)
    message = problems_of(script, config(script, tmp_path / "train", input=str(source)))
    assert "a.jsonl:20: no field 'text' (it has none)" in message and "... and 30 more" in message
    assert "a.jsonl:21:" not in message


def test_an_empty_result_is_an_error(script: ModuleType, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}])
    message = problems_of(script, config(script, tmp_path / "train", input=str(source)))
    assert "no tokens in 1 files (1 empty documents)" in message
    assert files_in(tmp_path) == ["a.jsonl"]


def test_a_problem_keeps_existing_output(script: ModuleType, tokenize: Any, tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "a.jsonl", [{"text": "x = 1\n"}])
    bad = write_jsonl(tmp_path / "b.jsonl", [{"text": "x = 2\n"}, {}])
    script.preprocess(config(script, tmp_path / "train", input=str(good)))
    problems_of(script, config(script, tmp_path / "train", input=str(bad), overwrite=True))
    assert read_back(tmp_path / "train") == [tokenize("x = 1\n") + [EOD]]
    write_jsonl(bad, [{"text": "x = 2\n"}])
    script.preprocess(config(script, tmp_path / "train", input=str(bad), overwrite=True))
    assert read_back(tmp_path / "train") == [tokenize("x = 2\n") + [EOD]]


def test_vocabulary_must_fit_the_type(script: ModuleType) -> None:
    assert script.choose_dtype("auto", 65499) == ("uint16", [])
    assert script.choose_dtype("auto", 65500) == ("int32", [])
    assert script.choose_dtype("uint16", 65536) == ("uint16", [])
    _, (problem,) = script.choose_dtype("uint16", 65537)
    assert "uint16 holds ids to 65535, the tokenizer has 65536; use int32 or auto" in problem


def test_tokenizer_without_end_of_text_or_files_is_an_error(script: ModuleType, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    run = config(script, tmp_path / "train", input=str(source), tokenizer=str(folder))
    assert f"tokenizer: cannot load one from {folder}" in problems_of(script, run)
    shutil.copy(TOKENIZER / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert "has no eos_token for append_eod; set it False" in problems_of(script, run)


def test_a_tokenizer_that_transformers_5_saved_is_read(script: ModuleType, tokenize: Any, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, tmp_path)
    as_transformers_5_saves(tmp_path)
    tokenizer = script.load_tokenizer(str(tmp_path))
    assert [tokenizer(text).input_ids for text in TEXTS] == [tokenize(text) for text in TEXTS]


def test_tokenizer_code_is_never_run(script: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    bait = tmp_path / "executed"
    (folder / "evil.py").write_text(f"open({str(bait)!r}, 'w').close()\nclass Evil:\n    pass\n")
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    message = problems_of(script, config(script, tmp_path / "train", input=str(source), tokenizer=str(folder)))
    assert "cannot load one" in message
    assert not bait.exists()


def test_every_key_of_the_yaml_is_a_setting_and_back(script: ModuleType) -> None:
    keys = set(OmegaConf.load(CONFIG)) - {"hydra", "defaults"}
    assert keys == set(script.PreprocessConfig.model_fields)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"input": []}, r"input=\[\] must be one or more names of files"),
        ({"dtype": "int64"}, "dtype='int64' must be one of auto, uint16, int32"),
        ({"max_document_bytes": 0}, "max_document_bytes=0 must be a whole number of bytes from 1, or null"),
        ({"max_documents": 0}, "max_documents=0 must be a whole number from 1"),
        ({"append_eod": "maybe"}, "append_eod='maybe' must be True or False"),
    ],
)
def test_wrong_values_are_named(script: ModuleType, tmp_path: Path, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        config(script, tmp_path / "train", **{"input": "a.jsonl", **settings})


def run_command(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_command_line(tmp_path: Path) -> None:
    """From another directory, with relative paths; nothing but the two files appears."""
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    done = run_command(tmp_path, "input=a.jsonl", "output=out/train", f"tokenizer={TOKENIZER}")
    assert done.returncode == 0, done.stderr
    assert "3 documents" in done.stdout
    assert "100%" in done.stderr, "progress bar"
    assert files_in(tmp_path) == ["a.jsonl", "out"] and files_in(tmp_path / "out") == ["train.bin", "train.idx"]


def test_command_line_reports_problems_without_a_traceback(tmp_path: Path) -> None:
    failed = run_command(tmp_path, "input=[nope.jsonl,nope.csv]", "output=train", "tokenizer=nope")
    assert failed.returncode == 2
    assert failed.stderr.count(" does not exist") == 2 and "Traceback" not in failed.stderr
    missing = run_command(tmp_path, "output=train")
    assert missing.returncode == 2 and all(f"  {key} is needed" in missing.stderr for key in ("input", "tokenizer"))
    assert files_in(tmp_path) == []


def test_problems_found_before_a_good_tokenizer_is_loaded_are_kept(script: ModuleType, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": TEXTS[0]}])
    prefix = tmp_path / "train"
    for suffix in (".bin", ".idx"):
        Path(f"{prefix}{suffix}").write_bytes(b"precious")
    inputs = [str(tmp_path / name) for name in ("a.jsonl", "missing.jsonl")]
    with pytest.raises(script.PreprocessError, match=r"missing\.jsonl does not exist[\s\S]*exist already"):
        script.preprocess(config(script, prefix, input=inputs))
    assert Path(f"{prefix}.bin").read_bytes() == b"precious"
