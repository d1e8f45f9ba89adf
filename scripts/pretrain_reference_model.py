# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Pre-train a small byte-level model, Llama- or GPT-2-shaped, on the CPU from scratch.

python scripts/pretrain_reference_model.py data=data/python.jsonl.gz output=outputs/reference-model-bytes

Plain PyTorch around transformers' models. The learning rate rises, stays, and falls at the end
(warmup-stable-decay, arXiv 2405.18392), so a run may be ended at any step: a file <output>/decay starts the fall. The
checkpoint appears by renaming, so a killed run has its last one whole; initial weights and data are functions of the
seed and the step, so a resumed run gives the bits of an uninterrupted one.

With `exit_layers` the final norm and output are trained to read the hidden states after those layers too (LayerSkip,
arXiv 2404.16710, section 4.1.2, without its layer dropout):

    loss = CE(final) + exit_loss_weight / n  sum over the n layers of CE(output(norm(hidden)))

Options: conf/pretrain_reference_model.yaml.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from lib.pretraining_settings import PretrainConfig, Progress, Sizes
from omegaconf import DictConfig

from nemo_ee.checkpoint.atomic import atomic_file
from nemo_ee.commands.command import command
from nemo_ee.commands.console import messages
from nemo_ee.text.json_values import check_model_files

logger = logging.getLogger("nemo_ee.scripts")

# Family -> what its config has besides the sizes.
_FIXED = {
    "llama": {"rms_norm_eps": 1e-5, "rope_theta": 10000.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "layer_norm_epsilon": 1e-5},
}
_GPT2_NAMES = {
    "num_hidden_layers": "n_layer", "hidden_size": "n_embd", "intermediate_size": "n_inner",
    "num_attention_heads": "n_head", "max_position_embeddings": "n_positions",
}  # fmt: skip
_SHOWN_PROBLEMS = 20
# Rows of attention done at once. With 512 columns a block of bf16 scores stays in the cache and half of the masked
# part is never computed; torch's own CPU kernel takes twice the time at this size.
_ATTENTION_ROWS = 128


def blocked_causal_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Causal attention in blocks of rows, in bf16 if autocast is on; transformers' attention interface.

    Args:
        query, key, value: `[b, heads, s, head]`; as many key heads as query heads.
        scaling: of the scores; None = 1 / sqrt(head).

    Returns:
        (`[b, s, heads, head]`, None).
    """
    import torch

    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    batch, heads, length, size = query.shape
    scaling = size**-0.5 if scaling is None else scaling
    # [b, heads, s, head] -> [b * heads, s, head]
    query, key, value = (one.to(dtype).reshape(batch * heads, length, size) for one in (query, key, value))
    rows = []
    with torch.autocast("cpu", enabled=False):
        for begin in range(0, length, _ATTENTION_ROWS):
            end = min(begin + _ATTENTION_ROWS, length)
            bias = torch.full((end - begin, end), -math.inf, dtype=dtype).triu_(begin + 1)
            scores = torch.baddbmm(bias, query[:, begin:end], key[:, :end].transpose(1, 2), alpha=scaling)
            rows.append(torch.bmm(scores.softmax(-1), value[:, :end]))
    # [b * heads, s, head] -> [b, s, heads, head]
    return torch.cat(rows, dim=1).reshape(batch, heads, length, size).transpose(1, 2), None


def build_model(config: PretrainConfig):
    """The model in fp32, with initial weights drawn from the seed or those of `start_from`.

    Raises:
        ValueError: `start_from` holds a model of another shape.
    """
    import torch
    from lib.byte_tokenizer import END
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

    AttentionInterface.register("blocked_causal", blocked_causal_attention)
    torch.manual_seed(config.seed)
    family, shape = config.model.family, _shape(config.model)
    wanted = AutoConfig.for_model(
        family, **shape, **_FIXED[family], bos_token_id=END, eos_token_id=END, pad_token_id=END
    )  # fmt: skip
    if config.start_from is None:
        return AutoModelForCausalLM.from_config(wanted, attn_implementation="blocked_causal")
    try:
        check_model_files(config.start_from)
    except ValueError as error:
        raise ValueError(f"start_from: {config.start_from} cannot be read as a model: {error}") from error
    try:
        stored = AutoConfig.from_pretrained(config.start_from)
        other = [
            f"{key} ({found}, not {value})"
            for key, value in {**shape, "model_type": family}.items()
            if (found := getattr(stored, key, None)) != value
        ]
        if other:
            raise ValueError(f"start_from: {config.start_from} has another {', '.join(other)}; set model to its shape")
        return AutoModelForCausalLM.from_pretrained(
            config.start_from, torch_dtype=torch.float32, attn_implementation="blocked_causal"
        )
    except OSError as error:
        raise ValueError(
            f"start_from: {config.start_from} cannot be read as a model: {error}; name `model` of a finished run"
        ) from error


def _shape(sizes: Sizes) -> dict[str, Any]:
    """The sizes under the names of the family's config."""
    shape = sizes.model_dump(exclude={"family"})
    if sizes.family == "llama":
        return {**shape, "num_key_value_heads": sizes.num_attention_heads}
    return {_GPT2_NAMES.get(key, key): value for key, value in shape.items()}


def build_optimizer(model, config: PretrainConfig):
    """AdamW with weight decay on matrices only."""
    import torch

    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def losses_of(model, tokens, precision: str, exit_layers: Sequence[int] = ()):
    """Mean next-byte cross-entropy in nats of `[b, s + 1]` tokens, fp32: the final one, then one per exit layer."""
    import torch

    losses, norm = [], getattr(model.base_model, "norm", None) or model.base_model.ln_f
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        result = model(input_ids=tokens[:, :-1], use_cache=False, output_hidden_states=bool(exit_layers))
        # [b, s, v] -> [b * s, v]
        losses.append(_cross_entropy(result.logits, tokens))
        for layer in exit_layers:
            logits = model.lm_head(norm(result.hidden_states[layer]))
            losses.append(_cross_entropy(logits, tokens))
    return torch.stack(losses)


def _cross_entropy(logits, tokens):
    import torch

    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def held_out_losses(model, windows, count: int | None, config: PretrainConfig) -> list[float]:
    """Mean losses in nats per byte, the final one first, over the first `count` windows (all if None) of an order of
    their own."""
    import torch

    count = len(windows) if count is None else min(count, len(windows))
    total = torch.zeros(1 + len(config.exit_layers), dtype=torch.float64)
    with torch.no_grad():
        for begin in range(0, count, config.batch_size):
            rows = [windows.window(number) for number in range(begin, min(count, begin + config.batch_size))]
            tokens = torch.stack([torch.from_numpy(row) for row in rows])
            total += losses_of(model, tokens, config.precision, config.exit_layers).double() * len(rows)
    return (total / count).tolist()


class Run:
    """A model in training, and its files.

    Args:
        config: the settings.
        windows: training data.
        held_out: held-out data.

    Raises:
        ValueError: a checkpoint of other settings or other data is in the output directory.
    """

    def __init__(self, config: PretrainConfig, windows, held_out) -> None:
        self.config, self.windows, self.held_out = config, windows, held_out
        self.model = build_model(config)
        self.optimizer = build_optimizer(self.model, config)
        self.progress = Progress(0, config.steps - config.decay_steps, config.decay_steps)
        self.checkpoint = config.output / "checkpoint.pt"
        self.identity = {
            "model": config.model.model_dump(),
            **{key: getattr(config, key) for key in ("sequence_length", "batch_size", "precision", "seed")},
            **{key: getattr(config, key) for key in ("lr", "warmup_steps", "weight_decay", "betas", "clip")},
            "data": windows.digest(),
        }
        # Only settings with an effect, so that a run without these resumes from checkpoints that do not have them.
        if config.start_from is not None:
            self.identity["start_from"] = config.start_from
        if config.model.family == "llama":
            del self.identity["model"]["family"]
        if config.exit_layers:
            self.identity |= {"exit_layers": config.exit_layers, "exit_loss_weight": config.exit_loss_weight}
        if self.checkpoint.exists():
            self._load()

    def _load(self) -> None:
        import torch

        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        stored = state["identity"]
        other = [key for key in {**self.identity, **stored} if self.identity.get(key) != stored.get(key)]
        if other:
            raise ValueError(
                f"{self.checkpoint} was made with other {', '.join(other)}; give the settings of that run again, "
                "or another output"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = self.progress.resumed(Progress(**state["progress"]))
        logger.info("going on after step %d of %s", self.progress.step, self.checkpoint)

    def save(self) -> None:
        """Write the checkpoint; a kill leaves the one before or this one, whole."""
        import torch

        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "identity": self.identity}
        with atomic_file(self.checkpoint) as partial:
            torch.save({**state, "progress": dataclasses.asdict(self.progress)}, partial)

    def log(self, **values: Any) -> None:
        """Add a line to log.jsonl. After a resume a step may have two lines; the later one counts."""
        with open(self.config.output / "log.jsonl", "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": self.progress.step, **values}) + "\n")

    def _log_held_out(self, name: str, count: int | None, **values: Any) -> float:
        """Add the held-out losses, `name` for the final one, to log.jsonl; returns that one."""
        loss, *exit_losses = held_out_losses(self.model, self.held_out, count, self.config)
        if exit_losses:
            values[f"{name}_of_exits"] = dict(zip(self.config.exit_layers, exit_losses, strict=True))
        self.log(**{name: loss}, **values)
        return loss

    def train_step(self) -> float:
        """One optimizer step; returns its loss in nats per byte."""
        import torch

        rate = self.progress.learning_rate(self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        config = self.config
        tokens = torch.from_numpy(self.windows.batch(self.progress.step, config.batch_size))
        losses = losses_of(self.model, tokens, config.precision, config.exit_layers)
        loss = losses[0]
        (loss + config.exit_loss_weight * losses[1:].mean() if config.exit_layers else loss).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        if not math.isfinite(loss.item()):
            raise ValueError(f"the loss of step {self.progress.step} is {loss.item()}; lower lr ({self.config.lr})")
        return loss.item()

    def steps(self) -> Iterator[float]:
        """Make the steps that are left, with checkpoints, requests and held-out losses; yields each loss."""
        config, progress = self.config, self.progress
        last = None if config.max_steps_this_run is None else progress.step + config.max_steps_this_run
        while progress.step < progress.end and progress.step != last:
            if progress.heed(config.output / "decay"):
                logger.info("end requested: %d steps of decay from step %d", progress.decay_steps, progress.step)
            yield self.train_step()
            if progress.step % config.save_every == 0:
                self.save()
            if config.validate_every is not None and progress.step % config.validate_every == 0:
                self._log_held_out("held_out_loss", config.validation_windows)
        self.save()

    def finish(self) -> Path:
        """Save the model (bf16, Hugging Face format) with its tokenizer; log the held-out loss of these weights."""
        import torch
        from lib.byte_tokenizer import write_byte_tokenizer

        folder = self.config.output / "model"
        model = self.model.to(torch.bfloat16)
        model.save_pretrained(folder, safe_serialization=True)
        write_byte_tokenizer(folder, self.config.model.max_position_embeddings)
        model.float()
        size = self.config.batch_size * self.config.sequence_length
        count = self.config.final_validation_windows
        loss = self._log_held_out("final_held_out_loss", count, bytes=self.progress.step * size)
        logger.info("%s: held-out loss %.4f nats per byte after %d steps", folder, loss, self.progress.step)
        return folder


def read_data(config: PretrainConfig):
    """(training windows, held-out windows).

    Raises:
        ValueError: the problems of the files.
    """
    from lib.packed_bytes import PackedWindows, read_documents, without

    documents, problems = read_documents(config.data, config.max_document_bytes)
    held_out, other_problems = read_documents(config.held_out, config.max_document_bytes)
    if not config.held_out:
        other_problems = ["empty list; name at least one file"]
    problems = [f"data: {problem}" for problem in problems] + [f"held_out: {problem}" for problem in other_problems]
    if problems:
        more = [f"and {len(problems) - _SHOWN_PROBLEMS} more"] if len(problems) > _SHOWN_PROBLEMS else []
        raise ValueError("\n  - ".join(["Nothing was trained:", *problems[:_SHOWN_PROBLEMS], *more]))
    kept = without(documents, held_out)
    logger.info("%d documents, %d of them held out", len(documents), len(documents) - len(kept))
    length, seed = config.sequence_length, config.seed
    return PackedWindows(kept, length, seed), PackedWindows(held_out, length, seed)


def pretrain(config: PretrainConfig) -> Path | None:
    """Train to the end, or for `max_steps_this_run` steps.

    Returns:
        The directory of the finished model, None if steps are left.
    """
    from tqdm import tqdm

    windows, held_out = read_data(config)
    config.output.mkdir(parents=True, exist_ok=True)
    run = Run(config, windows, held_out)
    size = config.batch_size * config.sequence_length
    logger.info(
        "%d parameters; %d steps of %d bytes from %d windows",
        sum(parameter.numel() for parameter in run.model.parameters()),
        run.progress.end,
        size,
        len(windows),
    )
    with tqdm(
        initial=run.progress.step, total=run.progress.end, desc="pretrain", dynamic_ncols=True, file=messages()
    ) as bar:
        recent, began, busy = [], time.monotonic(), time.process_time()
        for loss in run.steps():
            bar.total = run.progress.end
            bar.update()
            recent.append(loss)
            if len(recent) == 10:
                mean, seconds = sum(recent) / len(recent), time.monotonic() - began
                rate = run.optimizer.param_groups[0]["lr"]
                per_cpu_second = size * len(recent) / (time.process_time() - busy)
                per_second = size * len(recent) / seconds
                bar.set_postfix(loss=f"{mean:.3f}", lr=f"{rate:.1e}", bytes_per_s=f"{per_second:.0f}")
                run.log(loss=mean, lr=rate, bytes_per_cpu_second=per_cpu_second)
                recent, began, busy = [], time.monotonic(), time.process_time()
    return run.finish() if run.progress.step == run.progress.end else None


@hydra.main(version_base="1.3", config_path="../conf", config_name="pretrain_reference_model")
def main(cfg: DictConfig) -> None:
    """Run with the options of conf/pretrain_reference_model.yaml."""
    with command(cfg):
        pretrain(PretrainConfig.from_config(cfg))


if __name__ == "__main__":
    main()
