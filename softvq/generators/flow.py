"""Flows from data at time 0 to noise at time 1, whose networks learn the velocity (SiT)."""

import dataclasses
import math
from typing import Literal, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from softvq.errors import InputError
from softvq.generators.process import Prediction, in_full, over_samples
from softvq.randomness import normal, uniform

__all__ = ["Flow", "FlowConfig", "shifted"]

NEAREST = 2.0**-24  # how close to 0 and 1 training times come: float32 holds both bounds
TimeT = TypeVar("TimeT", float, Tensor)
SMALL = 1e-2  # root mean square of velocities below which their direction is not trusted


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FlowConfig:
    """The path from data to noise, and which of its times are trained."""

    kind: Literal["flow"] = "flow"
    path: Literal["linear", "cosine"] = "linear"
    """How data fade and noise grows: in a line, or along a quarter of a circle."""
    times: Literal["uniform", "logit_normal", "lognormal"] = "logit_normal"
    """Distribution of training times; lognormal is that of the ratio of noise to data, whatever the path."""
    time_mean: float = 0.0
    """Mean of the normal inside the last two: of the logit of the time, or of the log of the ratio."""
    time_std: float = 1.0
    """Deviation of that normal."""
    time_shift: float = 1.0
    """Above 1, training times move towards noise, as suits latents with more numbers."""
    cosine_weight: float = 0.0
    """Weight of 1 - cos(velocity, target), which trains directions apart from lengths."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if not -20 <= self.time_mean <= 20:
            raise InputError(f"time_mean is {self.time_mean}, expected -20 to 20")
        if not 0 < self.time_std <= 20:
            raise InputError(f"time_std is {self.time_std}, expected above 0 and at most 20")
        if not 0 < self.time_shift <= 1000:
            raise InputError(f"time_shift is {self.time_shift}, expected above 0 and at most 1000")
        if not 0 <= self.cosine_weight <= 1000:
            raise InputError(f"cosine_weight is {self.cosine_weight}, expected 0 to 1000")


class Flow:
    """A stochastic interpolant between data and noise (arXiv:2401.08740, arXiv:2209.03003); a `Process`.

        noisy = alpha clean + sigma noise
        velocity = alpha' clean + sigma' noise        what the network predicts
        alpha = 1 - t, sigma = t                      linear
        alpha = cos(pi t / 2), sigma = sin(pi t / 2)  cosine

    Args:
        config: The path, and which times are trained.
    """

    def __init__(self, config: FlowConfig) -> None:
        self.config = config

    def output_dim(self, dim: int) -> int:
        """Return `dim`: a velocity has as many numbers as its token."""
        return dim

    def draw_times(self, keys: Int64[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Draw training times, always in float32 and inside (0, 1).

            t = u                                  uniform, u from (0, 1)
            t = 1 / (1 + exp(-(mean + std n)))     logit-normal (arXiv:2403.03206, section 3.1), n standard normal
            sigma(t) / alpha(t) = exp(mean + std n)  lognormal; on the linear path this is the logit-normal

        Args:
            keys: One for each sample, on the device where the times are wanted.

        Returns:
            Times, shifted as `shifted` does.
        """
        config = self.config
        if config.times == "uniform":
            times = uniform(keys)
        else:
            log_ratio = config.time_mean + config.time_std * normal(keys)
            curved = config.times == "lognormal" and config.path == "cosine"
            times = log_ratio.exp().atan() * (2 / math.pi) if curved else log_ratio.sigmoid()
        return shifted(times, config.time_shift).clamp(NEAREST, 1 - NEAREST)

    def noisy(
        self,
        clean: Float[Tensor, "batch *token dim"],
        noise: Float[Tensor, "batch *token dim"],
        time: Float[Tensor, " batch"],
    ) -> Float[Tensor, "batch *token dim"]:
        """Return `alpha clean + sigma noise`.

        Args:
            clean: Latents of data.
            noise: Standard normal.
            time: Of each sample.

        Returns:
            In float32, or in float64 if the data are.
        """
        (alpha, sigma), _ = self._at(over_samples(in_full(time), clean))
        return alpha * in_full(clean) + sigma * in_full(noise)

    def losses(
        self,
        output: Float[Tensor, "batch *token dim"],
        clean: Float[Tensor, "batch *token dim"],
        noise: Float[Tensor, "batch *token dim"],
        time: Float[Tensor, " batch"],
    ) -> dict[str, Float[Tensor, "batch *token"]]:
        """Return the losses of predicted velocities.

            mse = mean (output - velocity)^2
            cosine = cosine_weight (1 - cos(output, velocity))

        Args:
            output: Of the network.
            clean: Latents of data.
            noise: What was mixed with them.
            time: Of each sample.

        Returns:
            `mse`, and `cosine` if it has a weight; means over the last dimension, in float32.
        """
        _, (alpha_rate, sigma_rate) = self._at(over_samples(in_full(time), clean))
        target = alpha_rate * in_full(clean) + sigma_rate * in_full(noise)
        output = in_full(output)
        losses = {"mse": (output - target).square().mean(dim=-1)}
        if self.config.cosine_weight:
            # networks start with an output of zero, near which the gradient of a bare cosine has no bound
            sizes = [(x.square().mean(dim=-1) + SMALL**2).sqrt() for x in (output, target)]
            cosine = (output * target).mean(dim=-1) / (sizes[0] * sizes[1])
            losses["cosine"] = self.config.cosine_weight * (1 - cosine)
        return losses

    def network_time(self, time: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the time itself."""
        return time

    def predict(
        self, output: Float[Tensor, "batch *token dim"], noisy: Float[Tensor, "batch *token dim"], time: float
    ) -> Prediction:
        """Solve `noisy` and `velocity` for data and noise.

        Args:
            output: The velocity, as the network gives it.
            noisy: What it was given.
            time: Of all samples.

        Returns:
            Data and noise with `noisy = alpha clean + sigma noise`.
        """
        alpha, sigma = self.levels(time)
        alpha_rate, sigma_rate = self.rates(time)
        noisy, velocity = in_full(noisy), in_full(output)
        size = alpha * sigma_rate - alpha_rate * sigma  # 1 on the line, pi / 2 on the circle: never 0
        clean = (sigma_rate / size) * noisy - (sigma / size) * velocity
        return Prediction(clean, (alpha / size) * velocity - (alpha_rate / size) * noisy)

    def velocity(self, prediction: Prediction, time: float) -> Float[Tensor, "batch *token dim"]:
        """Return the velocity `alpha' clean + sigma' noise` that belongs to a prediction at a time."""
        alpha_rate, sigma_rate = self.rates(time)
        return alpha_rate * prediction.clean + sigma_rate * prediction.noise

    def score(self, prediction: Prediction, time: float) -> Float[Tensor, "batch *token dim"]:
        """Return the gradient of the log density, `-noise / sigma`, at a time above 0 (arXiv:2401.08740)."""
        return prediction.noise * (-1 / self.levels(time)[1])

    def levels(self, time: float) -> tuple[float, float]:
        """Return alpha and sigma, which at times 0 and 1 are exactly 0 and 1."""
        if self.config.path == "linear":
            return 1 - time, time
        return math.sin(math.pi / 2 * (1 - time)), math.sin(math.pi / 2 * time)

    def rates(self, time: float) -> tuple[float, float]:
        """Return how fast alpha and sigma grow with time."""
        if self.config.path == "linear":
            return -1.0, 1.0
        alpha, sigma = self.levels(time)
        return -math.pi / 2 * sigma, math.pi / 2 * alpha

    def fraction(self, time: float) -> float:
        """Return the time itself, which runs from 0 to 1."""
        return time

    def time_at(self, fraction: float) -> float:
        """Return the fraction itself."""
        return fraction

    def grid(self, steps: int, *, shift: float = 1.0) -> tuple[float, ...]:
        """Return times from 1 to 0, evenly spread before they are shifted.

        Args:
            steps: One less than there are times.
            shift: See `shifted`.

        Returns:
            `steps + 1` falling times.

        Raises:
            InputError: If there is no step, or the shift is not positive.
        """
        if steps < 1:
            raise InputError(f"steps is {steps}, expected at least 1")
        if not 0 < shift < math.inf:
            raise InputError(f"shift is {shift}, expected a positive number")
        return tuple(shifted(1 - step / steps, shift) for step in range(steps + 1))

    def _at(self, time: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return levels and rates for times of any shape."""
        if self.config.path == "linear":
            ones = torch.ones_like(time)
            return (1 - time, time), (-ones, ones)
        alpha, sigma = torch.cos(math.pi / 2 * time), torch.sin(math.pi / 2 * time)
        return (alpha, sigma), (-math.pi / 2 * sigma, math.pi / 2 * alpha)


def shifted(time: TimeT, shift: float) -> TimeT:
    """Move times towards noise: `shift t / (1 + (shift - 1) t)` (arXiv:2403.03206, section 5.3).

    Args:
        time: From 0 to 1; both ends stay where they are.
        shift: 1 changes nothing, below 1 moves towards data.

    Returns:
        The moved times.
    """
    return time if shift == 1 else shift * time / (1 + (shift - 1) * time)
