"""Mean and covariance of features that come in batches, in float64 and over any number of processes."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from softvq.errors import InputError
from softvq.ranks import world_size

__all__ = ["Moments"]

ROWS_AT_ONCE = 4096


class Moments:
    """How many features there were, their mean, and the sum of their centred products.

    Two sets a and b are joined exactly (Chan, Golub and LeVeque 1979), with n = n_a + n_b and d = mean_b - mean_a:

        mean = mean_a + d n_b / n
        scatter = scatter_a + scatter_b + d d^T n_a n_b / n

    Nothing is ever squared before it is centred, so that features far from zero lose no digits.

    Args:
        dim: Of the features, >= 1.
        device: Where the sums are kept; adding features of that device waits for nothing.

    Raises:
        InputError: If dim is less than 1.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        if dim < 1:
            raise InputError(f"dim is {dim}, expected at least 1")
        self.dim = dim
        self.device = torch.device(device)
        self._count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @property
    def count(self) -> int:
        """How many features were added."""
        return self._count

    @property
    def mean(self) -> Float[Tensor, " dim"]:
        """The mean, in float64; an InputError where there are no features, or one was not finite."""
        self._check(1, "mean")
        return self._mean.clone()

    @property
    def covariance(self) -> Float[Tensor, "dim dim"]:
        """The covariance with the divisor n - 1, in float64; an InputError below two features, or if one is broken."""
        self._check(2, "covariance")
        return self._scatter / (self._count - 1)

    @torch.no_grad()
    def add(self, features: Float[Tensor, "sample dim"]) -> None:
        """Count features in, however many; values that are not finite are found when the moments are asked for.

        Args:
            features: Of `dim` dimensions, on any device.

        Raises:
            InputError: If they have another dimension.
        """
        if features.shape[1] != self.dim:
            raise InputError(f"features has {features.shape[1]} dimensions, expected {self.dim}")
        for part in features.split(ROWS_AT_ONCE):  # so that only some rows at once are there in float64
            if len(part):
                part = part.to(self.device).double()
                mean = part.mean(0)
                centred = part - mean
                self._join(len(part), mean, centred.T @ centred)

    def merged(self, others: Iterable["Moments"]) -> "Moments":
        """Return the moments of these features and all the others' together; none of them is changed.

        Args:
            others: Of the same dimension, on any device.

        Returns:
            New moments, on the device of this one.

        Raises:
            InputError: If a dimension differs.
        """
        whole = self._copy()
        for other in others:
            if other.dim != self.dim:
                raise InputError(f"others has moments of {other.dim} dimensions, expected {self.dim}")
            if other.count:
                whole._join(other.count, other._mean.to(self.device), other._scatter.to(self.device))
        return whole

    @torch.no_grad()
    def over_ranks(self) -> "Moments":
        """Return the moments of the features of all ranks, the same everywhere; every rank must call it.

        Returns:
            New moments; a copy in a single process. A rank without features is as good as any.
        """
        whole = self._copy()
        if world_size() == 1:
            return whole
        counted = torch.cat([self._mean * self._count, self._mean.new_tensor([self._count])])
        dist.all_reduce(counted)
        whole._count = int(counted[-1])
        if whole._count:
            whole._mean = counted[:-1] / counted[-1]
            # n_a d_a d_a^T + n_b d_b d_b^T about the common mean is the last term of the formula for two
            offset = self._mean - whole._mean
            whole._scatter = self._scatter + self._count * torch.outer(offset, offset)
            dist.all_reduce(whole._scatter)
        return whole

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self._count + count
        offset = mean - self._mean
        self._mean = self._mean + offset * (count / total)
        self._scatter += scatter
        self._scatter.addr_(offset, offset, alpha=self._count * count / total)
        self._count = total

    def _copy(self) -> "Moments":
        copy = Moments(self.dim, self.device)
        copy._count, copy._mean, copy._scatter = self._count, self._mean.clone(), self._scatter.clone()
        return copy

    def _check(self, least: int, what: str) -> None:
        if self._count < least:
            raise InputError(f"features has {self._count} samples, expected at least {least} for a {what}")
        if not bool(self._mean.isfinite().all() & self._scatter.isfinite().all()):
            raise InputError(
                "features holds values that are not finite; look at the pictures or the network they are from"
            )
