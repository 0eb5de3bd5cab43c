"""Streams are pure functions of their key, and the same in every release."""

import itertools

import pytest
import torch

from softvq.randomness import fold_in, generator, keys_of, manual_seed, normal, seed_of, uniform

KEYS = [458480144296515684, -1175178834724009946, 8835682878422521016]
UNIFORM = [0.93444353, 0.12083989, 0.88647944]
NORMAL = [0.31316209, 1.75282693, 0.47828689]


@pytest.mark.parametrize(
    ("key", "seed"),
    [
        ((0,), 7520536977032167579),
        ((0, "augment", 5), 5142896083214653008),
        ((1, "noise", 123456789), 8237501010343412126),
        ((-1, "größe"), 3542751108751287969),
        ((9223372036854775808, "a", 0, "b"), 5193429555972728368),
    ],
)
def test_seeds_never_change(key: tuple[int | str, ...], seed: int) -> None:
    """A released seed that changes makes every earlier run impossible to resume or repeat."""
    assert seed_of(*key) == seed


def test_draws_never_change() -> None:
    drawn = torch.randint(0, 2**31, (4,), generator=generator(0, "augment", 5))
    assert drawn.tolist() == [1374549879, 899350150, 812058277, 588023796]


def test_a_stream_is_a_function_of_its_key_alone() -> None:
    first = torch.rand(8, generator=generator(3, "noise", 1))
    torch.rand(100)
    torch.rand(100, generator=generator(3, "noise", 0))
    assert torch.equal(first, torch.rand(8, generator=generator(3, "noise", 1)))


def test_every_part_of_the_key_matters() -> None:
    keys = [
        (0,),
        (1,),
        (0, "a"),
        (0, "b"),
        (0, "a", 0),
        (0, "a", 1),
        (0, "a", "1"),
        (0, 1, "a"),
        (0, "a", 0, 0),
        (0, "a", 11),
        (0, "a", 1, 1),
        (0, "a/b"),
        (0, "a", "b"),
        (0, 'a", "b'),
        (0, ""),
        (-1,),
    ]
    seeds = [seed_of(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_neighbouring_streams_are_uncorrelated() -> None:
    count = 64
    streams = torch.stack([torch.randn(4096, generator=generator(0, "noise", position)) for position in range(count)])
    correlation = torch.corrcoef(streams) - torch.eye(count)
    assert correlation.abs().max() < 6 / 4096**0.5  # six standard errors; 2016 pairs reach about four
    assert streams[:, 0].std() > 0.7  # not the same first draw again and again


def test_numbers_of_another_kind_are_refused() -> None:
    with pytest.raises(Exception, match=r"JSON serializable|Type-check error"):
        seed_of(0, torch.tensor(1))


def test_manual_seed_sets_the_global_generator() -> None:
    draws = []
    for key in itertools.chain([("a", 1)] * 2, [("a", 2)]):
        manual_seed(0, *key)
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(draws[0], torch.rand(4, generator=generator(0, "a", 1)))


def test_keyed_draws_never_change() -> None:
    keys = keys_of(0, "noise", torch.tensor([0, 1, 10**12]))
    assert keys.tolist() == KEYS
    torch.testing.assert_close(uniform(keys, 1)[:, 0], torch.tensor(UNIFORM), rtol=0, atol=1e-7)
    torch.testing.assert_close(normal(keys, 1)[:, 0], torch.tensor(NORMAL), rtol=0, atol=1e-5)


def test_keyed_draws_belong_to_the_sample_and_not_to_the_batch() -> None:
    keys = keys_of(3, "noise", torch.arange(6))
    for draw in (uniform, normal):
        whole = draw(keys, 4, 5)
        assert torch.equal(whole, torch.cat([draw(keys[:1], 4, 5), draw(keys[1:], 4, 5)]))
        assert torch.equal(whole[:, :2], draw(keys, 2, 5))


def test_keyed_draws_have_their_distribution() -> None:
    keys = keys_of(0, "test", torch.arange(500))
    for draws, cdf in ((uniform(keys, 40), lambda x: x), (normal(keys, 40), torch.special.ndtr)):
        ordered = cdf(draws.flatten().double()).sort().values
        steps = torch.arange(1, len(ordered) + 1) / len(ordered)
        assert (ordered - steps).abs().max() < 1.63 / len(ordered) ** 0.5  # Kolmogorov and Smirnov at 1%
    draws = normal(keys, 40)
    for lag in (torch.corrcoef(draws.T), torch.corrcoef(draws[:40]), torch.corrcoef(draws[::12])):
        assert (lag - torch.eye(len(lag))).abs().max() < 0.75  # unrelated over indices and over keys
    assert uniform(keys, 2000).min() > 0
    assert uniform(keys, 2000).max() < 1


def test_folding_gives_other_streams() -> None:
    keys = keys_of(0, "test", torch.arange(400))
    others = (fold_in(keys, 0), fold_in(keys, 1), keys_of(1, "test", torch.arange(400)))
    streams = torch.stack([normal(k, 1)[:, 0] for k in (keys, *others)])
    assert (torch.corrcoef(streams) - torch.eye(4)).abs().max() < 0.2
