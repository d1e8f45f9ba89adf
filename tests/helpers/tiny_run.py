# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Write what a tiny tuning run starts from: a converted Hugging Face model and a data set.

python -m tests.helpers.tiny_run <folder>
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

REFERENCE_MODEL = Path(__file__).parents[2] / "assets" / "reference-model"


def write_start(folder: Path, exits: list[dict], *, num_layers: int, vocabulary: int, length: int) -> None:
    """`folder/start.nemo`, made from a random Hugging Face Qwen3, and `folder/data.{bin,idx}`."""
    from nemo_ee import cpu_host

    cpu_host.enable()
    import numpy
    import torch
    from hydra import compose, initialize_config_dir
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from transformers import Qwen3Config, Qwen3ForCausalLM

    import nemo_ee.models  # noqa: F401
    from nemo_ee.commands.convert import convert

    torch.manual_seed(5)
    source = folder / "hugging_face"
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=80, num_hidden_layers=num_layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12, max_position_embeddings=64,
        tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(source)
    for file in REFERENCE_MODEL.glob("*token*.json"):
        (source / file.name).write_bytes(file.read_bytes())
    builder = IndexedDatasetBuilder(str(folder / "data.bin"), dtype=numpy.uint16)
    generator = torch.Generator().manual_seed(7)
    for _ in range(40):
        tokens = torch.randint(1, 300, (int(torch.randint(10, 60, (), generator=generator)),), generator=generator)
        builder.add_document(torch.cat((tokens, torch.zeros(1, dtype=torch.long))), [len(tokens) + 1])
    builder.finalize(str(folder / "data.idx"))
    with initialize_config_dir(str(Path(__file__).parents[2] / "conf"), version_base="1.3"):
        cfg = compose(
            "megatron_gpt_early_exit_convert",
            overrides=[
                f"source={source}", f"output={folder / 'start.nemo'}", "trainer.accelerator=cpu",
                "model.global_batch_size=4", f"model.encoder_seq_length={length}", "probe_tokens=16",
            ],
        )  # fmt: skip
    cfg.model.early_exit.exits = exits
    convert(cfg)


if __name__ == "__main__":
    from tests.distributed.layout_program import EXITS, LENGTH, NUM_LAYERS, VOCABULARY

    write_start(Path(sys.argv[1]), EXITS, num_layers=NUM_LAYERS, vocabulary=VOCABULARY, length=LENGTH)
    print(json.dumps({"written": sys.argv[1]}))
