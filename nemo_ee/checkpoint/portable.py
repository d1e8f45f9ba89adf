# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Paths on disk in a `.nemo`, stored such that the file can be used on another machine.

    backbone_path    in an exits-only file: relative to that file if the backbone lies beside or below it, or below
                     one of the two folders around it; else the backbone's base name as a hint. The fingerprint
                     decides whether it is the right backbone
    tokenizer        the files themselves, in `tokenizer/`; `type` names that folder
    anything else    an absolute path in the config is dropped

Two paths are kept. A backbone is copied byte for byte, so its `.metadata` may name the folder in which it was first
written. A tokenizer's directory that cannot be bundled (no `tokenizer_class`, no vocabulary file of a known name) is
still named by `type`, with a warning.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
from collections.abc import Container, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from nemo_ee.checkpoint.atomic import atomic_file
from nemo_ee.checkpoint.members import (
    CONFIG_MEMBER,
    IN_ARCHIVE,
    METADATA_FILE,
    MODEL_WEIGHTS,
    TOKENIZER_ARTIFACTS,
    TOKENIZER_FOLDER,
)
from nemo_ee.checkpoint.nemo_archive import NemoArchive, write_nemo
from nemo_ee.checkpoint.tokenizer_files import plain_json_object
from nemo_ee.text.tokenizer_directory import TOKENIZER_FILES, carried_settings, has_settings

logger = logging.getLogger(__name__)

_FOLDERS_UP = 2
_BACKBONE_KEY = "backbone_path"
_YAML_STRING = "tag:yaml.org,2002:str"
_LONGEST_PATH = 4096  # limit of Linux
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def plain_config(archive: NemoArchive) -> dict[str, Any]:
    """The model config of a GPT's `.nemo` as plain values.

    Raises:
        ValueError: the file is damaged, or not a GPT.
    """
    path, config = archive.path, archive.config_values()
    layers = config.get("num_layers") if isinstance(config, dict) else None
    if not isinstance(layers, int) or layers < 1:
        raise ValueError(f"{path}: {CONFIG_MEMBER} has no num_layers, so this is not a GPT; give the .nemo of one")
    return config


def backbone_of(nemo: str | Path, given: str | Path | None = None, option: str = "model.backbone_path") -> Path:
    """The file with the backbone of a `.nemo`: the file itself, or the base of an exits-only file. Reads configs only.

    Args:
        nemo, given, option: see `find_backbone`.

    Raises:
        ValueError: the file does not exist, has no backbone, or another backbone than the exits were tuned on.
    """
    with NemoArchive(nemo) as archive:
        if archive.has(MODEL_WEIGHTS):
            return Path(nemo)
        config = plain_config(archive)
    path = find_backbone(nemo, stored=config.get(_BACKBONE_KEY), given=given, option=option)
    with NemoArchive(path) as archive:
        if not archive.has(MODEL_WEIGHTS):
            raise ValueError(
                f"{nemo} holds exits only, and {path} has no backbone either: "
                f"give {option}=<the .nemo the exits were tuned on>"
            )
        found = plain_config(archive).get("backbone_fingerprint")
    refuse_other_backbone(config.get("backbone_fingerprint"), found, path, option)
    return path


def refuse_other_backbone(
    expected: str | None, found: str | None, path: Path, option: str = "model.backbone_path"
) -> None:
    """Raises a ValueError where two fingerprints differ; None is an unknown one."""
    if None not in (expected, found) and found != expected:
        raise ValueError(
            f"the exits were tuned on the backbone with fingerprint {expected}, but {path} has {found}; "
            f"give the base model they were tuned on ({option}=...)"
        )


def stored_backbone_path(backbone: str | Path, nemo: str | Path) -> str:
    """The `backbone_path` to store in an exits-only file `nemo`; it names no folder above the two around the file."""
    relative = Path(os.path.relpath(Path(backbone).resolve(), Path(nemo).resolve().parent))
    return relative.as_posix() if relative.parts.count("..") <= _FOLDERS_UP else relative.name


def find_backbone(
    nemo: str | Path, *, stored: str | None, given: str | Path | None, option: str = "model.backbone_path"
) -> Path:
    """The backbone of an exits-only file.

    Args:
        nemo: the exits-only file.
        stored: `backbone_path` of its config, relative to it; files of earlier versions hold an absolute path.
        given: the user's path, relative to the working directory; it has priority over `stored`.
        option: the setting with the user's path, for messages.

    Raises:
        ValueError: the file does not exist, or the stored value is not a path.
    """
    if given:
        places = [Path(str(given))]
    elif stored:
        if not isinstance(stored, str) or len(stored) > _LONGEST_PATH:
            raise ValueError(
                f"{nemo} is damaged: its {_BACKBONE_KEY} is {str(stored)[:40]!r}..., which is not a path; "
                f"give {option}=<the .nemo the exits were tuned on>"
            )
        folder, name = Path(nemo).resolve().parent, PureWindowsPath(stored).name  # both kinds of separators
        places = list(dict.fromkeys((folder / stored, folder / name, Path(stored))))
    else:
        places = []
    for place in places:
        if _exists(place):
            return place
    named = str(given) if given else stored
    tried = f" (searched: {', '.join(map(str, places))})" if len(places) > 1 else ""
    problem = f"its base model ({named!r}) was not found{tried}" if named else "it does not name its base model"
    raise ValueError(f"{nemo} holds exits only; {problem}: give {option}=<the .nemo the exits were tuned on>")


def _exists(place: Path) -> bool:
    try:
        return place.exists()
    except OSError:  # a name that is too long, a folder that may not be read
        return False


def put_member(path: str | Path, member: str, content: bytes, output: str | Path | None = None) -> Path:
    """Put a member into a `.nemo`; one of the same name is replaced. Everything else is copied byte for byte, except
    `backbone_path` of an exits-only file that is written to another directory.

    Args:
        path: the `.nemo` file, or an extracted one.
        output: the whole file to write; None = `path` itself (of a link: its target), which is replaced only when the
            new file is whole.

    Returns:
        The file (or directory) with the member.
    """
    path = Path(path)
    if output is None and path.is_dir():
        with atomic_file(path / member) as partial:
            partial.write_bytes(content)
        return path
    with NemoArchive(path) as archive:
        entries: dict[str, Any] = {name: archive for name in archive.members() if name != member}
        # The target of a link is replaced, not the link: the member belongs into the target.
        target = Path(output) if output else path.resolve()
        if CONFIG_MEMBER in entries:
            entries[CONFIG_MEMBER] = config_elsewhere(archive.config_text(), path, target)
        return write_nemo(target, {**entries, member: content})


def config_elsewhere(text: str, nemo: str | Path, output: str | Path) -> str:
    """The config of an exits-only file for a copy of the file: `backbone_path` is made relative to the copy.

    All other values, and configs of other files, are unchanged.

    Args:
        text: text of `model_config.yaml`.
        nemo, output: the file and its copy.

    Raises:
        ValueError: the text is not YAML.
    """
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as problem:
        raise ValueError(f"{nemo}: {CONFIG_MEMBER} is damaged ({problem}); fetch or save the file again") from problem
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    node = next((value for key, value in pairs if key.value == _BACKBONE_KEY and _follows(value, key)), None)
    stored = node.value if node is not None and node.tag == _YAML_STRING else None
    if stored is None or Path(nemo).resolve().parent == Path(output).resolve().parent:
        return text
    try:
        moved = stored_backbone_path(find_backbone(nemo, stored=stored, given=None), output)
    except ValueError:  # the user gave its path; a copy keeps its name
        moved = PureWindowsPath(stored).name
    start, end = node.start_mark.index, node.end_mark.index
    end = start + len(text[start:end].rstrip())  # a block's value ends after its last newline
    value = yaml.safe_dump(moved, default_style='"', width=math.inf, allow_unicode=True).rstrip("\n")
    return text[:start] + value + text[end:]


def _follows(value: yaml.Node, key: yaml.Node) -> bool:
    """Whether the text of a node's value is at the node; an alias has it somewhere else."""
    return value.start_mark.index >= key.end_mark.index


def portable_tokenizer(
    block: Mapping[str, Any], members: Container[str], *, own: Container[str] = ()
) -> tuple[dict[str, Any], dict[str, Path]]:
    """A config's tokenizer block without paths of this machine, and the files that the archive needs for it.

    Args:
        block: `library`, `type`, `model`, ...
        members: names in the archive; a tokenizer in the archive is kept.
        own: keys that the user set. Other keys come from a `.nemo`, which may be untrusted: from a directory that such
            a key names only a tokenizer's files are taken, and a single file that it names is not taken.

    Returns:
        (the block to store, name in the archive -> file).
    """
    block, files = dict(block), {}
    place = block.get("type")
    if block.get("library") == "huggingface" and isinstance(place, str):
        folder, bundled = Path(place), any(f"{TOKENIZER_FOLDER}/{name}" in members for name in TOKENIZER_FILES)
        if not bundled and folder.is_dir():
            files = _bundle(folder)
        if bundled or files:
            block["type"] = TOKENIZER_FOLDER
            if block.get("use_fast") is None:  # NeMo's default is False; the files in `tokenizer/` were read with True
                block["use_fast"] = bundled
    for key in TOKENIZER_ARTIFACTS:
        value = block.get(key)
        if not isinstance(value, str) or not value or value.startswith(IN_ARCHIVE):
            continue
        name = PurePosixPath(value).name
        if key in own and Path(value).is_file():
            name = f"{key}_{name}"
            files[name], block[key] = Path(value), f"{IN_ARCHIVE}{name}"
        elif name in members:  # written by old versions of NeMo
            block[key] = f"{IN_ARCHIVE}{name}"
        elif key not in own:
            logger.warning("tokenizer.%s=%s of the source is not in its .nemo, and not stored", key, value)
            del block[key]
    return block, files


def _bundle(folder: Path) -> dict[str, Path]:
    """The tokenizer files of a directory; none if transformers needs more than these.

    Links are followed: a folder of the Hugging Face hub's cache consists of links.
    """
    files = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    reason = None
    if not (plain_json_object((folder / "tokenizer_config.json").resolve()) or {}).get("tokenizer_class"):
        reason = "tokenizer_config.json names no tokenizer_class"
    elif not files.keys() & set(_VOCABULARIES):
        reason = f"there is none of {', '.join(_VOCABULARIES)}"
    if reason is not None:
        logger.warning(
            "%s: %s, so the tokenizer is not put into the .nemo, which needs this directory wherever it is loaded",
            folder,
            reason,
        )
        return {}
    return {f"{TOKENIZER_FOLDER}/{name}": file for name, file in files.items()}


def without_code_files(entries: Mapping[str, Path | bytes | str | NemoArchive]) -> dict[str, Any]:
    """Entries of a `.nemo` (see `write_nemo`) without code that transformers would run when it loads the tokenizer:
    Python files, and keys in the settings of `tokenizer/` that name code.
    """
    kept: dict[str, Any] = {}
    for name, source in entries.items():
        folder, _, file = name.rpartition("/")
        if name.endswith(".py"):
            logger.warning("%s is code and is not stored", name)
        elif folder != TOKENIZER_FOLDER or not has_settings(file):
            kept[name] = source
        else:
            data = carried_settings(file, _contents(name, source))
            if data is None:
                logger.warning("%s is no JSON object and is not stored", name)
            else:
                kept[name] = data
    return kept


def _contents(name: str, source: Path | bytes | str | NemoArchive) -> bytes:
    if isinstance(source, NemoArchive):
        with source.open_member(name) as file:
            return file.read()
    if isinstance(source, Path):
        return source.read_bytes()
    return source.encode() if isinstance(source, str) else source


def without_machine_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model config without the keys whose value is an absolute path, or a list with one.

    The tokenizer's block is unchanged: see `portable_tokenizer`.
    """
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if key == "tokenizer":
            kept[key] = value
        elif isinstance(value, Mapping):
            kept[key] = without_machine_paths(value)
        elif any(map(_is_absolute, _strings(value))):
            logger.info("%s=%s is a path of this machine and is not stored", key, value)
        else:
            kept[key] = value
    return kept


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _is_absolute(text: str) -> bool:
    return any(path.is_absolute() and len(path.parts) > 1 for path in (PurePosixPath(text), PureWindowsPath(text)))


def forget_folder(folder: Path) -> None:
    """Replace the path in a distributed checkpoint's `.metadata` by the checkpoint's name.

    Only for a checkpoint that this process has just written: it is unpickled without restrictions.
    """
    path = folder / METADATA_FILE
    metadata = pickle.loads(path.read_bytes())
    if getattr(metadata, "storage_meta", None) is None:
        return
    metadata.storage_meta.checkpoint_id = folder.name
    path.write_bytes(pickle.dumps(metadata))
