"""A discriminator's losses by hand, whose weights and pixels get which gradients, and when nothing of it is called."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softvq.config import from_dict
from softvq.errors import InputError
from softvq.losses.adversarial import LeCam, consistency_loss, discriminator_loss, generator_loss
from softvq.losses.augment import augment
from softvq.losses.discriminators import Discriminator
from softvq.randomness import fold_in, keys_of
from softvq.training import adversary as module
from softvq.training.adversary import AdversarialConfig, Adversary, adversarial_weight_at
from softvq.training.tokenizer_recipe import build_task
from softvq.training.tokenizer_task import TokenizerTask
from tests import family

KINDS: dict[str, dict[str, Any]] = {
    "dino": family.EVERY_LOSS["adversarial"]["discriminator"],
    "patchgan": {"kind": "patchgan", "width": 8, "depth": 2},
    "stylegan": {"kind": "stylegan", "width": 8, "max_width": 16, "group": 2},
}


def build(kind: str = "patchgan", **changes: object) -> Adversary:
    torch.manual_seed(0)
    config = from_dict(AdversarialConfig, {"discriminator": KINDS[kind], "start": 0, **changes})
    return Adversary(config, image_size=32)


def draw(seed: int, count: int = 8) -> Tensor:
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")


def keys(count: int = 8) -> Tensor:
    return keys_of(0, "model", torch.arange(count))


def task(kind: str = "patchgan", **changes: object) -> TokenizerTask:
    recipe = family.recipe(family.QUANTIZERS["none"])
    adversarial = from_dict(AdversarialConfig, {"discriminator": KINDS[kind], "start": 0, **changes})
    return build_task(
        dataclasses.replace(recipe, loss=dataclasses.replace(recipe.loss, adversarial=adversarial)), torch.device("cpu")
    )


def batch(step: int = 0):
    return family.pictures(family.recipe(family.QUANTIZERS["none"]), step)


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def test_the_weight_waits_jumps_or_rises_and_stays() -> None:
    steps = (0, 9, 10, 11, 12, 13, 14, 1000)
    sudden = AdversarialConfig(weight=0.2, start=10)
    assert [adversarial_weight_at(sudden, step) for step in steps] == [0, 0, *[0.2] * 6]
    rising = AdversarialConfig(weight=2.0, start=10, warmup_steps=4)
    assert [adversarial_weight_at(rising, step) for step in steps] == [0, 0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert adversarial_weight_at(AdversarialConfig(weight=0.2, start=0), 0) == 0.2
    with pytest.raises(InputError, match=r"weight is 0.0, expected more than 0; leave adversarial out"):
        AdversarialConfig(weight=0.0)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("checkpoint", [False, True])
def test_fooling_moves_the_pixels_alone(kind: str, checkpoint: bool) -> None:
    ours = build(kind, checkpoint=checkpoint)
    fakes = draw(0).requires_grad_()
    ours.fool(fakes, keys()).backward()
    assert gradients(ours) == {}
    assert fakes.grad is not None
    assert (fakes.grad.flatten(1).abs().sum(dim=1) > 0).all()
    assert all(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("checkpoint", [False, True])
def test_judging_moves_the_discriminator_alone(kind: str, checkpoint: bool) -> None:
    ours = build(kind, checkpoint=checkpoint)
    fakes, images = draw(0).requires_grad_(), draw(1)
    loss, _ = ours(fakes, images, keys(), 0.2)
    loss.backward()
    assert fakes.grad is None
    found = gradients(ours)
    assert found.keys() == dict(ours.named_parameters()).keys()
    assert any(bool((value != 0).any()) for value in found.values())


def test_fooling_is_minus_the_mean_verdict_on_what_was_changed() -> None:
    ours = build(augment_probability=1.0)
    seed = fold_in(keys(), 2)
    changed = augment(draw(0), seed, color=True, translation=0.125, cutout=0.2, probability=1.0)
    with torch.no_grad():
        verdicts = ours.discriminator(changed, seed)
        assert float(ours.fool(draw(0), keys())) == pytest.approx(-float(verdicts.mean()), rel=1e-5)
    ours = build(augment_probability=0.0, loss="non_saturating")
    with torch.no_grad():
        expected = generator_loss(ours.discriminator(draw(0), seed), "non_saturating")
        assert float(ours.fool(draw(0), keys())) == pytest.approx(float(expected), rel=1e-5)


def judged(ours: Adversary, weight: float | Tensor = 0.2) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    loss, report = ours(draw(0), draw(1), keys(), weight)
    loss.backward()
    return loss.detach(), {name: value.detach() for name, value in report.items()}, gradients(ours)


def fooled(ours: Adversary) -> tuple[Tensor, Tensor]:
    fakes = draw(0).requires_grad_()
    loss = ours.fool(fakes, keys())
    return loss.detach(), torch.autograd.grad(loss, fakes)[0]


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize(
    "changes", [{"checkpoint": True}, {"micro_batches": 4}, {"checkpoint": True, "micro_batches": 2}]
)
def test_saving_memory_changes_nothing(kind: str, changes: dict[str, object]) -> None:
    plain, ours = build(kind), build(kind, **changes)
    for first, second in zip(fooled(plain), fooled(ours), strict=True):
        torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-7)
    loss, report, found = judged(plain)
    loss_too, report_too, found_too = judged(ours)
    torch.testing.assert_close(loss_too, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(report_too, report, rtol=1e-4, atol=1e-6)
    largest = max(float(value.abs().max()) for value in found.values())
    torch.testing.assert_close(found_too, found, rtol=1e-3, atol=1e-5 * largest)
    states = [{name: value for name, value in one.state_dict().items() if "mean_" in name} for one in (plain, ours)]
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-9)  # the averages of LeCam moved once


def test_micro_batches_may_outnumber_the_samples() -> None:
    torch.testing.assert_close(judged(build(micro_batches=64))[0], judged(build())[0])


def counted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Note the probability of every call of the augmentation: 1 is the strong one's."""
    calls: list[float] = []

    def counting(images: Tensor, keys: Tensor, **options: Any) -> Tensor:
        calls.append(options["probability"])
        return augment(images, keys, **options)

    monkeypatch.setattr(module, "augment", counting)
    return calls


@pytest.mark.parametrize(("weight", "expected"), [(0.0, [0.5, 0.5]), (4.0, [0.5, 1.0, 0.5, 1.0])])
def test_strong_augmentation_is_computed_only_if_it_counts(
    weight: float, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    _, report = build(consistency_weight=weight)(draw(0), draw(1), keys(), 0.2)
    assert calls == expected
    assert ("consistency" in report) == (weight > 0)


def by_hand(ours: Adversary, weight: float) -> Tensor:
    """The discriminator's loss, term by term, from its verdicts."""
    config, verdicts = ours.config, {}
    for name, images, number in (("fake", draw(0), 0), ("real", draw(1), 1)):
        seed = fold_in(keys(), number)
        common = {"color": config.color, "translation": config.translation}
        weak = augment(images, seed, **common, cutout=config.cutout, probability=config.augment_probability)
        strong = augment(images, fold_in(seed, 1), **common, cutout=0.5, probability=1.0)
        verdicts[name] = ours.discriminator(weak, seed), ours.discriminator(strong, seed)
    (fake, fake_strong), (real, real_strong) = verdicts["fake"], verdicts["real"]
    hinge = (nn.functional.relu(1 - real).mean() + nn.functional.relu(1 + fake).mean()) / 2
    torch.testing.assert_close(discriminator_loss(real, fake, "hinge"), hinge)
    mean_real, mean_fake = (
        (1 - config.lecam_decay) * real.detach().mean(),
        (1 - config.lecam_decay) * fake.detach().mean(),
    )
    lecam = nn.functional.relu(real - mean_fake).square().mean() + nn.functional.relu(mean_real - fake).square().mean()
    pairs = ((fake, fake_strong), (real, real_strong))
    consistency = sum((weak - strong).square().mean() for weak, strong in pairs) / 2
    torch.testing.assert_close(consistency, (consistency_loss(*pairs[0]) + consistency_loss(*pairs[1])) / 2)
    score = hinge + config.lecam_weight * lecam
    return weight * score + config.consistency_weight * consistency


@pytest.mark.parametrize("weight", [0.0, 0.35, 0.7])
def test_the_discriminators_loss_is_the_sum_of_its_terms(weight: float) -> None:
    settings = {"lecam_weight": 0.5, "lecam_decay": 0.8, "consistency_weight": 3.0}
    ours = build(**settings)
    for name, parameter in ours.named_parameters():
        if name.endswith("logit.weight"):
            parameter.data *= 50  # verdicts that count, of both signs of the hinge
    expected = by_hand(ours, weight)
    slopes = torch.autograd.grad(expected, list(ours.parameters()))
    loss, report, found = judged(ours, weight)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-6)
    largest = max(float(slope.abs().max()) for slope in slopes)
    for mine, theirs in zip(found.values(), slopes, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5 * largest)
    terms = report["discriminator"] + 0.5 * report["lecam"]
    total = weight * terms + 3.0 * report["consistency"]
    torch.testing.assert_close(loss, total)
    assert float(report["lecam"]) > 1e-4
    assert float(report["consistency"]) > 1e-4


def test_without_lecam_its_averages_stay() -> None:
    ours = build(lecam_weight=0.0, consistency_weight=0.0)
    loss, report, _ = judged(ours, torch.tensor(0.5))  # a tensor, as a recording has it
    assert report.keys() == {"discriminator", "logits_real", "logits_fake"}
    torch.testing.assert_close(loss, 0.5 * report["discriminator"])
    assert float(ours.lecam.mean_real) == 0.0
    assert isinstance(ours.lecam, LeCam)


class Raises(Discriminator):
    def forward(self, images: Tensor, keys: Tensor) -> Tensor:
        raise AssertionError("the discriminator was called")

    def advance(self) -> None:
        raise AssertionError("the discriminator was called")


def test_before_its_start_nothing_of_it_is_called() -> None:
    ours = task(start=3)
    assert ours.critic is not None
    ours.critic.discriminator = Raises()
    for step in range(3):
        assert not ours.critic_counts(step)
        loss, report, _ = ours(batch(step), step)
        assert "adversarial" not in report
        torch.testing.assert_close(loss.detach(), report["reconstruction"])
    assert ours.critic_counts(3)
    with pytest.raises(AssertionError, match="the discriminator was called"):
        ours(batch(3), 3)


def pixel_gradients(ours: TokenizerTask, step: int = 0) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """The gradient at the pixels of the whole loss, of the reconstruction alone, and of the adversarial term alone."""
    assert ours.critic is not None
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Any) -> None:
        output.images.retain_grad()
        kept.append(output.images)

    handle = ours.tokenizer.register_forward_hook(keep)
    one = batch(step)
    loss, report, _ = ours(one, step)
    loss.backward()
    handle.remove()
    images = kept[0].detach().requires_grad_()
    (main,) = torch.autograd.grad(nn.functional.mse_loss(images, one.images), images)
    seed = fold_in(keys_of(ours.seed, "model", one.positions), 1)
    (other,) = torch.autograd.grad(ours.critic.fool(images, seed), images)
    assert kept[0].grad is not None
    return kept[0].grad, main, other, report


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_adaptive_weight_makes_both_pull_alike(kind: str) -> None:
    whole, main, other, report = pixel_gradients(task(kind, adaptive=True, weight=0.5))
    added = whole - main
    scale = main.numel() ** 0.5  # a gradient of the mean, free of the number of values
    ratio = scale * main.norm() / (scale * other.norm() + 1e-4)
    torch.testing.assert_close(report["adaptive_weight"], ratio, rtol=1e-4, atol=0)
    torch.testing.assert_close(added, 0.5 * ratio * other, rtol=1e-3, atol=1e-3 * float(added.abs().max()))
    if scale * float(other.norm()) > 0.1:  # where the summand of 1e-4 is small
        assert float(added.norm()) == pytest.approx(0.5 * float(main.norm()), rel=2e-3)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_without_it_the_adversarial_gradient_has_its_weight(kind: str) -> None:
    whole, main, other, report = pixel_gradients(task(kind, weight=0.5, warmup_steps=2))
    added = whole - main
    torch.testing.assert_close(added, 0.25 * other, rtol=1e-3, atol=1e-3 * float(added.abs().max()))
    assert "adaptive_weight" not in report


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_judges_what_a_task_made(kind: str) -> None:
    ours = task(kind, weight=0.5, warmup_steps=4)
    assert ours.critic is not None
    loss, report, made = ours(batch(), 2)
    loss.backward()
    assert gradients(ours.critic) == {}
    assert {"reconstruction", "adversarial"} <= report.keys()
    verdict, more = ours.critic(*made)
    verdict.backward()
    assert bool(verdict.isfinite())
    assert {"discriminator", "lecam", "consistency", "logits_real", "logits_fake"} == more.keys()
    assert any(bool((value != 0).any()) for value in gradients(ours.critic).values())
    fakes, images, _, weight = made
    assert (weight, fakes.requires_grad) == (0.375, False)
    assert torch.equal(images, batch().images)


RANGES = {
    "weight": -1.0, "start": -1, "warmup_steps": -1, "lecam_weight": -0.1, "consistency_weight": float("nan"),
    "translation": 1.5, "cutout": -0.1, "augment_probability": 2.0, "lecam_decay": 1.0, "micro_batches": 0,
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), list(RANGES.items()))
def test_impossible_values_are_named(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{field} is {value}, expected"):
        AdversarialConfig(**{field: value})
