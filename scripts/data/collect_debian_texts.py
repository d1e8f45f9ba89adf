# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Download documentation packages of Debian and turn their English texts into JSONL.

python scripts/data/collect_debian_texts.py output=data/english.jsonl.gz

It needs `apt-get` and `dpkg-deb` with a package list (`apt-get update`), and neither root nor an installation. HTML
pages, plain text, Perl's pod, dictionaries of dictd and fortunes become text; everything else is left out, and so are
duplicates; of a package with HTML pages only these are taken, because its other files are the same text. A document is
a file, or a piece of a long one; the pieces of a file stay together, in the training or in the held-out texts. A line
is {"text", "source", "distribution", "licence"}; the licence is the name of the package's own statement, which says
whether a text may be published.

Options: conf/collect_debian_texts.yaml. Output appears under its name only when complete.
"""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Annotated, Any, ClassVar

import hydra
from omegaconf import DictConfig
from pydantic import AfterValidator, Field
from tqdm import tqdm

from nemo_ee.commands.command import command
from nemo_ee.commands.console import messages, show
from nemo_ee.settings.fields import BelowOne, Texts
from nemo_ee.settings.script_input import ScriptInput
from nemo_ee.settings.user_input import Positive

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lib/

from lib.collected_texts import CollectionPath, Source, digest_of, write_collection

DOWNLOAD_TIMEOUT = 600.0  # seconds for one package
_BLOCKS = frozenset("article blockquote dd div dl dt h1 h2 h3 h4 h5 h6 li ol p pre section table tr ul".split())
_UNREAD = frozenset("footer head nav script style svg".split())
_DIGITS = 2**32  # of a digest, for the choice of held-out documents


def _is_expression(texts: Texts) -> Texts:
    for text in texts:
        try:
            re.compile(text)
        except re.error as error:
            raise ValueError(f"must be regular expressions; {text!r} is none: {error}") from error
    return texts


class CollectSettings(ScriptInput):
    """The settings of conf/collect_debian_texts.yaml, one field per key."""

    headline: ClassVar = "Nothing was written"

    overwrite: bool
    output: CollectionPath
    packages: Annotated[Texts, Field(min_length=1)]
    skip_missing: bool
    excluded: Annotated[Texts, AfterValidator(_is_expression)]
    held_out_share: BelowOne
    min_document_characters: Positive
    max_document_characters: Positive


class _Page(HTMLParser):
    """The text of a page; a blank line between blocks, white space as it is in `pre` only."""

    def __init__(self) -> None:
        super().__init__()
        self._pieces: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _UNREAD or tag == "pre":
            self._open.append(tag)
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            del self._open[len(self._open) - 1 - self._open[::-1].index(tag) :]
        self._break(tag)

    def handle_data(self, data: str) -> None:
        if _UNREAD & set(self._open):
            return
        self._pieces.append(data if "pre" in self._open else re.sub(r"\s+", " ", data))

    def _break(self, tag: str) -> None:
        if tag in _BLOCKS:
            self._pieces.append("\n\n")
        elif tag == "br":
            self._pieces.append("\n")

    def text(self) -> str:
        """The text so far."""
        text = re.sub(r"[ \t]+\n", "\n", "".join(self._pieces).replace("\xb6", ""))
        return re.sub(r"\n{3,}", "\n\n", re.sub(r"\n\n ", "\n\n", text)).strip()


def page_text(page: str) -> str:
    """The text of an HTML page."""
    parser = _Page()
    parser.feed(page)
    parser.close()
    return parser.text()


def pod_text(pod: str) -> str:
    """The text of Perl's documentation, without its marks."""
    text = re.sub(r"^=(?:head\d|item) +", "", pod, flags=re.MULTILINE)
    text = re.sub(r"^=\w+.*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"[BCEFIL]<+ ?([^<>]*?) ?>+", r"\1", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def documents_of(path: Path) -> list[str]:
    """The documents in a file; none where it is no text."""
    content = path.read_bytes()
    try:
        if path.suffix in (".gz", ".dz"):
            content = gzip.decompress(content)
        text = content.decode("utf-8").replace("\r\n", "\n")
    except (UnicodeDecodeError, OSError, EOFError, zlib.error):  # other bytes, or a damaged archive
        return []
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind == ".html":
        return [page_text(text)]
    if kind == ".pod":
        return [pod_text(text)]
    if path.parent.name == "fortunes" and not kind:
        return [text.replace("\n%\n", "\n\n")]
    if path.name.endswith(".dict.dz"):
        return [re.sub(r"[{}]", "", text)]
    return [text] if kind == ".txt" else []


def pieces_of(text: str, longest: int) -> Iterator[str]:
    """A text in pieces of at most `longest` characters, cut between paragraphs where there are some."""
    while len(text) > longest:
        end = text.rfind("\n\n", 0, longest)
        end = end if end > 0 else longest
        yield text[:end].strip()
        text = text[end:].strip()
    yield text.strip()


def download(package: str, folder: Path) -> str | None:
    """Download a package and unpack it into `<folder>/<package>`. Returns its version; None: there is no such package.

    Raises:
        FileNotFoundError: there is no apt-get or dpkg-deb.
        ValueError: the package cannot be downloaded or unpacked.
    """
    try:
        done = _run("apt-get", "download", "--", package, cwd=folder)
        if done.returncode and re.search(r"Unable to locate package|has no candidate", done.stderr):
            return None
        found = sorted(folder.glob(f"{package}_*.deb"))
        if done.returncode == 0 and found:
            done = _run("dpkg-deb", "-x", found[0], folder / package)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error.filename} is missing: packages are downloaded with Debian's own tools; run this on Debian or "
            "Ubuntu, or give other texts to scripts/data/preprocess_text.py"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"Nothing was written: {package} took more than {DOWNLOAD_TIMEOUT:.0f} s") from error
    if done.returncode or not found:
        raise ValueError(f"Nothing was written: {package} cannot be downloaded or unpacked: {done.stderr.strip()}")
    version = found[0].name.split("_")[1].replace("%3a", ":")
    found[0].unlink()
    return version


def _run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT)


def collect(settings: CollectSettings) -> dict[str, Any]:
    """Write the texts and the list of their sources.

    Returns:
        The list: {"training", "held_out": {package: {version, documents, characters}}, "missing": [packages]}.

    Raises:
        ValueError: a package is missing and `skip_missing` is off, or there is no text.
    """
    taken: dict[str, list[Source]] = {"training": [], "held_out": []}
    report: dict[str, Any] = {"training": {}, "held_out": {}, "missing": []}
    seen: set[str] = set()
    with tempfile.TemporaryDirectory() as temporary:
        for package in tqdm(settings.packages, desc="packages", dynamic_ncols=True, file=messages()):
            version = download(package, Path(temporary))
            if version is None:
                report["missing"].append(package)
                continue
            for source in _texts(package, Path(temporary, package), settings):
                if source.digest in seen:
                    continue
                seen.add(source.digest)
                file = digest_of(f"{package}/{source.source}")
                held_out = int(file[:8], 16) < settings.held_out_share * _DIGITS
                kind = "held_out" if held_out else "training"
                taken[kind].append(source)
                row = report[kind].setdefault(package, {"version": version, "documents": 0, "characters": 0})
                row["documents"] += 1
                row["characters"] += len(source.text)
    if report["missing"] and not settings.skip_missing:
        raise ValueError(f"Nothing was written: apt-get finds no {', '.join(report['missing'])}; see apt-get update")
    if not taken["training"]:
        raise ValueError("Nothing was written: no package had a text; check `packages`, and run apt-get update")
    write_collection(settings.output, taken, report)
    return report


def _texts(package: str, folder: Path, settings: CollectSettings) -> Iterator[Source]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    names = {path: path.relative_to(folder).as_posix() for path in files}
    paths = [path for path in files if not any(re.search(one, f"/{names[path]}") for one in settings.excluded)]
    pages = [path for path in paths if path.suffix == ".html"]
    for path in pages or paths:
        for document in documents_of(path):
            for piece in pieces_of(document, settings.max_document_characters):
                if len(piece) >= settings.min_document_characters:
                    licence = f"/usr/share/doc/{package}/copyright"
                    yield Source(digest_of(piece), piece, names[path], package, licence)


@hydra.main(version_base="1.3", config_path="../../conf", config_name="collect_debian_texts")
def main(cfg: DictConfig) -> None:
    """Run with the options of conf/collect_debian_texts.yaml."""
    with command(cfg):
        report = collect(CollectSettings.from_config(cfg))
        for kind in ("training", "held_out"):
            rows = report[kind].values()
            documents, size = (sum(row[key] for row in rows) for key in ("documents", "characters"))
            show(f"{kind}: {len(rows)} packages, {documents} documents, {size} characters")
        if report["missing"]:
            show(f"not in the archive: {', '.join(report['missing'])}")


if __name__ == "__main__":
    main()
