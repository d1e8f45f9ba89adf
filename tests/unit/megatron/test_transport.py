# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The order of receive, layers, send and exits' work on one stage, and the bound on outstanding sends.

Transfers are scripted: a test says what has been posted and waited for, no process group is needed.
"""

from __future__ import annotations

import pytest
import torch

from nemo_ee.megatron.pipeline import transport as tuning_schedule
from nemo_ee.megatron.pipeline.transport import StageLink, run_stage

SHAPE = (2, 1, 3)


class Transfers:
    """Stands for torch.distributed: records every post and every wait, and fills received buffers on wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.sent: list[torch.Tensor] = []
        self.received = 0
        monkeypatch.setattr(tuning_schedule, "irecv", self._irecv)
        monkeypatch.setattr(tuning_schedule, "isend", self._isend)

    def _work(self, name: str, on_wait=lambda: None):
        transfers = self

        class Work:
            def wait(self) -> None:
                transfers.log.append(f"{name} done")
                on_wait()

        return Work()

    def _irecv(self, buffer: torch.Tensor, src: int, group: object):
        index, self.received = self.received, self.received + 1
        self.log.append(f"receive {index}")
        assert (src, group) == (3, "group")
        return self._work(f"receive {index}", lambda: buffer.fill_(10.0 + index))

    def _isend(self, tensor: torch.Tensor, dst: int, group: object):
        index = len(self.sent)
        self.sent.append(tensor)
        self.log.append(f"send {index}")
        assert (dst, group) == (5, "group") and tensor.is_contiguous()
        return self._work(f"send {index}")


def _run(link: StageLink, log: list[str], count: int) -> list[torch.Tensor | None]:
    seen: list[torch.Tensor | None] = []

    def forward(index: int, received: torch.Tensor | None) -> torch.Tensor:
        log.append(f"layers {index}")
        seen.append(None if received is None else received.clone())
        return torch.full(SHAPE, float(index))

    run_stage(
        link, num_microbatches=count, shape=SHAPE, dtype=torch.float32, device=torch.device("cpu"),
        forward=forward, work=lambda index: log.append(f"exits {index}"),
    )  # fmt: skip
    return seen


def test_a_middle_stage_sends_before_its_exits_work(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = Transfers(monkeypatch)
    link = StageLink("group", 3, 5, max_in_flight=2)
    seen = _run(link, transfers.log, 3)
    assert [t.unique().tolist() for t in seen] == [[10.0], [11.0], [12.0]], "each microbatch gets its own hidden state"
    assert [t.unique().tolist() for t in transfers.sent] == [[0.0], [1.0], [2.0]]
    assert transfers.log == [
        "receive 0", "receive 0 done",
        "receive 1", "layers 0", "send 0", "exits 0", "receive 1 done",
        "receive 2", "layers 1", "send 1", "exits 1", "receive 2 done",
        "layers 2", "send 0 done", "send 2", "exits 2",
    ]  # fmt: skip


def test_the_bound_holds_across_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the third send waits, though it belongs to the next global batch; nothing is drained between steps."""
    transfers = Transfers(monkeypatch)
    link = StageLink("group", None, 5, max_in_flight=2)
    _run(link, transfers.log, 2)
    assert not [line for line in transfers.log if line.endswith("done")]
    _run(link, transfers.log, 2)
    assert [line for line in transfers.log if "send" in line][2:] == ["send 0 done", "send 2", "send 1 done", "send 3"]
    link.drain()
    assert transfers.log[-2:] == ["send 2 done", "send 3 done"]
    link.drain()
    assert transfers.log[-2:] == ["send 2 done", "send 3 done"], "drained once"


def test_first_last_and_only_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    for link, posted in (
        (StageLink("group", None, 5), ["send 0", "send 1"]),
        (StageLink("group", 3, None), ["receive 0", "receive 1"]),
        (StageLink(None, None, None), []),
    ):
        transfers = Transfers(monkeypatch)
        seen = _run(link, transfers.log, 2)
        assert [line for line in transfers.log if line[:4] in ("send", "rece") and "done" not in line] == posted
        assert (seen == [None, None]) == (link.previous_rank is None)


def test_what_is_sent_is_kept_until_its_transfer_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage drops its hidden state; the transfer must not read freed memory."""
    import gc
    import weakref

    transfers = Transfers(monkeypatch)
    link = StageLink("group", None, 5, max_in_flight=1)
    first = weakref.ref(hidden := torch.ones(SHAPE))
    link.send(hidden)
    transfers.sent.clear()
    del hidden
    gc.collect()
    assert first() is not None
    link.send(torch.zeros(SHAPE))
    transfers.sent.clear()
    gc.collect()
    assert first() is None, "kept no longer than needed"


def test_a_view_is_sent_as_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = Transfers(monkeypatch)
    view = torch.arange(6.0).view(3, 2, 1).transpose(0, 1)
    StageLink("group", None, 5).send(view)
    assert torch.equal(transfers.sent[0], view)


@pytest.mark.parametrize("bound", [0, -1])
def test_a_bound_below_one_is_refused(bound: int) -> None:
    with pytest.raises(ValueError, match=rf"max_in_flight={bound}: at least one microbatch.*use 2 or more"):
        StageLink(None, None, None, max_in_flight=bound)
