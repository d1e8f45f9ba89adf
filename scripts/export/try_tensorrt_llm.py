# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Try an export on a real TensorRT-LLM, which needs a GPU. This script has not been run on one.

    python scripts/export/export_huggingface.py checkpoint=tuned.nemo output=hf thresholds=0.9
    python scripts/export/export_tensorrt_llm.py checkpoint=tuned.nemo output=trt thresholds=0.9

    python scripts/export/try_tensorrt_llm.py pytorch hf/hf_early_exit                # TensorRT-LLM 1.0 to 1.4
    python scripts/export/try_tensorrt_llm.py engine trt --reference hf/hf_early_exit  # 0.20 to 1.2.1 and 1.3.0rc20

Start it in the repository with PYTHONPATH=. in TensorRT-LLM's container; it needs torch, safetensors and transformers,
which are there. It serves three prompts greedily: as a batch for tokens per second, beside those without exits, and
one by one to compare the tokens with nemo_ee.runtime under `kv: propagate` on the CPU, since with several sequences
one token that differs changes where all of them leave. In half precision some tokens differ: most must agree, and a
threshold of 1.0 must give the tokens without exits. --dry-run prints the commands.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_ee.export.tensorrt_llm.early_exit_files import ENGINE_VERSIONS, PYTORCH_VERSIONS
from nemo_ee.text.json_values import read_json_object

PROMPTS = ("def main():", "import os\nimport sys\n", "class Parser:\n    def __init__(self")


def refuse_version(backend: str, version: str) -> None:
    """End in one line on a TensorRT-LLM that does not have the backend, or not in the form that the files know."""
    found = re.match(r"(\d+)\.(\d+)[.\d]*(?:rc(\d+))?", version)
    major, minor, candidate = found.groups() if found else (0, 0, None)
    release = (int(major), int(minor))
    if backend == "pytorch":
        versions, other, supported = PYTORCH_VERSIONS, "engine", (1, 0) <= release <= (1, 4)
    else:
        versions, other = ENGINE_VERSIONS, "pytorch"
        supported = (0, 20) <= release < (1, 3) or (
            release == (1, 3) and candidate is not None and int(candidate) <= 20
        )
    if not supported:
        raise SystemExit(
            f"TensorRT-LLM {version}: the {backend} backend's files are for {versions}; install one of them, or try "
            f"the backend {other}"
        )


def build_command(export: Path, engine: Path, options: argparse.Namespace, class_name: str | None) -> list[str]:
    """`trtllm-build` of `trtllm_ckpt/`; with a class name through the exported model file."""
    command = [
        "trtllm-build", "--checkpoint_dir", str(export / "trtllm_ckpt"), "--output_dir", str(engine),
        "--gemm_plugin", "auto", "--max_batch_size", str(len(PROMPTS)), "--max_seq_len", str(options.max_seq_len),
        "--workers", "1", "--reduce_fusion", "disable",
    ]  # fmt: skip
    if class_name is not None:
        command += ["--model_cls_file", str(export / "tensorrt_llm_model.py"), "--model_cls_name", class_name]
    return command


def prompts_of(folder: Path) -> list[list[int]]:
    """Token ids of the prompts; small numbers for a directory without a tokenizer."""
    from nemo_ee.runtime.loader import load_tokenizer

    try:
        tokenizer = load_tokenizer(folder)
    except ValueError:
        return [list(range(2, 8 + index)) for index in range(len(PROMPTS))]
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


def generate(llm: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[list[list[int]], float]:
    """Greedy tokens of each prompt served alone; tokens per second of all as a batch, the second of two runs."""
    from tensorrt_llm import SamplingParams

    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, top_k=1, ignore_eos=True)

    def served(batch: Sequence[Sequence[int]]) -> list[list[int]]:
        return [list(o.outputs[0].token_ids) for o in llm.generate([list(prompt) for prompt in batch], params)]

    for _ in range(2):
        start = time.perf_counter()
        speed = sum(map(len, served(prompts))) / (time.perf_counter() - start)
    return [served([prompt])[0] for prompt in prompts], speed


def compare(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], what: str) -> None:
    """Print the number of equal first tokens: a different token changes all that follow."""
    for index, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        same = next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), min(len(own), len(other)))
        print(f"prompt {index}: the first {same} of {len(other)} tokens are {what}'s")


def early_exit_of(folder: Path) -> dict[str, Any]:
    """`early_exit` of a directory's config.json."""
    return read_json_object(folder / "config.json").get("early_exit") or {}


def reference_tokens(
    folder: Path, prompts: Sequence[Sequence[int]], new_tokens: int, early_exit: dict[str, Any]
) -> list[list[int]]:
    """The runtime's tokens under `kv: propagate`, on the CPU in fp32, each prompt alone.

    Args:
        folder: `hf_early_exit/`.
        early_exit: thresholds and criterion of the compared engine.
    """
    from nemo_ee.generation.policy import ExitPolicy
    from nemo_ee.runtime.loader import load_model
    from nemo_ee.runtime.propagation import generate_propagating

    thresholds = early_exit.get("thresholds") or {}
    policy = ExitPolicy(thresholds, early_exit.get("criterion", "max_probability"), tuple(thresholds))
    model, tokens, left = load_model(folder, dtype="float32"), [], 0
    for prompt in prompts:
        result = generate_propagating(model, [prompt], max_new_tokens=[new_tokens], policy=policy)
        tokens.append(list(result.tokens[0]))
        left += sum(exit is not None for exit in result.exits[0])
    print(f"reference: {left} of {new_tokens * len(prompts)} tokens leave early")
    return tokens


def same_thresholds(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two `early_exit` blocks leave at the same places."""
    return all((one.get(key) or None) == (other.get(key) or None) for key in ("thresholds", "criterion"))


def try_pytorch(options: argparse.Namespace) -> None:
    """The PyTorch backend on `hf_early_exit/`, beside the stock class on `hf_full/` where that was exported."""
    folder = options.directory
    if options.dry_run:
        print(f"TLLM_WORKER_USE_SINGLE_PROCESS=1 trtllm-serve {folder} --backend pytorch "
              f"--custom_module_dirs {folder / 'early_exit_trtllm'} --extra_llm_api_options serve.yaml   "
              "# serve.yaml, not needed from 1.3 on: cuda_graph_config: null, disable_overlap_scheduler: true, "
              "kv_cache_config: {enable_block_reuse: false}")  # fmt: skip
        return
    # In this process, which has imported the classes; worker processes would have to import them too.
    os.environ["TLLM_WORKER_USE_SINGLE_PROCESS"] = "1"
    from tensorrt_llm import LLM
    from tensorrt_llm.llmapi import KvCacheConfig

    settings = {
        "cuda_graph_config": None, "disable_overlap_scheduler": True, "max_batch_size": len(PROMPTS),
        "max_seq_len": options.max_seq_len, "kv_cache_config": KvCacheConfig(enable_block_reuse=False),
    }  # fmt: skip
    prompts, full = prompts_of(folder), folder.with_name("hf_full")
    if full.is_dir():
        with LLM(model=str(full), **settings) as llm:
            print(f"without exits: {generate(llm, prompts, options.new_tokens)[1]:.1f} tokens/s")
    sys.path.insert(0, str(folder))
    importlib.import_module("early_exit_trtllm")  # registers the classes
    with LLM(model=str(folder), **settings) as llm:
        tokens, speed = generate(llm, prompts, options.new_tokens)
    print(f"with exits: {speed:.1f} tokens/s")
    compare(tokens, reference_tokens(folder, prompts, options.new_tokens, early_exit_of(folder)), "the runtime")


def try_engine(options: argparse.Namespace) -> None:
    """Engines of `trtllm_ckpt/`, by the stock class and by the exported one."""
    export = options.directory
    models = read_json_object(export / "manifest.json")["early_exit_models"]
    if not models:
        raise SystemExit(
            f"{export}: no model file was exported with it; that is for Llama, Mistral, Qwen2 and Qwen3 with one stage"
        )
    built_in = early_exit_of(export / "trtllm_ckpt")
    if options.reference is not None and not same_thresholds(built_in, early_exit_of(options.reference)):
        print(f"note: {options.reference} has other thresholds; the reference takes the engine's")
    runs = {"without exits": None, "with exits": models[0]["class"]}
    tokens: list[list[int]] = []
    for name, class_name in runs.items():
        engine = options.engine_dir / name.replace(" ", "_")
        command = build_command(export, engine, options, class_name)
        print(" ".join(command))
        if options.dry_run:
            continue
        subprocess.run(command, check=True)
        try:
            from tensorrt_llm._tensorrt_engine import LLM
        except ImportError:  # 0.20: the engine backend is the default
            from tensorrt_llm import LLM
        from tensorrt_llm.llmapi import KvCacheConfig

        prompts = prompts_of(options.reference or export / "tokenizer")
        # Blocks of a request that left early hold approximate keys and values: not for the second run.
        cache = KvCacheConfig(enable_block_reuse=False)
        with LLM(model=str(engine), skip_tokenizer_init=True, kv_cache_config=cache) as llm:
            tokens, speed = generate(llm, prompts, options.new_tokens)
        print(f"{name}: {speed:.1f} tokens/s")
    if options.reference is not None and not options.dry_run:
        compare(tokens, reference_tokens(options.reference, prompts, options.new_tokens, built_in), "the runtime")


def main(arguments: list[str] | None = None) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=("pytorch", "engine"))
    parser.add_argument("directory", type=Path, help="hf_early_exit (pytorch), or an export_tensorrt_llm.py's output")
    parser.add_argument("--reference", type=Path, help="engine: hf_early_exit of the same .nemo, to compare with")
    parser.add_argument("--engine-dir", type=Path, default=Path("engines"), help="engine: directory to build in")
    parser.add_argument("--new-tokens", type=int, default=64, help="per prompt")
    parser.add_argument("--max-seq-len", type=int, default=1024, help="tokens, prompt included")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    options = parser.parse_args(arguments)
    if not options.dry_run:
        import tensorrt_llm

        print(f"tensorrt_llm {tensorrt_llm.__version__}")
        refuse_version(options.backend, tensorrt_llm.__version__)
    (try_pytorch if options.backend == "pytorch" else try_engine)(options)


if __name__ == "__main__":
    main()
