# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The console of a script has results and messages of nemo_ee; its log file has everything, and errors name it."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from tqdm import tqdm

from nemo_ee.commands.command import command
from nemo_ee.commands.console import console, messages, results, show

CONF = Path(__file__).parents[3] / "conf"
OURS, THEIRS = logging.getLogger("nemo_ee.somewhere"), logging.getLogger("lightning.somewhere")


def work() -> None:
    """What a script and the libraries below it write."""
    print("a banner")
    sys.stderr.write("a notice\n")
    warnings.warn("a deprecation", DeprecationWarning, stacklevel=1)
    THEIRS.info("a table")
    OURS.debug("every loss")
    OURS.info("what is loaded")
    OURS.warning("what is odd")
    for _ in tqdm(range(3), "work", file=messages()):
        pass
    show("the result")


@pytest.fixture(autouse=True)
def warnings_are_shown():
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: sys.stderr.write(f"{message}\n")
        yield


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Hydra's settings as in a script that was started with the log folder `tmp_path/logs`."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "logs"
    overrides = [f"hydra.run.dir={folder}", f"hydra.runtime.output_dir={folder}", "hydra.job.name=convert"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("megatron_gpt_early_exit_convert", overrides, return_hydra_config=True)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", cfg)
    return folder


NOISE = ("a banner", "a notice", "a deprecation", "a table", "every loss")


def test_the_log_file_has_everything_and_the_console_what_a_user_needs(tmp_path: Path, capsys) -> None:
    with console(tmp_path / "logs" / "x.log"):
        work()
    shown = capsys.readouterr()
    assert shown.out == "the result\n"
    assert shown.err.startswith("what is loaded\nwarning: what is odd\n") and "work: 100%" in shown.err
    assert not [noise for noise in NOISE if noise in shown.err]
    log = (tmp_path / "logs" / "x.log").read_text("utf-8")
    assert not [text for text in (*NOISE, "what is loaded", "what is odd", "the result") if text not in log]


def test_without_a_log_file_nothing_is_taken_from_the_console(capsys) -> None:
    with console(None):
        assert (results(), messages()) == (sys.stdout, sys.stderr)
        work()
    shown = capsys.readouterr()
    assert shown.out == "a banner\nthe result\n" and "what is loaded\n" in shown.err and "a deprecation" in shown.err


def test_the_console_is_as_before_afterwards(tmp_path: Path, capsys) -> None:
    before = sys.stdout, sys.stderr, logging.getLogger().level, OURS.parent.level, len(OURS.parent.handlers)
    with pytest.raises(KeyboardInterrupt), console(tmp_path / "x.log"):
        raise KeyboardInterrupt
    assert before == (sys.stdout, sys.stderr, logging.getLogger().level, OURS.parent.level, len(OURS.parent.handlers))
    show("later")
    assert capsys.readouterr().out == "later\n" and "later" not in (tmp_path / "x.log").read_text("utf-8")


@pytest.mark.parametrize(
    ("error", "code", "first"),
    [(ValueError("layer = 30: must be in 1..12"), 2, "error: layer"), (ZeroDivisionError("a bug"), 1, "Traceback")],
)
def test_the_log_file_is_named_first_and_after_an_error_last(error, code, first, logs: Path, capsys) -> None:
    with pytest.raises(SystemExit) as ended, command(OmegaConf.create()):
        raise error
    (log,) = logs.iterdir()
    assert ended.value.code == code and re.fullmatch(r"convert-\d{8}-\d{6}\.log", log.name)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("convert: log file ") and lines[0].endswith(log.name)
    assert lines[1].startswith(first) and any(str(error) in line for line in lines)
    assert lines[-1] == f"log file: {log}"
    text = log.read_text("utf-8")
    assert "Traceback" in text and str(error) in text and __file__ in text


def test_other_ranks_write_files_of_their_own_and_show_only_warnings(logs: Path, monkeypatch, capsys) -> None:
    with command(OmegaConf.create()):
        (first,) = logs.iterdir()
        inherited = os.environ["NEMO_EE_LOG_FILE"]
    capsys.readouterr()
    monkeypatch.setenv("RANK", "3")  # as a rank that rank 0 has started
    monkeypatch.setenv("NEMO_EE_LOG_FILE", inherited)
    with command(OmegaConf.create()):
        work()
    assert {path.name for path in logs.iterdir()} == {first.name, f"{first.stem}.rank3.log"}
    shown = capsys.readouterr()
    assert "rank 3: warning: what is odd\n" in shown.err and shown.out == ""
    assert "what is loaded" not in shown.err and "what is loaded" in (logs / f"{first.stem}.rank3.log").read_text()


def test_a_run_folder_that_is_the_working_directory_gets_no_log_file(logs: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(HydraConfig.get().run, "dir", ".")
    with command(OmegaConf.create()):
        print("a banner")
    assert not logs.exists() and capsys.readouterr().out == "a banner\n"
