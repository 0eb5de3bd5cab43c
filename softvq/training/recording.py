"""CUDA graphs: the computation of a step's gradients, recorded once and replayed without the CPU in between."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Recorder"]

EAGER_STEPS = 2
"""Steps of a phase before it is recorded, in which kernels are chosen, compiled and loaded."""

Scalars = Mapping[str, Tensor | float]
Reports = tuple[dict[str, Tensor], dict[str, Tensor]]


@dataclasses.dataclass(slots=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    batch: Any
    scheduled: dict[str, Tensor]
    reports: Reports
    gradients: list[tuple[nn.Parameter, Tensor | None]]


class Recorder:
    """Computes gradients as a function does, but records what it launches and replays that for later batches.

    A replay reads its batch and scheduled numbers from the memory of the recording, so both are copied there; what else
    the function decides on the CPU must be a function of the key.

    Args:
        differentiate: Called with a batch and scheduled numbers, leaves gradients and returns reports. It may not wait
            for the device, nor draw from global generators.
        parameters: Whose gradients it leaves.
    """

    def __init__(self, differentiate: Callable[[Any, Scalars], Reports], parameters: Iterable[nn.Parameter]) -> None:
        self._differentiate = differentiate
        self._parameters = list(parameters)
        self._recordings: dict[Hashable, _Recording] = {}
        self._met: Counter[Hashable] = Counter()
        self._device = self._parameters[0].device
        self._stream = torch.cuda.Stream(self._device)

    def __call__(self, key: Hashable, batch: Any, scheduled: Mapping[str, float]) -> Reports:
        """Leave the gradients of a batch and return its reports, which the next call overwrites.

        Args:
            key: The phase; the shapes of the batch may not change within it.
            batch: A dataclass of tensors.
            scheduled: Numbers that may change from step to step.

        Returns:
            What the function returned.
        """
        with torch.cuda.device(self._device):  # a graph is of the current GPU, whatever the tensors' is
            return self._replayed(key, batch, scheduled)

    def _replayed(self, key: Hashable, batch: Any, scheduled: Mapping[str, float]) -> Reports:
        if key not in self._recordings:
            self._met[key] += 1
            if self._met[key] <= EAGER_STEPS:
                return self._on_the_side(batch, self._numbers(scheduled))
            self._recordings[key] = self._record(batch, self._numbers(scheduled))
        recording = self._recordings[key]
        for name, tensor in _tensors(recording.batch).items():
            tensor.copy_(getattr(batch, name), non_blocking=True)
        for name, tensor in recording.scheduled.items():
            tensor.fill_(scheduled[name])
        recording.graph.replay()
        for parameter, gradient in recording.gradients:
            parameter.grad = gradient
        return recording.reports

    def _on_the_side(self, batch: Any, scheduled: Scalars) -> Reports:
        # on a stream of its own, as the recording will be: autograd remembers where it ran
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            reports = self._differentiate(batch, scheduled)
        torch.cuda.current_stream().wait_stream(self._stream)
        return reports

    def _numbers(self, scheduled: Mapping[str, float]) -> dict[str, Tensor]:
        # as tensors from the first step on: compiled code would be made anew for them while recording, which cannot be
        device = self._parameters[0].device
        return {name: torch.full((), value, device=device) for name, value in scheduled.items()}

    def _record(self, batch: Any, scheduled: dict[str, Tensor]) -> _Recording:
        for parameter in self._parameters:
            parameter.grad = None
        batch = dataclasses.replace(batch, **{name: tensor.clone() for name, tensor in _tensors(batch).items()})
        graph = torch.cuda.CUDAGraph()
        # recordings are replayed one at a time, so that all may share their memory; threads that load data go on
        pool = next((recording.graph.pool() for recording in self._recordings.values()), None)
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            reports = self._differentiate(batch, scheduled)
        gradients = [(parameter, parameter.grad) for parameter in self._parameters]
        return _Recording(graph=graph, batch=batch, scheduled=scheduled, reports=reports, gradients=gradients)


def _tensors(batch: Any) -> dict[str, Tensor]:
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: value for name, value in fields.items() if isinstance(value, Tensor)}
