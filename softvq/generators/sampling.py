"""Samplers: from noise to data along a process, by solvers of its ordinary or its stochastic differential equation.

Every sampler takes a prediction of data and noise, starting noise, falling times whose last is data, the process, and
a source of noise. Its state is float32 whatever the network computes in, or float64 if it starts so.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from softvq.errors import InputError
from softvq.generators.flow import Flow, shifted
from softvq.generators.process import Draw, Predict, Prediction, Process, in_full

__all__ = [
    "SAMPLERS",
    "Sampler",
    "adams_bashforth",
    "check_sampler",
    "ddim",
    "ddpm",
    "dpm_solver",
    "dpm_solver_sde",
    "euler",
    "euler_maruyama",
    "euler_maruyama_grid",
    "heun",
    "times_for",
]

Sampler = Callable[[Predict, Tensor, Sequence[float], Process, Draw], Tensor]
"""`sampler(predict, latents, times, process, draw)`, see `euler`."""
LAST_NOISY = 0.04  # the last time of the stochastic solver of flows; from there one step without noise


def euler(
    predict: Predict, latents: Float[Tensor, "batch *token dim"], times: Sequence[float], process: Process, draw: Draw
) -> Float[Tensor, "batch *token dim"]:
    """Follow a flow's velocity from each time to the next: `x += (s - t) v(x, t)`; order 1.

    Args:
        predict: Gives data and noise for noisy latents and a time.
        latents: Noise to start from.
        times: Falling; the last is data.
        process: What the latents are on.
        draw: Source of noise, for samplers that add some.

    Returns:
        Latents at the last time.

    Raises:
        InputError: If the process is no flow.
    """
    flow, latents = _flow_of(process, "euler"), in_full(latents)
    for time, after in pairwise(times):
        latents = latents + (after - time) * flow.velocity(predict(latents, time), time)
    return latents


def heun(
    predict: Predict, latents: Float[Tensor, "batch *token dim"], times: Sequence[float], process: Process, draw: Draw
) -> Float[Tensor, "batch *token dim"]:
    """Average the velocities at both ends of each step (Heun); order 2, two evaluations a step.

    The last step, to data, is Euler's: there the network has nothing to say. Both ends of a step are guided alike.

    Args:
        predict: As for `euler`.
        latents: As for `euler`.
        times: As for `euler`.
        process: As for `euler`.
        draw: As for `euler`.

    Returns:
        Latents at the last time.

    Raises:
        InputError: If the process is no flow.
    """
    flow, latents = _flow_of(process, "heun"), in_full(latents)
    for time, after in pairwise(times):
        step = after - time
        velocity = flow.velocity(predict(latents, time), time)
        if after > 0:
            there = predict(latents + step * velocity, after, step_time=time)
            velocity = (velocity + flow.velocity(there, after)) / 2
        latents = latents + step * velocity
    return latents


def adams_bashforth(
    predict: Predict, latents: Float[Tensor, "batch *token dim"], times: Sequence[float], process: Process, draw: Draw
) -> Float[Tensor, "batch *token dim"]:
    """Extrapolate the velocity from this step's and the last one's (Adams, Bashforth); order 2, one evaluation a step.

        x += h ((1 + r / 2) v_n - r / 2 v_(n-1)),  r = h / h of the step before;  the first step is Euler's

    Args:
        predict: As for `euler`.
        latents: As for `euler`.
        times: As for `euler`.
        process: As for `euler`.
        draw: As for `euler`.

    Returns:
        Latents at the last time.

    Raises:
        InputError: If the process is no flow.
    """
    flow, latents = _flow_of(process, "ab2"), in_full(latents)
    before: tuple[float, Tensor] | None = None
    for time, after in pairwise(times):
        step = after - time
        velocity = flow.velocity(predict(latents, time), time)
        ahead = velocity if before is None else velocity + step / before[0] / 2 * (velocity - before[1])
        latents, before = latents + step * ahead, (step, velocity)
    return latents


def euler_maruyama(
    predict: Predict, latents: Float[Tensor, "batch *token dim"], times: Sequence[float], process: Process, draw: Draw
) -> Float[Tensor, "batch *token dim"]:
    """Solve a flow's stochastic equation (arXiv:2401.08740, section 2.3) with noise of strength `w = 2 t`.

        x += (s - t) (v - w / 2 score) + sqrt(w (t - s)) draw

    The last step adds no noise. The score grows without bound towards data, so use `euler_maruyama_grid`.

    Args:
        predict: As for `euler`.
        latents: As for `euler`.
        times: As for `euler`.
        process: As for `euler`.
        draw: As for `euler`.

    Returns:
        Latents at the last time.

    Raises:
        InputError: If the process is no flow.
    """
    flow, latents = _flow_of(process, "euler_maruyama"), in_full(latents)
    last = len(times) - 2
    for index, (time, after) in enumerate(pairwise(times)):
        prediction = predict(latents, time)
        drift = flow.velocity(prediction, time) - time * flow.score(prediction, time)
        latents = latents + (after - time) * drift
        if index < last:
            latents = latents + math.sqrt(2 * time * (time - after)) * draw(index)
    return latents


def euler_maruyama_grid(steps: int, *, shift: float = 1.0) -> tuple[float, ...]:
    """Return times from 1 to 0.04, and 0 after them.

    Args:
        steps: One less than there are times.
        shift: Above 1 the times lie closer at the noisy end; the last two stay.

    Returns:
        `steps + 1` falling times.

    Raises:
        InputError: If there is no step, or the shift is not positive.
    """
    if steps < 1:
        raise InputError(f"steps is {steps}, expected at least 1")
    if not 0 < shift < math.inf:
        raise InputError(f"shift is {shift}, expected a positive number")
    even = [1 - step / max(1, steps - 1) for step in range(steps)]
    return (*(LAST_NOISY + (1 - LAST_NOISY) * shifted(time, shift) for time in even), 0.0)


def ddim(
    predict: Predict, latents: Float[Tensor, "batch *token dim"], times: Sequence[float], process: Process, draw: Draw
) -> Float[Tensor, "batch *token dim"]:
    """Mix the predicted data and noise anew at the next time's levels (arXiv:2010.02502, eta 0); order 1.

    Args:
        predict: As for `euler`.
        latents: As for `euler`.
        times: As for `euler`.
        process: Any.
        draw: As for `euler`.

    Returns:
        Latents at the last time.
    """
    latents = in_full(latents)
    for time, after in pairwise(times):
        prediction = predict(latents, time)
        alpha, sigma = process.levels(after)
        latents = alpha * prediction.clean + sigma * prediction.noise
    return latents


def ddpm(
    predict: Predict, latents: Float[Tensor, "batch *token dim"], times: Sequence[float], process: Process, draw: Draw
) -> Float[Tensor, "batch *token dim"]:
    """Draw from the posterior between two times given the predicted data (arXiv:2006.11239; arXiv:2107.00630, app. A).

        var_ts = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2                         of the step from s to t
        mean = (alpha_t / alpha_s) (sigma_s / sigma_t)^2 x + alpha_s var_ts / sigma_t^2 clean
        variance = var_ts (sigma_s / sigma_t)^2;  if it is learned, between this and var_ts, by their logs

    Args:
        predict: As for `euler`.
        latents: As for `euler`.
        times: As for `euler`.
        process: Any.
        draw: As for `euler`.

    Returns:
        Latents at the last time.
    """
    latents = in_full(latents)
    for index, (time, after) in enumerate(pairwise(times)):
        prediction = predict(latents, time)
        (alpha, sigma), (alpha_after, sigma_after) = process.levels(time), process.levels(after)
        ratio, shrink = alpha / alpha_after, (sigma_after / sigma) ** 2
        added = sigma**2 - ratio**2 * sigma_after**2
        latents = ratio * shrink * latents + alpha_after * added / sigma**2 * prediction.clean
        if sigma_after > 0:
            latents = latents + _deviation(prediction, added, added * shrink) * draw(index)
    return latents


def dpm_solver(
    predict: Predict, latents: Float[Tensor, "batch *token dim"], times: Sequence[float], process: Process, draw: Draw
) -> Float[Tensor, "batch *token dim"]:
    """DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2); order 2, one evaluation a step.

        x = sigma_s / sigma_t x + (alpha_s - sigma_s alpha_t / sigma_t) D
        D = clean_n + r / 2 (clean_n - clean_(n-1)),  r = h / h of the step before

    Here h is the log of the growth of alpha / sigma. Where it is infinite, at pure noise and pure data, D is this
    step's prediction alone. Unlike in the paper r is at most 1: near data h grows fast on evenly spread times while
    predictions settle, and extrapolation would overshoot.

    Args:
        predict: As for `euler`.
        latents: As for `euler`.
        times: As for `euler`.
        process: Any.
        draw: As for `euler`.

    Returns:
        Latents at the last time.
    """
    latents, before = in_full(latents), None
    for time, after in pairwise(times):
        prediction, step = predict(latents, time), _log_growth(process, time, after)
        (alpha, sigma), (alpha_after, sigma_after) = process.levels(time), process.levels(after)
        data = _ahead(prediction.clean, step, before)
        latents = sigma_after / sigma * latents + (alpha_after - sigma_after * alpha / sigma) * data
        before = step, prediction.clean
    return latents


def dpm_solver_sde(
    predict: Predict, latents: Float[Tensor, "batch *token dim"], times: Sequence[float], process: Process, draw: Draw
) -> Float[Tensor, "batch *token dim"]:
    """SDE-DPM-Solver++(2M) (arXiv:2211.01095, appendix): `dpm_solver` with fresh noise in every step but the last.

        x = q sigma_s / sigma_t x + alpha_s (1 - q^2) D + sigma_s sqrt(1 - q^2) draw,  q = e^-h

    Args:
        predict: As for `euler`.
        latents: As for `euler`.
        times: As for `euler`.
        process: Any.
        draw: As for `euler`.

    Returns:
        Latents at the last time.
    """
    latents, before = in_full(latents), None
    for index, (time, after) in enumerate(pairwise(times)):
        prediction, step = predict(latents, time), _log_growth(process, time, after)
        (alpha, sigma), (alpha_after, sigma_after) = process.levels(time), process.levels(after)
        kept = sigma_after * alpha / (alpha_after * sigma)
        data = _ahead(prediction.clean, step, before)
        latents = kept * sigma_after / sigma * latents + alpha_after * (1 - kept**2) * data
        if sigma_after > 0:
            latents = latents + sigma_after * math.sqrt(1 - kept**2) * draw(index)
        before = step, prediction.clean
    return latents


SAMPLERS: dict[str, Sampler] = {
    "euler": euler,
    "heun": heun,
    "ab2": adams_bashforth,
    "euler_maruyama": euler_maruyama,
    "dpm++": dpm_solver,
    "dpm++_sde": dpm_solver_sde,
    "ddpm": ddpm,
    "ddim": ddim,
}
"""Every sampler by its name in recipes and on the command line."""


def check_sampler(name: str, process: Process) -> None:
    """Refuse samplers that do not exist, or that do not go with a process.

    Args:
        name: Of the sampler.
        process: What it is to run on.

    Raises:
        InputError: If there is no such sampler, or it needs a flow and the process is none.
    """
    if name not in SAMPLERS:
        raise InputError(f"there is no sampler {name!r}, expected one of {', '.join(SAMPLERS)}")
    if name in {"euler", "heun", "ab2", "euler_maruyama"}:
        _flow_of(process, name)


def times_for(name: str, process: Process, steps: int, shift: float = 1.0) -> tuple[float, ...]:
    """Return the times at which a sampler runs.

    Args:
        name: Of the sampler.
        process: What it runs on.
        steps: How many.
        shift: Above 1 the times of a flow lie closer at the noisy end.

    Returns:
        `steps + 1` falling times, the last of which is data.

    Raises:
        InputError: If the sampler does not go with the process, or there cannot be so many steps.
    """
    check_sampler(name, process)
    if name == "euler_maruyama":
        return euler_maruyama_grid(steps, shift=shift)
    return process.grid(steps, shift=shift)


def _flow_of(process: Process, name: str) -> Flow:
    if not isinstance(process, Flow):
        others = ", ".join(other for other in SAMPLERS if other.startswith("d"))
        raise InputError(f"sampler is {name}, which needs a flow; for a diffusion take one of {others}")
    return process


def _deviation(prediction: Prediction, high: float, low: float) -> Tensor | float:
    """Return the deviation of a step's noise: that of the low variance, or one learned between the two."""
    if prediction.variance_fraction is None:
        return math.sqrt(low)
    return (math.log(low) / 2 + math.log(high / low) / 2 * prediction.variance_fraction).exp()


def _log_growth(process: Process, time: float, after: float) -> float:
    """Return the log of the growth of alpha / sigma over a step; infinite from pure noise and to pure data."""
    (alpha, sigma), (alpha_after, sigma_after) = process.levels(time), process.levels(after)
    if alpha == 0 or sigma_after == 0:
        return math.inf
    return math.log(alpha_after * sigma / (sigma_after * alpha))


def _ahead(clean: Tensor, step: float, before: tuple[float, Tensor] | None) -> Tensor:
    """Return the data predicted for the middle of a step, from its beginning and the beginning of the step before."""
    if before is None or math.inf in (step, before[0]):
        return clean
    return clean + min(1.0, step / before[0]) / 2 * (clean - before[1])
