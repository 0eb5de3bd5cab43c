"""CUDA graphs for inference: work recorded once for each shape and replayed without the CPU in between."""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

__all__ = ["Captured"]

WARMUPS = 3
"""Calls before a recording, in which kernels are compiled, chosen and loaded, and memory is found."""


class Captured:
    """A function of tensors on one GPU, recorded at the first call with each combination of shapes.

    Not for two threads at once: the recordings share their memory.

    Args:
        function: Launches the same work whenever the shapes and its other arguments are the same, without looking at a
            number in a tensor; returns one tensor.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __call__(self, *inputs: Tensor | Hashable) -> Tensor:
        """Return what the function would; the result is the caller's to keep."""
        tensors = [one for one in inputs if isinstance(one, Tensor)]
        key = tuple((tuple(one.shape), one.dtype) if isinstance(one, Tensor) else one for one in inputs)
        with torch.inference_mode(), torch.cuda.device(tensors[0].device):
            if key not in self._recorded:
                self._recorded[key] = self._record(inputs)
            graph, own, output = self._recorded[key]
            torch._foreach_copy_(own, tensors)
            graph.replay()
            return output.clone()

    def _record(self, inputs: tuple[Tensor | Hashable, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        own = [one.clone() if isinstance(one, Tensor) else one for one in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUPS):
                self._function(*own)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other, _, _ in self._recorded.values()), None)
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = self._function(*own)
        return graph, [one for one in own if isinstance(one, Tensor)], output
