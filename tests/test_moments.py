import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from softvq import ranks
from softvq.errors import InputError
from softvq.evaluation.frechet import moments
from softvq.evaluation.moments import Moments
from softvq.training import distributed
from tests.ranks import run_as_ranks


def cloud(count, dim=5, offset=0.0, seed=0, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=random)
    return (torch.randn(count, dim, generator=random) @ mixing + offset).to(dtype)


def added(*batches, dim=5):
    found = Moments(dim)
    for batch in batches:
        found.add(batch)
    return found


def assert_is_numpys(found, features, rtol=1e-9):
    exact = features.double().numpy()
    assert found.count == len(features)
    np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1e-13, atol=1e-14)
    expected = np.cov(exact, rowvar=False)
    np.testing.assert_allclose(found.covariance, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


@given(cuts=st.lists(st.integers(0, 97), max_size=8), offset=st.sampled_from([0.0, 1e3, -1e6]))
def test_any_split_into_batches_gives_numpys_covariance(cuts, offset):
    features = cloud(97, offset=offset)
    edges = [0, *sorted(cuts), 97]
    batches = [features[a:b] for a, b in itertools.pairwise(edges)]  # some of them are empty
    assert_is_numpys(added(*batches), features)


def test_far_from_zero_no_digits_are_lost():
    features = cloud(400, offset=1e8, dtype=torch.float64)
    assert_is_numpys(added(*features.split(7)), features, rtol=1e-6)  # float64 itself has 1e-8 of the offset left


def test_a_batch_larger_than_what_is_held_in_float64_at_once():
    features = cloud(10_000, offset=300)
    assert_is_numpys(added(features), features)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_summed_in_float64(dtype):
    features = cloud(3000, offset=30, dtype=dtype)
    assert_is_numpys(added(*features.split(100)), features)


def test_the_order_hardly_matters():
    batches = cloud(300, offset=50).split(31)
    one, other = added(*batches), added(*reversed(batches))
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(one.covariance, other.covariance, rtol=1e-11, atol=1e-11)


@given(cuts=st.lists(st.integers(0, 60), min_size=1, max_size=4))
def test_merged_parts_are_the_whole_and_stay_what_they_were(cuts):
    features = cloud(60, offset=200)
    edges = [0, *sorted(cuts), 60]
    parts = [added(features[a:b]) for a, b in itertools.pairwise(edges)]
    counts = [part.count for part in parts]
    assert_is_numpys(parts[0].merged(parts[1:]), features)
    assert [part.count for part in parts] == counts
    whole = parts[0].merged(parts[1:])
    whole.add(features)  # does not reach the first part
    assert parts[0].count == counts[0]


def test_in_one_process_over_ranks_is_a_copy():
    features = cloud(20)
    found = added(features)
    copy = found.over_ranks()
    copy.add(features + 9)
    assert_is_numpys(found, features)


def test_the_function_for_whole_clouds_gives_the_same():
    features = cloud(500, offset=40)
    mean, covariance = moments(features)
    assert torch.equal(mean, added(features).mean)
    assert torch.equal(covariance, added(features).covariance)


def test_what_was_read_cannot_change_what_is_kept():
    found = added(cloud(20))
    before = found.mean
    found.mean.zero_()
    found.covariance.zero_()
    assert torch.equal(found.mean, before)
    assert found.covariance.abs().max() > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_found_at_the_end(bad):
    features = cloud(20)
    features[3, 1] = bad
    found = added(features[:10], features[10:])
    with pytest.raises(InputError, match="features holds values that are not finite"):
        _ = found.covariance
    with pytest.raises(InputError, match="features holds values that are not finite"):
        _ = found.mean


def test_wrong_input_is_told():
    with pytest.raises(InputError, match="dim is 0, expected at least 1"):
        Moments(0)
    with pytest.raises(InputError, match="features has 4 dimensions, expected 5"):
        added(torch.zeros(3, 4))
    with pytest.raises(InputError, match="others has moments of 4 dimensions, expected 5"):
        added(cloud(3)).merged([Moments(4)])
    with pytest.raises(InputError, match="features has 0 samples, expected at least 1 for a mean"):
        _ = Moments(5).mean
    with pytest.raises(InputError, match="features has 1 samples, expected at least 2 for a covariance"):
        _ = added(cloud(1)).covariance


def add_as_rank(folder):
    distributed.join(torch.device("cpu"))
    try:
        features = cloud(101, offset=1e5)
        first, second = (slice(0, 73), slice(73, 101))
        uneven = added(features[first if ranks.rank() == 0 else second].clone()).over_ranks()
        one_sided = added(*([features] if ranks.rank() == 1 else [])).over_ranks()
        nothing = Moments(5).over_ranks()
        found = {"mean": uneven.mean, "covariance": uneven.covariance, "one_sided": one_sided.covariance}
        counts = torch.tensor([uneven.count, one_sided.count, nothing.count])
        save_file(found | {"counts": counts}, f"{folder}/{ranks.rank()}.safetensors")
    finally:
        distributed.leave()


def test_two_processes_together_have_the_moments_of_all(tmp_path):
    run_as_ranks(add_as_rank, tmp_path)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["counts"].tolist() == [101, 101, 0]
    exact = cloud(101, offset=1e5).double().numpy()
    np.testing.assert_allclose(first["mean"], exact.mean(0), rtol=1e-13)
    for name in ("covariance", "one_sided"):
        np.testing.assert_allclose(first[name], np.cov(exact, rowvar=False), rtol=1e-8, atol=1e-8)
