"""Which image stands at which position of a run: a pure function, so there is no sampler state to save."""

import functools

import torch
from jaxtyping import Int64
from torch import Tensor

from softvq.randomness import generator

__all__ = ["epoch_order", "index_at"]


def index_at(position: int, size: int, seed: int) -> int:
    """Return the index of the image at a global position.

    Every stretch of `size` positions, an epoch, visits every index once, each epoch in an order of its own.

    Args:
        position: Global sample number, step times batch size plus place in the batch; 0 or more.
        size: Number of images; 1 or more.
        seed: Of the run.

    Returns:
        A whole number in [0, size).
    """
    assert position >= 0, f"position is {position}"
    assert size >= 1, f"size is {size}"
    epoch, place = divmod(position, size)
    return int(epoch_order(epoch, size, seed)[place])


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def epoch_order(epoch: int, size: int, seed: int) -> Int64[Tensor, " size"]:
    """Return the order in which an epoch visits all indices; it is kept, so do not change it.

    Args:
        epoch: From 0.
        size: Number of images.
        seed: Of the run.

    Returns:
        A permutation of 0 to size - 1.
    """
    return torch.randperm(size, generator=generator(seed, "order", epoch))
