# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Validity of a certificate for a model, a tokenizer and a setting."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_ee.certificates.certificate import Certificate, Identity, Setting, read_certificates
from nemo_ee.checkpoint.chunk_reader import ChunkReader
from nemo_ee.checkpoint.fingerprint import exits_fingerprint
from nemo_ee.checkpoint.members import (
    EXIT_WEIGHTS,
    IN_ARCHIVE,
    LORA_WEIGHTS,
    PROBES,
    TOKENIZER_ARTIFACTS,
    TOKENIZER_FOLDER,
)
from nemo_ee.checkpoint.nemo_archive import NemoArchive
from nemo_ee.checkpoint.portable import plain_config
from nemo_ee.checkpoint.unpacked import readable
from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.exits.criteria import PROBE
from nemo_ee.text.special_tokens import EndOfText

KV_POLICY = "carry"  # the decoding engine computes keys and values of skipped layers later, exactly
_TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.model", "chat_template*")

logger = logging.getLogger(__name__)


def setting_of(request: Any, mode: str) -> Setting:
    """The setting of a script's run.

    Args:
        request: the checked settings of generation or calibration; top_k null and 0 both keep every token.
        mode: one of `nemo_ee.generation.policy.MODES`.
    """
    shaping = {"temperature": request.temperature, "top_p": request.top_p, "top_k": request.top_k or 0}
    sampling = {"greedy": request.greedy, "repetition_penalty": request.repetition_penalty}
    return Setting(
        mode=mode,
        kv=KV_POLICY,
        precision="bf16" if request.trainer.precision.startswith("bf16") else "32",
        tokens_to_generate=request.tokens_to_generate,
        stop_on_eos=request.stop_on_eos,
        add_BOS=request.add_BOS,
        sampling=sampling if request.greedy else {**sampling, **shaping},
    )


def identify(path: str | Path) -> Identity:
    """The model of a certificate of this `.nemo`: fingerprints of its backbone, exits and tokenizer.

    The backbone's fingerprint is read from the file; `model.verify=full` recomputes it when weights are
    loaded. Exits and tokenizer are hashed here.

    Raises:
        ValueError: the file is damaged, has no exits, or does not state its backbone's fingerprint.
    """
    with NemoArchive(path) as archive:
        stored = plain_config(archive)
        block = stored.get("early_exit") or {}
        if not archive.has(EXIT_WEIGHTS) or not block.get("exits"):
            raise ValueError(f"{path} has no exits; add some with examples/megatron_gpt_early_exit_convert.py")
        if not stored.get("backbone_fingerprint"):
            raise ValueError(
                f"{path} does not state the fingerprint of its backbone, which a certificate names; write it anew "
                "with examples/megatron_gpt_early_exit_convert.py, which computes one"
            )
        tokenizer = tokenizer_fingerprint(archive, stored.get("tokenizer") or {})
        exits = EarlyExitConfig.from_mapping(block, num_layers=stored["num_layers"]).exits
        with readable(archive) as opened:
            has_updates = opened.has(LORA_WEIGHTS)
            fingerprint = exits_fingerprint(
                ChunkReader(opened.folder(EXIT_WEIGHTS), prefix="exits."),
                [f"{exit.name} {exit.layer} {exit.architecture} {exit.output}" for exit in exits],
                updates=ChunkReader(opened.folder(LORA_WEIGHTS), prefix="") if has_updates else None,
                vocab_size=stored.get("vocab_size"),
            )
        probes = None
        if archive.has(PROBES):
            with archive.open_member(PROBES) as file:
                probes = hashlib.sha256(file.read()).hexdigest()
    return Identity(stored["backbone_fingerprint"], fingerprint, tokenizer, probes)


def tokenizer_fingerprint(archive: NemoArchive, block: Mapping[str, Any]) -> str:
    """sha256 over names and contents of the tokenizer's files: bundled, or in a directory; else over its settings.

    NeMo bundles single files, such as a SentencePiece model, under `nemo:<random>_<name>`: their contents count, not
    the name, which changes with each save.
    """
    digest = hashlib.sha256(b"nemo_ee tokenizer fingerprint 2\n")
    block = {key: _setting_or_content(archive, key, value) for key, value in block.items()}
    bundled = sorted(name for name in archive.members() if name.startswith(f"{TOKENIZER_FOLDER}/"))
    folder = Path(str(block.get("type")))
    if bundled:
        contents = ((name.partition("/")[2], lambda name=name: archive.open_member(name)) for name in bundled)
    elif folder.is_dir():
        files = sorted({file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})
        contents = ((file.name, lambda file=file: open(file, "rb")) for file in files)
    else:
        digest.update(repr(sorted(block.items())).encode())
        contents = ()
    for name, opened in contents:
        with opened() as file:
            digest.update(f"{name} {hashlib.sha256(file.read()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _setting_or_content(archive: NemoArchive, key: str, value: Any) -> str:
    """A tokenizer's setting; for a file the sha256 of its content."""
    text = str(value)
    member = text.removeprefix(IN_ARCHIVE)
    if member != text and member in archive.members():
        opened = archive.open_member(member)
    elif key in TOKENIZER_ARTIFACTS and Path(text).is_file():
        opened = open(text, "rb")
    else:
        return text
    with opened as file:
        return hashlib.sha256(file.read()).hexdigest()


def model_problems(certificate: Certificate, found: Identity) -> Iterator[str]:
    """Differences between the model of the certificate and this model."""
    parts = {
        "backbone": "the backbone is another",
        "exits": "the exits (or low-rank updates) have been changed or tuned since",
        "tokenizer": "the tokenizer is another",
    }
    for part, meaning in parts.items():
        certified, ours = getattr(certificate.model, part), getattr(found, part)
        if certified != ours:
            yield f"{meaning}: certified {certified[:12]}..., found {ours[:12]}...; calibrate this model"
    if certificate.criterion == PROBE and certificate.model.probes != found.probes:
        yield "the probes of the exits are missing or were fitted anew; calibrate this model"


def setting_problems(certificate: Certificate, setting: Setting) -> Iterator[str]:
    """Differences between a setting and the certified one.

    Shorter continuations are a difference too: the risk is a mean over a continuation's tokens, and the mean over all
    of them does not bound the mean over the first ones.
    """
    certified = certificate.setting
    for key in ("mode", "kv", "precision", "tokens_to_generate", "stop_on_eos", "add_BOS"):
        if getattr(setting, key) != getattr(certified, key):
            yield f"{key}={getattr(setting, key)}, certified {key}={getattr(certified, key)}"
    ours, theirs = setting.sampling, certified.sampling
    # Greedy settings have no temperature, top_k and top_p.
    for key in ("greedy", *(key for key in ours if key in theirs and key != "greedy")):
        if ours.get(key) != theirs.get(key):
            yield f"{key}={ours.get(key)}, certified {key}={theirs.get(key)}"


def stop_problems(certificate: Certificate, stops: EndOfText) -> Iterator[str]:
    """Difference between the tokens that end an answer here and in calibration.

    Args:
        stops: end-of-text tokens of this model. No ids: they are the tokenizer's, and the certificate's identity
            already covers the tokenizer.
    """
    setting = certificate.setting
    certified = setting.stop_tokens
    if certified is None:
        certified = () if stops.tokenizer is None else (stops.tokenizer,)
    ours = tuple(sorted(stops.ids))
    if setting.stop_on_eos and ours and ours != certified:
        yield f"answers end at the tokens {list(ours)}, certified stop tokens {list(certified)}"


def valid_certificates(path: str | Path) -> list[Certificate]:
    """The certificates of a `.nemo` for its present weights and tokenizer. Each other one causes a warning.

    Raises:
        ValueError: the file or a certificate is damaged.
    """
    with NemoArchive(path) as archive:
        found = read_certificates(archive)
    identity = identify(path) if found else None
    valid = []
    for certificate in found.values():
        problems = list(model_problems(certificate, identity))
        if problems:
            logger.warning("certificate %r of %s is void: %s", certificate.name, path, "; ".join(problems))
        else:
            valid.append(certificate)
    return valid
