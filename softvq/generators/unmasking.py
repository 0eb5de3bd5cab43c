"""How MAR draws an image: some tokens at a time, each drawn by the head, in a random order."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.nn import functional

from softvq.errors import InputError
from softvq.generators.guidance import Guidance, guided
from softvq.generators.mar import MAR, random_orders, select
from softvq.generators.process import Watch
from softvq.generators.sampling import Sampler
from softvq.randomness import fold_in, normal

__all__ = ["sample", "unmasking_counts"]

ORDER, NOISE = range(2)


def unmasking_counts(num_tokens: int, steps: int) -> tuple[int, ...]:
    """Return how many tokens are still hidden after each step: few are shown at first, many at last.

        floor(num_tokens cos(pi/2 (i + 1) / steps))          the cosine of arXiv:2202.04200, rounded down

    changed where needed so that every step shows at least one token.

    Args:
        num_tokens: Of one image.
        steps: From 1 to `num_tokens`.

    Returns:
        Falling numbers, one for each step, the last 0.

    Raises:
        InputError: If there is no step, or not a token for each.
    """
    if not 1 <= steps <= num_tokens:
        raise InputError(f"steps is {steps}, expected 1 to {num_tokens} tokens")
    counts = []
    hidden = num_tokens
    for i in range(steps):
        wanted = math.floor(num_tokens * math.cos(math.pi / 2 * (i + 1) / steps))
        hidden = max(min(wanted, hidden - 1), steps - 1 - i)
        counts.append(hidden)
    return tuple(counts)


@torch.no_grad()
def sample(
    model: MAR,
    condition: Shaped[Tensor, "batch *conditiondim"],
    keys: Int64[Tensor, " batch"],
    *,
    steps: int,
    sampler: Sampler,
    times: Sequence[float],
    guidance: Guidance,
    temperature: float = 1.0,
    watch: Watch | None = None,
) -> Float[Tensor, "batch token dim"]:
    """Draw latents (arXiv:2406.11838, section 3.4).

    The scale of guidance is the same for all of a step's denoising; it is `guidance.at` the share of tokens that are
    still hidden after the step, so that with `linear` it rises as tokens appear and the last step has all of it.

    Args:
        model: Network and process.
        condition: See `Condition`.
        keys: Of the images; an image depends on its key and its condition, never on its batch.
        steps: In which tokens appear, at most as many as there are tokens.
        sampler: Of the head: one of `softvq.generators.sampling`.
        times: At which the head denoises, one more than its steps, from `model.process.grid`.
        guidance: How far to move away from what is drawn without the condition.
        temperature: Factor on all noise: what the head starts from, and what its sampler adds. Below 1 there is less
            variety.
        watch: Called after every step with its number, from 1, and the latents, 0 where they are still hidden.

    Returns:
        float32 latents.

    Raises:
        InputError: If there are more steps than tokens, times and steps of the head differ, or temperature is negative.
    """
    counts = unmasking_counts(model.num_tokens, steps)
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature is {temperature}, expected at least 0")
    orders = random_orders(fold_in(keys, ORDER), model.num_tokens)
    noise_keys = fold_in(keys, NOISE)
    latents = torch.empty(len(keys), 0, model.latent_dim, device=keys.device)
    for step, count in enumerate(counts, 1):
        scale = guidance.at(count / model.num_tokens)
        shown = latents.shape[1]
        chosen = orders[:, shown : model.num_tokens - count]
        z = _vectors(model, condition, latents, orders, scale)[:, shown : model.num_tokens - count]
        # a key for each token: it is drawn in one step only, so steps need none of their own
        token_keys = (noise_keys[:, None] + chosen).flatten()
        tokens = _denoised(model, z.flatten(0, 1), token_keys, sampler, times, scale, temperature)
        latents = torch.cat([latents, tokens.unflatten(0, chosen.shape)], dim=1)
        if watch is not None:
            watch(step, select(functional.pad(latents, (0, 0, 0, count)), orders.argsort(dim=1)))
    return select(latents, orders.argsort(dim=1))


def _vectors(model: MAR, condition: Tensor, latents: Tensor, orders: Tensor, scale: float) -> Tensor:
    """Return z with the condition, without it, or both as halves of one batch: what a scale of guidance needs."""
    batch = len(orders)
    parts = 1 if scale in (0, 1) else 2
    null = torch.arange(parts * batch, device=orders.device) >= (0 if scale == 0 else batch)
    vector = model.condition(condition.repeat(parts, *[1] * (condition.ndim - 1)), null)
    return model(latents.repeat(parts, 1, 1), orders.repeat(parts, 1), vector)


def _denoised(
    model: MAR,
    z: Tensor,
    keys: Tensor,
    sampler: Sampler,
    times: Sequence[float],
    scale: float,
    temperature: float,
) -> Tensor:
    """Draw one token for each key; `z` has as many rows, or those with and those without the condition."""

    def network(noisy: Tensor, time: Tensor, null: Tensor) -> Tensor:
        return model.head(noisy, model.process.network_time(time), z)

    def draw(i: int) -> Tensor:
        return temperature * normal(fold_in(keys, 1 + i), model.latent_dim)

    predict = guided(network, model.process, Guidance(scale=scale))
    return sampler(predict, draw(-1), times, model.process, draw)
