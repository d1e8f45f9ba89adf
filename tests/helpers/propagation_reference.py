# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""`kv: propagate` on transformers' own modules, without any cache: a naive reference, and directories to compare on.

Of every position it keeps what went into each layer: the layer below's output, or, past the exit a token left at, the
hidden state there. Each step recomputes each layer's attention over all of that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.huggingface_models import save_tiny_model


def save_early_exit_directory(folder: Path, name: str, exits: Sequence[tuple[str, int, bool]], **changes: Any) -> Any:
    """A tiny model with random exits as an `hf_early_exit` directory.

    Args:
        name: of `TINY_MODELS`.
        exits: (architecture, layer, own output projection).

    Returns:
        The transformers model.
    """
    model = save_tiny_model(folder, name, **changes)
    config = json.loads((folder / "config.json").read_text())
    generator = torch.Generator().manual_seed(11)
    tensors, table = load_file(folder / "model.safetensors"), []
    layer = {k.removeprefix("model.layers.0."): v for k, v in tensors.items() if k.startswith("model.layers.0.")}
    for architecture, depth, own in exits:
        exit = f"layer{depth}-{architecture}{'' if own else '-shared'}"
        entry = {"name": exit, "layer": depth, "architecture": architecture, "output": "own" if own else "backbone"}
        table.append(entry)
        wanted = {"norm.weight": tensors["model.norm.weight"]} if architecture != "embedding" else {}
        if architecture == "mlp":
            wanted |= {k: v for k, v in layer.items() if k.startswith(("mlp.", "post_attention_layernorm."))}
        if own:
            wanted["unembed.weight"] = tensors["model.embed_tokens.weight"]
        for key, like in wanted.items():
            noise = torch.randn(like.shape, generator=generator)
            value = 1 + 0.3 * noise if like.ndim == 1 and "norm" in key else 0.15 * noise
            tensors[f"exit_heads.{exit}.{key}"] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"early_exit": {"exits": table}}))
    return model


class NaivePropagation:
    """A batch of sequences on a transformers model (Llama, Mistral, Qwen2) and the exits of its directory."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.model = model
        self.table = json.loads((folder / "config.json").read_text())["early_exit"]["exits"]
        self.tensors = {}
        for file in folder.glob("*.safetensors"):
            self.tensors |= load_file(file)
        self.inputs: dict[int, list[list[Tensor]]] = {}

    def stop_of(self, entry: Mapping[str, Any]) -> int:
        return 2 * entry["layer"] - (entry["architecture"] == "mlp")

    def _mlp(self, prefix: str, hidden: Tensor) -> Tensor:
        linear, t = torch.nn.functional.linear, self.tensors
        weights = [(t[f"{prefix}mlp.{x}_proj.weight"], t.get(f"{prefix}mlp.{x}_proj.bias")) for x in ("gate", "up")]
        source = self._norm(f"{prefix}post_attention_layernorm", hidden)
        gate, up = (linear(source, weight, bias) for weight, bias in weights)
        down = t[f"{prefix}mlp.down_proj.weight"], t.get(f"{prefix}mlp.down_proj.bias")
        return hidden + linear(torch.nn.functional.silu(gate) * up, *down)

    def _norm(self, name: str, hidden: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden.square().mean() + self.model.config.rms_norm_eps)
        return hidden * scale * self.tensors[f"{name}.weight"]

    def exit_logits(self, entry: Mapping[str, Any], hidden: Tensor) -> Tensor:
        """`[h]` at the exit's stop -> `[v]`."""
        prefix = f"exit_heads.{entry['name']}."
        if entry["architecture"] == "mlp":
            hidden = self._mlp(prefix, hidden)
        if entry["architecture"] != "embedding":
            hidden = self._norm(f"{prefix}norm", hidden)
        own = self.tensors.get(f"{prefix}unembed.weight")
        return self.model.lm_head(hidden) if own is None else own @ hidden

    def _attention(self, index: int, rows: Sequence[Tensor]) -> Tensor:
        """The attention output `[h]` of the last of `rows`, all of which went into this layer."""
        layer, count = self.model.model.layers[index], len(rows)
        hidden = torch.stack(list(rows))[None]
        mask = torch.full((count, count), float("-inf")).triu(1)[None, None]
        positions = self.model.model.rotary_emb(hidden, torch.arange(count)[None])
        return layer.self_attn(
            hidden_states=layer.input_layernorm(hidden), position_embeddings=positions, attention_mask=mask
        )[0][0, -1]

    @torch.no_grad()
    def run(
        self, tokens: Mapping[int, int], thresholds: Mapping[str, float], passes: Any
    ) -> tuple[str | None, dict[int, Tensor]]:
        """One token for each of some sequences.

        Args:
            thresholds: of the exits to ask, by name; empty = full depth.
            passes: (logits `[v]`, threshold) -> bool.

        Returns:
            The exit (None = the final one) and each sequence's logits.
        """
        layers = self.model.model.layers
        state = {s: self.model.model.embed_tokens(torch.tensor(token)) for s, token in tokens.items()}
        for sequence in tokens:
            self.inputs.setdefault(sequence, [[] for _ in layers])
        asked = sorted((e for e in self.table if e["name"] in thresholds), key=self.stop_of)
        for half in range(2 * len(layers)):
            index = half // 2
            for s, hidden in state.items():
                if half % 2 == 0:
                    self.inputs[s][index].append(hidden)
                    state[s] = hidden + self._attention(index, self.inputs[s][index])
                else:
                    layer = layers[index]
                    state[s] = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            for entry in (e for e in asked if self.stop_of(e) == half + 1):
                logits = {s: self.exit_logits(entry, hidden) for s, hidden in state.items()}
                if all(passes(row, thresholds[entry["name"]]) for row in logits.values()):
                    for s, hidden in state.items():
                        for later in self.inputs[s][index + 1 :]:
                            later.append(hidden)
                    return entry["name"], logits
        final = self.model.model.norm(torch.stack(list(state.values())))
        return None, dict(zip(state, self.model.lm_head(final), strict=True))

    @torch.no_grad()
    def run_row_by_row(
        self, tokens: Mapping[int, int], thresholds: Mapping[int, Mapping[str, float]], passes: Any
    ) -> tuple[dict[int, str | None], dict[int, Tensor]]:
        """As `run`, with thresholds of each sequence: each is read from its first exit that passes, and the step ends
        with the last one. A step with a sequence without thresholds runs to full depth."""
        depths = {}
        exits: dict[int, str | None] = dict.fromkeys(tokens)
        logits: dict[int, Tensor] = {}
        begun = {s: [len(rows) for rows in self.inputs.get(s, [[] for _ in self.model.model.layers])] for s in tokens}
        # First to full depth, to know every exit's logits; then the depth at which the step ends is cut out.
        layers, state = self.model.model.layers, {}
        for s, token in tokens.items():
            self.inputs.setdefault(s, [[] for _ in layers])
            state[s] = [self.model.model.embed_tokens(torch.tensor(token))]
            for half in range(2 * len(layers)):
                hidden, layer = state[s][-1], layers[half // 2]
                if half % 2 == 0:
                    self.inputs[s][half // 2].append(hidden)
                    state[s].append(hidden + self._attention(half // 2, self.inputs[s][half // 2]))
                else:
                    state[s].append(hidden + layer.mlp(layer.post_attention_layernorm(hidden)))
            logits[s], depths[s] = self.model.lm_head(self.model.model.norm(state[s][-1])), 2 * len(layers)
            for entry in sorted(self.table, key=self.stop_of) if all(thresholds[one] for one in tokens) else ():
                own, stop = thresholds[s].get(entry["name"]), self.stop_of(entry)
                row = self.exit_logits(entry, state[s][stop])
                if own is not None and passes(row, own):
                    exits[s], logits[s], depths[s] = entry["name"], row, stop
                    break
        end = max(depths.values())
        for s in tokens:
            for index in range((end + 1) // 2, len(layers)):
                self.inputs[s][index][begun[s][index] :] = [state[s][end]]
        return exits, logits

    def generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int], thresholds: Any, passes: Any,
        *, row_by_row: bool = False,
    ) -> tuple[list[list[int]], list[list[str | None]]]:  # fmt: skip
        """Greedy; prompts and first tokens at full depth. `thresholds`: of `run`, or of `run_row_by_row`."""
        tokens: list[list[int]] = [[] for _ in prompts]
        exits: list[list[str | None]] = [[] for _ in prompts]
        rows: dict[int, Tensor] = {}
        for sequence, prompt in enumerate(prompts):
            for token in prompt:
                rows |= self.run({sequence: token}, {}, passes)[1]
        exit: dict[int, str | None] = dict.fromkeys(rows)
        while rows:
            for sequence, row in rows.items():
                tokens[sequence].append(int(row.argmax()))
                exits[sequence].append(exit[sequence])
            going = {s: own[-1] for s, own in enumerate(tokens) if len(own) < new_tokens[s]}
            if not going:
                break
            if row_by_row:
                exit, rows = self.run_row_by_row(going, thresholds, passes)
            else:
                one, rows = self.run(going, thresholds, passes)
                exit = dict.fromkeys(going, one)
        return tokens, exits
