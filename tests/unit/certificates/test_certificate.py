# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Certificates in archives and directories, and what is refused of them; the fingerprint of exits."""

from __future__ import annotations

import dataclasses
import gzip
import json

import pytest
import torch

from nemo_ee.certificates.certificate import (
    Certificate,
    Guarantee,
    Identity,
    Setting,
    find_certificate,
    read_certificates,
    store_certificate,
)
from nemo_ee.checkpoint.chunk_reader import TensorInfo
from nemo_ee.checkpoint.fingerprint import exits_fingerprint
from nemo_ee.checkpoint.nemo_archive import NemoArchive, write_nemo

GREEDY = {"greedy": True, "repetition_penalty": 1.0}
CERTIFICATE = Certificate(
    name="default",
    created="2026-11-24",
    model=Identity("b" * 64, "e" * 64, "t" * 64),
    setting=Setting("early_exit", "carry", "32", 64, True, None, GREEDY),
    criterion="margin",
    thresholds={"a": 0.5, "b": 0.75},
    max_pending_tokens=3,
    guarantee=Guarantee("disagreement", "share", 0.1, 0.05, 0.03, 0.01, 9.5, 12),
    data={"sha256": "d" * 64, "num_prompts": 100},
)


@pytest.fixture
def plain(tmp_path):
    return write_nemo(
        tmp_path / "plain.nemo", {"model_config.yaml": "num_layers: 12\n", "exit_weights/x": b"\x00" * 700}
    )


def test_it_reads_back_as_it_was_and_gives_the_policy(plain, tmp_path):
    store_certificate(plain, CERTIFICATE)
    assert find_certificate(plain, True) == find_certificate(plain, "default") == CERTIFICATE
    policy = CERTIFICATE.policy()
    assert policy.thresholds == {"a": 0.5, "b": 0.75} and policy.active == ("a", "b")
    assert (policy.criterion, policy.max_pending_tokens) == ("margin", 3)
    full_depth = dataclasses.replace(CERTIFICATE, thresholds={})
    assert full_depth.policy().evaluated_exits([]) == ()


def test_a_certificate_of_an_earlier_version_is_read():
    """Its cap was called max_waiting."""
    values = CERTIFICATE.to_mapping()
    values["max_waiting"] = values.pop("max_pending_tokens")
    assert Certificate.from_mapping(values, "old") == CERTIFICATE


def test_several_have_names_and_one_of_a_name_is_replaced(plain, tmp_path):
    other = dataclasses.replace(CERTIFICATE, name="fast", created="2026-11-25")
    newer = dataclasses.replace(other, created="2026-11-26")
    for one in (CERTIFICATE, other, newer):
        store_certificate(plain, one)
    with NemoArchive(plain) as archive:
        assert read_certificates(archive) == {"default": CERTIFICATE, "fast": newer}
        assert archive.open_member("exit_weights/x").read() == b"\x00" * 700
    assert find_certificate(plain, True) == CERTIFICATE, "the one named default"
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(
        ValueError, match="no certificate 'slow', its certificates are default, fast; name one of them"
    ):
        find_certificate(plain, "slow")


def test_directories_and_compressed_archives_take_one_too(plain, tmp_path):
    packed = tmp_path / "packed.nemo"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    store_certificate(packed, CERTIFICATE, tmp_path / "elsewhere.nemo")
    assert find_certificate(tmp_path / "elsewhere.nemo", True) == CERTIFICATE
    with pytest.raises(ValueError, match="it has none"):
        find_certificate(packed, True)
    with NemoArchive(plain) as archive:
        archive.extract(tmp_path / "folder")
    store_certificate(tmp_path / "folder", CERTIFICATE)
    assert find_certificate(tmp_path / "folder", True) == CERTIFICATE


def test_an_exits_only_copy_elsewhere_still_finds_its_base(plain, tmp_path):
    config = "num_layers: 12\nbackbone_path: plain.nemo\n"
    exits = write_nemo(tmp_path / "exits.nemo", {"model_config.yaml": config, "exit_weights/x": b"\x00"})
    for output, expected in (("out/certified.nemo", '"../plain.nemo"'), ("certified.nemo", "plain.nemo")):
        copy = store_certificate(exits, CERTIFICATE, tmp_path / output)
        with NemoArchive(copy) as archive:
            assert f"backbone_path: {expected}\n" in archive.config_text()
            assert archive.open_member("exit_weights/x").read() == b"\x00"


def test_in_place_means_the_file_that_a_link_names_with_the_mode_it_has(plain, tmp_path):
    plain.chmod(0o640)
    link = tmp_path / "link.nemo"
    link.symlink_to(plain)
    store_certificate(link, CERTIFICATE)
    assert link.is_symlink() and find_certificate(plain, True) == CERTIFICATE
    assert plain.stat().st_mode & 0o777 == 0o640


def test_a_write_that_fails_leaves_the_file_as_it_was(plain, tmp_path, monkeypatch):
    before = plain.read_bytes()

    def fail(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr("nemo_ee.checkpoint.nemo_archive._add_file", fail)
    with pytest.raises(OSError, match="no space"):
        store_certificate(plain, CERTIFICATE)
    assert plain.read_bytes() == before and list(tmp_path.iterdir()) == [plain]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values | {"schema_version": 2}, "schema version 2, this code reads 1; calibrate again"),
        (lambda values: values | {"thresholds": {"a": 2.0}}, "damaged .*threshold of exit 'a' = 2.0"),
        (lambda values: values | {"model": {"backbone": "x"}}, "damaged"),
        (lambda values: values | {"name": "../x"}, "damaged .*certificate name"),
        (lambda values: {key: value for key, value in values.items() if key != "data"}, "damaged"),
        (lambda values: {key: value for key, value in values.items() if key != "model"}, "damaged .no 'model'"),
        (lambda values: values | {"name": "other"}, "default.json: damaged .it is named 'other'"),
        (lambda values: values | {"setting": values["setting"] | {"sampling": "greedy"}}, "damaged .sampling is"),
        (lambda values: [values], "schema version None"),
    ],
)
def test_damaged_ones_are_refused(tmp_path, change, message):
    values = json.loads(json.dumps(CERTIFICATE.to_mapping()))
    path = write_nemo(
        tmp_path / "x.nemo", {"model_config.yaml": "", "certificates/default.json": json.dumps(change(values))}
    )
    with pytest.raises(ValueError, match=message):
        find_certificate(path, True)


def test_a_file_that_is_no_json_is_refused(tmp_path):
    path = write_nemo(tmp_path / "x.nemo", {"model_config.yaml": "", "certificates/default.json": "{"})
    with pytest.raises(ValueError, match="certificates/default.json: damaged .*calibrate again"):
        find_certificate(path, True)


# -- the fingerprint of exits ---------------------------------------------------------------------------------------


class Tensors:
    """A source over tensors in memory."""

    def __init__(self, tensors):
        self.tensors = tensors

    def keys(self):
        return {key: TensorInfo(tuple(value.shape), value.dtype) for key, value in self.tensors.items()}

    def read(self, key, offset, shape):
        return self.tensors[key][tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]


def exits():
    generator = torch.Generator().manual_seed(0)
    return {
        "a.mlp.weight": torch.randn(3, 4, generator=generator),
        "a.output.weight": torch.randn(10, 4, generator=generator),
        "b.output_update.low_rank_b": torch.randn(10, 2, generator=generator).bfloat16(),
    }


PLACES = ["a 3 mlp own", "b 6 norm low_rank"]


def test_the_fingerprint_of_exits_changes_with_everything_but_padding():
    plain = exits_fingerprint(Tensors(exits()), PLACES, vocab_size=10)
    seen = {plain}
    for changed in (
        exits() | {"a.mlp.weight": exits()["a.mlp.weight"].nextafter(torch.tensor(9.0))},
        exits() | {"c.mlp.weight": torch.ones(1)},
        {key.replace("a.", "c."): value for key, value in exits().items()},
        exits() | {"b.output_update.low_rank_b": exits()["b.output_update.low_rank_b"].float()},
    ):
        digest = exits_fingerprint(Tensors(changed), PLACES, vocab_size=10)
        assert digest not in seen
        seen.add(digest)
    for places in (["a 4 mlp own", PLACES[1]], PLACES[::-1]):
        assert exits_fingerprint(Tensors(exits()), places, vocab_size=10) not in seen
    updates = Tensors({"decoder.layers.x": torch.ones(2)})
    assert exits_fingerprint(Tensors(exits()), PLACES, updates=updates, vocab_size=10) not in seen
    padded = {
        key: torch.cat([value, value.new_zeros(6, value.shape[1])]) if len(value) == 10 else value
        for key, value in exits().items()
    }
    assert exits_fingerprint(Tensors(padded), PLACES, vocab_size=10) == plain
    assert exits_fingerprint(Tensors(padded), PLACES) != plain
    with pytest.raises(ValueError, match="a.output.weight has 10 rows, fewer than the vocabulary size 11"):
        exits_fingerprint(Tensors(exits()), PLACES, vocab_size=11)
