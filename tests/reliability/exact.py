"""Training in float64 throughout, where rounding is too small to be taken for anything else.

The package computes in float32. Here a process that is a fork, and ends soon, is told otherwise.
"""

import dataclasses
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from softvq.training.trainer import Trainer

__all__ = ["compute_in_float64", "nudge_weights"]


class _Torch(types.ModuleType):
    """The module torch, in which float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def compute_in_float64() -> None:
    """Let everything in this process that softvq computes, keeps and sends be float64, from images to the log."""
    torch.set_default_dtype(torch.float64)
    original, fit = Tensor.float, Trainer.fit

    def as_double(self: Tensor) -> Tensor:
        # truth values are for a kernel of AdamW that asks for float32
        return original(self) if self.dtype == torch.bool else self.double()

    def fit_in_double(self: Trainer, batches: Callable[[int, int], Iterator[Any]]) -> None:
        assert all(weight.dtype == torch.float64 for weight in self.task.parameters())
        fit(self, lambda start, count: map(_doubled, batches(start, count)))

    Tensor.float = as_double
    Trainer.fit = fit_in_double
    for name, module in list(sys.modules.items()):
        if name.startswith("softvq.") and vars(module).get("torch") is torch:
            module.torch = _Torch("torch")


def nudge_weights() -> None:
    """Let trainings of this process begin with each weight of the model at the next number that its type has."""
    fit = Trainer.fit

    def fit_nudged(self: Trainer, batches: Callable[[int, int], Iterator[Any]]) -> None:
        with torch.no_grad():
            for weight in self.task.model.parameters():
                weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))
        fit(self, batches)

    Trainer.fit = fit_nudged


def _doubled(batch: Any) -> Any:
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    floats = {name: value for name, value in fields.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return dataclasses.replace(batch, **{name: value.double() for name, value in floats.items()})
