# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Which settings a certificate is about, and what of a model it depends on."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_ee.certificates.certificate import Certificate, Guarantee, Identity, Setting
from nemo_ee.certificates.validity import identify, setting_of, setting_problems, stop_problems, tokenizer_fingerprint
from nemo_ee.checkpoint.nemo_archive import NemoArchive, write_nemo
from nemo_ee.text.special_tokens import EndOfText

SAMPLED = {"greedy": False, "repetition_penalty": 1.0, "temperature": 0.7, "top_k": 0, "top_p": 1.0}
SETTING = Setting("early_exit", "carry", "32", 64, True, None, SAMPLED)
CERTIFICATE = Certificate(
    name="default",
    created="2026-11-24",
    model=Identity("b" * 64, "e" * 64, "t" * 64),
    setting=SETTING,
    criterion="margin",
    thresholds={"a": 0.5},
    max_pending_tokens=None,
    guarantee=Guarantee("disagreement", "share", 0.1, 0.05, 0.03, 0.01, 9.5, 12),
    data={},
)


def test_the_certified_setting_is_inside():
    assert not list(setting_problems(CERTIFICATE, SETTING))
    greedy = dataclasses.replace(SETTING, sampling={"greedy": True, "repetition_penalty": 1.0})
    certificate = dataclasses.replace(CERTIFICATE, setting=greedy)
    assert not list(setting_problems(certificate, greedy))


def test_top_k_null_and_0_are_one_setting():
    config = {"mode": "early_exit", "tokens_to_generate": 4, "stop_on_eos": True, "add_BOS": None, **SAMPLED}
    kept, asked = (setting_of({**config, "top_k": k, "trainer": {"precision": 32}}) for k in (0, None))
    assert kept == asked


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mode", "self_speculative"),
        ("kv", "propagate"),
        ("precision", "bf16"),
        ("tokens_to_generate", 65),
        ("tokens_to_generate", 63),  # a mean over 64 tokens does not bound that over the first 63
        ("stop_on_eos", False),
        ("add_BOS", True),
        ("add_BOS", False),
        ("greedy", True),
        ("temperature", 0.8),
        ("top_k", 5),
        ("top_p", 0.9),
        ("repetition_penalty", 1.1),
    ],
)
def test_every_other_setting_is_outside(key, value):
    if key in SAMPLED:
        asked = dataclasses.replace(SETTING, sampling=SAMPLED | {key: value})
    else:
        asked = dataclasses.replace(SETTING, **{key: value})
    certified = SAMPLED.get(key, getattr(SETTING, key, None))
    assert list(setting_problems(CERTIFICATE, asked)) == [f"{key}={value}, certified {key}={certified}"]


@pytest.mark.parametrize(
    ("certified", "stops", "inside"),
    [
        (None, EndOfText((2,), 2), True),  # of an earlier version, which knew the tokenizer's token alone
        (None, EndOfText((0, 12), 0), False),
        (None, EndOfText((2,), 0), False),
        (None, EndOfText((), None), True),  # the tokenizer says, and it is the certified one
        ((0, 12), EndOfText((12, 0), 0), True),
        ((0, 12), EndOfText((0,), 0), False),
        ((0,), EndOfText((0, 12), 0), False),
        ((0,), EndOfText((), 0), True),
    ],
)
def test_answers_must_end_at_the_certified_tokens(certified, stops, inside):
    certificate = dataclasses.replace(CERTIFICATE, setting=dataclasses.replace(SETTING, stop_tokens=certified))
    problems = list(stop_problems(certificate, stops))
    assert not problems if inside else "answers end at the tokens" in problems[0] and len(problems) == 1
    running_on = dataclasses.replace(certificate, setting=dataclasses.replace(certificate.setting, stop_on_eos=False))
    assert not list(stop_problems(running_on, stops))


def test_stop_tokens_come_back_from_the_file():
    """A certificate without them is written as in earlier versions."""
    certificate = dataclasses.replace(CERTIFICATE, setting=dataclasses.replace(SETTING, stop_tokens=(0, 12)))
    values = certificate.to_mapping()
    assert Certificate.from_mapping(values, "x") == certificate
    assert "stop_tokens" not in CERTIFICATE.to_mapping()["setting"]
    assert Certificate.from_mapping(CERTIFICATE.to_mapping(), "x") == CERTIFICATE
    for wrong in ("0", [0, "12"], [True]):
        values["setting"]["stop_tokens"] = wrong
        with pytest.raises(ValueError, match="damaged .*stop_tokens"):
            Certificate.from_mapping(values, "x")


# -- the model ------------------------------------------------------------------------------------------------------


def tokenizer_of(path, block, **members):
    with NemoArchive(write_nemo(path, {"model_config.yaml": "", **members})) as archive:
        return tokenizer_fingerprint(archive, block)


def test_a_tokenizer_is_what_its_files_hold_not_what_they_are_called(tmp_path):
    """NeMo gives a SentencePiece model another name at each saving."""
    block = {"library": "sentencepiece", "model": "nemo:0a_tokenizer.model", "vocab_file": None}
    renamed = block | {"model": "nemo:1b_tokenizer.model"}
    first = tokenizer_of(tmp_path / "a.nemo", block, **{"0a_tokenizer.model": b"pieces"})
    assert tokenizer_of(tmp_path / "b.nemo", renamed, **{"1b_tokenizer.model": b"pieces"}) == first
    assert tokenizer_of(tmp_path / "c.nemo", block, **{"0a_tokenizer.model": b"others"}) != first
    local = tmp_path / "tokenizer.model"
    local.write_bytes(b"pieces")
    assert tokenizer_of(tmp_path / "d.nemo", block | {"model": str(local)}) == first
    local.write_bytes(b"others")
    assert tokenizer_of(tmp_path / "e.nemo", block | {"model": str(local)}) != first
    other = block | {"library": "other"}
    assert tokenizer_of(tmp_path / "f.nemo", other, **{"0a_tokenizer.model": b"pieces"}) != first


def test_a_backbone_without_a_fingerprint_is_no_identity(tmp_path):
    config = "num_layers: 2\nearly_exit: {exits: [{layer: 1, architecture: norm}]}\n"
    path = write_nemo(tmp_path / "a.nemo", {"model_config.yaml": config, "exit_weights/x": b"x"})
    with pytest.raises(ValueError, match="does not state the fingerprint of its backbone.*convert.py"):
        identify(path)
