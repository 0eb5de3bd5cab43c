"""Attribution against its closed form for a decoder that is linear in tokens."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from softvq.evaluation.attribution import owner_picture, token_attribution, token_colours, token_maps
from softvq.tokenizers.autoencoder import ImageTokenizer

TOKENS, DIM, SIZE = 5, 3, 4


class Linear(ImageTokenizer):
    """Paints a sum over tokens, each with weights of its own, and counts what it is asked for."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        weights = torch.randn(TOKENS, DIM, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        self.register_buffer("weights", weights.double())
        self.batches: list[int] = []

    def decode(self, latents: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        self.batches.append(len(latents))
        return torch.einsum("btd,tdchw->bchw", latents, self.weights)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("batch_size", [1, 4, 10, 99])  # 4 does not divide the 10 pictures there are to decode
def test_a_linear_decoder_has_a_closed_form(batch_size: int) -> None:
    tokenizer, latents, baseline = Linear(), draw(2, TOKENS, DIM), draw(TOKENS, DIM, seed=2)
    found = token_attribution(tokenizer, latents, baseline, batch_size)
    changes = torch.einsum("btd,tdchw->btchw", latents - baseline, tokenizer.weights)
    torch.testing.assert_close(found, changes.abs().mean(2).float())
    assert max(tokenizer.batches) <= batch_size
    assert sum(tokenizer.batches) == 2 + 2 * TOKENS


def test_no_token_is_left_out_or_taken_for_another() -> None:
    tokenizer, latents, baseline = Linear(), draw(1, TOKENS, DIM), draw(TOKENS, DIM, seed=2)
    everything = token_attribution(tokenizer, latents, baseline, 2)
    assert everything.shape == (1, TOKENS, SIZE, SIZE)
    assert bool((everything.flatten(2).amax(2) > 0).all())
    for token in range(TOKENS):
        unlike = baseline.clone()
        unlike[token] += 1
        found = token_attribution(tokenizer, latents, unlike, 2)
        differ = (found != everything).flatten(2).any(2)[0]
        assert differ.tolist() == [place == token for place in range(TOKENS)]


def test_a_token_equal_to_the_baseline_changes_nothing() -> None:
    latents, baseline = draw(1, TOKENS, DIM), draw(TOKENS, DIM, seed=2)
    latents[0, 3] = baseline[3]
    found = token_attribution(Linear(), latents, baseline)[0]
    assert [bool((one == 0).all()) for one in found] == [False, False, False, True, False]
    assert not np.asarray(token_maps(found)[3]).any()


def test_the_latents_stay_as_they_were() -> None:
    latents = draw(1, TOKENS, DIM)
    before = latents.clone()
    token_attribution(Linear(), latents, torch.zeros(TOKENS, DIM).double())
    assert torch.equal(latents, before)


def test_a_pixel_takes_the_colour_of_the_token_that_changes_it_most() -> None:
    attribution = torch.zeros(3, 2, 2)
    attribution[1, 0, 0], attribution[2, 0, 0] = 0.5, 0.4
    attribution[2, 0, 1], attribution[0, 1, 0] = 0.1, 9.0
    colours = (255 * token_colours(3)).round().int().tolist()
    pixels = np.asarray(owner_picture(attribution)).tolist()
    assert pixels == [[colours[1], colours[2]], [colours[0], [0, 0, 0]]]


def test_a_map_is_brightest_at_its_own_largest_change() -> None:
    attribution = torch.zeros(2, 1, 2)
    attribution[0, 0] = torch.tensor([0.0, 8.0])
    attribution[1, 0] = torch.tensor([0.04, 0.01])
    colours = 255 * token_colours(2)
    first, second = (np.asarray(picture)[0] for picture in token_maps(attribution))
    assert first.tolist() == [[0, 0, 0], colours[0].round().int().tolist()]
    assert second.tolist() == [colours[1].round().int().tolist(), (colours[1] / 2).round().int().tolist()]


@pytest.mark.parametrize("count", [1, 16, 64, 128])
def test_tokens_have_colours_of_their_own(count: int) -> None:
    colours = token_colours(count)
    assert colours.shape == (count, 3)
    assert colours.min() >= 0
    assert colours.max() <= 1
    assert len({tuple(colour) for colour in (255 * colours).round().tolist()}) == count
    assert colours.amax(1).min() >= 0.5  # seen on black
