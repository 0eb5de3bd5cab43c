"""Diffusions in discrete timesteps, whose networks learn the noise and perhaps the variance (DiT)."""

import dataclasses
import math
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from softvq.errors import InputError
from softvq.generators.process import Prediction, in_full, over_samples
from softvq.randomness import uniform

__all__ = ["Diffusion", "DiffusionConfig"]

CLEAN = -1.0  # the time of data, one below the first timestep
HIGHEST_BETA = 0.999


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionConfig:
    """The noise schedule, and what the network predicts."""

    kind: Literal["diffusion"] = "diffusion"
    schedule: Literal["linear", "cosine"] = "linear"
    """Betas that rise in a line (arXiv:2006.11239), or signal that falls like a squared cosine (arXiv:2102.09672)."""
    predicts: Literal["epsilon", "clean", "velocity"] = "epsilon"
    """What the first `dim` channels of the output are; velocity is alpha noise - sigma clean (arXiv:2202.00512)."""
    learned_variance: bool = True
    """Whether `dim` further channels say where the variance lies between its two bounds (arXiv:2102.09672)."""
    num_timesteps: int = 1000
    """Timesteps from data to noise."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if not 2 <= self.num_timesteps <= 100_000:
            raise InputError(f"num_timesteps is {self.num_timesteps}, expected 2 to 100000")


class Diffusion:
    """A variance-preserving Markov chain from data to noise (arXiv:2006.11239, arXiv:2102.09672); a `Process`.

        noisy = alpha clean + sigma noise,  alpha_t^2 = prod_(i <= t) (1 - beta_i),  sigma_t^2 = 1 - alpha_t^2

    Args:
        config: Schedule and parametrisation.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.betas = _betas(config)
        self._levels = _cumulative(self.betas)
        self._tables: dict[torch.device, Tensor] = {}

    def output_dim(self, dim: int) -> int:
        """Return `dim`, or twice as many if the variance is learned."""
        return 2 * dim if self.config.learned_variance else dim

    def draw_times(self, keys: Int64[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Draw timesteps, all equally likely, as whole numbers in float32."""
        count = self.config.num_timesteps
        return (uniform(keys) * count).floor().clamp(max=count - 1)

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
            time: Timestep of each sample.

        Returns:
            In float32, or in float64 if the data are.
        """
        alpha, sigma = self._at(time, clean)[:2]
        return alpha * in_full(clean) + sigma * in_full(noise)

    def losses(
        self,
        output: Float[Tensor, "batch *token outputdim"],
        clean: Float[Tensor, "batch *token dim"],
        noise: Float[Tensor, "batch *token dim"],
        time: Float[Tensor, " batch"],
    ) -> dict[str, Float[Tensor, "batch *token"]]:
        """Return the hybrid objective of arXiv:2102.09672 (section 3.1).

            mse = mean (output - target)^2
            vlb = num_timesteps / 1000 KL(q(x_s | x_t, x_0) || p(x_s | x_t)) / ln 2     in bits per dimension

        The mean of p is detached, so that `vlb` trains the variance alone. The last step, to data, has the negative log
        likelihood under p in its place: latents are continuous numbers, so it is that of the Gaussian, without bins.

        Args:
            output: Of the network.
            clean: Latents of data.
            noise: What was mixed with them.
            time: Timestep of each sample.

        Returns:
            `mse`, and `vlb` if the variance is learned; means over the last dimension, in float32.
        """
        alpha, sigma, weight, log_posterior, log_beta = self._at(time, clean)
        clean, noise = in_full(clean), in_full(noise)
        value, fraction = self._parts(output)
        targets = {"epsilon": noise, "clean": clean, "velocity": alpha * noise - sigma * clean}
        losses = {"mse": (value - targets[self.config.predicts]).square().mean(dim=-1)}
        if fraction is not None:
            found, _ = self._solved(value.detach(), alpha * clean + sigma * noise, alpha, sigma)
            first = over_samples(time, clean).eq(0)
            nats = _bound(weight * (clean - found), fraction, log_posterior, log_beta, first).mean(dim=-1)
            losses["vlb"] = nats * (self.config.num_timesteps / 1000 / math.log(2))
        return losses

    def network_time(self, time: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the timestep itself."""
        return time

    def predict(
        self, output: Float[Tensor, "batch *token outputdim"], noisy: Float[Tensor, "batch *token dim"], time: float
    ) -> Prediction:
        """Solve `noisy` and the network's output for data and noise.

        Args:
            output: As the network gives it.
            noisy: What it was given.
            time: Timestep of all samples.

        Returns:
            Data and noise with `noisy = alpha clean + sigma noise`, and the learned variance if there is one.
        """
        value, fraction = self._parts(output)
        return Prediction(*self._solved(value, in_full(noisy), *self.levels(time)), fraction)

    def levels(self, time: float) -> tuple[float, float]:
        """Return alpha and sigma at a timestep; 1 and 0 at time -1."""
        return self._levels[round(time) + 1]

    def fraction(self, time: float) -> float:
        """Return 1 for the last timestep, falling evenly to 0 for data."""
        return (time + 1) / self.config.num_timesteps

    def time_at(self, fraction: float) -> float:
        """Return the nearest timestep; -1 for 0."""
        return float(round(fraction * self.config.num_timesteps) - 1)

    def grid(self, steps: int, *, shift: float = 1.0) -> tuple[float, ...]:
        """Return timesteps spread evenly from the last to the first, and -1 after them.

        Args:
            steps: How many timesteps; one alone is the last.
            shift: 1; only a flow's times can be shifted.

        Returns:
            `steps + 1` falling times.

        Raises:
            InputError: If there are fewer than one or more than all of the timesteps, or they are to be shifted.
        """
        last = self.config.num_timesteps - 1
        if not 1 <= steps <= last + 1:
            raise InputError(f"steps is {steps}, expected 1 to the {last + 1} timesteps of this diffusion")
        if shift != 1:
            raise InputError(f"shift is {shift}, expected 1: the timesteps of a diffusion cannot be shifted")
        if steps == 1:
            return (float(last), CLEAN)
        return (*(float(round(step * last / (steps - 1))) for step in range(steps - 1, -1, -1)), CLEAN)

    def _parts(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        output = in_full(output)
        if not self.config.learned_variance:
            return output, None
        value, position = output.chunk(2, dim=-1)
        return value, (position + 1) / 2  # -1 to 1 in the output

    def _solved(
        self, value: Tensor, noisy: Tensor, alpha: Tensor | float, sigma: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Return data and noise from what the network predicts."""
        if self.config.predicts == "epsilon":
            return (noisy - sigma * value) / alpha, value
        if self.config.predicts == "clean":
            return value, (noisy - alpha * value) / sigma
        return alpha * noisy - sigma * value, sigma * noisy + alpha * value

    def _at(self, time: Tensor, like: Tensor) -> list[Tensor]:
        """Return alpha, sigma and the posterior's coefficient, log variance and its bound for each sample."""
        device = time.device
        if device not in self._tables:
            # kept, because a copy from the host would wait for the device at every step
            rows = _rows(self.betas, self._levels)
            self._tables[device] = torch.tensor(rows, dtype=torch.float32, device=device)
        columns = self._tables[device][(time + 1).round().long()]
        return [over_samples(column, like) for column in columns.unbind(dim=-1)]


def _betas(config: DiffusionConfig) -> tuple[float, ...]:
    count = config.num_timesteps
    if config.schedule == "linear":
        first, last = 1e-4 * 1000 / count, 0.02 * 1000 / count  # 1000 timesteps are what its ends were chosen for
        betas = [first + (last - first) * step / (count - 1) for step in range(count)]
    else:
        signal = [math.cos((step / count + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(count + 1)]
        betas = [1 - after / before for before, after in pairwise(signal)]
    return tuple(min(beta, HIGHEST_BETA) for beta in betas)


def _cumulative(betas: tuple[float, ...]) -> tuple[tuple[float, float], ...]:
    """Return alpha and sigma of data and of every timestep."""
    levels, signal = [(1.0, 0.0)], 1.0
    for beta in betas:
        signal *= 1 - beta
        levels.append((math.sqrt(signal), math.sqrt(1 - signal)))
    return tuple(levels)


def _rows(betas: tuple[float, ...], levels: tuple[tuple[float, float], ...]) -> list[tuple[float, ...]]:
    """Return alpha, sigma, the weight of the data in the posterior's mean, its log variance, and log beta."""
    # the first posterior is a point; its variance is taken from the second, as the paper does
    variances = [
        beta * (before[1] / after[1]) ** 2 for beta, (before, after) in zip(betas, pairwise(levels), strict=True)
    ]
    variances[0] = variances[1]
    rows: list[tuple[float, ...]] = [(1.0, 0.0, 1.0, 0.0, 0.0)]  # of data, where nothing is trained
    for beta, variance, (before, after) in zip(betas, variances, pairwise(levels), strict=True):
        rows.append((*after, before[0] * beta / after[1] ** 2, math.log(variance), math.log(beta)))
    return rows


def _bound(gap: Tensor, fraction: Tensor, log_posterior: Tensor, log_beta: Tensor, first: Tensor) -> Tensor:
    """Return the divergence of two Gaussians whose means are `gap` apart, or a negative log likelihood in the first."""
    log_variance = fraction * log_beta + (1 - fraction) * log_posterior
    distance = gap.square() * (-log_variance).exp()
    ratio = log_posterior - log_variance
    divergence = (ratio.exp() - 1 - ratio + distance) / 2
    return torch.where(first, (math.log(2 * math.pi) + log_variance + distance) / 2, divergence)
