# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The main job end to end on the embedded model: `make demo`, or `python examples/run_demo.py`.

    corpus -> convert -> evaluate -> tune -> evaluate -> generate -> report

Every step is the command that a user would type, run on the CPU in a process of its own. Its output goes to
<output>/logs/<step>.log, beside its own log file. At the end <output> holds early_exit.nemo, tuned.nemo, report.json,
losses.png (loss of every exit before and after tuning) and sample.txt (a text in which each token shows its exit).
Needs no network.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from nemo_ee.checkpoint.atomic import write_json
from nemo_ee.evaluation.report import compare, comparison_table, draw_comparison

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "assets" / "reference-model"
# A progress bar of tqdm or Lightning in a log: "12/110 [".
_PROGRESS = re.compile(rb"(\d+)/(\d+) \[")
_PROMPT = "def test_add(self):"
_THREADS = str(min(8, os.cpu_count() or 1))  # the model is small: more threads would wait for each other


def arguments() -> argparse.Namespace:
    """The demo's options; the defaults are those of `make demo`."""
    parser = argparse.ArgumentParser(description="Turn the embedded model into an early-exit model, on the CPU.")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="directory of the results")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 6, 9], help="layers that get an mlp exit")
    parser.add_argument("--steps", type=int, default=100, help="tuning steps")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--heldout-tokens", type=int, default=40_000, help="held-out tokens to measure on")
    parser.add_argument("--threshold", type=float, default=0.6, help="confidence above which a token leaves")
    parser.add_argument("--new-tokens", type=int, default=160, help="length of the text sample")
    return parser.parse_args()


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """Step -> script and overrides, in order."""
    out = options.output
    exits = "[" + ",".join(f"{{layer: {layer}}}" for layer in options.layers) + "]"
    heldout, train = out / "data" / "heldout", out / "data" / "train"
    converted, tuned = quoted(out / "early_exit.nemo"), quoted(out / "tuned.nemo")
    data = f"{{train: [{quoted(train)}], validation: [{quoted(heldout)}], test: [{quoted(heldout)}]}}"
    cpu = ["trainer.accelerator=cpu", "trainer.precision=32"]
    evaluate = ["examples/megatron_gpt_early_exit_eval.py", *cpu, f"data={quoted(heldout)}",
                f"model.encoder_seq_length={options.length}", f"max_tokens={options.heldout_tokens}"]  # fmt: skip

    def preprocess(split: str, output: Path) -> list[str]:
        return ["scripts/data/preprocess_text.py", f"tokenizer={quoted(MODEL)}",
                f"input={quoted(MODEL / 'corpus' / f'{split}.jsonl.gz')}", f"output={quoted(output)}"]  # fmt: skip

    return {
        "preprocess train": preprocess("train", train),
        "preprocess heldout": preprocess("heldout", heldout),
        "convert": [
            "examples/megatron_gpt_early_exit_convert.py", *cpu,
            f"source={quoted(MODEL)}", f"output={converted}", f"model.early_exit.exits={exits}",
        ],
        "evaluate before": [*evaluate, f"model.restore_from_path={converted}", f"output={quoted(out / 'before')}"],
        "tune": [
            "examples/megatron_gpt_early_exit_tune.py", *cpu,
            f"model.restore_from_path={converted}", f"save_to={tuned}", f"model.data.data_prefix={data}",
            f"model.encoder_seq_length={options.length}", f"model.global_batch_size={options.batch}",
            f"model.micro_batch_size={min(4, options.batch)}", f"trainer.max_steps={options.steps}",
            f"trainer.val_check_interval={options.steps}", "trainer.limit_val_batches=1",
            "trainer.log_every_n_steps=5",
            f"model.optim.lr={options.lr}", "model.optim.sched.name=CosineAnnealing",
            f"model.optim.sched.warmup_steps={max(1, options.steps // 20)}",
            f"model.optim.sched.min_lr={options.lr / 20}",
            f"exp_manager.explicit_log_dir={quoted(out / 'run')}", "exp_manager.create_checkpoint_callback=False",
            "exp_manager.resume_if_exists=False",
        ],
        "evaluate after": [*evaluate, f"model.restore_from_path={tuned}", f"output={quoted(out / 'after')}"],
        "generate": [
            "examples/megatron_gpt_early_exit_generate.py", *cpu, f"model.restore_from_path={tuned}",
            f"prompts=['{_PROMPT}']", f"threshold={options.threshold}", f"tokens_to_generate={options.new_tokens}",
            "greedy=False", "temperature=0.7", "seed=1", "colour=never",
        ],
    }  # fmt: skip


def quoted(path: Path) -> str:
    """A path as a value of a Hydra override."""
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


def end_on_sigterm() -> None:
    """Let SIGTERM end this process as an exception does, which ends the running step too, see `run_step`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def run_step(name: str, command: list[str], logs: Path) -> tuple[float, str]:
    """Run one step and show its progress; returns (seconds, its standard output).

    Raises:
        SystemExit: the step failed; its last lines are shown.
    """
    log, printed = logs / f"{name.replace(' ', '_')}.log", logs / f"{name.replace(' ', '_')}.out"
    environment = {"OMP_NUM_THREADS": _THREADS, **os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    with open(log, "wb") as errors, open(printed, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / command[0]), *command[1:], f"hydra.run.dir={quoted(logs)}"],
            stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment,
            start_new_session=True,  # so that its child processes can be ended with it
        )  # fmt: skip
        try:
            while process.poll() is None:
                show(name, time.monotonic() - start, log, printed)
                time.sleep(0.5)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    seconds = time.monotonic() - start
    text = printed.read_text(errors="replace")
    with open(log, "a") as merged:  # one file per step
        merged.write(text)
    printed.unlink()
    if process.returncode:
        lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
        tail = "\n".join(line for line in lines[-40:] if line.strip())
        raise SystemExit(f"\n{name} failed with code {process.returncode}. The end of {log}:\n\n{tail}")
    show(name, seconds, done=True)
    return seconds, text


def show(name: str, seconds: float, *files: Path, done: bool = False) -> None:
    """One line per step, rewritten in place on a terminal; elsewhere only when the step is done."""
    terminal = sys.stderr.isatty()
    if not done and not terminal:
        return
    counts = [found[-1] for file in files if (found := _PROGRESS.findall(_tail(file)))]
    at, total = map(int, counts[0]) if counts else (0, 0)
    bar = f"[{'#' * (24 * at // total):24s}] {at}/{total}" if total else "..."
    line = f"{name:20s} {seconds:6.1f} s  {'done' if done else bar}"
    sys.stderr.write((f"\r\x1b[K{line}" if terminal else line) + ("\n" if done else ""))
    sys.stderr.flush()


def _tail(file: Path) -> bytes:
    with open(file, "rb") as stream:
        stream.seek(max(0, file.stat().st_size - 4000))
        return stream.read()


def report_of(options: argparse.Namespace, seconds: Mapping[str, float]) -> dict:
    """`report.json`: exits before and after on the same held-out tokens, the full model, times, settings."""
    before, after = (json.loads((options.output / when / "exits.json").read_text()) for when in ("before", "after"))
    preprocess = sum(value for name, value in seconds.items() if name.startswith("preprocess"))
    steps = {name.replace(" ", "_"): value for name, value in seconds.items() if not name.startswith("preprocess")}
    return {
        "exits": compare(before, after),
        "full_model": after["full_model"],
        "seconds": {name: round(value, 1) for name, value in {"preprocess": preprocess, **steps}.items()},
        "settings": {
            "heldout_tokens": after["tokens"],
            "steps": options.steps,
            "tokens_per_step": options.batch * options.length,
            "sequence_length": options.length,
            "learning_rate": options.lr,
            "threshold": options.threshold,
            "threads": int(os.environ.get("OMP_NUM_THREADS", _THREADS)),
        },
    }


def clear(output: Path) -> None:
    """Remove the files of an earlier demo from `output`, and nothing else."""
    for folder in ("data", "run", "logs", "before", "after"):
        shutil.rmtree(output / folder, ignore_errors=True)
    for file in ("early_exit.nemo", "tuned.nemo", "report.json", "losses.png", "sample.txt"):
        (output / file).unlink(missing_ok=True)


def main() -> None:
    """Run every step, then write the report, the picture and the sample."""
    options = arguments()
    end_on_sigterm()
    options.output = options.output.resolve()
    clear(options.output)
    logs = options.output / "logs"
    logs.mkdir(parents=True)
    start = time.monotonic()
    seconds: dict[str, float] = {}
    sample = ""
    for name, command in commands(options).items():
        seconds[name], sample = run_step(name, command, logs)
    seconds["total"] = time.monotonic() - start
    report = report_of(options, seconds)
    write_json(options.output / "report.json", report)
    tokens = report["settings"]["heldout_tokens"]
    draw_comparison(
        options.output / "losses.png",
        report,
        title="Exits of the reference model before and after tuning",
        caption=f"{tokens:,} held-out tokens; {options.steps} steps of {options.batch} x {options.length} tokens",
    )
    (options.output / "sample.txt").write_text(sample, encoding="utf-8")
    print(f"\n{comparison_table(report['exits'])}")
    print(f"\nfull model: loss {report['full_model']['loss']:.3f}; all on {tokens:,} held-out tokens\n\n{sample}")
    print(f"{seconds['total']:.0f} s; report.json, losses.png, sample.txt and the .nemo files are in {options.output}")


if __name__ == "__main__":
    main()
