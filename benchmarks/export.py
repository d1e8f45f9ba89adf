# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Time and memory of the exports of a made-up Llama of 1.2 billion parameters, bf16, one exit.

    python benchmarks/export.py --json export.json       # about 20 GB of disk in TMPDIR

Two exports, each in a process of its own: `tensorrt_llm` (full model and draft, one tensor-parallel rank) and
`huggingface` (backbone, exit, both in one). `seconds_1b` is the whole of the first from the `.nemo` archive to the
synced directory with hashes, `seconds_1b_huggingface` of the second; beside each stands a plain copy of as many bytes,
synced. `peak_bytes_over_largest_tensor` is the growth of anonymous memory after imports, sampled 20 times a second,
less 256 MiB, over the largest tensor's bytes, the larger of the two exports; target at most 2.5.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SIZES = {
    "vocab_size": 128256, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_layers": 16,
    "num_attention_heads": 32, "num_query_groups": 8, "kv_channels": 64,
}  # fmt: skip
QUICK = {
    "vocab_size": 512, "hidden_size": 64, "ffn_hidden_size": 128, "num_layers": 4,
    "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16,
}  # fmt: skip
ALLOWANCE = 256 << 20
TARGET = 2.5
SAMPLES_PER_SECOND = 20
SECONDS = {"tensorrt_llm": "seconds_1b", "huggingface": "seconds_1b_huggingface"}  # export -> name of its time


def make(path: Path, sizes: dict[str, int]) -> None:
    """Write the `.nemo`: tied embeddings, an `mlp` exit in the middle with an output matrix of its own."""
    from nemo_ee import cpu_host

    cpu_host.enable()
    import torch
    import yaml
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    from nemo_ee.checkpoint.nemo_archive import write_nemo

    v, h, f, layers = (sizes[key] for key in ("vocab_size", "hidden_size", "ffn_hidden_size", "num_layers"))
    d, heads, groups = sizes["kv_channels"], sizes["num_attention_heads"], sizes["num_query_groups"]

    def weight(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02)

    layer = {
        "self_attention.linear_qkv.layer_norm_weight": (h,),
        "self_attention.linear_qkv.weight": (d * (heads + 2 * groups), h),
        "self_attention.linear_proj.weight": (h, heads * d), "mlp.linear_fc1.layer_norm_weight": (h,),
        "mlp.linear_fc1.weight": (2 * f, h), "mlp.linear_fc2.weight": (h, f),
    }  # fmt: skip
    backbone = {
        f"{key}.{index}": ShardedTensor.from_rank_offsets(
            f"model.decoder.layers.{key}", weight(*shape), (0, index, layers), prepend_axis_num=1
        )
        for key, shape in layer.items()
        for index in range(layers)
    }
    whole = {"model.embedding.word_embeddings.weight": (v, h), "model.decoder.final_layernorm.weight": (h,)}
    exit = {f"exits.middle.{key}": shape for key, shape in layer.items() if key.startswith("mlp.")}
    exit |= {"exits.middle.norm.weight": (h,), "exits.middle.output.weight": (v, h)}
    backbone |= {key: ShardedTensor.from_rank_offsets(key, weight(*shape)) for key, shape in whole.items()}
    exits = {key: ShardedTensor.from_rank_offsets(key, weight(*shape)) for key, shape in exit.items()}
    config = {
        **sizes, "mcore_gpt": True, "normalization": "rmsnorm", "activation": "fast-swiglu", "bias": False,
        "position_embedding_type": "rope", "share_embeddings_and_output_weights": True,
        "max_position_embeddings": 2048,
        "early_exit": {"exits": [{"name": "middle", "layer": layers // 2, "architecture": "mlp"}]},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        entries: dict = {"model_config.yaml": yaml.safe_dump(config)}
        for name, state in (("model_weights", backbone), ("exit_weights", exits)):
            (Path(folder) / name).mkdir()
            dist_checkpointing.save(state, Path(folder) / name)
            entries[name] = Path(folder) / name
        torch.distributed.destroy_process_group()
        write_nemo(path, entries)


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def exporter(path: Path, target: str) -> Callable[[], Path]:
    """The export of `path` to a directory beside it, its modules imported."""
    output = path.parent / target
    options = {"dtype": "bfloat16", "parity_gigabytes": 0, "progress": False}
    if target == "huggingface":
        from nemo_ee.export.huggingface.exporter import HuggingFaceSettings, export_huggingface

        settings = HuggingFaceSettings(checkpoint=path, output=output, **options)
        return lambda: export_huggingface(settings)
    from nemo_ee.export.tensorrt_llm.unified_checkpoint import TensorRTLLMSettings, export_checkpoint

    settings = TensorRTLLMSettings(checkpoint=path, output=output, **options)
    return lambda: export_checkpoint(settings)


def measure(path: Path, target: str) -> dict[str, float]:
    """Export in this process, its memory watched by a thread."""
    import torch

    from nemo_ee.checkpoint.nemo_archive import NemoArchive
    from nemo_ee.checkpoint.portable import plain_config

    torch.set_num_threads(1)
    export = exporter(path, target)
    with NemoArchive(path) as archive:
        config = plain_config(archive)
    before, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(1 / SAMPLES_PER_SECOND):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        output = export()
        seconds = time.perf_counter() - start
    finally:
        done.set()
        watcher.join()
    largest = 2 * max(
        config["vocab_size"] * config["hidden_size"], 2 * config["ffn_hidden_size"] * config["hidden_size"]
    )
    growth = max(peak[0] - before, 0)
    written = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    shutil.rmtree(output)
    return {
        "seconds": round(seconds, 2),
        "peak_over_largest": round(max(growth - ALLOWANCE, 0) / largest, 3),
        "growth_mib": round(growth / 2**20, 1),
        "largest_tensor_mib": round(largest / 2**20, 1),
        "bytes_written": written,
        "copy_s": round(copy_seconds(path, path.stat().st_size + written), 2),
    }


def copy_seconds(path: Path, size: int) -> float:
    """Seconds to copy `size` bytes of a file (from its start again where it ends) and sync them."""
    start, left, target = time.perf_counter(), size, path.with_name("copy")
    with open(path, "rb") as source, open(target, "wb") as file:
        while left > 0:
            block = source.read(min(4 << 20, left))
            if not block:
                source.seek(0)
                continue
            left -= file.write(block)
        file.flush()
        os.fsync(file.fileno())
    target.unlink()
    return time.perf_counter() - start


def main() -> None:
    """Make the model, export it, print and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the numbers, one flat object")
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)  # tiny sizes, for tests only
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--target", choices=SECONDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.make, QUICK if options.quick else SIZES)
        return
    if options.measure:
        print(json.dumps(measure(options.measure, options.target)))
        return
    from benchmarks.measure import provenance

    result: dict = {**provenance(), **(QUICK if options.quick else SIZES)}
    print(", ".join(f"{key}={value}" for key, value in result.items()), flush=True)
    with tempfile.TemporaryDirectory(prefix="nemo_ee_benchmark_") as folder:
        path = Path(folder) / "made.nemo"
        # Processes of their own, so that the measured memory has neither the making of the model nor its libraries.
        quick = ["--quick"] if options.quick else []
        subprocess.run([sys.executable, __file__, "--make", str(path), *quick], check=True, stdout=sys.stderr)
        result["bytes_read"] = path.stat().st_size
        found = {}
        for target in SECONDS:
            run = [sys.executable, __file__, "--measure", str(path), "--target", target]
            printed = subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[target] = json.loads(printed.splitlines()[-1])
    for target, name in SECONDS.items():
        own = found[target]
        result |= {name: own["seconds"], f"{name}.copy_s": own["copy_s"]}
        result |= {f"{target}.{key}": own[key] for key in ("bytes_written", "growth_mib", "peak_over_largest")}
        print(f"{name} {own['seconds']:.1f} (copy of as many bytes as are read and written {own['copy_s']:.1f} s)")
    peak = max(own["peak_over_largest"] for own in found.values())
    result |= {
        "peak_bytes_over_largest_tensor": peak,
        "largest_tensor_mib": found["huggingface"]["largest_tensor_mib"],
    }
    grown = ", ".join(f"{target} {own['growth_mib']:.0f} MiB" for target, own in found.items())
    print(
        f"peak_bytes_over_largest_tensor {peak:.3f}, target at most {TARGET} (growth {grown}; allowance 256 MiB, "
        f"largest tensor {result['largest_tensor_mib']:.0f} MiB)"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
