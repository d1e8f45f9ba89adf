# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Early exit inside vLLM against stock vLLM, exits as draft models, and our runtime beside them; one thread each.

    .venvs/vllm/bin/python benchmarks/engines.py export --json engines.json
    .venv/bin/python benchmarks/engines.py export16 --gguf f16=f16/full.gguf q8=q8/full.gguf --json llamacpp.json

Every side is a process of its own with its model loaded. The sides decode the same prompts in turns; a ratio is the
median over the rounds. Greedy, fp32, held-out text; times include the prompts. The policy is the fastest whose tokens
agree with the full model's at 95 % of the positions of the model's own answers to other prompts, by the plugin's rule
over the batch (`best_policy`).

    vllm_early_exit_over_stock_b*   tokens/s, plugin over stock; `bound` = layers over the layers of the policy, as if
                                    heads, skipped layers and the engine cost nothing
    vllm_off_over_stock             plugin loaded, no thresholds, batch 1; `_b*` for the others
    vllm_draft_over_stock_b1        the best exit as draft model; `decoding_over_stock_b1` of `drafts`: without the
                                    prompts; beside it what the break-even rule predicts of that
    runtime_over_vllm_b*            nemo_ee.runtime at full depth over stock vLLM

With --gguf only llama-server runs beside the runtime, on GGUF files of the same model (export_gguf.py), batch 1. The
export must be stored in fp16 (`dtype=float16`): on the CPU the runtime keeps such weights so, with fp32 sums.

    runtime_over_llamacpp_<name>    nemo_ee.runtime at full depth over llama.cpp on that file; `bound` = bytes of the
                                    file over those of the export's weights
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.huggingface import read_prompts  # noqa: E402
from benchmarks.measure import interleaved, median_of_ratios, provenance  # noqa: E402
from nemo_ee.evaluation.forced_decoding import measured_costs, policy_of, threshold_search  # noqa: E402
from nemo_ee.generation.engine import EarlyExitEngine  # noqa: E402
from nemo_ee.generation.exit_trace import TracePass  # noqa: E402
from nemo_ee.generation.policy import ExitPolicy  # noqa: E402
from nemo_ee.runtime.exported_model import read_exported_model  # noqa: E402
from nemo_ee.runtime.loader import load_model, load_tokenizer  # noqa: E402
from nemo_ee.runtime.propagation import PropagatingBatch  # noqa: E402

AGREEMENT = 0.95
SHARES = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.0)  # of the tokens that may be others; see best_policy
CONTEXT, SCORED, NEW_TOKENS, BATCHES = 64, 64, 128, (1, 4, 16)
WARM_UP = 2  # rounds; the plugin measures in its first steps


class Side:
    """A process that decodes on request.

    Args:
        kind: `vllm`, `runtime` or `llamacpp`.
        settings: what the process loads.
    """

    def __init__(self, kind: str, **settings: Any) -> None:
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--side", json.dumps({"kind": kind, **settings})], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._read()

    def _read(self) -> dict[str, Any]:
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise RuntimeError(f"a side ended with {self._process.wait()}; its messages are above")

    def decode(self, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Decode; `seconds`, `tokens`, and what the side knows besides."""
        self._process.stdin.write(json.dumps(prompts) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait(60)


def serve_side(settings: dict[str, Any]) -> None:
    """The process of a side."""
    torch.set_num_threads(1)
    with ExitStack() as stack:
        kinds = {"vllm": _vllm_side, "runtime": _runtime_side, "llamacpp": partial(_llamacpp_side, stack=stack)}
        decode = kinds[settings["kind"]](settings)
        print("RESULT {}", flush=True)
        for line in sys.stdin:
            prompts = json.loads(line)
            begin = time.perf_counter()
            tokens, more = decode(prompts)
            result = {"seconds": time.perf_counter() - begin, "tokens": tokens, **more}
            print(f"RESULT {json.dumps(result)}", flush=True)


def _vllm_side(settings: dict[str, Any]) -> Any:
    from vllm import LLM, SamplingParams

    arguments = {"additional_config": {"early_exit": settings["early_exit"]}} if "early_exit" in settings else {}
    if "draft" in settings:
        arguments["speculative_config"] = {
            "method": "draft_model", "model": settings["draft"], "num_speculative_tokens": settings["draft_tokens"],
        }  # fmt: skip
    llm = LLM(
        settings["model"], dtype="float32", max_num_seqs=max(BATCHES), enable_prefix_caching=False, max_model_len=512,
        disable_log_stats=False, **arguments,
    )  # fmt: skip
    parameters = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)

    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    counts = getattr(worker.model_runner.model, "counts", None)

    def decode(prompts: list[list[int]]) -> tuple[list[list[int]], dict[str, Any]]:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)
        per_position = {
            one.name: getattr(one, "values", None) or getattr(one, "value", None) for one in llm.get_metrics()
        }
        kept = {name: value for name, value in per_position.items() if "spec_decode" in name}
        first, last = (max(getattr(own.metrics, f"{one}_token_ts") for own in outputs) for one in ("first", "last"))
        return [list(output.outputs[0].token_ids) for output in outputs], {
            "metrics": kept,
            "decoding_seconds": last - first,
            "rows_by_exit": counts and counts.by_exit(0),
        }

    return decode


def _runtime_side(settings: dict[str, Any]) -> Any:
    engine = EarlyExitEngine(load_model(settings["model"], dtype="float32"))

    def decode(prompts: list[list[int]]) -> tuple[list[list[int]], dict[str, Any]]:
        result = engine.generate(prompts, max_new_tokens=NEW_TOKENS, mode="full")
        return [list(own) for own in result.tokens], {}

    return decode


def _llamacpp_side(settings: dict[str, Any], stack: ExitStack) -> Any:
    from tests.engines.llamacpp.server import serving

    server = stack.enter_context(serving(Path(settings["model"]), "--ctx-size", "512"))

    def decode(prompts: list[list[int]]) -> tuple[list[list[int]], dict[str, Any]]:
        answers = [server.greedy(prompt, NEW_TOKENS) for prompt in prompts]
        timings = {key: answers[-1]["timings"][key] for key in ("prompt_ms", "predicted_ms")}
        return [answer["tokens"] for answer in answers], {"timings": timings}

    return decode


def agreement(model: Any, texts: Sequence[Sequence[int]], policy: ExitPolicy) -> dict[str, float]:
    """Share of the model's own tokens that the exits would choose too, and the mean share of the half layers that run,
    for all texts as one batch. `texts`: prompts of CONTEXT tokens with the model's greedy answers."""
    evaluated = policy.evaluated_exits(model.exits)
    stops = {exit.point.name: exit.point.stop for exit in evaluated} | {None: 2 * model.num_layers}
    batch = PropagatingBatch(model, [evaluated] * len(texts), policy.criterion, len(texts[0]), row_by_row=True)
    agreed = halves = 0
    batch.run({row: (0, text[:CONTEXT]) for row, text in enumerate(texts)}, evaluating=False)
    for position in range(CONTEXT, CONTEXT + SCORED):
        exits, logits = batch.run(
            {row: (position, [text[position]]) for row, text in enumerate(texts)}, evaluating=True
        )
        agreed += sum(a == text[position + 1] for a, text in zip(logits.argmax(-1).tolist(), texts, strict=True))
        halves += max(stops[exit] for exit in exits)
    return {"agreement": agreed / SCORED / len(texts), "depth": halves / SCORED / (2 * model.num_layers)}


def compare(calls: dict[str, tuple[Side, Sequence[Sequence[int]]]], rounds: int) -> dict[str, dict[str, Any]]:
    """What each side returned last for its prompts, with its seconds in every round, and those after the first token
    (`decoding`); the calls in turns."""
    results: dict[str, dict[str, Any]] = {}
    decoding: dict[str, list[float]] = {name: [] for name in calls}

    def decode(name: str) -> None:
        side, prompts = calls[name]
        results[name] = side.decode(prompts)
        decoding[name].append(results[name].get("decoding_seconds", 0.0))

    times = interleaved({name: partial(decode, name) for name in calls}, rounds=rounds, warmup=WARM_UP)
    return {name: {**results[name], "seconds": times[name], "decoding": decoding[name][WARM_UP:]} for name in calls}


def speed(over: dict[str, Any], under: dict[str, Any]) -> float:
    """Tokens/s of one side over another's."""
    return median_of_ratios(under["seconds"], over["seconds"])


def same(left: dict[str, Any], right: dict[str, Any]) -> float:
    """Share of positions with the same token."""
    pairs = [pair for a, b in zip(left["tokens"], right["tokens"], strict=True) for pair in zip(a, b, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def best_policy(folder: Path, prompts: Sequence[Sequence[int]], names: Sequence[str]) -> dict[int, dict[str, Any]]:
    """For each batch size the fastest policy with the agreement that is wanted, and what it gives.

    The thresholds are those that would be fastest if each row had its own depth and cache, for smaller and smaller
    shares of other tokens, until the agreement in a batch is enough.
    """
    model, chosen = load_model(folder, dtype="float32"), {}
    answers = EarlyExitEngine(model).generate(prompts, max_new_tokens=SCORED + 1, mode="full").tokens
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    table = TracePass(model, names, "max_probability").run(texts, [CONTEXT] * len(texts))
    differs = torch.cat([~table.agrees, torch.zeros_like(table.valid)[..., None]], dim=2)
    search = threshold_search(table, differs, measured_costs(model))
    for size in BATCHES:
        for share in SHARES:
            policy = policy_of(search.fastest(share * (1 - AGREEMENT)))
            groups = [texts[first : first + size] for first in range(0, len(texts), size)]
            measured = [agreement(model, group, policy) for group in groups]
            values = {key: fmean(one[key] for one in measured) for key in measured[0]}
            if values["agreement"] >= AGREEMENT:
                break
        else:
            policy, values = policy_of(search.at({})), {"agreement": 1.0, "depth": 1.0}
        thresholds = policy.thresholds if policy.active else {}
        chosen[size] = {"thresholds": thresholds, **values, "bound": 1 / values["depth"]}
        print(f"batch {size}: {chosen[size]}", flush=True)
    return chosen


def early_exit(
    export: Path, prompts: Sequence[Sequence[int]], others: Sequence[Sequence[int]], names: Sequence[str], rounds: int
) -> dict[str, Any]:
    """The plugin over stock vLLM, with and without thresholds, and the runtime."""
    policies = best_policy(export / "hf_early_exit", others, names)
    directory = str(export / "hf_early_exit")
    sides = {
        "stock": Side("vllm", model=str(export / "hf_full")),
        "off": Side("vllm", model=directory, early_exit={"active": list(names)}),
        "runtime": Side("runtime", model=str(export / "hf_full")),
    }
    values: dict[str, Any] = {"policies": policies}
    for size, policy in policies.items():
        settings = {"thresholds": policy["thresholds"]} if policy["thresholds"] else {"active": list(names)}
        sides["exits"] = Side("vllm", model=directory, early_exit=settings)
        found = compare({name: (side, prompts[:size]) for name, side in sides.items()}, rounds)
        sides.pop("exits").close()
        own = {
            "vllm_early_exit_over_stock": speed(found["exits"], found["stock"]),
            "vllm_off_over_stock": speed(found["off"], found["stock"]),
            "vllm_early_exit_over_off": speed(found["exits"], found["off"]),
            "runtime_over_vllm": speed(found["runtime"], found["stock"]),
            "same_tokens": {name: same(found[name], found["stock"]) for name in ("exits", "off", "runtime")},
            "rows_by_exit": found["exits"]["rows_by_exit"],
            "stock_tokens_per_second": size * NEW_TOKENS / median(found["stock"]["seconds"]),
        }
        values |= {f"{name}_b{size}": value for name, value in own.items()}
        print(json.dumps(own), flush=True)
    for side in sides.values():
        side.close()
    return {**values, "vllm_off_over_stock": values["vllm_off_over_stock_b1"]}


def drafts(
    export: Path, names: Sequence[str], prompts: Sequence[Sequence[int]], rounds: int, draft_tokens: int
) -> dict[str, Any]:
    """These exits as draft models over stock vLLM with the break-even rule's prediction, and the best one in
    batches."""
    values: dict[str, Any] = {}
    full = str(export / "hf_full")
    for folder in (export / f"hf_exit_{name}" for name in names):
        values[folder.name] = one = _draft(full, folder, prompts, rounds, draft_tokens)
        print(folder.name, json.dumps(one), flush=True)
    best = max(values, key=lambda name: values[name]["over_stock_b1"])
    stock = Side("vllm", model=full)
    both = Side("vllm", model=full, draft=str(export / best), draft_tokens=draft_tokens)
    batches = {}
    for size in BATCHES:
        found = compare({"stock": (stock, prompts[:size]), "both": (both, prompts[:size])}, rounds)
        batches[f"vllm_draft_over_stock_b{size}"] = speed(found["both"], found["stock"])
    stock.close()
    both.close()
    return {"drafts": values, "best_draft": best, **batches, "predicted_b1": values[best]["predicted"]}


def llamacpp(export: Path, files: dict[str, str], prompts: Sequence[Sequence[int]], rounds: int) -> dict[str, Any]:
    """The runtime over llama.cpp, for each file.

    Raises:
        SystemExit: the export is not stored in fp16.
    """
    if read_exported_model(export / "hf_full").dtype != "float16":
        raise SystemExit(f"{export}: not stored in fp16; export it with dtype=float16")
    weights = sum(file.stat().st_size for file in (export / "hf_full").glob("*.safetensors"))
    sides = {"runtime": Side("runtime", model=str(export / "hf_full"))}
    sides |= {name: Side("llamacpp", model=file) for name, file in files.items()}
    found = compare({name: (side, prompts[:1]) for name, side in sides.items()}, rounds)
    for side in sides.values():
        side.close()
    values: dict[str, Any] = {f"runtime_over_llamacpp_{name}": speed(found["runtime"], found[name]) for name in files}
    values["bound"] = {name: Path(file).stat().st_size / weights for name, file in files.items()}
    values["same_tokens"] = {name: same(found[name], found["runtime"]) for name in files}
    values["tokens_per_second"] = {name: NEW_TOKENS / median(one["seconds"]) for name, one in found.items()}
    return {**values, "timings": {name: found[name]["timings"] for name in files}}


def _draft(
    full: str, folder: Path, prompts: Sequence[Sequence[int]], rounds: int, draft_tokens: int
) -> dict[str, Any]:
    stock, draft = Side("vllm", model=full), Side("vllm", model=str(folder))
    both = Side("vllm", model=full, draft=str(folder), draft_tokens=draft_tokens)
    # A verification runs as many rows as a step of this many sequences.
    calls = {"stock": (stock, prompts[:1]), "draft": (draft, prompts[:1]), "both": (both, prompts[:1])}
    found = compare({**calls, "wide": (stock, prompts[: draft_tokens + 1])}, rounds)
    for side in (stock, draft, both):
        side.close()
    metrics = found["both"]["metrics"]
    verified = metrics["vllm:spec_decode_num_drafts"]
    accepted = [count / verified for count in metrics["vllm:spec_decode_num_accepted_tokens_per_pos"]]
    step, alone, wide = (median(found[name]["decoding"]) / (NEW_TOKENS - 1) for name in ("stock", "draft", "wide"))
    return {
        "over_stock_b1": speed(found["both"], found["stock"]),
        "decoding_over_stock_b1": median_of_ratios(found["stock"]["decoding"], found["both"]["decoding"]),
        "predicted": (1 + sum(accepted)) * step / (draft_tokens * alone + wide),
        "accepted_at_position": accepted,
        "draft_step_over_full_step": alone / step,
        "verification_over_full_step": wide / step,
        "same_tokens": same(found["both"], found["stock"]),
    }


def main() -> None:
    """Measure, print, and with --json write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, nargs="?", help="an export with hf_full, hf_exit_* and hf_early_exit")
    parser.add_argument("--exits", nargs="+", help="exits to evaluate; default: all")
    parser.add_argument("--drafts", nargs="+", help="exits to use as draft models; default: all, minutes for each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draft-tokens", type=int, default=3)
    parser.add_argument("--gguf", nargs="+", metavar="NAME=FILE", help="llama.cpp on these files instead of vLLM")
    parser.add_argument("--only", choices=("early_exit", "drafts"))
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--side", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve_side(options.side)
        return
    torch.set_num_threads(1)
    texts = read_prompts(load_tokenizer(options.export / "hf_full"), 2 * max(BATCHES), CONTEXT)
    others, prompts = texts[: max(BATCHES)], texts[max(BATCHES) :]
    a = read_exported_model(options.export / "hf_full").architecture
    values: dict[str, Any] = {
        "machine": provenance(),
        "versions": versions(),
        "model": f"{a.num_layers} layers, hidden size {a.hidden_size}, vocabulary {a.vocab_size}",
        "options": {key: vars(options)[key] for key in ("exits", "drafts", "rounds", "draft_tokens")},
        "lengths": {"prompt": CONTEXT, "new": NEW_TOKENS, "warm_up_rounds": WARM_UP},
    }
    if options.gguf:
        files = dict(one.split("=", 1) for one in options.gguf)
        values |= llamacpp(options.export, files, prompts, options.rounds)
    else:
        exits = [one.name for one in read_exported_model(options.export / "hf_early_exit").exits]
        if options.only != "drafts":
            values |= early_exit(options.export, prompts, others, options.exits or exits, options.rounds)
        if options.only != "early_exit":
            values |= drafts(options.export, options.drafts or exits, prompts, options.rounds, options.draft_tokens)
    print(json.dumps(values, indent=2))
    if options.json:
        options.json.write_text(json.dumps(values, indent=2) + "\n")


def versions() -> dict[str, str]:
    """What runs here."""
    names = ("vllm", "vllm-cpu", "gguf", "torch", "transformers")
    return {name: package for name in names for package in [_version(name)] if package}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
