# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Every script's table of settings: it has the keys of the yaml, takes its values, and refuses wrong ones by name.

Where the table leaves a value to the setting's own reader, that reader is what is tried.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from nemo_ee.settings import checks, files, training
from nemo_ee.settings.checks import anything
from nemo_ee.settings.known import KnownSettings

ROOT = Path(__file__).parents[3]
TABLES = {
    "collect_python_sources": files.COLLECT_SOURCES,
    "export_huggingface": files.EXPORT_HUGGINGFACE,
    "export_tensorrt_llm": files.EXPORT_TENSORRT_LLM,
    "megatron_gpt_early_exit_calibrate": training.CALIBRATE,
    "megatron_gpt_early_exit_convert": training.CONVERT,
    "megatron_gpt_early_exit_eval": training.EVALUATE,
    "megatron_gpt_early_exit_generate": training.GENERATE,
    "megatron_gpt_early_exit_serve": files.SERVE,
    "megatron_gpt_early_exit_sweep": training.TUNE,
    "megatron_gpt_early_exit_tune": training.TUNE,
    "plot_tuning": files.PLOT_TUNING,
    "preprocess_chat": files.PREPROCESS_CHAT,
    "preprocess_text": files.PREPROCESS_TEXT,
    "pretrain_reference_model": files.PRETRAIN,
    "sweep_thresholds": training.SWEEP_THRESHOLDS,
}
# Read, and not in a yaml: the length of a schedule is the run's; the type of a cluster is NeMo's.
NOT_IN_THE_YAML = {"model.optim.sched.max_steps", "cluster_type"}
# The sweep's own keys, which its values take over.
OF_THE_SWEEP = {"layer", "lora_lr", "lora_min_lr"}


@pytest.fixture(scope="module", autouse=True)
def resolver() -> None:
    OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)


@cache
def _composed(stem: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(stem)


def settings_of(stem: str, **changes: Any) -> DictConfig:
    """The yaml as Hydra composes it, with other values."""
    cfg = _composed(stem).copy()
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    return cfg


def test_no_script_leaves_a_file_where_it_was_started() -> None:
    """Hydra opens every handler of its logging, used or not; a file handler makes an empty .log.

    The log file of a script lies in `outputs/`; a script without noisy libraries has none.
    """
    without_log = set(
        "collect_python_sources megatron_gpt_early_exit_serve plot_tuning preprocess_chat preprocess_text".split()
    )
    for stem in TABLES:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            hydra = compose(stem, return_hydra_config=True).hydra
        files_of = [
            name
            for logging in (hydra.job_logging, hydra.hydra_logging)
            for name, handler in (OmegaConf.to_container(logging).get("handlers") or {}).items()
            if "filename" in handler
        ]
        folder = "." if stem in without_log else "outputs/logs"
        assert (files_of, hydra.output_subdir, hydra.run.dir) == ([], None, folder), stem


def leaves(block: dict, known: KnownSettings, prefix: str = "") -> Iterator[str]:
    for name, value in block.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in known.checks:
            yield from leaves(value, known, f"{key}.")
        else:
            yield key


def keys_of(stem: str) -> set[str]:
    return set(leaves(OmegaConf.to_container(settings_of(stem)), TABLES[stem]))


def test_every_yaml_has_a_table_and_its_script_uses_it() -> None:
    assert TABLES.keys() == {file.stem for file in (ROOT / "conf").glob("*.yaml")}
    for stem in TABLES.keys() - {"megatron_gpt_early_exit_sweep", "megatron_gpt_early_exit_tune"}:
        (script,) = (path for folder in ("examples", "scripts") for path in (ROOT / folder).rglob(f"{stem}.py"))
        name = next(name for module in (files, training) for name, one in vars(module).items() if one is TABLES[stem])
        assert f"with command(cfg, {name}" in script.read_text(encoding="utf-8"), script


@pytest.mark.parametrize("stem", TABLES)
def test_a_table_has_the_keys_of_the_yaml_and_takes_its_values(stem: str) -> None:
    assert set(TABLES[stem].checks) - NOT_IN_THE_YAML == keys_of(stem) - OF_THE_SWEEP
    assert TABLES[stem].problems(settings_of(stem)) == {}


def checked(stem: str) -> list[str]:
    """The keys that the table itself checks."""
    return sorted(key for key in keys_of(stem) if TABLES[stem].checks.get(key, anything) is not anything)


# What is right for some: any text is a prefix of data to begin with, and blocks have readers of their own.
RIGHT_FOR = {"\t": ("model.data.data_prefix",), "{'a': 1}": ("model.early_exit", "model.layer_split")}


# A block, a list of a list, a text without anything in it.
@pytest.mark.parametrize("wrong", [{"a": 1}, [[]], "\t"], ids=str)
@pytest.mark.parametrize("stem", sorted(TABLES.keys() - {"megatron_gpt_early_exit_sweep"}))
def test_every_key_refuses_a_value_of_a_wrong_kind_by_name(stem: str, wrong: Any) -> None:
    keys = [key for key in checked(stem) if key not in RIGHT_FOR.get(str(wrong), ())]
    problems = TABLES[stem].problems(settings_of(stem, **dict.fromkeys(keys, wrong)))
    assert sorted(problems) == keys
    assert all(problem.startswith(f"{key}={wrong!r}") for key, problem in problems.items())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), "ten", True, -7], ids=str)
@pytest.mark.parametrize("stem", TABLES)
def test_numbers_refuse_what_is_no_number_of_theirs(stem: str, wrong: Any) -> None:
    plain = OmegaConf.create(OmegaConf.to_container(settings_of(stem)))
    values = {key: OmegaConf.select(plain, key, throw_on_missing=False) for key in checked(stem)}
    keys = [key for key, value in values.items() if type(value) in (int, float)]
    assert sorted(TABLES[stem].problems(settings_of(stem, **dict.fromkeys(keys, wrong)))) == keys


@pytest.mark.parametrize("stem", TABLES)
def test_keys_that_nothing_reads_are_refused(stem: str) -> None:
    key = sorted(keys_of(stem))[0]
    problems = TABLES[stem].problems(settings_of(stem, **{"foo": 1, key[:-1]: 1}))
    assert set(problems) == {"foo", key[:-1]}
    assert "foo=1: there is no such setting" in problems["foo"] and "did you mean" in problems[key[:-1]]


def test_a_helper_key_that_a_value_is_worked_out_from_is_read() -> None:
    table = TABLES["preprocess_text"]
    for helper, taken in (({"x": "a"}, "${my.x}"), (["a"], "${my[0]}"), ({"x": "a"}, "${my}"), ("a", "${.my}")):
        assert table.problems(settings_of("preprocess_text", my=helper, text_key=taken)).keys() <= {"text_key"}
    assert "my" in table.problems(settings_of("preprocess_text", my="a")), "control"


def test_the_criteria_are_those_of_the_exits() -> None:
    from nemo_ee.exits.confidence import CRITERIA

    for name in CRITERIA:
        assert checks.criterion(name) == name
    with pytest.raises(ValueError, match=", ".join(CRITERIA)):
        checks.criterion("surest")


# -- the readers behind the tables ------------------------------------------------------------------------------------


def _main(stem: str) -> Any:
    (path,) = (path for folder in ("examples", "scripts") for path in (ROOT / folder).rglob(f"{stem}.py"))
    spec = importlib.util.spec_from_file_location(stem, path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[stem] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    return script.main


WITHOUT_NEMO = (
    "collect_python_sources export_huggingface export_tensorrt_llm megatron_gpt_early_exit_calibrate "
    "megatron_gpt_early_exit_generate megatron_gpt_early_exit_serve plot_tuning preprocess_chat preprocess_text "
    "pretrain_reference_model"
).split()


@pytest.mark.parametrize("stem", WITHOUT_NEMO)
def test_no_value_of_any_setting_ends_in_a_traceback(stem: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Each key that the table leaves to its reader; the files named do not exist, so no run gets far."""
    folder = next(iter((ROOT / "scripts").rglob(f"{stem}.py")), ROOT / "examples").parent
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    main = _main(stem)
    base = settings_of(stem)
    for key in OmegaConf.missing_keys(base):
        OmegaConf.update(base, key, f"nowhere/{key}")
    if stem == "collect_python_sources":
        base.excluded = ["nowhere"]
    for key in sorted(keys_of(stem) - set(checked(stem))):
        for wrong in ("fast", float("nan"), -1, [], None, {"x": 1}):
            cfg = base.copy()
            OmegaConf.update(cfg, key, wrong, merge=False)
            with pytest.raises(SystemExit) as ended:
                main(cfg)
            message = capsys.readouterr().err
            assert ended.value.code == 2 and re.search(r"error: \S", message), (key, wrong)
    assert list(tmp_path.iterdir()) == []
