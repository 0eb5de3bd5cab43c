"""Figures beside those of other people's libraries, of the same features or the same 8-bit pictures."""

import math
import warnings

import lpips
import numpy as np
import pytest
import torch
from scipy.spatial import KDTree
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
from torchmetrics.functional.image import lpips as torchmetrics_lpips
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
)
from torchmetrics.functional.image import (
    peak_signal_noise_ratio as psnr,
)
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from softvq.evaluation.frechet import frechet_distance, moments
from softvq.evaluation.moments import Moments
from softvq.evaluation.pair_figures import load_distance, pair_figures
from softvq.evaluation.scores import cmmd, density_coverage, inception_score, kernel_distance, precision_recall
from softvq.losses.perceptual import feature_distance, load_perceptual

RELATIVE = 1e-4


def clouds(count: int, dim: int, offset: float = 0.3, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Features as networks give them: not below 0, with channels that go together and some that hardly do anything."""
    generator = torch.Generator().manual_seed(count + dim)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64) * torch.logspace(0, -3, dim)
    real, fake = (torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mixing.T for _ in range(2))
    return scale * real.relu(), scale * (1.2 * fake + offset).relu()


def pictures(count: int, size: int, seed: int = 0) -> Tensor:
    """Smooth 8-bit pictures with edges and noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    images = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    images[..., size // 3 :, size // 2 :] *= 0.5
    images += 0.05 * torch.randn(images.shape, generator=generator)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def pairs(size: int) -> tuple[Tensor, Tensor]:
    """Originals, and what a poor tokenizer makes of them: blur, less contrast, noise."""
    originals = pictures(3, size)
    low = nn.functional.avg_pool2d(originals.float(), 5, 1, 2)
    noise = torch.randn(low.shape, generator=torch.Generator().manual_seed(9))
    weights = torch.tensor([0.0, 4.0, 25.0]).view(-1, 1, 1, 1)
    return originals, (0.9 * low + 10 + weights * noise).round().clamp(0, 255).to(torch.uint8)


class Pixels(nn.Module):
    """A network whose features are the pixels of small pictures."""

    num_features = 48

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.double().flatten(1) / 255


# sets


@pytest.mark.parametrize(("count", "dim"), [(400, 48), (30, 48), (500, 96)])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 50.0])
def test_the_frechet_distance_is_that_of_torch_fidelity(count: int, dim: int, scale: float) -> None:
    real, fake = clouds(count, dim, scale=scale)
    statistics = [metric_fid.fid_features_to_statistics(features) for features in (real, fake)]
    theirs = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(*moments(real), *moments(fake)) == pytest.approx(theirs, rel=RELATIVE)


def test_the_frechet_distance_of_batches_is_that_of_torchmetrics() -> None:
    theirs = FrechetInceptionDistance(feature=Pixels(), input_img_size=(3, 4, 4)).set_dtype(torch.float64)
    found = []
    for real, seed in ((True, 0), (False, 1)):
        summed = Moments(48)
        images = pictures(300, 4, seed) // (2 - real)
        for batch in images.split(64):
            theirs.update(batch, real=real)
            summed.add(Pixels()(batch))
        found += [summed.mean, summed.covariance]
    assert frechet_distance(*found) == pytest.approx(float(theirs.compute()), rel=RELATIVE)


@pytest.mark.parametrize("turn", [0.0, 0.4, math.pi / 2])
def test_the_frechet_distance_of_ellipses_has_a_closed_form(turn: float) -> None:
    """In two dimensions the trace of the root of M is (tr M + 2 det M^(1/2))^(1/2), whether or not A and B commute."""
    rotation = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]], dtype=torch.float64)
    a = torch.diag(torch.tensor([4.0, 0.25], dtype=torch.float64))
    b = rotation @ torch.diag(torch.tensor([9.0, 0.01], dtype=torch.float64)) @ rotation.T
    product = a @ b
    root = (product.trace() + 2 * torch.linalg.det(product).sqrt()).sqrt()
    shift = torch.tensor([3.0, -1.0], dtype=torch.float64)
    expected = 10 + a.trace() + b.trace() - 2 * root
    assert frechet_distance(0 * shift, a, shift, b) == pytest.approx(float(expected), rel=1e-9)


def test_samples_come_to_the_closed_form_of_their_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    deviations = torch.linspace(0.5, 2, 16, dtype=torch.float64)
    real, fake = torch.randn(2, 60_000, 16, generator=generator, dtype=torch.float64)
    expected = 16 * 0.5**2 + (deviations - 1).square().sum()
    assert frechet_distance(*moments(real), *moments(fake * deviations + 0.5)) == pytest.approx(
        float(expected), rel=0.02
    )


@pytest.mark.parametrize("splits", [1, 5, 10])
def test_the_inception_score_is_that_of_torch_fidelity(splits: int) -> None:
    logits = 4 * torch.randn(300, 20, generator=torch.Generator().manual_seed(0))
    theirs = metric_isc.isc_features_to_metric(logits, splits, shuffle=False)
    mean, deviation = inception_score(logits, splits, seed=None)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert deviation == pytest.approx(theirs["inception_score_std"], rel=1e-6, abs=1e-9)


@pytest.mark.filterwarnings("ignore:Metric:UserWarning")  # that it keeps all features
def test_scores_of_pictures_are_those_of_torchmetrics() -> None:
    real, fake = pictures(80, 4), pictures(80, 4, seed=1) // 2
    score, distance = InceptionScore(feature=Pixels(), splits=1), KernelInceptionDistance(Pixels(), 3, 80)
    for metric in (score, distance):
        metric.set_dtype(torch.float64)
    score.update(fake)
    distance.update(real, real=True)
    distance.update(fake, real=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the deviation of one split is none
        mean = float(score.compute()[0])
    assert inception_score(Pixels()(fake), 1)[0] == pytest.approx(mean, rel=1e-9)
    found = kernel_distance(Pixels()(real), Pixels()(fake), subsets=3, subset_size=80)
    assert found[0] == pytest.approx(float(distance.compute()[0]), rel=1e-8)


def test_the_kernel_distance_and_cmmd_are_those_of_torch_fidelity() -> None:
    real, fake = clouds(90, 24)
    options = {"kid_subsets": 2, "kid_subset_size": 90, "verbose": False}
    theirs = metric_kid.kid_features_to_metric(fake, real, **options)["kernel_inception_distance_mean"]
    assert kernel_distance(real, fake, subsets=2, subset_size=90)[0] == pytest.approx(theirs, rel=1e-8)
    options |= {"kid_kernel": "rbf", "kid_kernel_rbf_sigma": 10.0}
    theirs = metric_kid.kid_features_to_metric(fake, real, **options)["kernel_inception_distance_mean"]
    assert cmmd(real, fake, unbiased=True) == pytest.approx(1000 * theirs, rel=1e-8)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_those_of_torch_fidelity(k: int) -> None:
    real, fake = clouds(220, 6, offset=0.6)
    fake = fake[:150]
    theirs = metric_prc.calculate_precision_recall_full(fake, real, neighborhood=k)
    assert 0 < min(theirs) < max(theirs) < 1
    assert precision_recall(real, fake, k) == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_density_and_coverage_are_those_of_a_tree_of_points(k: int) -> None:
    real, fake = (each.numpy() for each in clouds(220, 6, offset=0.6))
    radii = KDTree(real).query(real, k + 1)[0][:, -1]  # the nearest is the point itself
    inside = KDTree(fake).query_ball_point(real, radii, return_length=True)
    assert 0 < (inside > 0).mean() < 1
    expected = (inside.sum() / (k * len(fake)), (inside > 0).mean())
    assert density_coverage(torch.tensor(real), torch.tensor(fake), k) == pytest.approx(expected, abs=1e-12)


# pictures


def test_figures_of_pairs_are_those_of_scikit_image() -> None:
    originals, made = pairs(96)
    found = pair_figures(originals, made)
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for number, (one, other) in enumerate(zip(originals, made, strict=True)):
        a, b = (each.permute(1, 2, 0).numpy() for each in (one, other))
        assert float(found["psnr"][number]) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), rel=1e-9)
        theirs = structural_similarity(a, b, data_range=255, channel_axis=-1, **window)
        assert float(found["ssim"][number]) == pytest.approx(theirs, abs=2e-5)
        theirs = structural_similarity(a / 255, b / 255, data_range=2, channel_axis=-1)
        assert float(found["legacy_ssim"][number]) == pytest.approx(theirs, abs=2e-5)
        assert float(found["mse"][number]) == np.mean((a.astype(float) - b) ** 2)


def test_figures_of_pairs_are_those_of_torchmetrics() -> None:
    originals, made = pairs(192)
    found = pair_figures(originals, made)
    a, b = made.double(), originals.double()
    theirs = psnr(a, b, data_range=255.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(found["psnr"], theirs, rtol=1e-6, atol=0)  # their range is float32
    theirs = multiscale_structural_similarity_index_measure(a, b, data_range=255.0, reduction="none", normalize="relu")
    torch.testing.assert_close(found["ms_ssim"], theirs, rtol=0, atol=2e-3)  # they keep the border of the last scale


@pytest.mark.filterwarnings("ignore:.*parameter 'pretrained':UserWarning")
@pytest.mark.filterwarnings("ignore:Arguments other than a weight enum:UserWarning")
@pytest.mark.parametrize("kind", ["alex", "vgg"])
def test_lpips_is_that_of_its_package(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    features = torchmetrics_lpips._get_tv_model_features
    monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda net, pretrained: features(net))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        distance = load_distance(f"lpips-{kind}", (48, 48))
        theirs = lpips.LPIPS(net=kind, pnet_rand=True, verbose=False)
    assert distance is not None
    for number in range(5):  # the published heads
        (one,), (another,) = (list(getattr(each, f"lin{number}").parameters()) for each in (distance.network, theirs))
        assert torch.equal(one, another)
        assert float(one.min()) >= 0 < float(one.max())
    theirs.net.load_state_dict(distance.network.net.state_dict())  # trunks are random here, nothing is fetched
    originals, made = pairs(48)
    with torch.no_grad():
        expected = theirs(originals / 127.5 - 1, made / 127.5 - 1).flatten().double()
    found = pair_figures(originals, made, distance)[f"lpips_{kind}"]
    assert found.min() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_the_shift_tolerant_heads_are_applied_as_lpips_applies_its_own() -> None:
    """One stage of our distance beside the package's steps: unit length, squared difference, head, mean of places."""
    distance = load_perceptual()
    maps = [torch.randn(2, 64, 9, 7, generator=torch.Generator().manual_seed(seed)).relu() for seed in (0, 1)]
    head = lpips.lpips.NetLinLayer(64, use_dropout=True).eval()
    with torch.no_grad():
        head.model[-1].weight.copy_(distance.heads[0].view(1, -1, 1, 1))
        unit = [lpips.normalize_tensor(each) for each in maps]
        expected = lpips.lpips.spatial_average(head((unit[0] - unit[1]) ** 2)).flatten()
        found = feature_distance(*maps, distance.heads[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
