# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The number of weights that decoding reads: a model that counts them, and the bound on speed that follows.

Decoding a few tokens reads every weight of the half layers and heads it runs once, however many tokens run together,
and at small batches that reading takes the time. Where each weight takes the same time, no mode is faster than full
depth by more than

    bound = weights read at full depth / weights read in that mode, for the same tokens

The word embedding, of which a token reads one row, norms and biases are left out.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nemo_ee.generation.decoding_model import TokenPositions
from nemo_ee.runtime.exported_model import ExportedModel
from nemo_ee.runtime.model import RuntimeModel


def head_weights(model: ExportedModel) -> dict[str | None, int]:
    """Weights that one evaluation of each exit reads; the final exit under None."""
    a = model.architecture
    output = a.hidden_size * a.vocab_size
    before = {"embedding": 0, "norm": 0, "mlp": a.mlp_size, "layer": a.attention_size + a.mlp_size}
    return {None: output} | {exit.name: before[exit.architecture] + output for exit in model.exits}


class CountingModel:
    """A `RuntimeModel` that adds up what its calls read.

    Attributes:
        touched: weights read so far; it may be reset to 0.
    """

    def __init__(self, model: RuntimeModel) -> None:
        self._model, self.touched = model, 0
        self._heads = head_weights(model.config)

    def __getattr__(self, name: str) -> Any:
        """All other attributes are the model's."""
        return getattr(self._model, name)

    def run(self, hidden: Tensor, positions: TokenPositions, start: int, stop: int, cache: Any) -> Tensor:
        """See `DecodingModel.run`; odd half layers are attention, even ones MLPs."""
        a, num_mlps = self._model.architecture, stop // 2 - start // 2
        self.touched += num_mlps * a.mlp_size + (stop - start - num_mlps) * a.attention_size
        return self._model.run(hidden, positions, start, stop, cache)

    def exit_logits(self, name: str | None, hidden: Tensor, positions: TokenPositions, cache: Any) -> Tensor:
        """See `DecodingModel.exit_logits`."""
        self.touched += self._heads[name]
        return self._model.exit_logits(name, hidden, positions, cache)
