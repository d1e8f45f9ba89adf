# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The operations of tuning for one microbatch, and their costs.

    layer             QKV product, attention, output product, MLP            forward, under no_grad
    exit              own MLP or layer, output projection, loss              forward and backward
    embedding         table lookup                                           forward
    final exit        final norm and the backbone's output                   forward

A trained matrix takes three products of the same size: y = W x, dL/dx = W^T dL/dy, dL/dW = dL/dy x^T. A frozen one
(`init: lora`, `output: shared | low_rank`) lacks the last, and the second too where nothing in front of it trains.
Nobody reads dL/dx of the first matrix of an `mlp` exit, whose norm is frozen; Transformer Engine forms it.

`count_flops` prices operations by their multiplications and additions, 2 m n k for a product; softmax, norms and
activations count nothing. `nemo_ee.planning.cost_measurement` times the same operations instead.

Shapes are those of one tensor-parallel rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

from nemo_ee.exits.config import ExitConfig
from nemo_ee.families.architecture import Architecture

# Backward over forward: attention that keeps its weights multiplies four times, a fused kernel forms them once more.
_ATTENTION_BACKWARD = {False: 2.0, True: 2.5}


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """A model and how its microbatches run.

    Attributes:
        model: its sizes, the vocabulary padded.
        sequence, micro_batch: tokens per sequence, sequences per microbatch.
        fused_attention: causal attention in one kernel that skips the masked half; otherwise the whole square.
        tensor_parallel: ranks that share every matrix.
        chunk_bytes: size of one chunk of fp32 logits in the loss.
        transformer_engine: an exit's MLP is Transformer Engine's.
    """

    model: Architecture
    sequence: int
    micro_batch: int
    fused_attention: bool = False
    tensor_parallel: int = 1
    chunk_bytes: int = 64 * 2**20
    transformer_engine: bool = True

    @property
    def tokens(self) -> int:
        """Tokens of one microbatch."""
        return self.sequence * self.micro_batch


@dataclasses.dataclass(frozen=True)
class Product:
    """A linear layer y = x W^T on `rows` tokens, W [outputs, inputs], `rows_at_once` of them at a time."""

    rows: int
    inputs: int
    outputs: int
    input_gradient: bool = False
    weight_gradient: bool = False
    rows_at_once: int | None = None

    @property
    def flops(self) -> float:
        """2 rows inputs outputs for each of the products."""
        return 2.0 * self.rows * self.inputs * self.outputs * (1 + self.input_gradient + self.weight_gradient)


@dataclasses.dataclass(frozen=True)
class Attention:
    """Causal attention proper: scores, softmax, weighted values. `fused` skips the masked half."""

    batch: int
    sequence: int
    heads: int
    head_dim: int
    fused: bool
    backward: bool = False

    @property
    def flops(self) -> float:
        """Two products over the square of the sequence, or over half of it."""
        square = self.batch * self.heads * self.sequence**2 * self.head_dim
        forward = 4.0 * square * (0.5 if self.fused else 1.0)
        return forward * (1.0 + (_ATTENTION_BACKWARD[self.fused] if self.backward else 0.0))


@dataclasses.dataclass(frozen=True)
class Pointwise:
    """Work without products on [rows, columns]: `norm`, `activation` (of the MLP), `lookup`, `loss` (softmax and,
    with `backward`, its gradient, in fp32). It has no FLOPs and does have a time."""

    kind: str
    rows: int
    columns: int
    gated: bool = False
    backward: bool = False
    rows_at_once: int | None = None

    @property
    def flops(self) -> float:
        """Nothing: only products count."""
        return 0.0


Operation = Product | Attention | Pointwise
Price = Callable[[Operation], float]


def count_flops(operation: Operation) -> float:
    """Multiplications and additions of one tensor-parallel rank."""
    return operation.flops


def layer_operations(
    shape: ModelShape, *, mlp: bool = True, backward: bool = False, trained: bool = True
) -> list[Operation]:
    """One transformer layer of one microbatch.

    Args:
        shape: the model's sizes.
        mlp: with its MLP.
        backward: and its backward.
        trained: with `backward`, its matrices train; otherwise gradients only pass through (LoRA).
    """
    model = shape.model
    tokens, tp = shape.tokens, shape.tensor_parallel
    gradients = {"input_gradient": backward, "weight_gradient": backward and trained}
    width = model.proj_columns // tp
    operations: list[Operation] = [
        Pointwise("norm", tokens, model.hidden_size, backward=backward),
        Product(tokens, model.hidden_size, model.qkv_rows // tp, **gradients),
        Attention(
            shape.micro_batch,
            shape.sequence,
            model.num_attention_heads // tp,
            model.kv_channels,
            shape.fused_attention,
            backward,
        ),
        Product(tokens, width, model.hidden_size, **gradients),
    ]
    return operations + (mlp_operations(shape, backward=backward, trained=trained) if mlp else [])


def mlp_operations(shape: ModelShape, *, backward: bool = False, trained: bool = True) -> list[Operation]:
    """A layer's MLP with the norm in front of it. Arguments as in `layer_operations`."""
    model = shape.model
    tokens, ffn, tp = shape.tokens, model.ffn_hidden_size // shape.tensor_parallel, shape.tensor_parallel
    gradients = {"input_gradient": backward, "weight_gradient": backward and trained}
    return [
        Pointwise("norm", tokens, model.hidden_size, backward=backward),
        Product(tokens, model.hidden_size, model.fc1_rows // tp, **gradients),
        Pointwise("activation", tokens, ffn, gated=model.gated, backward=backward),
        Product(tokens, ffn, model.hidden_size, **gradients),
    ]


def exit_operations(shape: ModelShape, exit: ExitConfig, *, again: bool = False) -> list[Operation]:
    """Forward, loss and backward of one exit on one microbatch.

    Args:
        shape: the model's sizes.
        exit: the exit.
        again: its logits are formed once more in the backward pass, as where the backbone trains too.
    """
    lora = exit.init == "lora"
    operations: list[Operation] = []
    if exit.architecture == "layer":
        operations += layer_operations(shape, backward=True, trained=not lora)
    elif exit.architecture == "mlp":
        operations += mlp_operations(shape, backward=True, trained=not lora)
    # Where the backbone trains too (`again`), the tap reads the gradient.
    if operations and (lora or exit.architecture == "mlp" and not (shape.transformer_engine or again)):
        operations = _without_first_gradient(operations)
    if lora and operations:
        operations += _low_rank_operations(shape, exit)
    if exit.architecture != "embedding":
        operations.append(Pointwise("norm", shape.tokens, shape.model.hidden_size, backward=not lora))
    # Whether a gradient is wanted in front of the output projection.
    reaches = exit.architecture in ("mlp", "layer") or (exit.architecture == "norm" and not lora)
    return operations + _output_operations(shape, exit, reaches) + again * _logits(shape)


def _without_first_gradient(operations: list[Operation]) -> list[Operation]:
    """The first product's input is the tap, or a frozen norm of it: with a frozen matrix, or on Megatron's own
    linears, its gradient is not formed."""
    first = next(index for index, operation in enumerate(operations) if isinstance(operation, Product))
    changed = dataclasses.replace(operations[first], input_gradient=False)
    return [*operations[:first], changed, *operations[first + 1 :]]


def _low_rank_operations(shape: ModelShape, exit: ExitConfig) -> list[Operation]:
    """Low-rank updates of every linear in an exit's MLP or layer; the first one's input needs no gradient."""
    model = shape.model
    tp, tokens, rank = shape.tensor_parallel, shape.tokens, exit.rank
    linears = [(model.hidden_size, model.fc1_rows // tp), (model.ffn_hidden_size // tp, model.hidden_size)]
    if exit.architecture == "layer":
        linears = [(model.hidden_size, model.qkv_rows // tp), (model.proj_columns // tp, model.hidden_size), *linears]
    operations: list[Operation] = []
    for index, (inputs, outputs) in enumerate(linears):
        operations.append(Product(tokens, inputs, rank, input_gradient=index > 0, weight_gradient=True))
        operations.append(Product(tokens, rank, outputs, input_gradient=True, weight_gradient=True))
    return operations


def _output_operations(shape: ModelShape, exit: ExitConfig, reaches: bool) -> list[Operation]:
    model = shape.model
    rows, tokens = model.vocab_size // shape.tensor_parallel, shape.tokens
    chunk = max(1, min(tokens, shape.chunk_bytes // (4 * rows)))
    trained = exit.output == "own" and exit.init != "lora"
    operations: list[Operation] = [
        Product(tokens, model.hidden_size, rows, input_gradient=reaches, weight_gradient=trained, rows_at_once=chunk)
    ]
    if exit.output == "low_rank" or (exit.output == "own" and exit.init == "lora"):
        operations += [
            Product(tokens, model.hidden_size, exit.rank, input_gradient=reaches, weight_gradient=True),
            Product(tokens, exit.rank, rows, input_gradient=True, weight_gradient=True, rows_at_once=chunk),
        ]
    return [*operations, Pointwise("loss", tokens, rows, backward=True, rows_at_once=chunk)]


def _logits(shape: ModelShape, **gradients: bool) -> list[Operation]:
    """One product with an output matrix and the softmax of it."""
    rows, tokens = shape.model.vocab_size // shape.tensor_parallel, shape.tokens
    chunk = max(1, min(tokens, shape.chunk_bytes // (4 * rows)))
    return [
        Product(tokens, shape.model.hidden_size, rows, rows_at_once=chunk, **gradients),
        Pointwise("loss", tokens, rows, rows_at_once=chunk, backward=bool(gradients)),
    ]


def final_exit_operations(shape: ModelShape, *, train: str = "exits") -> list[Operation]:
    """The final norm, and the backbone's output with its loss: forward only, or with what trains the backbone."""
    norm = Pointwise("norm", shape.tokens, shape.model.hidden_size, backward=train != "exits")
    if train == "exits":
        return [norm, *_logits(shape)]
    return [norm, *_logits(shape, input_gradient=True, weight_gradient=train == "joint"), *_logits(shape)]


def embedding_operations(shape: ModelShape) -> list[Operation]:
    """The lookup of the word embeddings."""
    return [Pointwise("lookup", shape.tokens, shape.model.hidden_size)]


def exit_parameters(shape: ModelShape, exit: ExitConfig) -> tuple[int, int]:
    """(trained, frozen) matrix entries of an exit over all tensor-parallel ranks; norms and biases are left out.

    A frozen copy of the backbone's output (`shared`, `low_rank`) counts as frozen: a stage keeps one, whatever the
    number of exits.
    """
    model = shape.model
    body = {"mlp": model.mlp_size, "layer": model.mlp_size + model.attention_size}.get(exit.architecture, 0)
    output = model.hidden_size * model.vocab_size
    update = exit.rank * (model.hidden_size + model.vocab_size)
    if exit.init == "lora":
        whole = dataclasses.replace(shape, tensor_parallel=1, micro_batch=1, sequence=1)
        low_rank = _low_rank_operations(whole, exit) if body else []
        trained = sum(product.inputs * product.outputs for product in low_rank)
        return trained + (0 if exit.output == "shared" else update), body + output
    trained = body + {"own": output, "shared": 0, "low_rank": update}[exit.output]
    return trained, 0 if exit.output == "own" else output


@dataclasses.dataclass(frozen=True)
class StageCosts:
    """Time of one microbatch in units of one layer's forward.

    Attributes:
        layer: one layer that runs: 1 with a frozen backbone; with its backward where the backbone trains too.
        layer_without_mlp: the deepest layer, where its MLP is skipped.
        embedding, final_exit: see the module.
        exits: exit name -> forward, loss and backward.
    """

    layer: float
    layer_without_mlp: float
    embedding: float
    final_exit: float
    exits: Mapping[str, float]

    @classmethod
    def of(
        cls,
        shape: ModelShape,
        exits: Sequence[ExitConfig],
        price: Price,
        *,
        train: str = "exits",
        taught: Collection[str] = (),
        num_stages: int | None = 1,
    ) -> StageCosts:
        """Price every entry.

        Args:
            shape: the model's sizes.
            exits: its exits.
            price: cost of an operation in any unit, e.g. `count_flops`.
            train: `exits`, `joint` (the backbone's backward runs too) or `lora` (the same without its weights).
            taught: names of exits that need the final exit's whole distribution. A stage forms it once for all of
                them, but for its `layer` exits once each: each of the others pays a part, as if they were spread
                evenly over the stages.
            num_stages: pipeline-parallel size; None: every exit forms the distribution for itself.
        """

        def total(operations: Sequence[Operation]) -> float:
            return sum(price(operation) for operation in operations)

        def shared(exit: ExitConfig) -> bool:
            return exit.name in taught and exit.architecture != "layer"

        share = 1.0 if num_stages is None else min(1.0, num_stages / max(1, sum(map(shared, exits))))
        teacher = total(_logits(shape)) if taught else 0.0
        backbone = {"backward": train != "exits", "trained": train == "joint"}
        unit = total(layer_operations(shape))
        return cls(
            layer=total(layer_operations(shape, **backbone)) / unit,
            layer_without_mlp=total(layer_operations(shape, mlp=False, **backbone)) / unit,
            embedding=total(embedding_operations(shape)) / unit,
            final_exit=total(final_exit_operations(shape, train=train)) / unit,
            exits={
                exit.name: (
                    total(exit_operations(shape, exit, again=train != "exits"))
                    + (exit.name in taught) * teacher * (share if shared(exit) else 1.0)
                )
                / unit
                for exit in exits
            },
        )

    def per_layer(
        self, exits: Sequence[ExitConfig], *, layers_to_run: int, skip_last_mlp: bool, final_exit: bool
    ) -> list[float]:
        """Cost of each layer that runs, with its exits, the embedding (first layer) and the final exit (last
        layer)."""
        costs = [self.layer] * layers_to_run
        if skip_last_mlp:
            costs[-1] = self.layer_without_mlp
        costs[0] += self.embedding
        costs[-1] += self.final_exit if final_exit else 0.0
        for exit in exits:
            costs[exit.layer - 1] += self.exits[exit.name]
        return costs
