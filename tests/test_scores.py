import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from softvq.errors import InputError
from softvq.evaluation.scores import (
    biased_because,
    cmmd,
    density_coverage,
    inception_score,
    kernel_distance,
    precision_recall,
)

PAIRS = [kernel_distance, cmmd, precision_recall, density_coverage]


def random(*shape, seed=0, offset=0.0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale + offset


def figures(real, fake, chunk=2048):
    """Every figure of a pair of sets, in one list."""
    size = min(len(real), len(fake))
    return [
        *kernel_distance(real, fake, subsets=1, subset_size=size, chunk=chunk),
        cmmd(real, fake, sigma=2.0, chunk=chunk),
        cmmd(real, fake, sigma=2.0, unbiased=True, chunk=chunk),
        *precision_recall(real, fake, chunk=chunk),
        *density_coverage(real, fake, chunk=chunk),
    ]


# inception score


@pytest.mark.filterwarnings("ignore:Metric:UserWarning")  # that it keeps all features
@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")  # features are put in directly
@pytest.mark.parametrize("splits", [1, 4])
def test_the_inception_score_is_that_of_torchmetrics(splits):
    logits = random(200, 12, scale=3)
    theirs = InceptionScore(feature=nn.Identity(), splits=splits)
    theirs.features.append(logits.double())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        order = torch.randperm(200)
        torch.manual_seed(0)
        if splits == 1:  # its deviation of a single split is not a number, which torch warns of
            with pytest.warns(UserWarning, match="degrees of freedom"):
                mean, _ = theirs.compute()
        else:
            mean, deviation = theirs.compute()
    found = inception_score(logits[order], splits, seed=None)
    assert found[0] == pytest.approx(float(mean), rel=1e-10)
    if splits > 1:  # theirs has the divisor splits - 1
        assert found[1] == pytest.approx(float(deviation) * math.sqrt((splits - 1) / splits), rel=1e-9)


def test_the_inception_score_has_closed_forms():
    sure = torch.eye(7).repeat(5, 1)
    assert inception_score(sure, 1, probabilities=True) == (pytest.approx(7, rel=1e-12), 0)
    assert inception_score(1000 * sure, 1)[0] == pytest.approx(7, rel=1e-12)
    assert inception_score(torch.zeros(35, 7), 5) == (pytest.approx(1, rel=1e-12), pytest.approx(0, abs=1e-12))
    assert inception_score(sure[:1].repeat(9, 1), 3, probabilities=True)[0] == pytest.approx(1, rel=1e-12)
    # half the samples say (p, 1 - p), half the reverse: log 2 minus the entropy
    p = 0.8
    values = torch.tensor([[p, 1 - p], [1 - p, p]], dtype=torch.float64).repeat(8, 1)
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    found = inception_score(values, 1, probabilities=True)[0]
    assert found == pytest.approx(math.exp(math.log(2) - entropy), rel=1e-12)


def test_shuffling_saves_the_inception_score_of_sorted_samples():
    values = torch.eye(10).repeat_interleave(50, 0)
    assert inception_score(values, 10, probabilities=True, seed=None)[0] == pytest.approx(1)
    shuffled = inception_score(values, 10, probabilities=True)
    assert shuffled[0] > 8
    assert shuffled == inception_score(values, 10, probabilities=True)
    assert shuffled != inception_score(values, 10, probabilities=True, seed=1)


def test_the_inception_score_depends_on_neither_chunk_nor_form():
    logits = random(103, 9, scale=2)
    whole = inception_score(logits, 4)
    assert inception_score(logits, 4, chunk=7) == pytest.approx(whole, rel=1e-12)
    assert inception_score(logits.double().softmax(1), 4, probabilities=True) == pytest.approx(whole, rel=1e-12)
    assert inception_score(logits, 1)[0] == pytest.approx(inception_score(logits.flip(0), 1)[0], rel=1e-12)


def test_wrong_values_for_the_inception_score_are_told():
    with pytest.raises(InputError, match="splits is 4, expected 1 to the 3 samples"):
        inception_score(torch.zeros(3, 5), 4)
    with pytest.raises(InputError, match="values holds rows that are no probabilities"):
        inception_score(torch.ones(3, 5), 1, probabilities=True)
    with pytest.raises(InputError, match="values holds rows that are no probabilities"):
        inception_score(torch.tensor([[1.5, -0.5]]), 1, probabilities=True)
    with pytest.raises(InputError, match="values holds values that are not finite"):
        inception_score(torch.full((3, 5), math.nan), 1)
    with pytest.raises(InputError, match="values has 0 samples"):
        inception_score(torch.zeros(0, 5), 1)


# kernel distance


@pytest.mark.filterwarnings("ignore:Metric:UserWarning")
@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_the_kernel_distance_is_that_of_torchmetrics():
    real, fake = random(40, 8), random(40, 8, seed=1, offset=0.5)
    theirs = KernelInceptionDistance(feature=nn.Identity(), subsets=2, subset_size=40)
    theirs.real_features.append(real.double())
    theirs.fake_features.append(fake.double())
    mean, deviation = theirs.compute()
    found = kernel_distance(real, fake, subsets=2, subset_size=40)
    assert found[0] == pytest.approx(float(mean), rel=1e-10)
    assert found[1] == pytest.approx(float(deviation), abs=1e-10)


def test_the_kernel_distance_is_the_sum_over_pairs():
    real, fake = random(9, 3).double().numpy(), random(6, 3, seed=1, offset=1).double().numpy()

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    within = [
        np.mean([kernel(x, y) for i, x in enumerate(part) for j, y in enumerate(part) if i != j])
        for part in (real[:6], fake)
    ]
    across = np.mean([[kernel(x, y) for y in fake] for x in real[:6]])
    found = kernel_distance(torch.tensor(real[:6]), torch.tensor(fake), subsets=1, subset_size=6)
    assert found == (pytest.approx(sum(within) - 2 * across, rel=1e-12), 0)


def test_subsets_are_keyed_by_the_seed_and_differ():
    real, fake = random(60, 4), random(50, 4, seed=1)
    found = kernel_distance(real, fake, subsets=5, subset_size=20, seed=3)
    assert found == kernel_distance(real, fake, subsets=5, subset_size=20, seed=3)
    assert found[0] != kernel_distance(real, fake, subsets=5, subset_size=20, seed=4)[0]
    assert found[1] > 0


def test_the_kernel_distance_of_one_distribution_is_zero_on_average():
    mean, deviation = kernel_distance(random(2000, 8), random(2000, 8, seed=1), subsets=40, subset_size=200)
    assert abs(mean) < deviation / 2
    assert kernel_distance(random(2000, 8), random(2000, 8, seed=1, offset=0.5), subsets=4, subset_size=200)[0] > 1


# CMMD


@pytest.mark.parametrize("unbiased", [False, True])
def test_cmmd_is_the_sum_over_pairs(unbiased):
    real, fake = random(9, 3).double().numpy(), random(6, 3, seed=1, offset=1).double().numpy()

    def mean(a, b, skip):
        values = np.exp(-np.square(a[:, None] - b).sum(2) / (2 * 10**2))
        return (values.sum() - np.trace(values) * skip) / (len(a) * (len(b) - skip))

    expected = 1000 * (mean(real, real, unbiased) + mean(fake, fake, unbiased) - 2 * mean(real, fake, False))
    found = cmmd(torch.tensor(real), torch.tensor(fake), unbiased=unbiased)
    assert found == pytest.approx(expected, rel=1e-9)


def test_cmmd_of_two_points_has_a_closed_form():
    a, b = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
    assert cmmd(a, b) == pytest.approx(2000 * (1 - math.exp(-25 / 200)), rel=1e-12)
    assert cmmd(a, b, sigma=5.0, scale=1.0) == pytest.approx(2 * (1 - math.exp(-0.5)), rel=1e-12)
    cloud = random(50, 6, offset=3)
    assert cmmd(cloud, cloud) == pytest.approx(0, abs=1e-9)


# balls


def brute_force(real, fake, k):
    """Precision, recall, density and coverage from whole matrices of distances, in numpy."""
    real, fake = real.double().numpy(), fake.double().numpy()

    def distances(a, b):
        return np.sqrt(np.square(a[:, None] - b[None]).sum(2))

    radius_real = np.sort(distances(real, real), 1)[:, k]  # the nearest is the point itself
    radius_fake = np.sort(distances(fake, fake), 1)[:, k]
    in_real = distances(fake, real) <= radius_real
    in_fake = distances(real, fake) <= radius_fake
    return in_real.any(1).mean(), in_fake.any(1).mean(), in_real.sum(1).mean() / k, in_real.any(0).mean()


@given(seed=st.integers(0, 1000), k=st.integers(1, 6), offset=st.sampled_from([0.0, 0.7, 100.0]))
def test_the_balls_are_those_of_brute_force(seed, k, offset):
    real, fake = random(31, 3, seed=seed, offset=offset), random(23, 3, seed=seed + 5000, offset=1.3 * offset)
    precision, recall, density, coverage = brute_force(real, fake, k)
    assert precision_recall(real, fake, k) == pytest.approx((precision, recall), abs=1e-12)
    assert density_coverage(real, fake, k) == pytest.approx((density, coverage), abs=1e-12)


@pytest.mark.parametrize("chunk", [3, 16, 2048])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_a_set_is_wholly_in_its_own_region(chunk, offset):
    cloud = random(50, 40, offset=offset)
    assert precision_recall(cloud, cloud.flip(0), chunk=chunk) == (1, 1)
    density, coverage = density_coverage(cloud, cloud.flip(0), 5, chunk=chunk)
    # each ball holds its centre and five neighbours, of which the last is on the edge
    assert (density, coverage) == (pytest.approx(6 / 5, rel=1e-12), 1)


def test_points_on_a_line_have_a_closed_form():
    real = torch.arange(10.0)[:, None]
    fake = torch.tensor([[0.5], [4.0], [30.0], [40.0]])
    assert precision_recall(real, fake, 1) == (0.5, pytest.approx(0.8))  # 0..3.. are within 3.5 of 0.5 or of 4
    # 0.5 is in the balls of 0 and 1, and 4 in those of 3, 4 and 5
    assert density_coverage(real, fake, 1) == (pytest.approx(5 / 4), pytest.approx(0.5))


def test_few_modes_cost_recall_and_noise_costs_precision():
    real = random(400, 4)
    assert precision_recall(real, random(400, 4, seed=1, scale=0.2))[0] > 0.95
    assert precision_recall(real, random(400, 4, seed=1, scale=0.2))[1] < 0.5
    assert precision_recall(real, random(400, 4, seed=1, scale=4))[0] < 0.5


def test_equal_points_have_balls_of_no_size():
    points = torch.full((6, 2), 0.3)
    assert precision_recall(points, points) == (1, 1)
    assert precision_recall(points, points + 1e-3) == (0, 0)


# all of them


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_no_figure_depends_on_the_chunk(chunk):
    real, fake = random(23, 5), random(17, 5, seed=1, offset=0.4)
    assert figures(real[:17], fake, chunk) == pytest.approx(figures(real[:17], fake), rel=1e-9, abs=1e-10)
    assert figures(real, fake, chunk)[2:] == pytest.approx(figures(real, fake)[2:], rel=1e-9, abs=1e-10)


def test_no_figure_depends_on_the_order():
    real, fake = random(47, 5), random(47, 5, seed=1, offset=0.4)
    order = torch.randperm(47, generator=torch.Generator().manual_seed(2))
    assert figures(real[order], fake.flip(0)) == pytest.approx(figures(real, fake), rel=1e-9, abs=1e-10)


def test_low_precision_is_computed_in_float64():
    real, fake = random(47, 5, offset=4).bfloat16(), random(47, 5, seed=1, offset=4).bfloat16()
    assert figures(real, fake) == figures(real.double(), fake.double())


@pytest.mark.parametrize("figure", PAIRS)
def test_wrong_sets_are_told(figure):
    sets = random(9, 3), random(9, 3, seed=1)
    options = {"subset_size": 9} if figure is kernel_distance else {}
    with pytest.raises(InputError, match="real has 3 dimensions and fake 4, expected the same features"):
        figure(sets[0], torch.zeros(9, 4), **options)
    broken = sets[0].clone()
    broken[2, 1] = math.nan
    with pytest.raises(InputError, match="real holds values that are not finite"):
        figure(broken, sets[1], **options)
    with pytest.raises(InputError, match="fake holds values that are not finite"):
        figure(sets[0], broken, **options)
    with pytest.raises(InputError, match="fake has 0 samples, expected at least"):
        figure(sets[0], sets[1][:0], **options)
    with pytest.raises(InputError, match="chunk is 0, expected at least 1"):
        figure(*sets, chunk=0, **options)


def test_wrong_settings_are_told():
    sets = random(9, 3), random(9, 3, seed=1)
    with pytest.raises(InputError, match="subset_size is 1000, expected 2 to the 9 samples"):
        kernel_distance(*sets)
    with pytest.raises(InputError, match="subsets is 0, expected at least 1"):
        kernel_distance(*sets, subsets=0, subset_size=9)
    with pytest.raises(InputError, match=r"sigma is 0\.0, expected a number above 0"):
        cmmd(*sets, sigma=0.0)
    with pytest.raises(InputError, match="k is 0, expected at least 1"):
        precision_recall(*sets, 0)
    with pytest.raises(InputError, match="real has 9 samples, expected at least 10"):
        density_coverage(*sets, 9)


@pytest.mark.parametrize(("n", "dim", "is_biased"), [(2, 2, True), (3, 2, False), (100, 2048, True), (1, 1, True)])
def test_too_few_samples_for_a_frechet_distance_are_named(n, dim, is_biased):
    reason = biased_because(n, dim)
    assert (reason is not None) == is_biased
    assert reason is None or f"{n} samples of {dim} feature dimensions" in reason
    covariance = torch.cov(random(n, dim).double().T) if n > 1 else torch.zeros(1, 1)
    if dim < 10:  # what the sentence says is so
        assert (int(torch.linalg.matrix_rank(torch.atleast_2d(covariance))) < dim) == is_biased
