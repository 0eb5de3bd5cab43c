"""How long something takes, how much it computes, and what the device could do at most, measured in the same run."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Timing", "copy_rate", "count_flops", "matrix_peak", "time_in_turns"]

MATRIX_SIDE = {"cuda": 8192, "cpu": 1024}
COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
PEAK_ROUNDS = 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """What the calls of one thing took."""

    seconds: float
    """Median of a call."""
    low: float
    """Lower quartile."""
    high: float
    """Upper quartile."""
    rounds: tuple[float, ...]
    """Of each call, in order."""
    memory: int
    """Most bytes of tensors at once on a GPU, those of the networks among them; 0 elsewhere."""


def time_in_turns(
    calls: Sequence[Callable[[], object]], device: torch.device, *, rounds: int = 20, warmup: int = 3
) -> list[Timing]:
    """Time several things, a call of each in turn, so that a slow moment of the machine falls on all of them.

    On a GPU events on its stream are compared, and nothing waits for it before the last round is launched; on the CPU
    the clock is.

    Args:
        calls: What to time; their results are thrown away.
        device: Where they run.
        rounds: How often each counts, from 1.
        warmup: How often each is called before: to compile, to choose kernels, to fill caches.

    Returns:
        One timing for each, in order.
    """
    assert rounds >= 1, f"rounds is {rounds}"
    memory = []
    for call in calls:
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(warmup):
            call()
        memory.append(torch.cuda.max_memory_allocated(device) if on_gpu else 0)
    spent = _by_events(calls, device, rounds) if device.type == "cuda" else _by_clock(calls, rounds)
    return [_timing(seconds, used) for seconds, used in zip(spent, memory, strict=True)]


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of one large product of random square matrices."""
    side = MATRIX_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    (timing,) = time_in_turns([lambda: torch.mm(left, right, out=out)], device, rounds=PEAK_ROUNDS)
    return 2 * side**3 / timing.seconds


def copy_rate(device: torch.device) -> float:
    """Return the bytes a second of a large copy within the device's memory, read and written ones together."""
    source = torch.randint(0, 256, (COPIED_BYTES[device.type],), dtype=torch.uint8, device=device)
    out = torch.empty_like(source)
    (timing,) = time_in_turns([lambda: out.copy_(source)], device, rounds=PEAK_ROUNDS)
    return 2 * len(source) / timing.seconds


def count_flops(work: Callable[..., object], *shapes: tuple[int, ...]) -> int:
    """Count the floating-point operations of matrix products and convolutions, a product with its sum as two.

    Tensors have a shape but no numbers, so that a large model takes no longer than a small one.

    Args:
        work: Called with one float32 tensor on the CPU for each shape; not compiled.
        *shapes: Of its arguments.

    Returns:
        A number of operations.
    """
    counter = FlopCounterMode(display=False)
    with (
        torch.inference_mode(),
        FakeTensorMode(allow_non_fake_inputs=True),
        sdpa_kernel(SDPBackend.MATH),  # the others are not counted on every machine
        counter,
    ):
        work(*(torch.zeros(shape) for shape in shapes))
    return counter.get_total_flops()


def _by_events(calls: Sequence[Callable[[], object]], device: torch.device, rounds: int) -> list[list[float]]:
    pairs: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
    with torch.cuda.device(device):
        for _ in range(rounds):
            for call, seen in zip(calls, pairs, strict=True):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                seen.append((start, end))
        torch.cuda.synchronize(device)
    return [[start.elapsed_time(end) / 1e3 for start, end in seen] for seen in pairs]


def _by_clock(calls: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    spent: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, seen in zip(calls, spent, strict=True):
            started = time.perf_counter()
            call()
            seen.append(time.perf_counter() - started)
    return spent


def _timing(seconds: list[float], memory: int) -> Timing:
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return Timing(seconds=statistics.median(seconds), low=low, high=high, rounds=tuple(seconds), memory=memory)
