# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Requests under a certificate: its thresholds, its setting, its weights; anything else is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import openai

from nemo_ee.certificates.certificate import Certificate, Guarantee, Identity, Setting
from nemo_ee.export.export_certificates import certificates_of
from nemo_ee.export.manifest import write_manifest
from nemo_ee.serving.serve import make_server
from nemo_ee.serving.settings import ServerSettings
from tests.helpers.served_model import running, serve_config, write_exported_model

GREEDY = {"greedy": True, "repetition_penalty": 1.0}
CERTIFICATE = Certificate(
    name="default",
    created="2026-11-24",
    model=Identity("b" * 64, "e" * 64, "t" * 64),
    setting=Setting("early_exit", "carry", "32", 16, True, None, GREEDY),
    criterion="max_probability",
    thresholds={"layer6-mlp": 0.2, "layer9-mlp": 0.1},
    max_pending_tokens=3,
    guarantee=Guarantee("disagreement", "share", 0.1, 0.05, 0.03, 0.01, 9.5, 12),
    data={"sha256": "d" * 64, "num_prompts": 100},
)
SAMPLED = dataclasses.replace(
    CERTIFICATE,
    name="sampled",
    thresholds={},
    setting=dataclasses.replace(
        CERTIFICATE.setting, sampling={**GREEDY, "greedy": False, "temperature": 0.8, "top_k": 0, "top_p": 0.9}
    ),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_exported_model(tmp_path_factory.mktemp("export") / "hf_early_exit")
    write_manifest(path.parent, {"certificates": [CERTIFICATE.to_mapping(), SAMPLED.to_mapping()]})
    return path


@pytest.fixture(scope="module")
def client(model: Path):
    # The server's own mode is another, which must not matter.
    server = make_server(ServerSettings.from_config(serve_config(model, mode="self_speculative")))
    with running(server) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as own:
        yield own


def ask(client, certificate, **changes):
    given = {"certificate": certificate, **changes.pop("early_exit", {})}
    kind = {"model": "demo", "prompt": "def test_add(self):", "max_tokens": 16, "temperature": 0}
    return client.completions.create(**{**kind, **changes}, extra_body={"early_exit": given})


def test_the_certificate_s_thresholds_are_what_is_used(client) -> None:
    answer = ask(client, "default")
    given = {"threshold": CERTIFICATE.thresholds, "exits": ["layer6-mlp", "layer9-mlp"], "max_pending_tokens": 3}
    plain = client.completions.create(
        model="demo", prompt="def test_add(self):", max_tokens=16, temperature=0, extra_body={"early_exit": given | {
            "mode": "early_exit"}},
    )  # fmt: skip
    assert answer.choices[0].early_exit == plain.choices[0].early_exit
    assert answer.usage.early_exit["tokens_per_exit"]["final"] < 16
    told = answer.usage.early_exit["certificate"]
    assert (told["name"], told["risk"], told["epsilon"], told["delta"]) == ("default", "disagreement", 0.1, 0.05)
    assert "certificate" not in plain.usage.early_exit
    assert ask(client, True).usage.early_exit["certificate"]["name"] == "default"
    card = client.models.retrieve("demo")
    assert [one["name"] for one in card.early_exit["certificates"]] == ["default", "sampled"]


def test_no_thresholds_means_full_depth(client) -> None:
    answer = ask(client, "sampled", temperature=0.8, seed=3, top_p=0.9)
    assert answer.usage.early_exit["mode"] == "full"


@pytest.mark.parametrize(
    ("certificate", "changes", "words"),
    [
        ("default", {"max_tokens": 17}, "max_tokens=17, certified max_tokens=16"),
        ("default", {"max_tokens": 15}, "max_tokens=15, certified max_tokens=16"),
        ("default", {"temperature": 0.7}, "greedy=False, certified greedy=True"),
        ("default", {"stop": ["x"]}, "certified without stop"),
        ("default", {"logit_bias": {"5": 1}}, "logit_bias is given, certified without"),
        ("default", {"presence_penalty": 0.5}, "presence_penalty is given, certified without"),
        ("default", {"max_tokens": 20, "stop": "x"}, "max_tokens=16; stop is given"),
        ("sampled", {"temperature": 0.7, "top_p": 0.9}, "temperature=0.7, certified temperature=0.8"),
        ("other", {}, "its certificates are default, sampled"),
        (3, {}, "early_exit.certificate=3 must be True, or a text"),
        ("default", {"early_exit": {"max_pending_tokens": 1}}, "a certificate sets all of them"),
        ("default", {"early_exit": {"mode": "self_speculative"}}, "does not use certificate"),
    ],
)
def test_what_it_does_not_cover_is_refused(certificate, changes: dict, words: str, client) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        ask(client, certificate, **changes)


def test_changed_files_void_it(model: Path, caplog) -> None:
    assert set(certificates_of(model)) == {"default", "sampled"}
    tokenizer = model / "tokenizer_config.json"
    text = tokenizer.read_text(encoding="utf-8")
    try:
        tokenizer.write_text(text + " ", encoding="utf-8")
        assert certificates_of(model) == {} and "are void: hf_early_exit/tokenizer_config.json" in caplog.text
    finally:
        tokenizer.write_text(text, encoding="utf-8")
    assert certificates_of(model), "control: with the exported files it holds"


def test_another_precision_is_another_setting(model: Path) -> None:
    server = make_server(ServerSettings.from_config(serve_config(model, dtype="bfloat16")))
    with running(server) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="precision=bf16, certified precision=32"):
            ask(client, "default")
