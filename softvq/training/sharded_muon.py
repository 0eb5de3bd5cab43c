"""Muon on matrices that are spread over ranks: momentum on parts, and each matrix made orthogonal by one rank."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from softvq.ranks import rank, world_size
from softvq.training.muon import MOMENTUM, orthogonal_updates

__all__ = ["ShardedMuon"]


class ShardedMuon:
    """What `Muon` does, on parts.

    Momentum and decay are elementwise, so that parts suffice. What momentum makes of the gradient is brought together
    on one rank for each matrix, which turns it into an update and hands that back in parts.

    Args:
        matrices: Parts of this rank, each with the matrix it is of, spread by rows; on every rank in the same order.
        weight_decay: Of all of them.
    """

    def __init__(self, matrices: Sequence[tuple[nn.Parameter, Tensor]], weight_decay: float) -> None:
        self._parts = [part for part, _ in matrices]
        self._shapes = [whole.shape for _, whole in matrices]
        self._owners = _owners([shape.numel() for shape in self._shapes], world_size())
        self.state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        self._weight_decay = weight_decay

    def prepare(self) -> None:
        """Make the state, of zeros, if there is none yet."""
        for part in self._parts:
            self.state[part].setdefault("momentum_buffer", torch.zeros_like(part))

    @torch.no_grad()
    def step(self, lr: float, skip: Float[Tensor, ""]) -> None:
        """Make one update; every rank must call it.

        Args:
            lr: The learning rate.
            skip: 1 to leave weights and state as they are, whatever the gradients; read on the device.
        """
        self.prepare()
        changed = [*self._parts, *(self.state[part]["momentum_buffer"] for part in self._parts)]
        before = [tensor.clone() for tensor in changed]
        updates = self._scattered(self._orthogonal(self._collected(), lr))
        for part, update in zip(self._parts, updates, strict=True):
            part.mul_(1 - lr * self._weight_decay).add_(update)
        for tensor, old in zip(changed, before, strict=True):
            torch.where(skip > 0, old, tensor, out=tensor)

    def _collected(self) -> list[Tensor | None]:
        """Return what momentum makes of the gradients: whole matrices where this rank owns them."""
        sent, received, works = [], [], []
        for part, shape, owner in zip(self._parts, self._shapes, self._owners, strict=True):
            assert part.grad is not None
            momentum = self.state[part]["momentum_buffer"]
            momentum.lerp_(part.grad, 1 - MOMENTUM)
            rows = part.new_zeros(-(-shape[0] // world_size()), shape[1])  # all ranks have to send as much
            rows[: len(part)] = part.grad.lerp(momentum, MOMENTUM)
            boxes = [torch.empty_like(rows) for _ in range(world_size())] if owner == rank() else None
            works.append(dist.gather(rows, boxes, dst=owner, async_op=True))
            sent.append(rows)
            received.append(boxes)
        for work in works:
            work.wait()
        return [
            None if boxes is None else torch.cat(boxes)[: shape[0]]
            for boxes, shape in zip(received, self._shapes, strict=True)
        ]

    def _orthogonal(self, wholes: Sequence[Tensor | None], lr: float) -> list[Tensor | None]:
        updates = iter(orthogonal_updates([whole for whole in wholes if whole is not None], lr))
        return [None if whole is None else next(updates) for whole in wholes]

    def _scattered(self, updates: Sequence[Tensor | None]) -> list[Tensor]:
        parts, works, kept = [], [], []
        for part, shape, owner, update in zip(self._parts, self._shapes, self._owners, updates, strict=True):
            rows = part.new_empty(-(-shape[0] // world_size()), shape[1])
            boxes = None
            if update is not None:
                padded = update.new_zeros(len(rows) * world_size(), shape[1])
                padded[: shape[0]] = update
                boxes = list(padded.chunk(world_size()))
            works.append(dist.scatter(rows, boxes, src=owner, async_op=True))
            parts.append(rows)
            kept.append(boxes)  # until they are sent
        for work in works:
            work.wait()
        return [rows[: len(part)] for rows, part in zip(parts, self._parts, strict=True)]


def _owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """Return a rank for each size, the largest first to the one that has least so far."""
    load, owners = [0] * ranks, [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        owners[number] = min(range(ranks), key=lambda one: load[one])
        load[owners[number]] += sizes[number]
    return owners
