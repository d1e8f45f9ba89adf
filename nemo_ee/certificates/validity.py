# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether a certificate is valid here: for this model, this tokenizer and this setting."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_ee.certificates.certificate import Certificate, Identity, Setting, read_certificates
from nemo_ee.checkpoint.chunk_reader import ChunkReader
from nemo_ee.checkpoint.fingerprint import exits_fingerprint
from nemo_ee.checkpoint.members import EXIT_WEIGHTS, IN_ARCHIVE, LORA_WEIGHTS, TOKENIZER_ARTIFACTS, TOKENIZER_FOLDER
from nemo_ee.checkpoint.nemo_archive import NemoArchive
from nemo_ee.checkpoint.portable import plain_config
from nemo_ee.checkpoint.unpacked import readable
from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.text.special_tokens import EndOfText

KV_POLICY = "carry"  # how the decoding engine treats skipped layers: their keys and values are computed later, exactly
_TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.model", "chat_template*")

logger = logging.getLogger(__name__)


def setting_of(asked: Any, mode: str) -> Setting:
    """The setting that a script is run with.

    Args:
        asked: the checked settings of generation or calibration; top_k null and 0 both keep every token.
        mode: one of `nemo_ee.generation.policy.MODES`.
    """
    shaping = {"temperature": asked.temperature, "top_p": asked.top_p, "top_k": asked.top_k or 0}
    sampling = {"greedy": asked.greedy, "repetition_penalty": asked.repetition_penalty}
    return Setting(
        mode=mode,
        kv=KV_POLICY,
        precision="bf16" if asked.trainer.precision.startswith("bf16") else "32",
        tokens_to_generate=asked.tokens_to_generate,
        stop_on_eos=asked.stop_on_eos,
        add_BOS=asked.add_BOS,
        sampling=sampling if asked.greedy else {**sampling, **shaping},
    )


def identify(path: str | Path) -> Identity:
    """Read and hash what a certificate of this `.nemo` depends on.

    The backbone's fingerprint is the one that the file states; `model.verify=full` recomputes it when weights are
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
    return Identity(stored["backbone_fingerprint"], fingerprint, tokenizer)


def tokenizer_fingerprint(archive: NemoArchive, block: Mapping[str, Any]) -> str:
    """sha256 over names and contents of the tokenizer's files: bundled, or in a directory; else over its settings.

    NeMo bundles single files, such as a SentencePiece model, under `nemo:<random>_<name>`: their contents count, not
    a name that is another after each saving.
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
    """A tokenizer's setting; of a file the sha256 of what is in it."""
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
    """Why the certificate says nothing about this model."""
    parts = {
        "backbone": "the backbone is another",
        "exits": "the exits (or low-rank updates) have been changed or tuned since",
        "tokenizer": "the tokenizer is another",
    }
    for part, meaning in parts.items():
        certified, ours = getattr(certificate.model, part), getattr(found, part)
        if certified != ours:
            yield f"{meaning}: certified {certified[:12]}..., found {ours[:12]}...; calibrate this model"


def setting_problems(certificate: Certificate, asked: Setting) -> Iterator[str]:
    """Where a setting leaves what was certified.

    Shorter continuations are outside too: the risk is a mean over a continuation's tokens, and that over all of them
    does not bound the one over the first of them.
    """
    certified = certificate.setting
    for key in ("mode", "kv", "precision", "tokens_to_generate", "stop_on_eos", "add_BOS"):
        if getattr(asked, key) != getattr(certified, key):
            yield f"{key}={getattr(asked, key)}, certified {key}={getattr(certified, key)}"
    ours, theirs = asked.sampling, certified.sampling
    # Greedy settings say nothing about the shape of a distribution.
    for key in ("greedy", *(key for key in ours if key in theirs and key != "greedy")):
        if ours.get(key) != theirs.get(key):
            yield f"{key}={ours.get(key)}, certified {key}={theirs.get(key)}"


def stop_problems(certificate: Certificate, stops: EndOfText) -> Iterator[str]:
    """Whether answers end at other tokens than in calibration.

    Args:
        stops: of the model at hand. No ids mean that its tokenizer alone says, and a tokenizer is part of the
            certificate's identity.
    """
    setting = certificate.setting
    certified = setting.stop_tokens
    if certified is None:
        certified = () if stops.tokenizer is None else (stops.tokenizer,)
    ours = tuple(sorted(stops.ids))
    if setting.stop_on_eos and ours and ours != certified:
        yield f"answers end at the tokens {list(ours)}, certified stop tokens {list(certified)}"


def valid_certificates(path: str | Path) -> list[Certificate]:
    """The certificates of a `.nemo` that are about its present weights and tokenizer; others are warned of.

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
