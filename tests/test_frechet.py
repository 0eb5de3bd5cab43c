import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from softvq.backbones import load_backbone
from softvq.errors import InputError
from softvq.evaluation.features import pooled_features
from softvq.evaluation.frechet import frechet_distance, moments


def gaussian(dim: int, seed: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(dim, rank or dim, generator=generator, dtype=torch.float64)
    return torch.randn(dim, generator=generator, dtype=torch.float64), factor @ factor.T / dim


def commuting(dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return one basis and two spectra, of which one has a zero."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    one, other = torch.rand(2, dim, generator=generator, dtype=torch.float64) * 3
    one[0] = 0
    return basis, one, other


@pytest.mark.parametrize("turned", [False, True])
def test_covariances_that_commute_have_a_closed_form(turned: bool) -> None:
    basis, one, other = commuting(24, 0)
    basis = basis if turned else torch.eye(24, dtype=torch.float64)
    mean_a, mean_b = torch.randn(2, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = (mean_a - mean_b).square().sum() + (one.sqrt() - other.sqrt()).square().sum()
    found = frechet_distance(mean_a, basis * one @ basis.T, mean_b, basis * other @ basis.T)
    assert found == pytest.approx(float(expected), rel=1e-7)


def test_it_is_what_the_root_of_the_product_gives() -> None:
    (mean_a, cov_a), (mean_b, cov_b) = gaussian(32, 0), gaussian(32, 1)
    root = scipy.linalg.sqrtm((cov_a @ cov_b).numpy()).real
    expected = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * np.trace(root)
    assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(float(expected), rel=1e-9)


def test_it_is_symmetric_zero_for_equals_and_grows_by_a_translation() -> None:
    (mean_a, cov_a), (mean_b, cov_b) = gaussian(32, 0, rank=20), gaussian(32, 1)
    there = frechet_distance(mean_a, cov_a, mean_b, cov_b)
    assert there == pytest.approx(frechet_distance(mean_b, cov_b, mean_a, cov_a), rel=1e-6)
    assert 0 <= frechet_distance(mean_a, cov_a, mean_a, cov_a) < 1e-5
    shift = torch.full((32,), 0.5, dtype=torch.float64)
    assert frechet_distance(mean_a, cov_a, mean_a + shift, cov_a) == pytest.approx(32 * 0.25, rel=1e-6)
    assert frechet_distance(mean_a + shift, cov_a, mean_b + shift, cov_b) == pytest.approx(there, rel=1e-9)


def test_moments_are_those_of_numpy_in_float64() -> None:
    features = torch.randn(5000, 6, generator=torch.Generator().manual_seed(0)) + 1000  # float32 would lose digits
    mean, covariance = moments(features)
    exact = features.numpy().astype(np.float64)
    assert (mean.dtype, covariance.dtype) == (torch.float64, torch.float64)
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-13)
    np.testing.assert_allclose(covariance, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-12)
    assert torch.equal(moments(features[:2])[0], features[:2].double().mean(0))


def test_samples_of_one_gaussian_come_near_each_other() -> None:
    one, other = torch.randn(2, 20_000, 8, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(*moments(one), *moments(other)) < 0.01
    assert frechet_distance(*moments(one), *moments(2 * other)) == pytest.approx(8, rel=0.05)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    features = torch.zeros(4, 3)
    features[1, 2] = bad
    with pytest.raises(InputError, match="features holds values that are not finite"):
        moments(features)
    mean, covariance = torch.zeros(3), torch.eye(3)
    with pytest.raises(InputError, match="mean_a or cov_a holds values that are not finite"):
        frechet_distance(features[1], covariance, mean, covariance)
    with pytest.raises(InputError, match="mean_b or cov_b holds values that are not finite"):
        frechet_distance(mean, covariance, mean, covariance * bad)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_samples_are_refused(count: int) -> None:
    with pytest.raises(InputError, match=f"features has {count} samples, expected at least 2"):
        moments(torch.zeros(count, 3))


def test_matrices_that_are_no_covariances_are_refused() -> None:
    mean, covariance = torch.zeros(3), torch.eye(3)
    with pytest.raises(InputError, match="cov_a has negative eigenvalues"):
        frechet_distance(mean, -covariance, mean, covariance)
    with pytest.raises(InputError, match="cov_b has negative eigenvalues"):
        frechet_distance(mean, covariance, mean, -covariance)
    with pytest.raises(InputError, match="cov_b is not symmetric"):
        frechet_distance(mean, covariance, mean, torch.ones(3, 3).triu())


def test_features_are_the_mean_of_the_last_map() -> None:
    backbone = load_backbone("test_vit", image_size=32, pretrained=False)
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = pooled_features(backbone, images.split(2))
    assert found.shape == (5, backbone.channels[-1])
    assert not found.requires_grad
    torch.testing.assert_close(found, backbone(images)[-1].flatten(2).mean(2))
    with pytest.raises(InputError, match="batches is empty"):
        pooled_features(backbone, [])
