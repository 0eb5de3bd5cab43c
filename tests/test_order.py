import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softvq.data.order import index_at

SIZES = st.integers(1, 60)
SEEDS = st.integers(0, 2**40)


@given(SIZES, SEEDS, st.integers(0, 10**6))
def test_every_epoch_visits_every_index_once(size: int, seed: int, epoch: int) -> None:
    assert sorted(index_at(epoch * size + place, size, seed) for place in range(size)) == list(range(size))


@given(SIZES, SEEDS, st.lists(st.integers(0, 500), min_size=1, max_size=20))
def test_an_index_does_not_depend_on_what_was_asked_before(size: int, seed: int, positions: list[int]) -> None:
    forwards = [index_at(position, size, seed) for position in positions]
    backwards = [index_at(position, size, seed) for position in reversed(positions)]
    assert forwards == backwards[::-1]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(index_at(e * 50 + p, 50, seed) for p in range(50)) for e in range(4) for seed in range(4)}
    assert len(orders) == 16


def test_no_global_randomness_is_used() -> None:
    before = torch.get_rng_state()
    index_at(123_456, 789, 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_first_places_are_uniform() -> None:
    counts = torch.bincount(torch.tensor([index_at(e * 4, 4, 0) for e in range(2000)]), minlength=4)
    chi_squared = ((counts - 500.0).square() / 500.0).sum()
    assert chi_squared < 16.3  # 0.1 % of honest shuffles are beyond it


@pytest.mark.parametrize(("position", "size"), [(-1, 5), (0, 0)])
def test_our_own_mistakes_are_asserted(position: int, size: int) -> None:
    with pytest.raises(AssertionError):
        index_at(position, size, 0)
