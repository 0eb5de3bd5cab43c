"""Samplers on Gaussian data, whose predictions, paths and spread are known exactly."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from softvq.errors import InputError
from softvq.generators.diffusion import Diffusion, DiffusionConfig
from softvq.generators.flow import Flow, FlowConfig
from softvq.generators.guidance import Guidance, guided
from softvq.generators.process import Predict, Prediction, Process
from softvq.generators.sampling import SAMPLERS, check_sampler, euler_maruyama_grid, times_for

MEAN, DEVIATION = 0.7, 0.4
FLOWS = {path: Flow(FlowConfig(path=path)) for path in ("linear", "cosine")}
DIFFUSIONS = {name: Diffusion(DiffusionConfig(schedule=name)) for name in ("linear", "cosine")}
STOCHASTIC = ("euler_maruyama", "ddpm", "dpm++_sde")
ONLY_FLOWS = ("euler", "heun", "ab2", "euler_maruyama")
ONCE = ("euler", "ab2", "ddim", "dpm++", "euler_maruyama", "ddpm", "dpm++_sde")


def gaussian(process: Process) -> Predict:
    """Return the best prediction for data of N(MEAN, DEVIATION^2)."""

    def predict(noisy: Tensor, time: float, *, step_time: float | None = None) -> Prediction:
        alpha, sigma = process.levels(time)
        off = (noisy - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2)
        return Prediction(MEAN + alpha * DEVIATION**2 * off, sigma * off)

    return predict


def silent(step: int) -> Tensor:
    raise AssertionError("noise was drawn")


def spread(name: str, process: Process, times: Sequence[float]) -> tuple[float, float]:
    """Return mean and variance of what a sampler makes: it is linear in its noises, so each is followed by itself."""
    rows = len(times) + 1
    start = torch.zeros(rows, 1, 1, dtype=torch.float64)
    start[1] = 1

    def draw(step: int) -> Tensor:
        noise = torch.zeros_like(start)
        noise[2 + step] = 1
        return noise

    made = SAMPLERS[name](gaussian(process), start, times, process, draw).flatten()
    return made[0].item(), (made[1:] - made[0]).square().sum().item()


def error(name: str, process: Process, times: Sequence[float]) -> float:
    """Return the distance from the exact end of one path, along which the distance in deviations stays the same."""
    start = torch.tensor([[[-1.3]]], dtype=torch.float64)
    means, spreads = [], []
    for time in (times[0], times[-1]):
        alpha, sigma = process.levels(time)
        means.append(alpha * MEAN)
        spreads.append(math.sqrt(alpha**2 * DEVIATION**2 + sigma**2))
    exact = means[1] + spreads[1] * (-1.3 - means[0]) / spreads[0]
    return abs(SAMPLERS[name](gaussian(process), start, times, process, silent).item() - exact)


@pytest.mark.parametrize("path", FLOWS)
@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("ab2", 2), ("ddim", 1)])
def test_solvers_have_their_order(name: str, order: int, shift: float, path: str) -> None:
    errors = [error(name, FLOWS[path], times_for(name, FLOWS[path], steps, shift)) for steps in (128, 256, 512)]
    for before, after in itertools.pairwise(errors):
        assert math.log2(before / after) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("path", FLOWS)
def test_dpm_solver_has_order_two_between_the_ends(path: str) -> None:
    """At them h is infinite, however small the steps."""
    grids = [[0.95 - 0.85 * step / steps for step in range(steps + 1)] for steps in (256, 512)]
    errors = [error("dpm++", FLOWS[path], grid) for grid in grids]
    for before, after in itertools.pairwise(errors):
        assert math.log2(before / after) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("steps", [20, 40, 80])
def test_dpm_solver_is_much_better_than_ddim(steps: int) -> None:
    for process in (*FLOWS.values(), *DIFFUSIONS.values()):
        times = process.grid(steps)
        assert error("dpm++", process, times) < error("ddim", process, times) / 3


@pytest.mark.parametrize("path", FLOWS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_all_samplers_reach_the_data_of_a_flow(name: str, path: str) -> None:
    mean, variance = spread(name, FLOWS[path], times_for(name, FLOWS[path], 300))
    assert mean == pytest.approx(MEAN, abs=0.01)
    assert variance == pytest.approx(DEVIATION**2, rel=0.06)


@pytest.mark.parametrize("schedule", DIFFUSIONS)
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ONLY_FLOWS])
def test_all_samplers_reach_the_data_of_a_diffusion(name: str, schedule: str) -> None:
    process = DIFFUSIONS[schedule]
    mean, variance = spread(name, process, times_for(name, process, 300))
    assert mean == pytest.approx(MEAN, abs=0.01)
    assert variance == pytest.approx(DEVIATION**2, rel=0.06)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers_converge(name: str) -> None:
    flow = FLOWS["linear"]
    wrong = [abs(spread(name, flow, times_for(name, flow, steps))[1] / DEVIATION**2 - 1) for steps in (10, 40)]
    assert wrong[1] < wrong[0]


@given(steps=st.integers(1, 30), shift=st.floats(0.2, 5))
def test_on_the_line_ddim_is_euler(steps: int, shift: float) -> None:
    flow, start = FLOWS["linear"], torch.linspace(-2, 2, 6, dtype=torch.float64).reshape(2, 3, 1)
    times = flow.grid(steps, shift=shift)
    made = [SAMPLERS[name](gaussian(flow), start, times, flow, silent) for name in ("ddim", "euler")]
    torch.testing.assert_close(made[0], made[1])


def test_one_step_of_dpm_solver_is_that_of_ddim_and_with_noise_of_ddpm() -> None:
    process = DIFFUSIONS["cosine"]
    start, noise = torch.full((1, 1, 1), 0.4), torch.full((1, 1, 1), -0.8)
    for name, other in (("dpm++", "ddim"), ("dpm++_sde", "ddpm")):
        made = [SAMPLERS[n](gaussian(process), start, (700.0, 300.0), process, lambda _: noise) for n in (name, other)]
        torch.testing.assert_close(made[0], made[1])


@pytest.mark.parametrize("fraction", [None, 0.0, 0.5, 1.0])
def test_ddpm_draws_from_the_posterior_of_the_chain(fraction: float | None) -> None:
    process, step = DIFFUSIONS["linear"], 300
    betas = torch.tensor(process.betas, dtype=torch.float64)
    signal = (1 - betas).cumprod(0)
    beta, now, before = betas[step], signal[step], signal[step - 1]
    start, noise, clean = (torch.full((1, 1, 1), value, dtype=torch.float64) for value in (0.3, -1.1, 0.9))
    known = None if fraction is None else torch.full_like(start, fraction)
    made = SAMPLERS["ddpm"](
        lambda x, time: Prediction(clean, x, known), start, (float(step), step - 1.0), process, lambda _: noise
    )
    mean = (before.sqrt() * beta * clean + (1 - beta).sqrt() * (1 - before) * start) / (1 - now)
    narrow = beta * (1 - before) / (1 - now)
    variance = narrow if fraction is None else beta**fraction * narrow ** (1 - fraction)
    torch.testing.assert_close(made, mean + variance.sqrt() * noise)


def test_euler_maruyama_follows_its_equation() -> None:
    flow, x = FLOWS["linear"], torch.tensor([[[0.3]]], dtype=torch.float64)
    seen: list[int] = []

    def draw(step: int) -> Tensor:
        seen.append(step)
        return torch.full_like(x, 0.5)

    made = SAMPLERS["euler_maruyama"](gaussian(flow), x, (0.8, 0.5, 0.0), flow, draw)
    for time, after, noise in ((0.8, 0.5, 0.5), (0.5, 0.0, 0.0)):
        variance = (1 - time) ** 2 * DEVIATION**2 + time**2
        score = -(x - (1 - time) * MEAN) / variance
        rate = ((time - (1 - time) * DEVIATION**2) * (x - (1 - time) * MEAN)) / variance - MEAN
        x = x + (rate - time * score) * (after - time) + math.sqrt(2 * time * (time - after)) * noise
    torch.testing.assert_close(made, x)
    assert seen == [0]


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_is_drawn_once_for_every_step_but_the_last(name: str) -> None:
    seen: list[int] = []

    def draw(step: int) -> Tensor:
        seen.append(step)
        return torch.zeros(1, 1, 1)

    flow = FLOWS["cosine"]
    SAMPLERS[name](gaussian(flow), torch.zeros(1, 1, 1), times_for(name, flow, 5), flow, draw)
    assert seen == ([0, 1, 2, 3] if name in STOCHASTIC else [])


@pytest.mark.parametrize("name", SAMPLERS)
def test_predictions_are_asked_for_at_the_right_times(name: str) -> None:
    flow, seen = FLOWS["linear"], []

    def predict(noisy: Tensor, time: float, *, step_time: float | None = None) -> Prediction:
        seen.append((time, time if step_time is None else step_time))
        return gaussian(flow)(noisy, time)

    times = times_for(name, flow, 3)
    SAMPLERS[name](predict, torch.zeros(1, 1, 1), times, flow, lambda _: torch.zeros(1, 1, 1))
    once = [(time, time) for time in times[:-1]]
    twice = [(1, 1), (2 / 3, 1), (2 / 3, 2 / 3), (1 / 3, 2 / 3), (1 / 3, 1 / 3)]
    for found, expected in itertools.zip_longest(seen, once if name in ONCE else twice):
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("name", SAMPLERS)
def test_nothing_waits_for_the_device(name: str) -> None:
    """Meta tensors hold no numbers, so whatever looked at one would fail."""
    for process in (FLOWS["linear"], DIFFUSIONS["cosine"]):
        if process in DIFFUSIONS.values() and name in ONLY_FLOWS:
            continue
        dim = process.output_dim(4)
        predict = guided(
            lambda x, time, null, dim=dim: x.new_zeros(*x.shape[:-1], dim),
            process,
            Guidance(scale=2.0, interval=(0.0, 0.6)),
        )
        start = torch.empty(3, 2, 4, device="meta", dtype=torch.bfloat16)
        made = SAMPLERS[name](predict, start, times_for(name, process, 4), process, lambda _, x=start: x)
        assert made.shape == start.shape
        assert made.dtype == torch.float32
        keys = torch.empty(3, dtype=torch.int64, device="meta")
        losses = process.losses(start.new_zeros(3, 2, dim), start, start, process.draw_times(keys))
        assert all(loss.device.type == "meta" for loss in losses.values())


def test_images_do_not_depend_on_their_batch() -> None:
    flow, start = FLOWS["linear"], torch.linspace(-2, 2, 12).reshape(4, 3, 1)
    for name in SAMPLERS:
        times = times_for(name, flow, 5)
        whole = SAMPLERS[name](gaussian(flow), start, times, flow, lambda _: start.flip(1))
        part = SAMPLERS[name](gaussian(flow), start[1:2], times, flow, lambda _: start[1:2].flip(1))
        assert torch.equal(whole[1:2], part)


@given(steps=st.integers(2, 300), shift=st.floats(0.2, 8))
def test_the_stochastic_grid_stops_short_of_data(steps: int, shift: float) -> None:
    times = euler_maruyama_grid(steps, shift=shift)
    assert len(times) == steps + 1
    assert times[0] == pytest.approx(1)
    assert times[-2:] == (0.04, 0)
    assert all(after < time for time, after in itertools.pairwise(times))
    assert times_for("euler_maruyama", FLOWS["cosine"], steps, shift) == times


def test_each_sampler_has_its_times() -> None:
    assert times_for("heun", FLOWS["linear"], 2) == (1, 0.5, 0)
    assert times_for("ddim", DIFFUSIONS["cosine"], 3) == (999, 500, 0, -1)
    assert euler_maruyama_grid(1) == (1, 0)
    assert euler_maruyama_grid(3) == pytest.approx((1, 0.52, 0.04, 0))


@pytest.mark.parametrize("name", ONLY_FLOWS)
def test_solvers_of_velocities_need_a_flow(name: str) -> None:
    process = DIFFUSIONS["linear"]
    check_sampler(name, FLOWS["linear"])
    message = f"sampler is {name}, which needs a flow; for a diffusion take one of dpm"
    with pytest.raises(InputError, match=message):
        check_sampler(name, process)
    with pytest.raises(InputError, match=message):
        SAMPLERS[name](gaussian(process), torch.zeros(1, 1, 1), (5.0, -1.0), process, silent)


def test_bad_names_and_steps_are_refused() -> None:
    with pytest.raises(InputError, match="there is no sampler 'rk4', expected one of euler, heun"):
        check_sampler("rk4", FLOWS["linear"])
    for name in SAMPLERS:
        with pytest.raises(InputError, match="steps is 0, expected at least 1"):
            times_for(name, FLOWS["linear"], 0)
        with pytest.raises(InputError, match=r"shift is -1\.0, expected a positive number"):
            times_for(name, FLOWS["linear"], 3, -1.0)
    with pytest.raises(InputError, match=r"shift is 3\.0, expected 1"):
        times_for("ddim", DIFFUSIONS["linear"], 3, 3.0)
