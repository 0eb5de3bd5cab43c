"""Joining other ranks, what all agree on, and the signals that stop them; a single process needs no setup."""

import datetime
import os
import re
import signal
import threading
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from softvq.errors import InputError
from softvq.ranks import mean_over_ranks, rank, world_size

__all__ = [
    "GO_ON",
    "SAVE",
    "STOP",
    "StopSignals",
    "any_rank",
    "choose_device",
    "join",
    "largest",
    "leave",
    "lost_another",
    "max_over_ranks",
    "may_restart",
    "reduce_mean",
    "wait_for_all",
    "who_is_missing",
]

GO_ON, SAVE, STOP = range(3)
"""What a signal may wish of a run; the largest wish of any rank counts."""
PATIENCE = datetime.timedelta(minutes=30)
"""How long a process waits for the others, which sampling on the first one must not take."""
ROLL_CALL = datetime.timedelta(seconds=2)
"""How much later than another a process may notice that one is missing."""
_store: list[dist.Store] = []
"""Where the processes that joined find each other."""


def choose_device(name: str) -> torch.device:
    """Return the device of this process.

    Args:
        name: A torch device such as `cpu` or `cuda:1`, or `auto`: CUDA where there is one, the CPU elsewhere.

    Returns:
        The device; of `cuda`, the one that belongs to this process under `torchrun`.

    Raises:
        InputError: If torch does not know the device, or this machine lacks it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"device is {name!r}, expected auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise InputError(f"device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices here")
        device = torch.device("cuda", index)
    return device


def join(device: torch.device) -> None:
    """Meet the other ranks if `torchrun` started this process; do nothing otherwise."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # gloo carries what the host decides (signals, barriers), so that nothing of it waits for the GPU
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, number, count = next(dist.rendezvous("env://"))
    # the agent of torchrun keeps its store over restarts, and in it the addresses of processes that are no more
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    _store[:] = [dist.PrefixStore(f"attempt-{attempt}", store)]
    dist.init_process_group(backend, store=_store[0], rank=number, world_size=count, timeout=PATIENCE)


def may_restart() -> bool:
    """Return whether `torchrun --max-restarts` starts this process again if it ends badly."""
    return os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def lost_another(error: RuntimeError) -> bool:
    """Return whether an error says that another rank is no more; gloo has no class of its own for it."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error).lower())


def who_is_missing() -> str:
    """Return what to say of a lost connection, naming the processes that did not notice it within `ROLL_CALL`.

    Whoever waits in vain calls this, so those who do not have ended or are stuck.
    """
    count = world_size()
    try:
        _store[0].set(f"waits-{rank()}", "")
        missing = [other for other in range(count) if not _answers(other)]
    except (RuntimeError, IndexError):  # the first process keeps the store
        missing = [0]
    if not missing:
        return "the connection to another process of this training broke; see what they said, and resume"
    names = ", ".join(map(str, missing))
    return (
        f"process {names} of 0 to {count - 1} ended, or did not answer for {PATIENCE} and is stuck; "
        "see what it said, end it, and resume"
    )


def _answers(other: int) -> bool:
    try:
        _store[0].wait([f"waits-{other}"], ROLL_CALL)
    except dist.DistError:
        return False
    return True


def leave() -> None:
    """Part from the other ranks, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Return when every rank has come here."""
    any_rank(False)


def any_rank(flag: bool) -> bool:
    """Return whether `flag` is true on any rank."""
    return bool(largest(int(flag)))


def largest(number: int) -> int:
    """Return the largest small number of any rank, on the host."""
    if world_size() == 1:
        return number
    shared = torch.tensor(float(number))
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def max_over_ranks(value: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the largest value of any rank, on the device, without a host sync."""
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def reduce_mean(report: Mapping[str, Tensor]) -> dict[str, float]:
    """Average scalars over the ranks and bring them to the host, in one transfer.

    Args:
        report: Scalars on one device, the same names on every rank.

    Returns:
        Python floats that hold the float32 values exactly.
    """
    if not report:
        return {}
    values = mean_over_ranks(torch.stack([value.detach().float() for value in report.values()]))
    return dict(zip(report, values.tolist(), strict=True))


class StopSignals:
    """Within it, SIGINT, SIGTERM and SIGHUP only set `name`, and SIGUSR1 only asks for a checkpoint.

    The second signal to stop ends the process at once. A signal that is ignored, as under `nohup`, stays ignored.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.checkpoint = False  # apart from the name, so that forgetting the one never forgets the other
        self._before: dict[int, Any] = {}

    @property
    def wish(self) -> int:
        """What is wished: `GO_ON`, `SAVE` or `STOP`."""
        return STOP if self.name else SAVE if self.checkpoint else GO_ON

    @property
    def by(self) -> str:
        """What to call the signal in a sentence."""
        return self.name or "a signal to another process"

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.checkpoint = True
            return
        if self.name is not None:
            os._exit(128 + number)
        self.name = signal.Signals(number).name
