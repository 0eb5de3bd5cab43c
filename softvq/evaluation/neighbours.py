"""Nearest neighbours: which references a query is closest to, for finding what a generator has learned by heart."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from softvq.errors import InputError

__all__ = ["nearest"]


@torch.no_grad()
def nearest(
    queries: Float[Tensor, "query dim"],
    references: Float[Tensor, "reference dim"],
    *,
    metric: str = "cosine",
    count: int = 1,
    chunk: int = 4096,
) -> tuple[Float[Tensor, "query count"], Int64[Tensor, "query count"]]:
    """Return the nearest references of each query, without a matrix of all pairs.

    Args:
        queries: What to look up.
        references: Among what; on the device of the queries, or moved there a chunk at a time.
        metric: `cosine` is 1 - cos of the angle, which is 1 from a vector of zeros; `euclidean` the length of the
            difference.
        count: How many neighbours, at most as many as there are references.
        chunk: Queries and references that are compared at once.

    Returns:
        Distances in float32, the smallest first, and the indices of the references.

    Raises:
        InputError: If a setting is out of its range, or a value is not finite.
    """
    if metric not in ("cosine", "euclidean"):
        raise InputError(f"metric is {metric!r}, expected cosine or euclidean")
    if not 1 <= count <= len(references):
        raise InputError(f"count is {count}, expected 1 to the {len(references)} references")
    if chunk < 1:
        raise InputError(f"chunk is {chunk}, expected at least 1")
    if not bool(queries.isfinite().all()) or not bool(references.isfinite().all()):
        raise InputError("queries or references hold values that are not finite; look at what they were made from")
    distances = torch.empty(len(queries), count, device=queries.device)
    indices = torch.empty(len(queries), count, dtype=torch.int64, device=queries.device)
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        distances[rows], indices[rows] = _nearest_of(queries[rows], references, metric, count, chunk)
    return distances, indices


def _nearest_of(queries: Tensor, references: Tensor, metric: str, count: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Keep the best of each chunk of references and of those before."""
    unit = metric == "cosine"
    ours = _prepared(queries, unit)
    best = ours.new_empty(len(ours), 0)
    where = torch.empty(len(ours), 0, dtype=torch.int64, device=ours.device)
    for start in range(0, len(references), chunk):
        theirs = _prepared(references[start : start + chunk].to(ours.device), unit)
        # of the square |q - r|^2, the part |q|^2 is the same for all references; of cosines only the product matters
        found = -ours @ theirs.T if unit else theirs.square().sum(1) - 2 * ours @ theirs.T
        found, places = found.topk(min(count, len(theirs)), dim=1, largest=False)
        best, order = torch.sort(torch.cat([best, found], 1), dim=1, stable=True)
        where = torch.cat([where, places + start], 1).gather(1, order)
        best, where = best[:, :count], where[:, :count]
    if unit:
        return (1 + best).clamp(0, 2).float(), where
    chosen = torch.stack(
        [_prepared(references[column.to(references.device)].to(ours.device), False) for column in where.T], 1
    )
    return (ours[:, None] - chosen).square().sum(2).sqrt().float(), where


def _prepared(vectors: Tensor, unit: bool) -> Tensor:
    vectors = vectors.detach().double()  # float32 cannot tell near from equal in the expanded square
    return F.normalize(vectors, dim=1) if unit else vectors
