"""What a process between data and noise offers to networks, losses and samplers."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

__all__ = ["Draw", "Predict", "Prediction", "Process", "Watch", "in_full", "over_samples", "watched"]


@dataclasses.dataclass(frozen=True, slots=True)
class Prediction:
    """What a network's output says about noisy latents: `noisy = alpha clean + sigma noise`."""

    clean: Float[Tensor, "batch *token dim"]
    """Expected data, in float32, or in float64 if the noisy latents were."""
    noise: Float[Tensor, "batch *token dim"]
    """Expected noise, in the same."""
    variance_fraction: Float[Tensor, "batch *token dim"] | None = None
    """Learned variance: where the log variance lies between the posterior's (0) and the forward step's (1)."""


Predict = Callable[..., Prediction]
"""`predict(noisy, time, *, step_time=None)`; guidance is decided at `step_time`, where the solver's step began."""
Draw = Callable[[int], Tensor]
"""`draw(step)`: standard normal noise for one step, in the shape of the latents."""
Watch = Callable[[int, Tensor], object]
"""`watch(step, latents)`: sees, in every step from 1, the latents `[batch, token, dim]` as far as they can be told."""


@runtime_checkable
class Process(Protocol):
    """A way from data to noise, `noisy = alpha clean + sigma noise`, and what a network learns about it.

    Times are floats: of a flow from 1 (noise) to 0 (data), of a diffusion whole timesteps from `num_timesteps - 1` to 0
    and -1 for data.
    """

    def output_dim(self, dim: int) -> int:
        """Return how many numbers a network gives for each token of `dim` numbers."""
        ...

    def draw_times(self, keys: Int64[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Draw the time at which each sample is trained, from its own key and on the keys' device."""
        ...

    def noisy(
        self,
        clean: Float[Tensor, "batch *token dim"],
        noise: Float[Tensor, "batch *token dim"],
        time: Float[Tensor, " batch"],
    ) -> Float[Tensor, "batch *token dim"]:
        """Return `alpha clean + sigma noise` at each sample's time."""
        ...

    def losses(
        self,
        output: Float[Tensor, "batch *token outputdim"],
        clean: Float[Tensor, "batch *token dim"],
        noise: Float[Tensor, "batch *token dim"],
        time: Float[Tensor, " batch"],
    ) -> dict[str, Float[Tensor, "batch *token"]]:
        """Return named losses, each a mean over the last dimension; their sum is to be minimised."""
        ...

    def network_time(self, time: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return what the network is told of the time."""
        ...

    def predict(
        self,
        output: Float[Tensor, "batch *token outputdim"],
        noisy: Float[Tensor, "batch *token dim"],
        time: float,
    ) -> Prediction:
        """Return what the network's output says about noisy latents, all of which are at one time."""
        ...

    def levels(self, time: float) -> tuple[float, float]:
        """Return alpha and sigma at a time."""
        ...

    def fraction(self, time: float) -> float:
        """Return how far a time is from data (0) to noise (1)."""
        ...

    def grid(self, steps: int, *, shift: float = 1.0) -> tuple[float, ...]:
        """Return `steps + 1` falling times, from noise to data."""
        ...


def in_full(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return numbers in float32, or as they are if they have more digits."""
    return x if x.dtype == torch.float64 else x.float()


def watched(predict: Predict, watch: Watch) -> Predict:
    """Return the same predictions, the first of every step shown to `watch` before the solver goes on."""
    steps = itertools.count(1)

    def predict_and_show(noisy: Tensor, time: float, *, step_time: float | None = None) -> Prediction:
        prediction = predict(noisy, time, step_time=step_time)
        if step_time is None:  # otherwise it is a second look within a step
            watch(next(steps), prediction.clean)
        return prediction

    return predict_and_show


def over_samples(value: Float[Tensor, " batch"], like: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *ones"]:
    """Give one number per sample as many dimensions as `like` has, so that it is the same all over a sample."""
    return value.reshape(-1, *(1 for _ in like.shape[1:]))
