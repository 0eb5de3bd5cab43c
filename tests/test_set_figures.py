"""Figures of two sets: closed forms, other people's libraries, what they are called, and what is said against them."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import torch
from torch import Tensor
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from softvq.errors import InputError
from softvq.evaluation import set_figures as module
from softvq.evaluation.scores import kernel_distance
from softvq.evaluation.set_features import SetFeatures
from softvq.evaluation.set_figures import FIGURES, SetFigures, set_figures
from softvq.randomness import generator
from tests.looking import CATEGORIES, DIM, inception, network, seen

LOOK = network()


def cloud(count: int, seed: int, shift: float = 0.0, dim: int = DIM) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=random) @ torch.randn(dim, dim, generator=random) * 0.3 + shift


def gaussian(mean: Any, covariance: Any, source: str = "set") -> SetFeatures:
    moments = {"mean": torch.tensor(np.array(mean)).double(), "covariance": torch.tensor(np.array(covariance)).double()}
    return dataclasses.replace(seen(cloud(9, 0), LOOK, source), features=None, statistics_count=None, **moments)


def distance(a: SetFeatures, b: SetFeatures) -> float:
    return set_figures(a, b, LOOK).values["frechet_distance"]


def test_gaussians_along_the_axes_have_the_distance_of_the_formula() -> None:
    random = np.random.default_rng(0)
    means, deviations = random.normal(size=(2, DIM)), random.uniform(0.1, 2, size=(2, DIM))
    expected = ((means[0] - means[1]) ** 2 + (deviations[0] - deviations[1]) ** 2).sum()
    a, b = (gaussian(mean, np.diag(deviation**2)) for mean, deviation in zip(means, deviations, strict=True))
    assert distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert distance(b, a) == pytest.approx(expected, rel=1e-12)


def test_turned_gaussians_have_the_distance_that_scipy_finds() -> None:
    random = np.random.default_rng(1)
    roots = random.normal(size=(2, DIM, DIM))
    covariances = [root @ root.T for root in roots]
    mean = random.normal(size=DIM)
    product = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    expected = (mean**2).sum() + np.trace(covariances[0] + covariances[1] - 2 * product.real)
    found = distance(gaussian(mean, covariances[0]), gaussian(np.zeros(DIM), covariances[1]))
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_spatial_distance_is_that_of_the_spatial_moments() -> None:
    def spatial(mean: float, deviation: float) -> SetFeatures:
        moments = {"spatial_mean": torch.full((3,), mean).double(), "spatial_covariance": torch.eye(3).double()}
        moments["spatial_covariance"] *= deviation**2
        return dataclasses.replace(seen(cloud(20, 0), LOOK), **moments)

    found = set_figures(spatial(1.0, 2.0), spatial(3.0, 0.5), LOOK).values
    assert found["spatial_frechet_distance"] == pytest.approx(3 * (2.0**2 + 1.5**2), rel=1e-12)
    assert found["frechet_distance"] == pytest.approx(0, abs=1e-12)


@pytest.fixture(scope="module")
def pair() -> tuple[SetFeatures, SetFeatures]:
    logits = [torch.randn(400, CATEGORIES, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    return seen(cloud(400, 0), LOOK, "real", logits[0]), seen(cloud(400, 0, 0.4) * 1.2, LOOK, "fake", logits[1])


@pytest.fixture(scope="module")
def found(pair: tuple[SetFeatures, SetFeatures]) -> SetFigures:
    return set_figures(*pair, LOOK)


def tables(pair: tuple[SetFeatures, SetFeatures]) -> tuple[Tensor, Tensor]:
    real, fake = pair[0].features, pair[1].features
    assert real is not None
    assert fake is not None
    return real, fake


def test_distance_beside_other_libraries(pair: tuple[SetFeatures, SetFeatures], found: SetFigures) -> None:
    real, fake = tables(pair)
    statistics = [metric_fid.fid_features_to_statistics(table) for table in (real, fake)]
    theirs = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    moments = [(each.mean, each.covariance) for each in pair]
    assert found.values["frechet_distance"] == pytest.approx(theirs, rel=1e-6)
    assert found.values["frechet_distance"] == pytest.approx(float(_compute_fid(*moments[0], *moments[1])), rel=1e-6)


def test_the_kernel_distance_of_equally_many_is_of_the_whole_sets(
    pair: tuple[SetFeatures, SetFeatures], found: SetFigures
) -> None:
    real, fake = (table.double() for table in tables(pair))
    theirs = poly_mmd(real, fake)
    kernels = [metric_kid.kernel_poly(a.numpy(), b.numpy()) for a, b in ((real, real), (real, fake), (fake, fake))]
    assert found.values["kernel_distance"] == pytest.approx(float(theirs), rel=1e-9)
    assert found.values["kernel_distance"] == pytest.approx(float(metric_kid.mmd2(*kernels)), rel=1e-9)
    assert "kernel_distance_std" not in found.values


def test_the_kernel_distance_of_sets_of_different_sizes_is_a_mean_over_subsets(
    pair: tuple[SetFeatures, SetFeatures],
) -> None:
    real, fake = (table.double().numpy() for table in tables(pair))
    fake = fake[:300]
    kernels = [(a @ b.T / DIM + 1) ** 3 for a, b in ((real, real), (fake, fake), (real, fake))]
    within = [(kernel.sum() - kernel.trace()) / (len(kernel) * (len(kernel) - 1)) for kernel in kernels[:2]]
    fewer = seen(tables(pair)[1][:300], LOOK)
    parts = [set_figures(pair[0], fewer, LOOK, seed=seed).values for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]
    _, deviation = kernel_distance(torch.from_numpy(real), torch.from_numpy(fake), subset_size=300)
    near = deviation / 3  # of a mean of 100, whose deviation is a tenth
    for part in parts:
        assert "kernel_distance_std" not in part  # every subset is all of the smaller set
        assert part["kernel_distance"] == pytest.approx(sum(within) - 2 * kernels[2].mean(), abs=near)


def test_precision_and_recall_are_those_of_torch_fidelity(
    pair: tuple[SetFeatures, SetFeatures], found: SetFigures
) -> None:
    real, fake = (table.double() for table in tables(pair))
    theirs = metric_prc.prc_features_to_metric(
        fake, real, prc_neighborhood=3, prc_batch_size=100, verbose=False, save_cpu_ram=False
    )
    assert 0 < found.values["precision"] < 1
    assert 0 < found.values["recall"] < 1
    assert found.values["precision"] == pytest.approx(theirs["precision"])
    assert found.values["recall"] == pytest.approx(theirs["recall"])


def test_density_coverage_and_cmmd_are_those_of_their_definitions(
    pair: tuple[SetFeatures, SetFeatures], found: SetFigures
) -> None:
    real, fake = (table.double().numpy() for table in tables(pair))
    apart = scipy.spatial.distance.cdist(real, fake)
    radii = np.sort(scipy.spatial.distance.cdist(real, real), axis=1)[:, 5]  # itself is the first
    inside = apart <= radii[:, None]
    assert found.values["density"] == pytest.approx(inside.sum() / (5 * len(fake)))
    assert found.values["coverage"] == pytest.approx(inside.any(1).mean())
    real, fake = (table / np.linalg.norm(table, axis=1, keepdims=True) for table in (real, fake))
    means = [
        np.exp(scipy.spatial.distance.cdist(a, b, "sqeuclidean") / -200).mean()
        for a, b in ((real, real), (fake, fake), (real, fake))
    ]
    assert found.values["cmmd"] == pytest.approx(1000 * (means[0] + means[1] - 2 * means[2]), rel=1e-6)


def test_the_inception_score_is_that_of_ten_drawn_parts(
    pair: tuple[SetFeatures, SetFeatures], found: SetFigures
) -> None:
    logits = pair[1].logits
    assert logits is not None
    order = torch.randperm(len(logits), generator=generator(0, "inception score"))
    theirs = metric_isc.isc_features_to_metric(logits[order], 10, shuffle=False)
    assert found.values["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert found.values["inception_score_std"] == pytest.approx(theirs["inception_score_std"], rel=1e-6)


def test_figures_come_in_order_with_their_names(found: SetFigures) -> None:
    names = [key for key in found.values if not key.endswith("_std")]
    assert names == [name for name in FIGURES if name != "spatial_frechet_distance"]
    assert found.labels.keys() == found.values.keys()
    assert found.labels["frechet_distance"] == "Fréchet distance on Products"
    assert found.labels["precision"] == "precision on Products"
    assert found.labels["inception_score_std"] == "deviation of inception score on Products"
    assert found.warnings == []


def test_of_inception_figures_have_the_names_of_papers(pair: tuple[SetFeatures, SetFeatures]) -> None:
    look = inception()
    changes = {"extractor": look.name, "extractor_sha256": look.sha256}
    spatial = {"spatial_mean": torch.zeros(3).double(), "spatial_covariance": torch.eye(3).double()}
    sets = [dataclasses.replace(each, **changes, **spatial) for each in pair]
    labels = set_figures(*sets, look).labels
    keys = ("frechet_distance", "spatial_frechet_distance", "kernel_distance", "inception_score", "cmmd", "recall")
    assert [labels[key] for key in keys] == ["FID", "sFID", "KID", "IS", "CMMD on Inception", "recall"]


def test_statistics_alone_give_what_they_can(pair: tuple[SetFeatures, SetFeatures], found: SetFigures) -> None:
    real, fake = pair
    alone = dataclasses.replace(real, features=None, logits=None, statistics_count=None)
    values = set_figures(alone, fake, LOOK).values
    assert values == {key: found.values[key] for key in ("frechet_distance", "inception_score", "inception_score_std")}


def test_too_few_images_leave_figures_out_and_say_so() -> None:
    real, fake = cloud(5, 0), cloud(3, 1)
    found = set_figures(seen(real, LOOK), seen(fake, LOOK, logits=torch.zeros(3, 2)), LOOK)
    assert found.values.keys() == {"frechet_distance", "kernel_distance", "cmmd"}
    said = " / ".join(found.warnings)
    for part in ("3 samples of 6 feature dimensions", "at least 10", "precision and recall", "density and coverage"):
        assert part in said


@pytest.mark.parametrize(("count", "warned"), [(DIM, True), (DIM + 1, False)])
def test_fewer_samples_than_dimensions_are_warned_of(count: int, warned: bool) -> None:
    few, many = seen(cloud(count, 0), LOOK), seen(cloud(50, 1), LOOK)
    for sets in ((few, many), (many, few)):
        said = " ".join(set_figures(*sets, LOOK).warnings)
        assert ("without full rank" in said) == warned


def test_copies_and_equal_sets_are_warned_of() -> None:
    real, fake = seen(cloud(30, 0), LOOK, "real", pixels="aa"), seen(cloud(30, 1), LOOK, "fake", pixels="bb")
    copied = dataclasses.replace(fake, distinct=20)
    assert set_figures(dataclasses.replace(real, distinct=30), fake, LOOK).warnings == []
    (warning,) = set_figures(real, copied, LOOK).warnings
    assert warning.startswith("fake: only 20 of the 30 images differ")
    (warning,) = set_figures(real, dataclasses.replace(fake, pixels="aa"), LOOK).warnings
    assert warning.startswith("fake holds the same images as real")


@pytest.mark.parametrize("field", ["mean", "covariance", "features", "logits", "spatial_covariance"])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_finite_names_the_set(which: int, field: str) -> None:
    sets = [seen(cloud(30, seed), LOOK, name) for seed, name in enumerate(("real", "fake"))]
    shapes = {"mean": (DIM,), "covariance": (DIM, DIM), "features": (30, DIM)}
    broken = torch.ones(shapes.get(field, (30, 30)))
    broken.view(-1)[-1] = float("nan")
    sets[which] = dataclasses.replace(sets[which], **{field: broken})
    name = ("real", "fake")[which]
    with pytest.raises(InputError, match=f"^{name}: Products gives values that are not finite; [^.]*$"):
        set_figures(*sets, LOOK)


def test_sets_seen_by_other_networks_are_refused() -> None:
    mine, other = seen(cloud(30, 0), LOOK, "mine"), seen(cloud(30, 1), network(name="Other"), "other")
    weights = seen(cloud(30, 1), network(sha256="cd" * 32), "retrained")
    with pytest.raises(InputError, match=r"^other: was seen by Other, not by Products; look at it again$"):
        set_figures(mine, other, LOOK)
    with pytest.raises(InputError, match=r"^retrained: was seen by"):
        set_figures(weights, mine, LOOK)


def test_the_root_of_a_reference_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fakes = seen(cloud(30, 0), LOOK), [seen(cloud(30, seed), LOOK) for seed in (1, 2)]
    expected = [distance(dataclasses.replace(real), fake) for fake in fakes]
    calls: list[int] = []
    root = module.covariance_root

    def counted(covariance: Tensor) -> Tensor:
        calls.append(len(covariance))
        return root(covariance)

    monkeypatch.setattr(module, "covariance_root", counted)
    assert [distance(real, fake) for fake in fakes] == expected
    assert calls == [DIM]
    other = dataclasses.replace(real, covariance=4 * real.covariance)  # has a root of its own
    assert distance(other, fakes[0]) == distance(dataclasses.replace(real, covariance=4 * real.covariance), fakes[0])
    assert distance(other, fakes[0]) != expected[0]
