"""A convolution divided by its spectral norm, whose estimate moves only when it is told to."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["SpectralConv1d"]

FIRST_ITERATIONS = 20  # of the power method when a weight is made


class SpectralConv1d(nn.Module):
    """Circular convolution by W / sigma(W), sigma being the largest singular value of [out, in * kernel].

        sigma(W) = u^T W v        arXiv:1802.05957, appendix A

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        kernel: Odd; the input must have at least `kernel // 2` places.

    Note:
        u and v are constants of the forward pass, as in the paper, but they do not move in it: torch's own spectral
        norm moves them in every forward pass in training mode, so that a pass repeated by activation checkpointing
        would differ from the first.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.left: Tensor
        self.right: Tensor
        self.register_buffer("left", F.normalize(torch.randn(outputs), dim=0))
        self.register_buffer("right", torch.zeros(inputs * kernel))
        self.advance(FIRST_ITERATIONS)

    @torch.no_grad()
    def advance(self, iterations: int = 1) -> None:
        """Move u and v towards the singular vectors of the largest singular value."""
        matrix = self.weight.flatten(1)
        with torch.autocast(matrix.device.type, enabled=False):
            for _ in range(iterations):
                self.right.copy_(F.normalize(matrix.mT @ self.left, dim=0))
                self.left.copy_(F.normalize(matrix @ self.right, dim=0))

    def sigma(self) -> Float[Tensor, ""]:
        """Return the estimate of the spectral norm, with gradient to the weight."""
        return self.left @ self.weight.flatten(1) @ self.right

    def forward(self, hidden: Float[Tensor, "batch inputs place"]) -> Float[Tensor, "batch outputs place"]:
        """Convolve, the ends joined."""
        with torch.autocast(hidden.device.type, enabled=False):
            weight = self.weight / self.sigma()
        side = weight.shape[2] // 2
        return F.conv1d(F.pad(hidden, (side, side), mode="circular") if side else hidden, weight, self.bias)
