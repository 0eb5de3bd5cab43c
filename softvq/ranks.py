"""How many processes train together, and averages over them; in a single process everything is that process's own."""

import torch.distributed as dist
from torch import Tensor

__all__ = ["is_main", "mean_over_ranks", "rank", "world_size"]


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this process is the one that writes files and talks to people."""
    return rank() == 0


def mean_over_ranks(value: Tensor) -> Tensor:
    """Return the mean of a tensor over all ranks, on its device and without a host sync; every rank must call it.

    Its gradient is that of this rank's own value. That is right for a function of the mean which every rank computes
    alike, because the gradients themselves are averaged over the ranks afterwards: the mean of this rank's part of a
    derivative, over the ranks, is the derivative.

    Args:
        value: Floating point, of the same shape on every rank.

    Returns:
        A tensor of that shape.
    """
    if world_size() == 1:
        return value
    mean = value.detach().clone()
    dist.all_reduce(mean)
    return value + (mean / world_size() - value.detach())
