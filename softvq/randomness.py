"""Keyed randomness: every draw is a pure function of a seed and a name, never of what was drawn before.

`generator(seed, "augment", position)` is the same stream on any rank, in any data worker and after any restart,
so nothing random has to be saved to resume a run exactly.
"""

import hashlib
import json

import torch

__all__ = ["generator", "manual_seed", "seed_of"]


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
