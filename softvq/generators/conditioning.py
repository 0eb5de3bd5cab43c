"""What a generator is asked for, as one vector per image: a class, an embedding, or nothing."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

__all__ = ["Condition"]


class Condition(nn.Module):
    """Turns conditions into vectors; where a condition is hidden, the learned null vector stands in its place.

    The null class is number `num_classes`, one past the last.

    Args:
        kind: `class` looks up a table, `embedding` projects a vector, `none` always gives the null vector.
        num_classes: Of `class`; at least 1.
        dim: Length of the vectors of `embedding`.
        width: Length of what comes out.
    """

    def __init__(self, kind: Literal["class", "embedding", "none"], num_classes: int, dim: int, width: int) -> None:
        super().__init__()
        self.kind, self.num_classes = kind, num_classes
        if kind == "class":
            self.table = nn.Embedding(num_classes + 1, width)
            nn.init.normal_(self.table.weight, std=0.02)
        else:
            self.null = nn.Parameter(torch.zeros(width))
        if kind == "embedding":
            self.projection = nn.Linear(dim, width)

    def forward(
        self, condition: Shaped[Tensor, "batch *dim"], null: Bool[Tensor, " batch"]
    ) -> Float[Tensor, "batch width"]:
        """Return one vector per image.

        Args:
            condition: Class numbers `[batch]`, or embeddings `[batch, dim]`; with `none` only its length is looked at.
            null: Where the condition is hidden.

        Returns:
            The vectors.
        """
        if self.kind == "class":
            return self.table(torch.where(null, self.num_classes, condition))
        nothing = self.null.expand(condition.shape[0], -1)
        if self.kind == "none":
            return nothing
        return torch.where(null[:, None], nothing, self.projection(condition.to(self.projection.weight.dtype)))
