"""What stands at a position depends on the seed and the position alone."""

import dataclasses
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softvq.data import latent_set
from softvq.data.latent_cache import LatentCache
from softvq.data.latent_set import LatentBatch, LatentSet
from softvq.data.order import index_at
from softvq.errors import InputError
from softvq.randomness import keys_of, uniform
from softvq.training.task import split

TOKENS, DIM = 2, 3
CPU = torch.device("cpu")


def make_cache(size: int = 10, views: int = 2, dtype: torch.dtype = torch.float16) -> LatentCache:
    """Latents that say which image and view they are of: 10 times the image, plus the view."""
    number = 10.0 * torch.arange(size)[:, None] + torch.arange(views)
    return LatentCache(
        latents=number[..., None, None].expand(-1, -1, TOKENS, DIM).to(dtype).contiguous(),
        labels=torch.arange(size) % 3,
        classes=("a", "b", "c"),
        names=tuple(f"{'abc'[i % 3]}/{i}.png" for i in range(size)),
        fingerprint="f",
        tokenizer="model",
        image_size=16,
        data_fingerprint="d",
        digest="e",
    )


def numbers(batch: LatentBatch) -> tuple[list[int], list[int]]:
    """Return images and views of a batch."""
    first = batch.latents[:, 0, 0]
    assert torch.equal(batch.latents, first[:, None, None].expand_as(batch.latents))
    return (first / 10).long().tolist(), (first % 10).long().tolist()


def stream(images: LatentSet, batch_size: int, steps: int, start: int = 0, world_size: int = 1) -> LatentBatch:
    """Return all positions of some steps, whichever way they were shared out."""
    ranks = [list(images.batches(batch_size, start, steps, rank, world_size)) for rank in range(world_size)]
    pieces = [batch for step in zip(*ranks, strict=True) for batch in step]
    return LatentBatch(
        **{f.name: torch.cat([getattr(b, f.name) for b in pieces]) for f in dataclasses.fields(LatentBatch)}
    )


def same(one: LatentBatch, other: LatentBatch) -> bool:
    return all(torch.equal(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(LatentBatch))


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(1, 5), st.sampled_from([1, 2, 3]), st.integers(0, 9), st.integers(0, 3))
def test_a_position_holds_the_same_however_it_is_asked_for(
    size: int, share: int, world_size: int, start: int, seed: int
) -> None:
    images = LatentSet(make_cache(size), CPU, seed)
    batch_size, steps = share * world_size, 4
    found = stream(images, batch_size, steps, start, world_size)
    first = start * batch_size
    assert found.positions.tolist() == list(range(first, first + steps * batch_size))
    assert numbers(found)[0] == [index_at(position, size, seed) for position in found.positions.tolist()]
    alone = stream(images, 1, first + steps * batch_size)
    assert same(
        found,
        LatentBatch(latents=alone.latents[first:], labels=alone.labels[first:], positions=alone.positions[first:]),
    )


def test_views_are_chosen_by_the_coin_of_the_position() -> None:
    found = stream(LatentSet(make_cache(), CPU, seed=3), 8, 50)
    expected = uniform(keys_of(3, "flip", found.positions)) < 0.5
    views = torch.tensor(numbers(found)[1])
    assert torch.equal(views, expected.long())
    assert 0.4 < views.float().mean() < 0.6


def test_every_image_once_an_epoch_and_both_views_over_time() -> None:
    found = stream(LatentSet(make_cache(), CPU, seed=0), 10, 40)
    images, views = numbers(found)
    for epoch in range(40):
        assert sorted(images[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert len(Counter(zip(images, views, strict=True))) == 20


def test_labels_belong_to_names() -> None:
    cache = make_cache()
    found = stream(LatentSet(cache, CPU, seed=1), 4, 5)
    for image, label in zip(numbers(found)[0], found.labels.tolist(), strict=True):
        assert cache.names[image].startswith(f"{cache.classes[label]}/")


def test_a_batch_may_be_larger_than_the_set() -> None:
    (batch,) = LatentSet(make_cache(3), CPU, seed=0).batches(10, 5, 1)
    assert numbers(batch)[0] == [index_at(position, 3, 0) for position in range(50, 60)]


@pytest.mark.parametrize(("views", "flip"), [(1, True), (1, False), (2, False)])
def test_without_flips_photographs_are_as_they_are(views: int, flip: bool) -> None:
    images = LatentSet(make_cache(views=views), CPU, 0, flip)
    assert set(numbers(stream(images, 5, 8))[1]) == {0}
    assert numbers(stream(images, 5, 8))[0] == numbers(stream(LatentSet(make_cache(), CPU, 0), 5, 8))[0]


def test_seeds_differ() -> None:
    one, other = (stream(LatentSet(make_cache(), CPU, seed), 10, 3) for seed in (0, 1))
    assert numbers(one)[0] != numbers(other)[0]
    assert numbers(one)[1] != numbers(other)[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_batches_are_float32_and_can_be_split(dtype: torch.dtype) -> None:
    images = LatentSet(make_cache(dtype=dtype), CPU, 0)
    assert len(images) == 10
    assert images.classes == ("a", "b", "c")
    (batch,) = images.batches(6, 0, 1)
    assert batch.latents.dtype == torch.float32
    assert [part.positions.tolist() for part in split(batch, 2, CPU)] == [[0, 1, 2], [3, 4, 5]]


def test_no_global_randomness_and_no_values_on_the_host() -> None:
    before = torch.get_rng_state()
    images = LatentSet(make_cache(), torch.device("meta"), 0)  # no value is there to be looked at
    images._order = lambda epoch: torch.empty(10, dtype=torch.int64, device="meta")
    batches = list(images.batches(4, 0, 6))
    assert [tuple(batch.latents.shape) for batch in batches] == [(4, TOKENS, DIM)] * 6
    assert torch.equal(torch.get_rng_state(), before)


def test_too_little_memory_says_how_little(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(1000)
    needed = 1000 * 2 * TOKENS * DIM * 2 + 1000 * 8
    monkeypatch.setattr(latent_set, "_free_bytes", lambda device: needed)
    LatentSet(cache, CPU, 0)
    monkeypatch.setattr(latent_set, "_free_bytes", lambda device: needed - 1)
    with pytest.raises(InputError, match=r"the latents take 0\.00 GiB, but 0\.00 GiB of cpu are free"):
        LatentSet(cache, CPU, 0)
    LatentSet(cache, CPU, 0, flip=False)  # half of them


@pytest.mark.parametrize(("batch_size", "world_size"), [(0, 1), (5, 2)])
def test_a_batch_that_cannot_be_shared_out(batch_size: int, world_size: int) -> None:
    with pytest.raises(
        InputError, match=f"batch_size is {batch_size}, expected a positive multiple of the {world_size}"
    ):
        LatentSet(make_cache(), CPU, 0).batches(batch_size, 0, 1, 0, world_size)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_without_waiting_for_the_host() -> None:
    here, there = LatentSet(make_cache(), CPU, 0), LatentSet(make_cache(), "cuda", 0)
    batches = there.batches(4, 0, 6)
    found = [next(batches)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found += list(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(here.batches(4, 0, 6), found, strict=True):
        assert same(one, LatentBatch(**{f.name: getattr(other, f.name).cpu() for f in dataclasses.fields(LatentBatch)}))
