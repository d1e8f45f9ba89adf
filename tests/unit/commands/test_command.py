# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What every script does around its work: user errors end in one message, other errors keep their traceback."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from nemo_ee import cpu_host
from nemo_ee.commands.command import command

CONFIG = OmegaConf.create({"trainer": {"accelerator": "gpu"}})


@pytest.mark.parametrize("error", [ValueError("layer = 30: must be in 1..12"), FileNotFoundError("no such file")])
def test_a_users_error_ends_with_its_message_and_code_2(error: Exception, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended, command(CONFIG):
        raise error
    assert ended.value.code == 2
    assert str(error) in capsys.readouterr().err


def test_our_own_error_keeps_its_traceback() -> None:
    with pytest.raises(AssertionError), command(CONFIG):
        raise AssertionError("a bug")


@pytest.mark.parametrize("code", [0, 3])
def test_sigterm_ends_a_run_as_other_programs(code: int, capsys: pytest.CaptureFixture) -> None:
    """Lightning's exception alone would end a half-tuned run with exit code 0; any other exit keeps its own."""
    exceptions = pytest.importorskip("lightning.pytorch.utilities.exceptions")
    with pytest.raises(SystemExit) as ended, command(CONFIG):
        raise exceptions.SIGTERMException
    assert ended.value.code == 143 and "ended by SIGTERM" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended, command(CONFIG):
        raise SystemExit(code)
    assert ended.value.code == code


def test_the_traceback_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="layer"), command(CONFIG):
        raise ValueError("layer")


def test_other_ranks_say_who_they_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit), command(CONFIG):
        raise ValueError("layer")
    assert capsys.readouterr().err.startswith("rank 1: error: layer")


@pytest.mark.parametrize(("accelerator", "switched_on"), [("cpu", 1), ("gpu", 0), ("auto", 0)])
def test_the_cpu_host_is_switched_on_for_the_cpu_only(
    monkeypatch: pytest.MonkeyPatch, accelerator: str, switched_on: int
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(cpu_host, "enable", lambda: calls.append(1))
    with command(OmegaConf.create({"trainer": {"accelerator": accelerator}})):
        assert len(calls) == switched_on
