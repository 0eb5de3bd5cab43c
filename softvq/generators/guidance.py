"""Guidance: sampling with more of the condition than was asked for, at the times where that helps."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from softvq.errors import InputError
from softvq.generators.process import Predict, Prediction, Process, in_full

__all__ = ["Guidance", "Network", "guided"]

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`network(noisy, time, null)` with its conditions bound, for batches of n and 2n; `null` hides them, by sample."""
TOLERANCE = 1e-9  # so that a bound of 0.7 holds the time 1 - 0.3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Guidance:
    """How far predictions are moved away from those without the condition (arXiv:2207.12598)."""

    scale: float = 1.0
    """1 is no guidance, 0 no condition."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Noise fractions, from 0 (data) to 1 (noise), between which there is guidance (arXiv:2404.07724)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the scale comes from 1 at pure noise to `scale` at data."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if not 0 <= self.scale <= 1000:
            raise InputError(f"scale is {self.scale}, expected 0 to 1000")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise InputError(f"interval is {list(self.interval)}, expected two rising numbers from 0 to 1")

    def at(self, fraction: float) -> float:
        """Return the scale at a noise fraction.

            1 outside the interval, whose bounds belong to it; inside
            scale                                            constant
            1 + (scale - 1) (1 - fraction)                   linear
            1 + (scale - 1) (1 + cos(pi fraction)) / 2       cosine

        Args:
            fraction: From 0 (data) to 1 (noise).

        Returns:
            The scale.
        """
        low, high = self.interval
        if not low - TOLERANCE <= fraction <= high + TOLERANCE:
            return 1.0
        if self.schedule == "linear":
            return 1 + (self.scale - 1) * (1 - fraction)
        if self.schedule == "cosine":
            return 1 + (self.scale - 1) * (1 + math.cos(math.pi * fraction)) / 2
        return self.scale


def guided(network: Network, process: Process, guidance: Guidance, guide: Network | None = None) -> Predict:
    """Return predictions moved by `low + scale (high - low)`, where high is the network's output.

    Low is its output without the condition (arXiv:2207.12598), or that of a worse network, the guide, with the
    condition (autoguidance, arXiv:2406.02507). A learned variance is not moved. At a scale of 1 low is not computed, at
    0 high is not.

    Args:
        network: What is guided.
        process: Says what its output means.
        guidance: How much, and when.
        guide: What to lead away from, in place of the network without its condition.

    Returns:
        A function for the samplers.
    """

    def predict(noisy: Tensor, time: float, *, step_time: float | None = None) -> Prediction:
        scale = guidance.at(process.fraction(time if step_time is None else step_time))
        output = _output(network, guide, noisy, time, scale)
        return process.predict(output, noisy, time)

    return predict


def _output(network: Network, guide: Network | None, noisy: Tensor, time: float, scale: float) -> Tensor:
    batch, device = noisy.shape[0], noisy.device
    times = torch.full((2 * batch,), time, dtype=in_full(noisy[:0]).dtype, device=device)
    given = torch.zeros(batch, dtype=torch.bool, device=device)
    if scale == 1:
        return network(noisy, times[:batch], given)
    if scale == 0:
        return network(noisy, times[:batch], ~given) if guide is None else guide(noisy, times[:batch], given)
    if guide is None:
        both = in_full(network(torch.cat([noisy, noisy]), times, torch.cat([given, ~given])))
        high, low = both[:batch], both[batch:]
    else:
        high, low = (in_full(one(noisy, times[:batch], given)) for one in (network, guide))
    dim = noisy.shape[-1]
    moved = low[..., :dim] + scale * (high[..., :dim] - low[..., :dim])
    return torch.cat([moved, high[..., dim:]], dim=-1)
