# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Early-exit models on Megatron-core alone in this process, made from tiny Hugging Face ones, and what tests read off
them.

Importing this file switches the CPU host on for the rest of the process. `tests.helpers.megatron_models` has the same
models as NeMo builds them. Tests that need the CPU host off run in a process of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_ee import cpu_host

cpu_host.enable()
if "nemo_ee.models" in sys.modules:  # a test that needs no NeMo imported it while the CPU host was off
    cpu_host.adapt_nemo()

import torch  # noqa: E402 -- after the CPU host is on

from nemo_ee.exits.config import EarlyExitConfig  # noqa: E402
from tests.helpers.huggingface_models import save_tiny_model  # noqa: E402

torch.set_num_threads(1)  # tiny matrices: threads would only wait for each other

ALL_ARCHITECTURES = ("embedding", "norm", "mlp", "layer")


def exit_entry(layer: int, architecture: str, init: str = "copy", output: str = "own", **more: Any) -> dict[str, Any]:
    """An entry of `exits` whose name says what it is."""
    name = f"l{layer}-{architecture}-{init}-{output}"
    return {"name": name, "layer": layer, "architecture": architecture, "init": init, "output": output, **more}


def set_up_groups(*, tensor: int = 1, pipeline: int = 1, data: int = 1) -> None:
    """Megatron's process groups on gloo where there are none: of this process alone, or of the ranks that the
    environment names."""
    from megatron.core import parallel_state, tensor_parallel

    if not torch.distributed.is_initialized():
        if tensor * pipeline * data == 1:
            torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        else:
            torch.distributed.init_process_group("gloo")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor, pipeline)
        tensor_parallel.model_parallel_cuda_manual_seed(1234)


@dataclass
class CoreModel:
    """This rank's stage; attributes that NeMo's model has too have its names.

    Attributes:
        model: the stage.
        early_exit: its exits' settings.
        placements: all stages.
        cfg: the keys of NeMo's config that tests read.
    """

    model: Any
    early_exit: EarlyExitConfig
    placements: Sequence[Any]
    cfg: SimpleNamespace

    @property
    def vocab_size(self) -> int:
        """The true one."""
        return self.model.true_vocab_size

    @cached_property
    def context(self) -> Any:
        """Stage context without teachers and mixed precision."""
        from nemo_ee.exits.objective import Objective
        from nemo_ee.megatron.pipeline.stage_context import StageContext
        from nemo_ee.megatron.pipeline.stage_forward import hidden_state_transport

        objectives = {name: Objective.of(self.early_exit, name) for name in self.early_exit.names}
        return StageContext(self.model, hidden_state_transport(), objectives)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Every parameter of the stage."""
        return self.model.parameters()

    def sharded_state_dict(self) -> dict[str, Any]:
        """What a training checkpoint with a frozen backbone holds."""
        return self.model.exit_sharded_state_dict()


def core_model(
    folder: Path,
    exits: Sequence[Mapping[str, Any]],
    *,
    full_depth: bool = True,
    seed: int = 1234,
    vocab_multiple: int = 16,
    layers_per_stage: Sequence[int] | None = None,
    early_exit: Mapping[str, Any] | None = None,
    source: Any = None,
    stored_exits: Any = None,
    **settings: Any,
) -> CoreModel:
    """This rank's stage with the weights of a Hugging Face directory, exits initialised as they say.

    Args:
        folder: the directory.
        exits: entries of the `early_exit` block.
        full_depth: build all layers and the final exit.
        seed: of random first values.
        vocab_multiple: padding of the vocabulary.
        layers_per_stage: layers of each stage; None: as even as possible.
        early_exit: further keys of the block.
        source: weights of the backbone; None: the directory's.
        stored_exits: weights of the exits, where they are not initialised.
        settings: fields of Megatron's config.
    """
    from megatron.core import parallel_state

    from nemo_ee.checkpoint.huggingface import HuggingFaceSource
    from nemo_ee.checkpoint.megatron_model import load_stage, stage_of
    from nemo_ee.exits.placement import place_exits

    set_up_groups()
    weights = HuggingFaceSource(folder)
    block = {"exits": [dict(exit) for exit in exits], **(early_exit or {})}
    config = EarlyExitConfig.from_mapping(block, num_layers=weights.backbone.num_layers)
    placements = place_exits(
        config.exits,
        num_layers=weights.backbone.num_layers,
        num_stages=parallel_state.get_pipeline_model_parallel_world_size(),
        full_depth=full_depth,
        layers_per_stage=layers_per_stage,
    )
    model = stage_of(
        weights.backbone, config, placements, full_depth=full_depth, vocab_multiple=vocab_multiple,
        use_cpu_initialization=True, **settings,
    )  # fmt: skip
    load_stage(model, source or weights, stored_exits, early_exit=config, seed=seed)
    cfg = SimpleNamespace(
        num_layers=weights.backbone.num_layers, encoder_seq_length=weights.backbone.max_position_embeddings
    )
    return CoreModel(model, config, placements, cfg)


def tiny_core_pair(folder: Path, name: str, exits: Sequence[Mapping[str, Any]], **settings: Any):
    """(transformers model, early-exit model) on the same weights; see `TINY_MODELS` and `core_model`."""
    return save_tiny_model(folder, name), core_model(folder, exits, **settings)


def microbatch(tokens: torch.Tensor, *, labels: torch.Tensor | None = None, mask: torch.Tensor | None = None):
    """A `MicroBatch` of `tokens` [b, s]; by default every position counts and each label is the next token."""
    from nemo_ee.megatron.model.microbatch import MicroBatch

    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    labels = tokens.roll(-1, dims=1) if labels is None else labels
    return MicroBatch(tokens, labels, torch.ones(tokens.shape) if mask is None else mask, positions)


def random_tokens(model, *, batch: int = 2, length: int | None = None, seed: int = 3) -> torch.Tensor:
    """[b, s] tokens over the whole true vocabulary."""
    length = length or model.cfg.encoder_seq_length
    return torch.randint(0, model.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def naive_logits(head, tap: torch.Tensor, rotary_pos_emb, vocab_size: int) -> torch.Tensor:
    """[b, s, v] fp32 logits of an exit head from its tap [s, b, h], whole and without padding rows."""
    hidden = head(tap, rotary_pos_emb=rotary_pos_emb)
    logits = sum(inputs @ weight.t() for inputs, weight in head.output_terms(hidden))
    return logits[..., :vocab_size].transpose(0, 1).float()


@torch.no_grad()
def exit_logits(model, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Exit name -> logits [b, s, v] of tokens [b, s]."""
    stage = model.model.forward_to_taps(microbatch(tokens))
    return {
        head.exit.name: naive_logits(head, stage.taps[head.exit.stop], stage.rotary_pos_emb, model.vocab_size)
        for head in model.model.exits
    }


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of every parameter and buffer by name."""
    return {name: value.detach().clone() for name, value in [*module.named_parameters(), *module.named_buffers()]}


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference in units of the largest |theirs|."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
