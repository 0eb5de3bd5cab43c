"""Diffusions: schedules, the hybrid objective and timesteps, against formulas of the papers written out anew."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from softvq.errors import InputError
from softvq.generators.diffusion import Diffusion, DiffusionConfig
from softvq.randomness import keys_of, normal

SCHEDULES = ("linear", "cosine")


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    return normal(keys_of(1, "pair", torch.arange(shape[0])), 2, *shape[1:]).unbind(1)


def signals(diffusion: Diffusion) -> Tensor:
    """Return the cumulative products, with that of data before them."""
    betas = torch.tensor(diffusion.betas, dtype=torch.float64)
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])


def target_of(predicts: str, diffusion: Diffusion, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    signal = signals(diffusion)[time.long() + 1][:, None, None]
    velocity = signal.sqrt() * noise.double() - (1 - signal).sqrt() * clean.double()
    return {"epsilon": noise, "clean": clean, "velocity": velocity.float()}[predicts]


def test_schedules_are_those_of_the_papers() -> None:
    linear = Diffusion(DiffusionConfig(schedule="linear"))
    torch.testing.assert_close(torch.tensor(linear.betas), torch.linspace(1e-4, 0.02, 1000))
    cosine = Diffusion(DiffusionConfig(schedule="cosine"))
    steps = torch.arange(1001, dtype=torch.float64) / 1000
    signal = torch.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(signals(cosine)[:999], (signal / signal[0])[:999])
    assert cosine.betas[-1] == 0.999
    short = Diffusion(DiffusionConfig(schedule="linear", num_timesteps=100))
    assert short.betas[0] == pytest.approx(1e-3)
    assert short.betas[-1] == pytest.approx(0.2)
    assert max(Diffusion(DiffusionConfig(num_timesteps=2)).betas) <= 0.999


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_are_of_unit_variance_and_reach_data(schedule: str) -> None:
    diffusion = Diffusion(DiffusionConfig(schedule=schedule))
    signal = signals(diffusion)
    for time in (0, 1, 500, 999):
        alpha, sigma = diffusion.levels(float(time))
        assert alpha**2 == pytest.approx(signal[time + 1].item(), rel=1e-9)
        assert alpha**2 + sigma**2 == pytest.approx(1)
    assert diffusion.levels(-1.0) == (1.0, 0.0)
    clean, noise = pair(3, 2, 4)
    mixed = diffusion.noisy(clean, noise, torch.tensor([-1.0, 0.0, 999.0]))
    assert torch.equal(mixed[0], clean[0])
    for row, time in ((1, 0.0), (2, 999.0)):
        alpha, sigma = diffusion.levels(time)
        torch.testing.assert_close(mixed[row], alpha * clean[row] + sigma * noise[row])


@pytest.mark.parametrize("predicts", ["epsilon", "clean", "velocity"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_perfect_output_loses_nothing_and_is_understood(schedule: str, predicts: str) -> None:
    diffusion = Diffusion(DiffusionConfig(schedule=schedule, predicts=predicts, learned_variance=False))
    clean, noise = pair(3, 2, 4)
    for step in (0.0, 10.0, 400.0, 950.0):
        time = torch.full((3,), step)
        output = target_of(predicts, diffusion, clean, noise, time)
        losses = diffusion.losses(output, clean, noise, time)
        assert set(losses) == {"mse"}
        assert losses["mse"].shape == (3, 2)
        assert losses["mse"].max() < 1e-10
        worse = diffusion.losses(output - 3, clean, noise, time)["mse"]
        torch.testing.assert_close(worse, torch.full((3, 2), 9.0))
        found = diffusion.predict(output, diffusion.noisy(clean, noise, time), step)
        torch.testing.assert_close(found.clean, clean, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.noise, noise, atol=1e-4, rtol=1e-4)
        assert found.variance_fraction is None
    assert diffusion.output_dim(5) == 5


def bits(diffusion: Diffusion, output: Tensor, clean: Tensor, noise: Tensor, step: int) -> Tensor:
    """Return the bound of one timestep in bits per dimension, with torch's distributions in float64."""
    output, clean, noise = output.double(), clean.double(), noise.double()
    betas, signal = torch.tensor(diffusion.betas, dtype=torch.float64), signals(diffusion)
    beta, now, before = betas[step], signal[step + 1], signal[step]
    noisy = now.sqrt() * clean + (1 - now).sqrt() * noise
    epsilon, position = output.chunk(2, dim=-1)
    guess = (noisy - (1 - now).sqrt() * epsilon) / now.sqrt()

    def mean(data: Tensor) -> Tensor:
        return (before.sqrt() * beta * data + (1 - beta).sqrt() * (1 - before) * noisy) / (1 - now)

    other = max(step, 1)  # the first posterior has no variance
    lowest = betas[other] * (1 - signal[other]) / (1 - signal[other + 1])
    fraction = (position + 1) / 2
    model = Normal(mean(guess), (fraction * beta.log() + (1 - fraction) * lowest.log()).exp().sqrt())
    nats = -model.log_prob(clean) if step == 0 else kl_divergence(Normal(mean(clean), lowest.sqrt()), model)
    return nats.mean(dim=-1) / math.log(2)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("count", [1000, 250])
def test_the_bound_is_that_of_the_distributions(schedule: str, count: int) -> None:
    diffusion = Diffusion(DiffusionConfig(schedule=schedule, num_timesteps=count))
    clean, noise = pair(2, 3, 4)
    for step in (0, 1, 2, 50, count - 2):
        keys = keys_of(2, "output", torch.arange(2))
        output = torch.cat([noise + 0.3 * normal(keys, 3, 4), normal(keys, 3, 8)[..., 4:]], dim=-1)
        loss = diffusion.losses(output, clean, noise, torch.full((2,), float(step)))["vlb"]
        assert loss.shape == (2, 3)
        assert loss.dtype == torch.float32
        expected = bits(diffusion, output, clean, noise, step) * (count / 1000)
        torch.testing.assert_close(loss, expected.float(), rtol=2e-3, atol=1e-5)


def test_the_bound_is_zero_only_for_the_posterior_itself() -> None:
    diffusion = Diffusion(DiffusionConfig())
    clean, noise = pair(2, 3, 4)
    time = torch.full((2,), 300.0)
    right = torch.cat([noise, torch.full_like(noise, -1)], dim=-1)
    wrong = torch.cat([noise, torch.full_like(noise, 3)], dim=-1)
    assert diffusion.losses(right, clean, noise, time)["vlb"].abs().max() < 1e-5
    assert diffusion.losses(wrong, clean, noise, time)["vlb"].min() > 1e-5


def test_the_bound_trains_the_variance_alone() -> None:
    diffusion = Diffusion(DiffusionConfig())
    clean, noise = pair(4, 3, 5)
    time = torch.tensor([0.0, 1.0, 500.0, 999.0])
    output = torch.zeros(4, 3, 10, requires_grad=True)
    losses = diffusion.losses(output, clean, noise, time)
    (of_bound,) = torch.autograd.grad(losses["vlb"].sum(), output, retain_graph=True)
    (of_mse,) = torch.autograd.grad(losses["mse"].sum(), output)
    assert not of_bound[..., :5].any()
    assert of_bound[..., 5:].all()
    assert of_mse[..., :5].all()
    assert not of_mse[..., 5:].any()


def test_the_learned_variance_is_handed_on() -> None:
    diffusion = Diffusion(DiffusionConfig())
    output = torch.tensor([[[0.0, 0.0, -1.0, 0.5]]])
    fraction = diffusion.predict(output, torch.zeros(1, 1, 2), 5.0).variance_fraction
    assert fraction is not None
    torch.testing.assert_close(fraction, torch.tensor([[[0.0, 0.75]]]))
    assert diffusion.output_dim(2) == 4


def test_losses_need_no_tokens_and_stay_in_float32() -> None:
    clean, noise = pair(6, 8)
    output = torch.zeros(6, 16, dtype=torch.bfloat16)
    losses = Diffusion(DiffusionConfig()).losses(output, clean.bfloat16(), noise, torch.arange(6.0))
    assert set(losses) == {"mse", "vlb"}
    for loss in losses.values():
        assert loss.shape == (6,)
        assert loss.dtype == torch.float32
        assert loss.isfinite().all()


def test_tables_made_while_sampling_can_be_trained_with() -> None:
    diffusion, (clean, noise) = Diffusion(DiffusionConfig()), pair(2, 8)
    with torch.inference_mode():
        diffusion.noisy(clean, noise, torch.zeros(2))
    weight = torch.ones(2, 16, requires_grad=True)
    sum(diffusion.losses(weight, clean, noise, torch.ones(2)).values()).sum().backward()
    assert weight.grad is not None


def test_times_are_all_timesteps_alike() -> None:
    keys = keys_of(0, "diffusion", torch.arange(20_000))
    diffusion = Diffusion(DiffusionConfig(num_timesteps=5))
    drawn = diffusion.draw_times(keys)
    assert drawn.dtype == torch.float32
    counts = torch.bincount(drawn.long(), minlength=5)
    assert torch.equal(drawn, drawn.round())
    assert len(counts) == 5
    assert (counts - 4000).abs().max() < 250  # standard error 57
    assert torch.equal(diffusion.draw_times(keys[7:9]), drawn[7:9])
    assert torch.equal(diffusion.network_time(drawn), drawn)


@given(count=st.integers(2, 1200), data=st.data())
def test_the_grid_holds_falling_timesteps_with_both_ends(count: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, count))
    diffusion = Diffusion(DiffusionConfig(num_timesteps=count))
    grid = diffusion.grid(steps)
    assert len(grid) == steps + 1
    assert grid[0] == count - 1
    assert grid[-1] == -1
    assert steps == 1 or grid[-2] == 0
    assert all(after < time and time == int(time) for time, after in itertools.pairwise(grid))
    for time in grid:
        assert diffusion.time_at(diffusion.fraction(time)) == time
    gaps = [time - after for time, after in itertools.pairwise(grid[:-1])]
    assert not gaps or max(gaps) - min(gaps) <= 2


def test_the_whole_grid_is_every_timestep() -> None:
    diffusion = Diffusion(DiffusionConfig(num_timesteps=4))
    assert diffusion.grid(4) == (3, 2, 1, 0, -1)
    assert [diffusion.fraction(time) for time in diffusion.grid(4)] == [1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize(
    ("steps", "shift", "message"),
    [
        (0, 1.0, "steps is 0, expected 1 to the 1000 timesteps"),
        (1001, 1.0, "steps is 1001, expected 1 to the 1000 timesteps"),
        (10, 2.0, r"shift is 2\.0, expected 1"),
    ],
)
def test_bad_grids_are_refused(steps: int, shift: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Diffusion(DiffusionConfig()).grid(steps, shift=shift)


def test_bad_configs_are_refused() -> None:
    with pytest.raises(InputError, match="num_timesteps is 1, expected 2 to 100000"):
        DiffusionConfig(num_timesteps=1)
