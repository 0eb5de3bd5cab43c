import math

import pytest
import torch
from torch import Tensor

from softvq.errors import InputError
from softvq.evaluation.neighbours import nearest


def clouds(queries: int = 23, references: int = 57, dim: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(queries, dim, generator=generator), torch.randn(references, dim, generator=generator)


def all_distances(queries: Tensor, references: Tensor, metric: str) -> Tensor:
    a, b = queries.double()[:, None], references.double()[None]
    if metric == "euclidean":
        return (a - b).square().sum(2).sqrt()
    return 1 - (a * b).sum(2) / a.norm(dim=2) / b.norm(dim=2)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("count", [1, 3, 57])
@pytest.mark.parametrize("chunk", [1, 8, 10_000])
def test_they_are_what_looking_at_every_pair_finds(metric: str, count: int, chunk: int) -> None:
    queries, references = clouds()
    distances, indices = nearest(queries, references, metric=metric, count=count, chunk=chunk)
    expected, order = all_distances(queries, references, metric).sort(1)
    assert torch.equal(indices, order[:, :count])
    assert distances.dtype == torch.float32
    torch.testing.assert_close(distances, expected[:, :count].float(), rtol=1e-5, atol=1e-6)


def test_cosine_is_the_default_and_knows_no_length() -> None:
    queries, references = clouds()
    distances, indices = nearest(queries, references)
    scaled = nearest(queries * 9, references * torch.linspace(0.1, 5, 57)[:, None])
    assert torch.equal(indices, scaled[1])
    torch.testing.assert_close(distances, scaled[0])


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_copies_are_found_far_from_the_origin(metric: str) -> None:
    _, references = clouds(dim=64)
    references = references + 1000  # where the expanded square in float32 could not tell neighbours apart
    distances, indices = nearest(references[[5, 50, 0]], references, metric=metric, chunk=16)
    assert indices[:, 0].tolist() == [5, 50, 0]
    assert distances.max() < 1e-7


def test_a_vector_of_zeros_has_the_cosine_distance_one() -> None:
    distances, _ = nearest(torch.zeros(1, 3), torch.ones(2, 3))
    assert distances.tolist() == [[1.0]]


def test_no_queries_have_no_neighbours() -> None:
    distances, indices = nearest(torch.zeros(0, 3), torch.ones(2, 3), count=2)
    assert distances.shape == indices.shape == (0, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "manhattan"}, "metric is 'manhattan', expected cosine or euclidean"),
        ({"count": 0}, "count is 0, expected 1 to the 5 references"),
        ({"count": 6}, "count is 6, expected 1 to the 5 references"),
        ({"chunk": 0}, "chunk is 0, expected at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        nearest(torch.rand(2, 3), torch.rand(5, 3), **change)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    good = torch.rand(2, 3)
    for pair in ((good * bad, good), (good, good * bad)):
        with pytest.raises(InputError, match="queries or references hold values that are not finite"):
            nearest(*pair)
