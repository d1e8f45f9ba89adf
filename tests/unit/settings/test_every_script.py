# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Every script's settings: the model has the keys of the yaml, takes its values, and refuses wrong ones by name."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from nemo_ee.bridge.bridge_settings import BridgeTuneSettings
from nemo_ee.calibration.calibration_request import CalibrationRequest
from nemo_ee.calibration.probe_fitting import ProbeSettings
from nemo_ee.commands.convert_settings import ConvertSettings
from nemo_ee.commands.generation_request import GenerationRequest
from nemo_ee.commands.on_policy_settings import OnPolicySettings
from nemo_ee.evaluation.evaluation_settings import EvaluationSettings
from nemo_ee.evaluation.text_settings import PlacementSettings, ReportSettings
from nemo_ee.models.tune_settings import TuneSettings
from nemo_ee.serving.settings import ServerSettings
from nemo_ee.settings.script_input import ScriptInput, fields_of, script_problems

ROOT = Path(__file__).parents[3]
STEMS = sorted(file.stem for file in (ROOT / "conf").glob("*.yaml"))
MODELS = {
    "megatron_gpt_early_exit_calibrate": CalibrationRequest,
    "bridge_early_exit_tune": BridgeTuneSettings,
    "megatron_gpt_early_exit_convert": ConvertSettings,
    "megatron_gpt_early_exit_eval": EvaluationSettings,
    "megatron_gpt_early_exit_generate": GenerationRequest,
    "megatron_gpt_early_exit_on_policy": OnPolicySettings,
    "megatron_gpt_early_exit_place": PlacementSettings,
    "megatron_gpt_early_exit_probe": ProbeSettings,
    "megatron_gpt_early_exit_report": ReportSettings,
    "megatron_gpt_early_exit_serve": ServerSettings,
    "megatron_gpt_early_exit_sweep": TuneSettings,
    "megatron_gpt_early_exit_tune": TuneSettings,
}
# Read, and not in a yaml: the length of a schedule is the run's; the type of a cluster is NeMo's.
NOT_IN_THE_YAML = {"model.optim.sched.max_steps", "cluster_type"}
# The sweep's own keys, which its values take over.
OF_THE_SWEEP = {"layer", "lora_lr", "lora_min_lr"}


@cache
def script_of(stem: str) -> Any:
    """The module of a script, whose folder it may import from."""
    (path,) = (path for folder in ("examples", "scripts") for path in (ROOT / folder).rglob(f"{stem}.py"))
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location(stem, path)
        script = importlib.util.module_from_spec(spec)
        sys.modules[stem] = script  # dataclasses look their module up
        spec.loader.exec_module(script)
        return script
    finally:
        sys.path.remove(str(path.parent))


def model_of(stem: str) -> type[ScriptInput]:
    """The settings that a script reads its config into."""
    if stem in MODELS:
        return MODELS[stem]
    if stem == "export_huggingface":
        from nemo_ee.export.huggingface.exporter import HuggingFaceSettings

        return HuggingFaceSettings
    if stem == "export_tensorrt_llm":
        from nemo_ee.export.tensorrt_llm.unified_checkpoint import TensorRTLLMSettings

        return TensorRTLLMSettings
    if stem == "export_gguf":
        from nemo_ee.export.gguf.gguf_exporter import GgufSettings

        return GgufSettings
    script = script_of(stem)
    (name,) = re.findall(r"(\w+)\.from_config\(cfg\)", Path(script.__file__).read_text(encoding="utf-8"))
    return getattr(script, name)


def problems_in(stem: str, **changes: Any) -> dict[str, str]:
    changes = changes if "prompts" in changes or not stem.endswith("generate") else {"prompts": ["x"], **changes}
    return {one.where: one.text for one in script_problems(model_of(stem), settings_of(stem, **changes))}


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


@pytest.mark.slow_unit
def test_no_script_leaves_a_file_where_it_was_started() -> None:
    """Hydra opens every handler of its logging, used or not; a file handler makes an empty .log.

    The log file of a script lies in `outputs/`; a script without noisy libraries has none.
    """
    without_log = set(
        "collect_debian_texts collect_own_chats collect_prompts collect_python_sources dry_run "
        "megatron_gpt_early_exit_serve "
        "plot_tuning preprocess_chat preprocess_text".split()
    )
    for stem in STEMS:
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


def leaves(block: dict, known: list[str], prefix: str = "") -> Iterator[str]:
    for name, value in block.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in known:
            yield from leaves(value, known, f"{key}.")
        else:
            yield key


def keys_of(stem: str) -> set[str]:
    return set(leaves(OmegaConf.to_container(settings_of(stem)), list(fields_of(model_of(stem)))))


def right(stem: str, tmp_path: Path) -> dict[str, Any]:
    """Values for what the yaml leaves open, and of places that exist."""
    (tmp_path / "config.json").touch()
    open_keys = [one.where for one in script_problems(model_of(stem), settings_of(stem)) if one.kind == "missing"]
    values: dict[str, Any] = {key: 1 if key == "layer" else str(tmp_path) for key in open_keys}
    values |= {"output": str(tmp_path / "new.jsonl.gz")} if "collect" in stem else {}
    values |= {"output": str(tmp_path / "new.nemo")} if "convert" in stem else {}
    values |= {"output": str(tmp_path / "new")} if "export" in stem else {}
    if stem.endswith(("place", "report")):
        (tmp_path / "data.jsonl").touch()
        values["data"] = str(tmp_path / "data.jsonl")
        values |= {"output": str(tmp_path / "placement.json")} if "output" in values else {}
    values |= {"layout": [1, 1, 1]} if "layout" in values else {}
    values |= {"model.data.data_prefix": ["a"]} if "model.data.data_prefix" in values else {}
    if stem.endswith(("calibrate", "probe")):
        (tmp_path / "data.jsonl").write_text('{"prompt": "x"}')
        values["data"] = str(tmp_path / "data.jsonl")
    return values | ({"prompts": ["x"]} if "generate" in stem else {})


@pytest.mark.parametrize("stem", STEMS)
def test_a_model_has_the_keys_of_the_yaml_and_takes_its_values(stem: str, tmp_path: Path) -> None:
    assert set(fields_of(model_of(stem))) - NOT_IN_THE_YAML == keys_of(stem) - OF_THE_SWEEP
    assert problems_in(stem, **right(stem, tmp_path)) == {}


def checked(stem: str) -> list[str]:
    """The keys whose values are checked; others are NeMo's and free."""
    return sorted(keys_of(stem) - {"model.optim.name"} - OF_THE_SWEEP)


# What is right for some: any text may be shown; blocks of exits and thresholds have names of their own.
RIGHT_FOR = {
    "\t": ("title", "caption", "answer_until"),
    "{'a': 1}": ("model.early_exit", "model.layer_split", "threshold", "thresholds"),
}


# A block, a list of a list, a text without anything in it.
@pytest.mark.parametrize("wrong", [{"a": 1}, [[]], "\t"], ids=str)
@pytest.mark.parametrize("stem", sorted(set(STEMS) - {"megatron_gpt_early_exit_sweep"}))
def test_every_key_refuses_a_value_of_a_wrong_kind_by_name(stem: str, wrong: Any) -> None:
    keys = [key for key in checked(stem) if key not in RIGHT_FOR.get(str(wrong), ()) or stem == "sweep_thresholds"]
    problems = problems_in(stem, **dict.fromkeys(keys, wrong))
    assert sorted(problems) == keys
    for key, problem in problems.items():
        assert re.match(rf"{re.escape(key)}(\[0\]|\.a)?[=:]", problem) and re.search(r" must |cannot|not ", problem), (
            problem
        )


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), "ten", True, -7], ids=str)
@pytest.mark.parametrize("stem", STEMS)
def test_numbers_refuse_what_is_no_number_of_theirs(stem: str, wrong: Any) -> None:
    plain = OmegaConf.create(OmegaConf.to_container(settings_of(stem)))
    values = {key: OmegaConf.select(plain, key, throw_on_missing=False) for key in checked(stem)}
    keys = [key for key, value in values.items() if type(value) in (int, float)]
    found = problems_in(stem, **dict.fromkeys(keys, wrong))
    assert sorted(key for key, text in found.items() if "needed and not given" not in text) == keys


@pytest.mark.parametrize("stem", STEMS)
def test_keys_that_nothing_reads_are_refused(stem: str) -> None:
    key = sorted(keys_of(stem))[0]
    problems = problems_in(stem, **{"foo": 1, key[:-1]: 1})
    assert {key for key, text in problems.items() if "needed and not given" not in text} == {"foo", key[:-1]}
    assert "foo=1 is not a setting here" in problems["foo"] and "did you mean" in problems[key[:-1]]


def test_a_helper_key_that_a_value_is_worked_out_from_is_read() -> None:
    for helper, taken in (({"x": "a"}, "${my.x}"), (["a"], "${my[0]}"), ({"x": "a"}, "${my}"), ("a", "${.my}")):
        assert "my" not in problems_in("preprocess_text", my=helper, text_key=taken)
    assert "my" in problems_in("preprocess_text", my="a"), "control"


def test_the_criteria_are_those_of_the_exits() -> None:
    from nemo_ee.exits.confidence import CRITERIA
    from nemo_ee.settings.fields import Criterion

    assert get_args(Criterion) == CRITERIA


# -- the scripts ------------------------------------------------------------------------------------------------------


WITHOUT_NEMO = (
    "collect_python_sources export_huggingface export_tensorrt_llm megatron_gpt_early_exit_calibrate "
    "megatron_gpt_early_exit_generate megatron_gpt_early_exit_on_policy megatron_gpt_early_exit_serve plot_tuning "
    "preprocess_chat preprocess_text pretrain_reference_model"
).split()


@pytest.mark.slow_unit
@pytest.mark.parametrize("stem", WITHOUT_NEMO)
def test_no_value_of_any_setting_ends_in_a_traceback(stem: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """The files named do not exist, so no run gets far."""
    folder = next(iter((ROOT / "scripts").rglob(f"{stem}.py")), ROOT / "examples").parent
    monkeypatch.syspath_prepend(str(folder))  # for what the script imports later
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    main = script_of(stem).main
    base = settings_of(stem)
    for key in OmegaConf.missing_keys(base):
        OmegaConf.update(base, key, f"nowhere/{key}")
    if stem == "collect_python_sources":
        base.excluded = ["nowhere"]
    for key in sorted(keys_of(stem)):
        for wrong in ("fast", float("nan"), -1, [], None, {"x": 1}):
            cfg = base.copy()
            OmegaConf.update(cfg, key, wrong, merge=False)
            with pytest.raises(SystemExit) as ended:
                main(cfg)
            message = capsys.readouterr().err
            assert ended.value.code == 2 and re.search(r"error: \S", message), (key, wrong)
    assert list(tmp_path.iterdir()) == []
