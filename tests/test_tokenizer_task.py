import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

from softvq.data.folder import Batch
from softvq.errors import InputError
from softvq.tokenizers.autoencoder import ImageTokenizer, TokenizerOutput
from softvq.tokenizers.presets import preset
from softvq.training.tokenizer_task import LossConfig, TokenizerTask, perceptual_weight_at


class Darker(ImageTokenizer):
    """A tokenizer that takes a fixed amount off every pixel."""

    def __init__(self) -> None:
        super().__init__(preset("softvq-tiny-16", image_size=16))
        self.amount = nn.Parameter(torch.tensor(0.5))

    def forward(self, images: Tensor, *_, **__) -> TokenizerOutput:
        losses = {"entropy": self.amount * -0.25, "commitment": self.amount * 0.0 + 0.125}
        return TokenizerOutput(images=images - self.amount, latents=torch.zeros(len(images), 2, 3), losses=losses)


class Counted(nn.Module):
    """A distance of 2, 4, 6, ... for the images of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, images: Tensor, targets: Tensor) -> Float[Tensor, "batch"]:
        assert images.shape == targets.shape
        self.sizes.append(images.shape[-1])
        return torch.arange(1, len(images) + 1) * 2.0 + 0 * images.sum()


def batch(count: int = 2, size: int = 36) -> Batch:
    images = torch.rand(count, 3, size, size) * 2 - 1
    labels, positions = torch.full((count,), -1), torch.arange(count)
    return Batch(images=images, labels=labels, positions=positions, skipped=[])


def test_the_loss_is_the_sum_of_its_terms() -> None:
    config = LossConfig(perceptual_weight=0.5, perceptual_warmup_steps=0)
    loss, report, _ = TokenizerTask(Darker(), config, perceptual=Counted())(batch(), 0)
    assert float(loss.detach()) == pytest.approx(0.25 + 0.5 * 3.0 - 0.125 + 0.125)
    assert {name: round(value.item(), 6) for name, value in report.items()} == {
        "reconstruction": 0.25,
        "entropy": -0.125,
        "commitment": 0.125,
        "perceptual": 3.0,
    }


def test_absolute_differences_on_request() -> None:
    task = TokenizerTask(Darker(), LossConfig(reconstruction="l1", perceptual_weight=0.0))
    _, report, _ = task(batch(), 0)
    assert float(report["reconstruction"].detach()) == pytest.approx(0.5)


def test_every_term_reaches_the_weights() -> None:
    tokenizer = Darker()
    loss, *_ = TokenizerTask(tokenizer, LossConfig(perceptual_weight=0.0))(batch(), 0)
    loss.backward()
    assert float(tokenizer.amount.grad) == pytest.approx(2 * 0.5 - 0.25)  # of amount^2 and of the entropy


def test_the_perceptual_weight_waits_rises_and_stays() -> None:
    config = LossConfig(perceptual_weight=2.0, perceptual_start=10, perceptual_warmup_steps=4)
    weights = [perceptual_weight_at(config, step) for step in (0, 9, 10, 11, 12, 13, 14, 1000)]
    assert weights == [0.0, 0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    assert perceptual_weight_at(LossConfig(), 5_000) == 0.5  # the published ramp, min(1, step / 10000)


def test_the_perceptual_network_does_not_run_while_its_weight_is_zero() -> None:
    counted = Counted()
    task = TokenizerTask(Darker(), LossConfig(perceptual_start=3, perceptual_warmup_steps=2), perceptual=counted)
    reports = [task(batch(), step)[1] for step in range(5)]
    assert len(counted.sizes) == 1
    assert ["perceptual" in report for report in reports] == [False, False, False, False, True]


def test_the_perceptual_network_sees_smaller_images_on_request() -> None:
    counted = Counted()
    config = LossConfig(perceptual_warmup_steps=0, perceptual_size=18)
    TokenizerTask(Darker(), config, perceptual=counted)(batch(), 0)
    assert counted.sizes == [18]


def test_shrinking_averages_pixels() -> None:
    seen: list[Tensor] = []

    class Keeps(nn.Module):
        def forward(self, images: Tensor, targets: Tensor) -> Float[Tensor, "batch"]:
            seen.append(targets)
            return images.mean(dim=(1, 2, 3))

    one = batch(1)
    TokenizerTask(Darker(), LossConfig(perceptual_warmup_steps=0, perceptual_size=18), perceptual=Keeps())(one, 0)
    torch.testing.assert_close(seen[0][0, :, 0, 1], one.images[0, :, :2, 2:4].mean(dim=(1, 2)))


def test_the_real_tokenizer_learns_a_batch_by_heart() -> None:
    torch.manual_seed(0)
    task = TokenizerTask(ImageTokenizer(preset("softvq-tiny-16", image_size=16)), LossConfig(perceptual_weight=0.0))
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
    one = batch(2, 16)
    losses = []
    for step in range(60):
        loss, report, _ = task(one, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(report["reconstruction"].detach()))
    assert losses[-1] < losses[0] / 3
    assert "entropy" in report


@pytest.mark.parametrize(
    ("field", "value"),
    [("perceptual_weight", -1.0), ("perceptual_start", -1), ("perceptual_warmup_steps", -1), ("perceptual_size", 8)],
)
def test_config_refuses(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{field} is {value}, expected"):
        LossConfig(**{field: value})
