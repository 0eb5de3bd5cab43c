"""Adversarial losses against closed forms, torch's own cross-entropy and a simulation in NumPy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from softvq.losses import adversarial
from softvq.losses.adversarial import LeCam, adaptive_weight, consistency_loss, discriminator_loss, generator_loss
from softvq.randomness import generator

KINDS = ["hinge", "logistic", "non_saturating"]


def logits(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=generator(seed, "test"))


def test_hinge_by_hand():
    real, fake = torch.tensor([[2.0, 0.0], [1.0, -1.0]]), torch.tensor([[-3.0, 0.5], [-1.0, 1.0]])
    assert discriminator_loss(real, fake, "hinge").item() == ((0 + 1 + 0 + 2) / 4 + (0 + 1.5 + 0 + 2) / 4) / 2
    assert generator_loss(fake, "hinge").item() == 2.5 / 4


@pytest.mark.parametrize("kind", ["logistic", "non_saturating"])
def test_discriminator_loss_is_the_cross_entropy_of_real_and_fake(kind):
    real, fake = logits(4, 7), logits(4, 7, seed=1)
    entropy = F.binary_cross_entropy_with_logits
    expected = (entropy(real, torch.ones(4, 7)) + entropy(fake, torch.zeros(4, 7))) / 2
    torch.testing.assert_close(discriminator_loss(real, fake, kind), expected)


def test_non_saturating_generator_loss_is_the_cross_entropy_with_real():
    fake = logits(4, 7)
    expected = F.binary_cross_entropy_with_logits(fake, torch.ones(4, 7))
    torch.testing.assert_close(generator_loss(fake, "non_saturating"), expected)
    torch.testing.assert_close(generator_loss(fake, "logistic"), -fake.mean())


@pytest.mark.parametrize("kind", KINDS)
def test_steps_move_the_right_logits_the_right_way(kind):
    real, fake = logits(3, 5, scale=0.3).requires_grad_(), logits(3, 5, seed=1, scale=0.3).requires_grad_()
    real_slope, fake_slope = torch.autograd.grad(discriminator_loss(real, fake, kind), (real, fake))
    assert (real_slope < 0).all()  # the discriminator raises logits of photographs
    assert (fake_slope > 0).all()  # and lowers those of reconstructions
    (slope,) = torch.autograd.grad(generator_loss(fake, kind), fake)
    assert (slope < 0).all()  # the generator raises them


def test_slopes_at_the_ends():
    far = torch.tensor([[-50.0, 50.0]], requires_grad=True)
    (slope,) = torch.autograd.grad(generator_loss(far, "non_saturating"), far)
    torch.testing.assert_close(slope, torch.tensor([[-0.5, 0.0]]), atol=1e-6, rtol=0)
    (slope,) = torch.autograd.grad(discriminator_loss(far, far.detach(), "hinge"), far)
    assert slope.tolist() == [[-0.25, 0.0]]


@pytest.mark.parametrize("kind", KINDS)
def test_undecided_discriminator(kind):
    zero = torch.zeros(2, 3)
    expected = 1.0 if kind == "hinge" else math.log(2)
    assert discriminator_loss(zero, zero, kind).item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_float32_of_any_logits(kind):
    real, fake = logits(4, 3).bfloat16(), logits(4, 3, seed=1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        losses = [discriminator_loss(real, fake, kind), generator_loss(fake, kind), consistency_loss(real, fake)]
        losses += [LeCam()(real, fake), adaptive_weight(real, fake)]
    expected = [discriminator_loss(real.float(), fake.float(), kind), generator_loss(fake.float(), kind)]
    expected += [consistency_loss(real.float(), fake.float()), LeCam()(real.float(), fake.float())]
    expected += [adaptive_weight(real.float(), fake.float())]
    for found, value in zip(losses, expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, value)


def test_lecam_against_numpy():
    lecam = LeCam(decay=0.9)
    mean_real = mean_fake = 0.0
    for step in range(30):
        real, fake = logits(4, 3, seed=step) + 1, logits(4, 3, seed=100 + step) - 1
        x, y = real.double().numpy(), fake.double().numpy()
        mean_real, mean_fake = 0.9 * mean_real + 0.1 * x.mean(), 0.9 * mean_fake + 0.1 * y.mean()
        expected = np.mean(np.maximum(x - mean_fake, 0) ** 2) + np.mean(np.maximum(mean_real - y, 0) ** 2)
        assert lecam(real, fake).item() == pytest.approx(expected, rel=1e-5)
    assert lecam.mean_real.item() == pytest.approx(mean_real, rel=1e-5)
    assert lecam.mean_fake.item() == pytest.approx(mean_fake, rel=1e-5)
    assert set(lecam.state_dict()) == {"mean_real", "mean_fake"}


def test_lecam_pulls_the_sides_together():
    lecam = LeCam(decay=0.5)
    real, fake = torch.full((2, 2), 3.0, requires_grad=True), torch.full((2, 2), -3.0, requires_grad=True)
    loss = lecam(real, fake)
    assert loss.item() == 2 * 4.5**2  # the averages are half of the way, 1.5 and -1.5
    slopes = torch.autograd.grad(loss, (real, fake))
    assert slopes[0].tolist() == [[2.25] * 2] * 2  # 2 x 4.5 / 4
    assert slopes[1].tolist() == [[-2.25] * 2] * 2


def test_lecam_leaves_its_averages_in_eval_mode_and_after_a_bad_step():
    lecam = LeCam(decay=0.5)
    lecam(torch.ones(2, 2), -torch.ones(2, 2))
    lecam.eval()(torch.full((2, 2), 9.0), torch.full((2, 2), 9.0))
    assert (lecam.mean_real.item(), lecam.mean_fake.item()) == (0.5, -0.5)
    lecam.train()(torch.full((2, 2), math.nan), -torch.ones(2, 2))  # the whole step is bad, not one side of it
    lecam(torch.ones(2, 2), torch.full((2, 2), math.inf))
    assert (lecam.mean_real.item(), lecam.mean_fake.item()) == (0.5, -0.5)
    lecam(torch.ones(2, 2), -torch.ones(2, 2))
    assert (lecam.mean_real.item(), lecam.mean_fake.item()) == (0.75, -0.75)


def test_lecam_averages_over_ranks(monkeypatch):
    seen = []

    def mean_over_two_ranks(means):
        seen.append(means)
        return (means + torch.tensor([5.0, 7.0])) / 2  # the other rank's

    monkeypatch.setattr(adversarial, "mean_over_ranks", mean_over_two_ranks)
    lecam = LeCam(decay=0.0)
    lecam(torch.ones(2, 2, requires_grad=True), torch.full((2, 2), 3.0))
    assert (lecam.mean_real.item(), lecam.mean_fake.item()) == (3.0, 5.0)
    assert not seen[0].requires_grad
    lecam.eval()(torch.ones(2, 2), torch.ones(2, 2))
    assert len(seen) == 1


def test_consistency_by_hand_with_gradient_to_both():
    weak, strong = torch.tensor([[1.0, 2.0]], requires_grad=True), torch.tensor([[0.0, 4.0]], requires_grad=True)
    loss = consistency_loss(weak, strong)
    assert loss.item() == 2.5
    slopes = torch.autograd.grad(loss, (weak, strong))
    assert slopes[0].tolist() == [[1.0, -2.0]]
    assert slopes[1].tolist() == [[-1.0, 2.0]]


def test_adaptive_weight_balances_the_gradients():
    main, other = logits(5, 4).requires_grad_(), logits(5, 4, seed=1)
    weight = adaptive_weight(main, other)
    assert not weight.requires_grad
    expected = np.linalg.norm(main.detach().numpy()) / (np.linalg.norm(other.numpy()) + 1e-4)
    assert weight.item() == pytest.approx(expected, rel=1e-5)


def test_adaptive_weight_at_its_limits():
    one, zero = torch.ones(3), torch.zeros(3)
    assert adaptive_weight(torch.ones(1), torch.full((1,), 1e-4)).item() == pytest.approx(5000)
    assert adaptive_weight(zero, one).item() == 0
    assert adaptive_weight(one, zero).item() == 1e4  # 1.7e4 without the limit
    assert adaptive_weight(one, zero, limit=5.0).item() == 5
    for bad in (math.nan, math.inf):
        broken = torch.tensor([1.0, bad, 1.0])
        assert adaptive_weight(broken, one).item() == 0
        assert adaptive_weight(one, broken).item() == 0


def test_adaptive_weight_of_norms_is_that_of_the_gradients():
    main, other = logits(5, 4), logits(5, 4, seed=1)
    torch.testing.assert_close(adaptive_weight(main.norm(), -other.norm()), adaptive_weight(main, other))
