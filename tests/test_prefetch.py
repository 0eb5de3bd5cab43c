import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from softvq.errors import RunError
from softvq.training import prefetch
from softvq.training.prefetch import on_device

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Batch:
    images: Tensor
    skipped: list[str]


def stream(count: int, taken: list[int], fails: bool = False) -> Iterator[Batch]:
    for number in range(count):
        taken.append(number)
        yield Batch(torch.full((2, 3), float(number)), [str(number)])
    if fails:
        raise RunError("too many")


class Nothing:
    """Stands for a stream or an event where there is no GPU."""

    def __init__(self, *_: object) -> None:
        pass

    def record(self, _: object) -> None:
        pass

    def wait_event(self, _: object) -> None:
        pass


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Stream", "Event", "current_stream"):
        monkeypatch.setattr(prefetch.torch.cuda, name, Nothing)
    monkeypatch.setattr(prefetch.torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)


def test_on_the_cpu_nothing_is_done() -> None:
    batches = stream(3, [])
    assert on_device(batches, CPU) is batches


@pytest.mark.parametrize("count", [0, 1, 5])
def test_every_batch_comes_once_and_one_is_under_way(no_gpu: None, count: int) -> None:
    taken: list[int] = []
    ahead = prefetch._ahead(stream(count, taken), CPU)
    for number, batch in enumerate(ahead):
        assert (batch.images.unique().item(), batch.skipped) == (number, [str(number)])
        assert taken == list(range(min(number + 2, count)))
    assert len(taken) == count


def test_an_error_comes_in_its_turn(no_gpu: None) -> None:
    ahead: Iterator[Any] = prefetch._ahead(stream(2, [], fails=True), CPU)
    assert [next(ahead).skipped, next(ahead).skipped] == [["0"], ["1"]]
    with pytest.raises(RunError, match="too many"):
        next(ahead)


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_of_the_cpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    expected = [torch.randn(256, 3, 64, 64) for _ in range(20)]
    found = [
        (batch.images.sum((1, 2, 3)), batch.images.device)  # used at once, before the next one is asked for
        for batch in on_device(iter([Batch(each.pin_memory(), []) for each in expected]), device)
    ]
    for (sums, where), images in zip(found, expected, strict=True):
        assert where == device
        torch.testing.assert_close(sums.cpu(), images.to(device).sum((1, 2, 3)).cpu(), rtol=0, atol=0)
