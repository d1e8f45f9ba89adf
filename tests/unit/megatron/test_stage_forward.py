# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The order of receive, layers, send and exits' work on one stage, the bound on outstanding sends, and what is alive.

Transfers are scripted: a test says what has been posted and waited for, no process group is needed.
"""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from nemo_ee.exits.objective import CROSS_ENTROPY
from nemo_ee.megatron.model.microbatch import MicroBatch, StageOutput
from nemo_ee.megatron.pipeline import transport as module
from nemo_ee.megatron.pipeline import tuning_step
from nemo_ee.megatron.pipeline.stage_context import StageContext
from nemo_ee.megatron.pipeline.stage_forward import stage_outputs
from nemo_ee.megatron.pipeline.transport import Transport

SHAPE = (2, 1, 3)
RANKS = [3, 4, 5]  # of the pipeline's stages


class Transfers:
    """Stands for torch.distributed: records every post and every wait, and fills received buffers on wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.sent: list[torch.Tensor] = []
        self.received = 0
        self.fails = False
        monkeypatch.setattr(module, "irecv", self._irecv)
        monkeypatch.setattr(module, "isend", self._isend)
        monkeypatch.setattr(module, "get_process_group_ranks", lambda group: group.ranks)

    def _work(self, name: str, on_wait=lambda: None):
        transfers = self

        class Work:
            def wait(self, limit=None) -> None:
                if transfers.fails:
                    raise RuntimeError("Connection closed by peer")
                transfers.log.append(f"{name} done")
                on_wait()

        return Work()

    def _irecv(self, buffer: torch.Tensor, src: int, group: SimpleNamespace):
        index, self.received = self.received, self.received + 1
        self.log.append(f"receive {index}")
        assert src == group.ranks[group.rank() - 1]
        return self._work(f"receive {index}", lambda: buffer.fill_(10.0 + index))

    def _isend(self, tensor: torch.Tensor, dst: int, group: SimpleNamespace):
        index = len(self.sent)
        self.sent.append(tensor)
        self.log.append(f"send {index}")
        assert dst == group.ranks[group.rank() + 1] and tensor.is_contiguous()
        return self._work(f"send {index}")


def transport(stage: int = 1, ranks: list[int] = RANKS, *, max_outstanding: int = 2) -> Transport:
    group = SimpleNamespace(ranks=ranks, rank=lambda: stage)
    return Transport(group, carries="hidden states", max_outstanding=max_outstanding, way_out=". Start again")


class Stage(torch.nn.Module):
    """Stands for the model: writes the microbatch's number into its tap and its hidden state."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.log, self.post_process = log, False
        self.config = SimpleNamespace(params_dtype=torch.float32)
        self.received: list[torch.Tensor | None] = []
        self.taps: list[weakref.ref] = []
        self.alive: list[int] = []  # earlier taps, when the layers of each microbatch run

    def hidden_shape(self, batch: MicroBatch) -> tuple[int, ...]:
        return SHAPE

    def forward_to_taps(self, batch: MicroBatch, received: torch.Tensor | None) -> StageOutput:
        index = int(batch.tokens.unique())
        self.log.append(f"layers {index}")
        self.received.append(None if received is None else received.clone())
        gc.collect()
        self.alive.append(sum(tap() is not None for tap in self.taps))
        tap = torch.full(SHAPE, float(index))
        self.taps.append(weakref.ref(tap))
        return StageOutput(torch.full(SHAPE, float(index)), {2: tap}, None)


class Teachers:
    """Stands for the teacher channel of a stage that waits for one microbatch."""

    delay = 1

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def after_forward(self, output: StageOutput, batch: MicroBatch) -> list[float]:
        return [float(batch.tokens.unique())]

    def teacher(self, arriving: list[float]) -> str:
        self.log.append(f"teacher {int(arriving[0])}")
        return f"teacher {int(arriving[0])}"


def run(link: Transport, log: list[str], count: int, *, teachers: Teachers | None = None) -> Stage:
    model = Stage(log)
    batches = [MicroBatch(*[torch.full((1, 2), index)] * 4) for index in range(count)]
    for batch, output, teacher in stage_outputs(StageContext(model, link, {}, None, teachers), batches):
        index = int(batch.tokens.unique())
        assert output.taps[2].unique() == index and output.hidden is None
        assert teacher == (None if teachers is None else f"teacher {index}")
        log.append(f"exits {index}")
        del output
    return model


def test_a_middle_stage_sends_before_its_exits_work(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = Transfers(monkeypatch)
    model = run(transport(), transfers.log, 3)
    assert [t.unique().tolist() for t in model.received] == [[10.0], [11.0], [12.0]], "each gets its own hidden state"
    assert [t.unique().tolist() for t in transfers.sent] == [[0.0], [1.0], [2.0]]
    assert transfers.log == [
        "receive 0", "receive 0 done",
        "receive 1", "layers 0", "send 0", "exits 0", "receive 1 done",
        "receive 2", "layers 1", "send 1", "exits 1", "receive 2 done",
        "layers 2", "send 0 done", "send 2", "exits 2",
    ]  # fmt: skip


def test_exits_with_a_teacher_work_when_it_has_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = Transfers(monkeypatch)
    model = run(transport(0), transfers.log, 3, teachers=Teachers(transfers.log))
    assert [line for line in transfers.log if "send" not in line] == [
        "layers 0", "layers 1", "teacher 0", "exits 0", "layers 2", "teacher 1", "exits 1", "teacher 2", "exits 2",
    ]  # fmt: skip
    assert model.alive == [0, 1, 1], "the taps of the microbatch that waits"


def test_no_earlier_tap_is_alive_while_the_layers_run(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = Transfers(monkeypatch)
    model = run(transport(), transfers.log, 3)
    assert model.alive == [0, 0, 0]


@pytest.mark.parametrize("step", ["tune", "evaluate"])
def test_a_step_keeps_no_tap_and_no_gradient_of_an_earlier_microbatch(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    transfers = Transfers(monkeypatch)
    model = Stage(transfers.log)
    model.exits = [SimpleNamespace(exit=SimpleNamespace(name="one"))]
    context = StageContext(model, transport(), {"one": CROSS_ENTROPY})
    batches = [MicroBatch(*[torch.full((1, 2), index)] * 4) for index in range(3)]

    def exit_work(context, head, batch, output, **_: object) -> SimpleNamespace:
        gradient = torch.zeros(SHAPE)
        model.taps.append(weakref.ref(gradient))
        return SimpleNamespace(sums=None, input_grads=(gradient,) if step == "tune" else (), argmax=None)

    monkeypatch.setattr(tuning_step, f"{step}_exit", exit_work)
    monkeypatch.setattr(tuning_step, "row_of", lambda sums, **_: torch.ones(1))
    monkeypatch.setattr(tuning_step, "empty_row", lambda device: torch.zeros(1))
    monkeypatch.setattr(tuning_step, "finish_gradients", lambda optimizers, counted, **_: counted["one"])
    rows: list[torch.Tensor] = []
    sums = SimpleNamespace(add_row=lambda name, row: rows.append(row))
    if step == "tune":
        options = {"optimizers": None, "sums": sums, "loss_weights": {"one": 1.0}}
        assert tuning_step.tune_global_batch(context, batches, **options) == 3.0
    else:
        tuning_step.evaluate_global_batch(context, batches, sums=sums, agreement=False)
        assert len(rows) == 3
    assert model.alive == [0, 0, 0]


def test_the_bound_holds_across_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the third send waits, though it belongs to the next global batch; nothing is drained between steps."""
    transfers = Transfers(monkeypatch)
    link = transport(0)
    run(link, transfers.log, 2)
    assert not [line for line in transfers.log if line.endswith("done")]
    run(link, transfers.log, 2)
    assert [line for line in transfers.log if "send" in line][2:] == ["send 0 done", "send 2", "send 1 done", "send 3"]
    link.drain()
    assert transfers.log[-2:] == ["send 2 done", "send 3 done"]
    link.drain()
    assert transfers.log[-2:] == ["send 2 done", "send 3 done"], "drained once"


def test_first_last_and_only_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    for stage, ranks, posted in (
        (0, RANKS, ["send 0", "send 1"]),
        (2, RANKS, ["receive 0", "receive 1"]),
        (0, [3], []),
    ):
        transfers = Transfers(monkeypatch)
        model = run(transport(stage, ranks), transfers.log, 2)
        assert [line for line in transfers.log if line[:4] in ("send", "rece") and "done" not in line] == posted
        assert (model.received == [None, None]) == (stage == 0)


def test_what_is_sent_is_kept_until_its_transfer_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage drops its hidden state; the transfer must not read freed memory."""
    transfers = Transfers(monkeypatch)
    link = transport(max_outstanding=1)
    first = weakref.ref(hidden := torch.ones(SHAPE))
    link.send(2, hidden)
    transfers.sent.clear()
    del hidden
    gc.collect()
    assert first() is not None
    link.send(2, torch.zeros(SHAPE))
    transfers.sent.clear()
    gc.collect()
    assert first() is None, "kept no longer than needed"


def test_a_view_is_sent_as_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = Transfers(monkeypatch)
    view = torch.arange(6.0).view(3, 2, 1).transpose(0, 1)
    transport().send(2, view)
    assert torch.equal(transfers.sent[0], view)


def test_a_failed_transfer_names_both_ends_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = Transfers(monkeypatch)
    link = transport()
    posted = link.expect(0, SHAPE, torch.float32, "cpu")
    link.send(2, torch.zeros(SHAPE))
    transfers.fails = True
    assert not link.is_broken
    other_end = r"\(rank {0}\), which has ended, .*; look at the end of rank {0}'s own output\. Start again"
    with pytest.raises(RuntimeError, match=r"^pipeline stage 1 \(rank 4\) waits for hidden states of stage 0 " + (
        other_end.format(3)
    )) as received:  # fmt: skip
        posted.wait()
    with pytest.raises(RuntimeError, match=r"^pipeline stage 1 \(rank 4\) sends hidden states to stage 2 " + (
        other_end.format(5)
    )):  # fmt: skip
        link.drain()
    assert str(received.value.__cause__) == "Connection closed by peer" and link.is_broken


@pytest.mark.parametrize("bound", [0, -1])
def test_a_bound_below_one_is_refused(monkeypatch: pytest.MonkeyPatch, bound: int) -> None:
    Transfers(monkeypatch)
    with pytest.raises(AssertionError, match="a send is outstanding while it runs"):
        transport(max_outstanding=bound)
