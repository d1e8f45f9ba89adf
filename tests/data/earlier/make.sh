#!/usr/bin/env bash
# Writes the files of this folder with the scripts of the working tree that it is started in:
#   complete.nemo, exits.nemo (exits-only), run/ (a training checkpoint of step 4), export/, expected.json
# They were written by the commit named in expected.json; tests/functional/test_earlier_files.py reads them with today's code.
# Usage, in a checkout of that commit: bash <this folder>/make.sh OUTPUT_DIRECTORY
set -euo pipefail
python=.venv/bin/python
out=$1
work=$(mktemp -d)
export OMP_NUM_THREADS=1 PYTHONPATH=$PWD
mkdir -p "$out"
"$python" - "$work" <<'PY'
import gzip, json, pathlib, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
work = pathlib.Path(sys.argv[1])
torch.manual_seed(11)
config = LlamaConfig(
    vocab_size=257, hidden_size=16, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    head_dim=6, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.2, eos_token_id=256, bos_token_id=256,
)
LlamaForCausalLM(config).save_pretrained(work / "source")
for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
    (work / "source" / name).write_bytes(pathlib.Path("assets/reference-model-bytes", name).read_bytes())
texts = [f"for i in range({n}):\n    print(i + {n})\n" * 3 for n in range(60)]
(work / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
PY
"$python" examples/megatron_gpt_early_exit_convert.py "source=$work/source" "output=$work/start.nemo" trainer.accelerator=cpu \
    probe_tokens=16 model.encoder_seq_length=32 \
    'model.early_exit.exits=[{layer: 2, architecture: mlp}, {layer: 3, architecture: norm, output: shared}, {layer: 3, architecture: layer, init: lora, rank: 2, output: low_rank}]'
"$python" scripts/data/preprocess_text.py "input=$work/text.jsonl" "output=$work/data" "tokenizer=$work/source"
tune=("$python" examples/megatron_gpt_early_exit_tune.py "model.restore_from_path=$work/start.nemo" trainer.accelerator=cpu
    trainer.precision=32 model.micro_batch_size=2 model.global_batch_size=4 model.encoder_seq_length=32 trainer.val_check_interval=4
    trainer.limit_val_batches=2 trainer.log_every_n_steps=1 model.optim.lr=1e-2 model.optim.sched.min_lr=1e-3 trainer.enable_progress_bar=False
    exp_manager.checkpoint_callback_params.save_top_k=0 model.optim.sched.name=Constant
    "model.data.data_prefix={train: [$work/data], validation: [$work/data], test: [$work/data]}")
"${tune[@]}" trainer.max_steps=4 "exp_manager.explicit_log_dir=$work/run" "save_to=$work/complete.nemo"
"${tune[@]}" trainer.max_steps=4 "exp_manager.explicit_log_dir=$work/run" "save_to=$out/exits.nemo" exits_only=True
cp -r "$work/run/checkpoints" "$out/run"
"${tune[@]}" trainer.max_steps=8 "exp_manager.explicit_log_dir=$work/run" "save_to=$work/resumed.nemo"
cp "$work/complete.nemo" "$out/complete.nemo"
cp "$work/data.bin" "$work/data.idx" "$out/"
"$python" scripts/export/export_huggingface.py "checkpoint=$work/complete.nemo" "output=$out/export" 'targets=[early_exit]'
for file in complete resumed; do
    for mode in early_exit self_speculative; do
        "$python" examples/megatron_gpt_early_exit_generate.py "model.restore_from_path=$work/$file.nemo" trainer.accelerator=cpu mode=$mode \
            threshold=0.03 'prompts=["for i in range(7):\n", "print("]' tokens_to_generate=24 stop_on_eos=False "output=$work/$file-$mode.jsonl"
    done
done
"$python" - "$work" "$out" <<'PY'
import json, pathlib, subprocess, sys
work, out = map(pathlib.Path, sys.argv[1:])
commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
read = lambda name: [json.loads(line) for line in (work / name).read_text().splitlines()]
answers = {f"{file}-{mode}": [[(t["id"], t["exit"]) for t in row["tokens"]] for row in read(f"{file}-{mode}.jsonl")]
           for file in ("complete", "resumed") for mode in ("early_exit", "self_speculative")}
(out / "expected.json").write_text(json.dumps({"commit": commit, "answers": answers}) + "\n")
PY
rm -rf "$work"
du -ah "$out"
