"""Measuring time, operations and a device's limits."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from softvq.evaluation import timing
from softvq.evaluation.timing import Timing, copy_rate, count_flops, matrix_peak, time_in_turns

CPU = torch.device("cpu")


def clock(monkeypatch: pytest.MonkeyPatch, spent: list[float]) -> None:
    """Let each call seem to take what the list says."""
    stamps = itertools.chain.from_iterable((sum(spent[:i]), sum(spent[: i + 1])) for i in range(len(spent)))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(stamps))


def test_calls_take_turns_after_warming_up() -> None:
    made: list[str] = []
    time_in_turns([lambda: made.append("a"), lambda: made.append("b")], CPU, rounds=3, warmup=2)
    assert "".join(made) == "aabb" + "ababab"


def test_medians_and_quartiles(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, [1.0, 10.0, 5.0, 30.0, 2.0, 20.0, 3.0, 50.0, 4.0, 40.0])
    first, second = time_in_turns([int, int], CPU, rounds=5, warmup=0)
    assert (first.seconds, first.low, first.high, first.memory) == (3.0, 2.0, 4.0, 0)
    assert first.rounds == (1.0, 5.0, 2.0, 3.0, 4.0)
    assert (second.seconds, second.low, second.high) == (30.0, 20.0, 40.0)


def test_a_single_round_has_no_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, [2.0])
    (found,) = time_in_turns([int], CPU, rounds=1, warmup=0)
    assert (found.low, found.seconds, found.high) == (2.0, 2.0, 2.0)


def test_limits_are_operations_and_bytes_over_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed(calls, *_, **__):
        for call in calls:
            call()
        return [Timing(seconds=0.25, low=0.1, high=0.5, rounds=(0.25,), memory=0) for _ in calls]

    monkeypatch.setattr(timing, "MATRIX_SIDE", {"cpu": 8})
    monkeypatch.setattr(timing, "COPIED_BYTES", {"cpu": 100})
    monkeypatch.setattr(timing, "time_in_turns", fixed)
    assert matrix_peak(CPU, torch.bfloat16) == 2 * 8**3 / 0.25
    assert copy_rate(CPU) == 2 * 100 / 0.25


def test_operations_of_a_linear_layer_and_of_attention() -> None:
    def work(tokens: torch.Tensor) -> torch.Tensor:
        queries = torch.nn.Linear(6, 8)(tokens)
        return F.scaled_dot_product_attention(queries, queries, queries)

    assert count_flops(work, (2, 5, 6)) == 2 * (2 * 5 * 6 * 8) + 2 * (2 * 2 * 5 * 5 * 8)


@pytest.mark.gpu
def test_events_measure_a_gpus_time_and_memory() -> None:
    device = torch.device("cuda")
    small, large = (torch.randn(n, n, device=device) for n in (64, 8192))
    first, second = time_in_turns([lambda: small @ small, lambda: large @ large], device, rounds=5)
    assert 0 < first.seconds < second.seconds
    assert second.memory >= 3 * large.nbytes
