"""Muon with all matrices of one shape at once, since a GPU is faster than it can be told of matrices one by one."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["MOMENTUM", "Muon", "orthogonal_updates"]

MOMENTUM = 0.95
"""What `torch.optim.Muon` has by default, as are the two below."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
SMALLEST_NORM = 1e-7
MOST_NUMBERS = 1 << 26
"""In one stack, whose copies take 16 bytes a number."""


class Muon:
    """What `torch.optim.Muon` does with Nesterov momentum and `match_rms_adamw`, in stacks of matrices of one shape.

    The momentum M of a gradient G is 0.95 M + 0.05 G, and 0.95 M + 0.05 G once more is made orthogonal (Jordan et al.,
    "Muon: an optimizer for hidden layers in neural networks", 2024); the update has AdamW's usual size
    (arXiv:2502.16982). On a GPU the step takes as many launches for 100 matrices of one shape as for one. A matrix
    without a gradient counts as one whose gradient is zero, where torch's leaves it alone.

    Args:
        matrices: What to move.
        weight_decay: Of all of them.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], weight_decay: float) -> None:
        self._stacks = [_Stack(group) for group in _alike(matrices)]
        self._weight_decay = weight_decay
        self.state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)

    def prepare(self) -> None:
        """Make the state, of zeros, if there is none yet."""
        for stack in self._stacks:
            if stack.momentum is None:
                stack.momentum = torch.stack([torch.zeros_like(matrix) for matrix in stack.matrices])
                for matrix, momentum in zip(stack.matrices, stack.momentum, strict=True):
                    self.state[matrix] = {"momentum_buffer": momentum}

    @torch.no_grad()
    def step(self, lr: float, skip: Float[Tensor, ""]) -> None:
        """Make one update.

        Args:
            lr: The learning rate.
            skip: 1 to leave weights and state as they are, whatever the gradients; read on the device.
        """
        self.prepare()
        for stack in self._stacks:
            momentum, matrices = stack.momentum, stack.matrices
            assert momentum is not None
            gradients = torch.stack([_gradient(matrix) for matrix in matrices])
            moved = momentum.lerp(gradients, 1 - MOMENTUM)
            updates = _orthogonal(gradients.lerp_(moved, MOMENTUM)).float() * -_scale_of(matrices[0].shape, lr)
            momentum.copy_(torch.where(skip > 0, momentum, moved))
            updates = torch.where(skip > 0, -0.0, updates)  # 0 would change -0
            decay = torch.where(skip > 0, 1.0, 1 - lr * self._weight_decay)
            torch._foreach_mul_(matrices, decay)
            torch._foreach_add_(matrices, updates.unbind())


class _Stack:
    def __init__(self, matrices: list[Tensor]) -> None:
        self.matrices = matrices
        self.momentum: Tensor | None = None


def orthogonal_updates(gradients: Sequence[Float[Tensor, "row column"]], lr: float) -> list[Tensor]:
    """Return what to add to matrices.

    Args:
        gradients: With momentum, of any shapes.
        lr: The learning rate.

    Returns:
        In the order of the gradients, float32, each near a matrix with equal singular values.
    """
    found: dict[int, Tensor] = {}
    for group in _alike(gradients):
        updates = _orthogonal(torch.stack(group)).float() * -_scale_of(group[0].shape, lr)
        found |= {id(gradient): update for gradient, update in zip(group, updates, strict=True)}
    return [found[id(gradient)] for gradient in gradients]


def _scale_of(shape: Sequence[int], lr: float) -> float:
    """Return what an orthogonal matrix is multiplied by, so that its numbers are as large as AdamW's updates."""
    return lr * 0.2 * math.sqrt(max(shape))


def _orthogonal(stack: Float[Tensor, "matrix row column"]) -> Tensor:
    """Bring all singular values near 1 by five steps of X <- a X + b (X X^T) X + c (X X^T)^2 X, in bfloat16."""
    a, b, c = COEFFICIENTS
    found = stack.to(torch.bfloat16)
    flipped = found.shape[1] > found.shape[2]
    found = found.mT if flipped else found
    found = found / found.norm(dim=(1, 2), keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(ITERATIONS):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.mT if flipped else found


def _alike(matrices: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield matrices of one shape together, as many as may be in a stack."""
    groups: dict[tuple[int, ...], list[Any]] = {}
    for matrix in matrices:
        groups.setdefault(tuple(matrix.shape), []).append(matrix)
    for shape, group in groups.items():
        most = max(1, MOST_NUMBERS // math.prod(shape))
        yield from (group[start : start + most] for start in range(0, len(group), most))


def _gradient(matrix: Tensor) -> Tensor:
    return torch.zeros_like(matrix) if matrix.grad is None else matrix.grad
