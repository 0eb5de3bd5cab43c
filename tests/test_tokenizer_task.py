import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from softvq.config import from_dict
from softvq.data.folder import Batch
from softvq.errors import InputError
from softvq.losses.perceptual import PerceptualDistance
from softvq.randomness import fold_in, keys_of
from softvq.tokenizers.alignment import alignment_loss, distance_matrix_loss, patch_features
from softvq.tokenizers.autoencoder import ImageTokenizer, TokenizerOutput
from softvq.tokenizers.presets import preset
from softvq.training.adversary import adversarial_weight_at
from softvq.training.tokenizer_recipe import build_task
from softvq.training.tokenizer_task import LossConfig, TokenizerTask, perceptual_weight_at, softening_at
from tests import family


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


def task(name: str = "softvq", *, every_flag: bool = False, corruption: dict[str, Any] | None = None, **loss: Any):
    """Build the task of a small recipe with some changes in its losses."""
    recipe = family.recipe(family.QUANTIZERS[name], every_flag=every_flag)
    base = family.EVERY_LOSS if every_flag else family.PLAIN_LOSS
    changed = from_dict(LossConfig, {**base, **loss})
    if corruption is not None:
        recipe = dataclasses.replace(recipe, corruption=from_dict(type(recipe.corruption), corruption))
    weightless = dataclasses.replace(changed, perceptual_weight=0.0)
    ours = build_task(dataclasses.replace(recipe, loss=weightless), torch.device("cpu"))
    ours.config = changed
    ours.perceptual = PerceptualDistance(widths=(4, 8), depths=(1, 1), seed=0)
    return ours


def pictures(step: int = 0) -> Batch:
    return family.pictures(family.recipe(family.SOFT), step)


def cosine_distance(predicted: Tensor, features: Tensor, hidden: Tensor) -> Tensor:
    """Image by image, over the quarters of a picture, of which each has four patches."""
    total = torch.zeros(())
    for ours, theirs, mask in zip(predicted, features, hidden, strict=True):
        share = mask.view(2, 2, 2, 2).float().mean(dim=(1, 3)).flatten()  # [row, inner row, column, inner column]
        share = share if mask.any() else torch.ones(4)
        apart = torch.stack([1 - F.cosine_similarity(a, b, dim=0) for a, b in zip(ours, theirs, strict=True)])
        total = total + (apart * share).sum() / share.sum()
    return total / len(predicted)


def plainly(ours: TokenizerTask, one: Batch, step: int, num_tokens: int | None) -> Tensor:
    """The loss as an equation, differentiated by autograd from end to end."""
    config, keys = ours.config, keys_of(ours.seed, "model", one.positions)
    softening = softening_at(config, step)
    settings = {"corruption": ours.corruption, "num_tokens": num_tokens, "softening": softening}
    output = ours.tokenizer(one.images, fold_in(keys, 0), **settings)
    apart = output.images - one.images
    loss = apart.square().mean() if config.reconstruction == "l2" else apart.abs().mean()
    loss = loss + perceptual_weight_at(config, step) * ours.perceptual(output.images, one.images).mean()
    if config.adversarial is not None:
        weight = adversarial_weight_at(config.adversarial, step)
        loss = loss + weight * ours.critic.fool(output.images, fold_in(keys, 1))
    if config.alignment is not None:
        features = patch_features(ours.teacher, one.images)
        projected = ours.heads["projector"](output.latents)
        terms = alignment_loss(projected, features, config.alignment.mode, config.alignment.cosine_margin)
        margin = config.alignment.distance_margin
        terms = terms + config.alignment.distance_weight * distance_matrix_loss(output.latents, features, margin)
        loss = loss + config.alignment.weight * terms
    if config.features is not None:
        predicted = ours.heads["feature_decoder"](output.latents, (2, 2))
        loss = loss + config.features.weight * cosine_distance(predicted, features, output.masked)
    return loss + sum(output.losses.values())


def drawn_tokens(ours: TokenizerTask, step: int) -> int | None:
    """The number of tokens that a step of training decodes."""
    seen: list[int | None] = []
    handle = ours.tokenizer.register_forward_pre_hook(
        lambda _, __, named: seen.append(named["num_tokens"]), with_kwargs=True
    )
    ours(pictures(step), step)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["softvq", "kl", "residual"])
@pytest.mark.parametrize("reconstruction", ["l2", "l1"])
@pytest.mark.parametrize("step", [2, 9])
def test_the_gradient_is_that_of_the_plain_sum_of_everything(name: str, reconstruction: str, step: int) -> None:
    adversarial = {**family.EVERY_LOSS["adversarial"], "adaptive": False}
    alignment = {**family.EVERY_LOSS["alignment"], "adaptive": False}
    loss = {"reconstruction": reconstruction, "perceptual_weight": 0.7, "perceptual_warmup_steps": 5}
    ours = task(name, every_flag=True, adversarial=adversarial, alignment=alignment, **loss)
    one, parameters = pictures(), dict(ours.model.named_parameters())
    expected = plainly(ours, one, step, drawn_tokens(ours, step))
    slopes = torch.autograd.grad(expected, list(parameters.values()), allow_unused=True)
    total, *_ = ours(one, step)
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    torch.testing.assert_close(total.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    largest = max(float(slope.abs().max()) for slope in slopes if slope is not None)
    for key, mine, theirs in zip(parameters, found, slopes, strict=True):
        assert (mine is None) == (theirs is None), key
        if theirs is not None:
            torch.testing.assert_close(
                mine, theirs, rtol=1e-3, atol=1e-5 * largest, msg=lambda text, key=key: key + text
            )


def test_the_adaptive_alignment_pulls_on_the_latents_as_hard_as_the_pixels() -> None:
    alignment = {**family.EVERY_LOSS["alignment"], "weight": 0.3}
    ours = task("none", alignment=alignment)
    one, config = pictures(), ours.config.alignment
    loss, report, _ = ours(one, 0)
    output = ours.tokenizer(one.images)
    features = patch_features(ours.teacher, one.images)
    terms = alignment_loss(ours.heads["projector"](output.latents), features, config.mode, config.cosine_margin)
    terms = terms + distance_matrix_loss(output.latents, features, config.distance_margin)
    (pixels,) = torch.autograd.grad(F.mse_loss(output.images, one.images), output.latents, retain_graph=True)
    (aligned,) = torch.autograd.grad(terms, output.latents, retain_graph=True)
    scale = math.sqrt(pixels.numel())
    expected = scale * pixels.norm() / (scale * aligned.norm() + 1e-4)
    torch.testing.assert_close(report["alignment_weight"], expected, rtol=1e-4, atol=0)
    total = F.mse_loss(output.images, one.images) + 0.3 * expected * terms
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-6)
    mine, theirs = (
        torch.autograd.grad(x, ours.tokenizer.to_latents.weight, retain_graph=True)[0] for x in (loss, total)
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))


def test_a_teacher_may_be_for_the_features_alone() -> None:
    alignment = {**family.EVERY_LOSS["alignment"], "weight": 0.0}
    ours = task(alignment=alignment, features={"weight": 2.0, **family.EVERY_LOSS["features"]})
    assert ours.heads.keys() == {"feature_decoder"}
    loss, report, _ = ours(pictures(), 0)
    assert report.keys() == {"reconstruction", "entropy", "features"}
    total = report["reconstruction"] + report["entropy"] + 2 * report["features"]
    torch.testing.assert_close(loss.detach(), total.detach())
    with pytest.raises(InputError, match="features needs the teacher of alignment; add alignment, with weight 0"):
        LossConfig(features=ours.config.features)


class Guess(nn.Module):
    """Predictions that are weights."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.randn(8, 4, 64, generator=torch.Generator().manual_seed(0)))

    def forward(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        assert grid == (2, 2)
        return self.values


@pytest.mark.parametrize("ratio", [[0.1, 0.3], [-0.3, 0.2], [0.0, 0.0]])
def test_features_count_where_patches_are_hidden(ratio: list[float]) -> None:
    loss = {key: family.EVERY_LOSS[key] for key in ("alignment", "features")}
    ours = task("none", corruption={"mask_ratio": ratio}, **loss)
    guess = ours.heads["feature_decoder"] = Guess()
    _, report, _ = ours(pictures(), 0)
    keys = fold_in(keys_of(0, "model", pictures().positions), 0)
    masked = ours.tokenizer(pictures().images, keys, corruption=ours.corruption).masked
    masked = torch.zeros(8, 16, dtype=torch.bool) if masked is None else masked
    features = patch_features(ours.teacher, pictures().images)
    torch.testing.assert_close(report["features"], cosine_distance(guess.values, features, masked))
    report["features"].backward()
    counts = masked.view(8, 2, 2, 2, 2).any(dim=4).any(dim=2).flatten(1)
    counts = counts | ~masked.any(dim=1, keepdim=True)  # all of an image of which nothing is hidden
    assert ratio[1] == 0 or not bool(counts.all())
    assert torch.equal((guess.values.grad != 0).any(dim=2), counts)


def test_the_temperature_falls_by_the_same_factor_each_step() -> None:
    config = LossConfig(anneal_from=16.0, anneal_steps=4)
    assert [softening_at(config, step) for step in (0, 1, 2, 3, 4, 5, 1000)] == [16, 8, 4, 2, 1, 1, 1]
    assert [softening_at(LossConfig(), step) for step in (0, 7)] == [1, 1]
    assert softening_at(LossConfig(anneal_from=0.25, anneal_steps=2), 1) == 0.5


@pytest.mark.parametrize("step", [0, 2, 4])
def test_the_posterior_is_softened_as_the_schedule_says(step: int) -> None:
    ours = task(anneal_from=16.0, anneal_steps=4)
    _, _, (fakes, *_) = ours(pictures(), step)
    expected = ours.tokenizer(pictures().images, softening={0: 16.0, 2: 4.0, 4: 1.0}[step]).images
    torch.testing.assert_close(fakes, expected.detach())


def nested(least: int = 1) -> TokenizerTask:
    recipe = family.recipe(family.QUANTIZERS["softvq"])
    model = dataclasses.replace(recipe.model, min_latent_tokens=least)
    return build_task(dataclasses.replace(recipe, model=model), torch.device("cpu"))


def test_the_number_of_tokens_is_a_function_of_the_step() -> None:
    ours = nested()
    counts = [drawn_tokens(ours, step) for step in range(60)]
    again = nested()
    assert counts[:20] == [drawn_tokens(again, step) for step in range(20)]
    for count in (1, 2, 4):
        assert 8 <= counts.count(count) <= 34  # of 20 expected, p = 1e-4
    assert drawn_tokens(task(), 0) is None


def test_the_decoder_sees_the_first_tokens_alone() -> None:
    ours = nested()
    step = next(step for step in range(60) if drawn_tokens(ours, step) == 2)
    plain = ours(pictures(), step)[2][0]

    def spoil(first: int) -> Tensor:
        def change(_: nn.Module, __: object, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
            spoiled = output[0].clone()
            spoiled[:, first] += 3
            return spoiled, output[1]

        handle = ours.tokenizer.quantizer.register_forward_hook(change)
        made = ours(pictures(), step)[2][0]
        handle.remove()
        return made

    assert torch.equal(spoil(2), plain)
    assert torch.equal(spoil(3), plain)
    assert not torch.allclose(spoil(1), plain, atol=1e-3)


HEALTHY = {"perplexity": 9.0, "posterior_entropy": 1.0, "max_probability": 0.5}
SICK = {
    "one": ({"perplexity": 1.2}, "all tokens have the same likeliest codeword"),
    "uniform": ({"posterior_entropy": 0.99 * math.log(16)}, "nearly uniform over the codewords"),
    "one-hot": ({"max_probability": 0.995}, "nearly one-hot, as in VQ"),
}


@pytest.mark.parametrize("kind", sorted(SICK))
@pytest.mark.parametrize("name", ["softvq", "gmmvq", "residual-product"])
def test_a_collapsed_codebook_is_told_of(name: str, kind: str) -> None:
    figures, sentence = SICK[kind]
    found = task(name).warnings({**HEALTHY, **figures})
    assert found.keys() == {kind}
    assert sentence in found[kind]
    assert task(name).warnings(HEALTHY) == {}


@pytest.mark.parametrize("name", ["vq", "residual"])
def test_what_is_one_hot_by_design_is_not_told_of(name: str) -> None:
    ours = task(name)
    figures = {key: float(value) for key, value in ours.figures(ours.health(pictures())).items()}
    assert (figures["max_probability"], figures["posterior_entropy"]) == (1.0, 0.0)
    assert ours.warnings({**figures, "perplexity": 9.0}) == {}
    assert ours.warnings({**figures, "perplexity": 1.0}).keys() == {"one"}


@pytest.mark.parametrize("name", ["kl", "none"])
def test_without_a_codebook_there_is_nothing_to_tell(name: str) -> None:
    ours = task(name)
    assert ours.figures(ours.health(pictures())) == {}
    assert ours.warnings({"loss": 1.0}) == {}
