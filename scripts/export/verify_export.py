# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Check an export against its manifest, its format, the results it had when it was written (parity) and, when given,
the `.nemo` it was made from.

    python scripts/export/verify_export.py export
    python scripts/export/verify_export.py export --checkpoint tuned.nemo     # and every number, every config field

Ends with 0 when there is no problem, otherwise with 1, or with 2 when there is nothing to check.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nemo_ee.export.manifest import read_manifest
from nemo_ee.export.parity import DEFAULT_GIGABYTES
from nemo_ee.export.verify import verify_export


def main(arguments: list[str] | None = None) -> int:
    """Print the problems, one a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="output of an export")
    parser.add_argument("--checkpoint", type=Path, help="the .nemo it was made from")
    parser.add_argument("--backbone", type=Path, help="the base model's .nemo of an exits-only checkpoint")
    parser.add_argument(
        "--parity-gigabytes", type=float, default=DEFAULT_GIGABYTES,
        help="largest model, in fp32, that is loaded and run (default: %(default)s); 0 = none",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        problems = verify_export(
            options.directory, options.checkpoint, options.backbone, parity_gigabytes=options.parity_gigabytes
        )
        note = read_manifest(options.directory).get("verified", {}).get("note", "nothing was run")
    except ValueError as problem:
        sys.stderr.write(f"error: {problem}\n")
        return 2
    for problem in problems:
        print(problem)
    compared = "hashes, names, shapes and shards, stated parity" + (" and every number" if options.checkpoint else "")
    print(f"{len(problems)} problems in {compared}; {note}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
