"""Keyed randomness: every draw is a pure function of a seed and a name, never of what was drawn before.

`generator(seed, "augment", position)` is the same stream on any rank, in any data worker and after any restart,
so nothing random has to be saved to resume a run exactly. What a model draws for each sample of a batch comes from
`keys_of`, `uniform` and `normal`: hashes computed on the samples' device, the same for any split of a batch over ranks.
"""

import hashlib
import json
import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

__all__ = ["fold_in", "generator", "keys_of", "manual_seed", "normal", "seed_of", "uniform"]

_ODD = 0x1E3779B97F4A7C15  # odd, and near the golden ratio of the range, so that multiples spread


def seed_of(seed: int, *key: int | str) -> int:
    """Return the 63-bit seed that belongs to `(seed, *key)`; different keys give unrelated seeds."""
    name = json.dumps([seed, *key])
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *key: int | str) -> torch.Generator:
    """Return a fresh CPU generator for the stream `key`, e.g. `generator(0, "augment", position)`."""
    return torch.Generator().manual_seed(seed_of(seed, *key))


def manual_seed(seed: int, *key: int | str) -> None:
    """Reseed torch's global generators, for code that draws from them and takes no generator: dropout, drop path."""
    torch.manual_seed(seed_of(seed, *key))


def keys_of(seed: int, name: str, positions: Int64[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
    """Return one key for each sample of a batch, from which `uniform` and `normal` draw on the samples' device.

    Args:
        seed: Of the run.
        name: Of the stream.
        positions: Numbers of the samples, which may lie on any rank and in any micro-batch.

    Returns:
        Unrelated 64-bit numbers.
    """
    return fold_in(positions, seed_of(seed, name))


def fold_in(keys: Int64[Tensor, " batch"], number: int) -> Int64[Tensor, " batch"]:
    """Return other keys: one set for every number."""
    return _mixed(_mixed(keys) + number * _ODD % (1 << 63))


def uniform(keys: Int64[Tensor, " batch"], *shape: int) -> Float[Tensor, "batch ..."]:
    """Draw float32 numbers above 0 and below 1: `[batch, *shape]`, each sample's from its own key."""
    return _unit(_bits(keys, shape) >> 40)


def normal(keys: Int64[Tensor, " batch"], *shape: int) -> Float[Tensor, "batch ..."]:
    """Draw float32 numbers of the standard normal: `[batch, *shape]`, each sample's from its own key (Box, Muller)."""
    bits = _bits(keys, shape)
    radius = (-2 * _unit(bits >> 40).log()).sqrt()
    return radius * (2 * math.pi * _unit(bits >> 8)).cos()


def _bits(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Hash (key, index) to 64 bits; integers only, so that every device and every batch gives the same."""
    index = torch.arange(math.prod(shape), device=keys.device)
    # added before it is multiplied: compilers take an index alone for 32 bits
    return _mixed((_mixed(keys)[:, None] + index) * _ODD).reshape(-1, *shape)


def _mixed(x: Tensor) -> Tensor:
    # the finalizer of SplitMix64 (Steele, Lea and Flood 2014); products wrap around
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, places: int) -> Tensor:
    return (x >> places) & ((1 << (64 - places)) - 1)  # torch shifts the sign in


def _unit(bits: Tensor) -> Tensor:
    return ((bits & 0x7FFFFF).float() + 0.5) * 2.0**-23
