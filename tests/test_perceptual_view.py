"""What the perceptual distance sees of pictures larger than its size."""

from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

from softvq.data.folder import Batch
from softvq.errors import InputError
from softvq.training.tokenizer_task import LossConfig, TokenizerTask
from tests.test_tokenizer_task import Darker, batch


class Keeps(nn.Module):
    """A distance that remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def forward(self, images: Tensor, targets: Tensor) -> Float[Tensor, "batch"]:
        self.pairs.append((images.detach(), targets))
        return images.mean(dim=(1, 2, 3))


def seen(one: Batch, **loss: Any) -> tuple[Tensor, Tensor]:
    """Return what the perceptual distance sees of reconstructions and of images."""
    keeps = Keeps()
    config = LossConfig(perceptual_warmup_steps=0, perceptual_size=18, **loss)
    TokenizerTask(Darker(), config, perceptual=keeps)(one, 0)
    return keeps.pairs[0]


def test_shrinking_averages_pixels() -> None:
    one = batch(1)
    _, targets = seen(one)
    torch.testing.assert_close(targets[0, :, 0, 1], one.images[0, :, :2, 2:4].mean(dim=(1, 2)))


def test_the_perceptual_network_sees_the_same_square_of_both_pictures() -> None:
    one = batch(12)
    images, targets = seen(one, perceptual_view="crop")
    windows = one.images.unfold(2, 18, 1).unfold(3, 18, 1).permute(0, 2, 3, 1, 4, 5)
    places = (windows == targets[:, None, None]).flatten(3).all(3).nonzero()
    assert places[:, 0].tolist() == list(range(12))
    assert len(places[:, 1:].unique(dim=0)) > 6
    output = Darker()(one.images).images.detach()
    expected = torch.stack([output[i, :, row : row + 18, column : column + 18] for i, row, column in places.tolist()])
    assert torch.equal(images, expected)


def test_either_view_is_sometimes_the_whole() -> None:
    one = batch(12)
    _, targets = seen(one, perceptual_view="either")
    whole = torch.isclose(targets, seen(one)[1], atol=1e-6).flatten(1).all(1)
    assert 0 < whole.sum() < 12


def test_a_view_without_a_size_is_refused() -> None:
    with pytest.raises(InputError, match="perceptual_view is 'crop', which needs perceptual_size, its side"):
        LossConfig(perceptual_view="crop")
