"""Flows: levels, velocities, times and losses, against what the papers say in closed form."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from softvq.errors import InputError
from softvq.generators.flow import Flow, FlowConfig, shifted
from softvq.randomness import keys_of, normal

KEYS = keys_of(0, "flow", torch.arange(20_000))
PATHS = ("linear", "cosine")


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    keys = keys_of(1, "pair", torch.arange(shape[0]))
    return normal(keys, 2, *shape[1:]).unbind(1)


def velocity_of(path: str, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """Return the derivative of the path by finite differences in float64."""

    def place(t: Tensor) -> Tensor:
        if path == "linear":
            return (1 - t) * clean.double() + t * noise.double()
        return torch.cos(math.pi * t / 2) * clean.double() + torch.sin(math.pi * t / 2) * noise.double()

    return ((place(time.double() + 1e-5) - place(time.double() - 1e-5)) / 2e-5).to(clean.dtype)


@pytest.mark.parametrize("path", PATHS)
def test_a_perfect_velocity_loses_nothing(path: str) -> None:
    clean, noise = pair(5, 3, 4)
    time = torch.tensor([1e-3, 0.2, 0.5, 0.9, 0.999])
    target = velocity_of(path, clean, noise, time[:, None, None])
    flow = Flow(FlowConfig(path=path, cosine_weight=1.0))
    losses = flow.losses(target, clean, noise, time)
    assert set(losses) == {"mse", "cosine"}
    for loss in losses.values():
        assert loss.shape == (5, 3)
        assert loss.abs().max() < 2e-3
    assert losses["mse"].abs().max() < 1e-10
    torch.testing.assert_close(flow.losses(target + 2, clean, noise, time)["mse"], torch.full((5, 3), 4.0))


@pytest.mark.parametrize("path", PATHS)
@given(time=st.floats(0, 1))
def test_predictions_undo_the_path(path: str, time: float) -> None:
    clean, noise = (x.double() for x in pair(2, 3, 4))
    flow = Flow(FlowConfig(path=path))
    noisy = flow.noisy(clean, noise, torch.full((2,), time, dtype=torch.float64))
    output = velocity_of(path, clean, noise, torch.tensor(time, dtype=torch.float64))
    found = flow.predict(output, noisy, time)
    torch.testing.assert_close(found.clean, clean)
    torch.testing.assert_close(found.noise, noise)
    torch.testing.assert_close(flow.velocity(found, time), output)
    alpha, sigma = flow.levels(time)
    torch.testing.assert_close(alpha * found.clean + sigma * found.noise, noisy)
    if time > 0.01:
        torch.testing.assert_close(flow.score(found, time), (alpha * clean - noisy) / sigma**2)


@pytest.mark.parametrize("path", PATHS)
def test_both_ends_are_exact(path: str) -> None:
    flow = Flow(FlowConfig(path=path))
    assert flow.levels(0.0) == (1.0, 0.0)
    assert flow.levels(1.0) == (0.0, 1.0)
    assert flow.fraction(0.3) == flow.time_at(0.3) == 0.3
    assert flow.output_dim(7) == 7
    times = torch.tensor([0.25, 0.5])
    assert torch.equal(flow.network_time(times), times)


def test_the_cosine_loss_has_its_limits() -> None:
    clean, noise = pair(3, 2, 64)
    flow, time = Flow(FlowConfig(cosine_weight=0.5)), torch.full((3,), 0.5)
    target = noise - clean
    across = torch.stack([-target[..., 1::2], target[..., ::2]], dim=-1).flatten(-2)
    for output, expected in ((3 * target, 0), (-target, 1), (across, 0.5)):
        cosine = flow.losses(output, clean, noise, time)["cosine"]
        torch.testing.assert_close(cosine, torch.full((3, 2), float(expected)), atol=2e-4, rtol=0)
    assert set(Flow(FlowConfig()).losses(target, clean, noise, time)) == {"mse"}
    zero = torch.zeros_like(target, requires_grad=True)
    flow.losses(zero, clean, noise, time)["cosine"].sum().backward()
    assert zero.grad is not None
    assert zero.grad.isfinite().all()
    assert zero.grad.norm(dim=-1).max() < 10  # networks start here


def test_losses_need_no_tokens_and_stay_in_float32() -> None:
    clean, noise = pair(6, 8)
    flow, time = Flow(FlowConfig(cosine_weight=1.0)), torch.full((6,), 0.5)
    assert flow.noisy(clean.bfloat16(), noise, time).dtype == torch.float32
    for loss in flow.losses(clean.bfloat16(), clean, noise, time).values():
        assert loss.shape == (6,)
        assert loss.dtype == torch.float32


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    ("path", "times"),
    [("linear", "uniform"), ("linear", "logit_normal"), ("linear", "lognormal"), ("cosine", "lognormal")],
)
def test_times_have_their_quantiles(path: str, times: str, shift: float) -> None:
    flow = Flow(FlowConfig(path=path, times=times, time_mean=0.4, time_std=1.2, time_shift=shift))
    drawn = flow.draw_times(KEYS)
    assert drawn.dtype == torch.float32
    shares = torch.tensor([0.1, 0.5, 0.8])
    log_ratio = 0.4 + 1.2 * torch.special.ndtri(shares)
    expected = shares if times == "uniform" else log_ratio.exp() / (1 + log_ratio.exp())
    if path == "cosine":  # tan(pi t / 2) is the ratio of sigma to alpha
        expected = log_ratio.exp().atan() * 2 / math.pi
    expected = shift * expected / (1 + (shift - 1) * expected)
    torch.testing.assert_close(drawn.quantile(shares), expected, atol=0.012, rtol=0)


def test_on_the_line_lognormal_is_logit_normal() -> None:
    drawn = [Flow(FlowConfig(times=times)).draw_times(KEYS) for times in ("lognormal", "logit_normal")]
    torch.testing.assert_close(drawn[0], drawn[1])


@pytest.mark.parametrize("mean", [-20.0, 20.0])
@pytest.mark.parametrize("path", PATHS)
def test_times_never_reach_the_ends(path: str, mean: float) -> None:
    config = FlowConfig(path=path, times="lognormal", time_mean=mean, time_std=20.0, time_shift=1000.0)
    drawn = Flow(config).draw_times(KEYS)
    assert drawn.min() > 0
    assert drawn.max() < 1


def test_times_belong_to_the_sample() -> None:
    flow = Flow(FlowConfig())
    assert torch.equal(flow.draw_times(KEYS[:9])[4:5], flow.draw_times(KEYS[4:5]))


@given(time=st.floats(0, 1), shift=st.floats(0.05, 50))
def test_shifting_keeps_the_ends_and_undoes_itself(time: float, shift: float) -> None:
    assert shifted(time, 1.0) == time
    assert shifted(0.0, shift) == 0
    assert shifted(1.0, shift) == pytest.approx(1)
    assert shifted(shifted(time, shift), 1 / shift) == pytest.approx(time, abs=1e-12)
    assert (shifted(0.5, shift) > 0.5) == (shift > 1) or shift == 1


@given(steps=st.integers(1, 300), shift=st.floats(0.1, 10))
def test_the_grid_falls_from_noise_to_data(steps: int, shift: float) -> None:
    grid = Flow(FlowConfig()).grid(steps, shift=shift)
    assert len(grid) == steps + 1
    assert grid[0] == pytest.approx(1, abs=1e-15)
    assert grid[-1] == 0
    assert all(after < time for time, after in itertools.pairwise(grid))


def test_the_grid_is_even_unless_shifted() -> None:
    flow = Flow(FlowConfig())
    assert flow.grid(4) == (1, 0.75, 0.5, 0.25, 0)
    assert flow.grid(2, shift=3.0) == (1, 0.75, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"time_mean": math.nan}, "time_mean is nan, expected -20 to 20"),
        ({"time_std": 0.0}, "time_std is 0.0, expected above 0"),
        ({"time_shift": -1.0}, "time_shift is -1.0, expected above 0"),
        ({"cosine_weight": -0.1}, "cosine_weight is -0.1, expected 0"),
    ],
)
def test_bad_configs_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FlowConfig(**fields)


def test_bad_grids_are_refused() -> None:
    with pytest.raises(InputError, match="steps is 0, expected at least 1"):
        Flow(FlowConfig()).grid(0)
    with pytest.raises(InputError, match=r"shift is 0\.0, expected a positive number"):
        Flow(FlowConfig()).grid(3, shift=0.0)
