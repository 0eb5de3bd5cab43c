"""Guidance: what is evaluated, when, and what comes of it."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from softvq.errors import InputError
from softvq.generators.diffusion import Diffusion, DiffusionConfig
from softvq.generators.flow import Flow, FlowConfig
from softvq.generators.guidance import Guidance, Network, guided
from softvq.generators.sampling import SAMPLERS, times_for

FLOW = Flow(FlowConfig())
CONDITION = torch.tensor([0.5, -1.0, 2.0])
NOISY = torch.linspace(-1, 1, 24).reshape(3, 2, 4)


class Counted:
    """A network that keeps how many rows it was given, and how many of them were without their condition."""

    def __init__(self, weight: float = 1.0, copies: int = 1) -> None:
        self.weight, self.copies = weight, copies
        self.calls: list[tuple[int, int]] = []

    def __call__(self, noisy: Tensor, time: Tensor, null: Tensor) -> Tensor:
        assert noisy.shape[:1] == time.shape == null.shape
        assert null.dtype == torch.bool
        self.calls.append((len(noisy), int(null.sum())))
        condition = torch.where(null, 0.0, CONDITION.repeat(len(noisy) // 3))
        row = self.weight * (noisy.sin() + condition[:, None, None] + time[:, None, None])
        return torch.cat([row * (1 + copy) for copy in range(self.copies)], dim=-1)


def given_and_null(network: Network, time: float) -> tuple[Tensor, Tensor]:
    hidden = torch.zeros(3, dtype=torch.bool)
    times = torch.full((3,), time)
    return network(NOISY, times, hidden), network(NOISY, times, ~hidden)


@pytest.mark.parametrize(("scale", "calls"), [(1.0, [(3, 0)]), (2.5, [(6, 3)]), (0.5, [(6, 3)]), (0.0, [(3, 3)])])
def test_only_what_is_needed_is_evaluated(scale: float, calls: list[tuple[int, int]]) -> None:
    network = Counted()
    guided(network, FLOW, Guidance(scale=scale))(NOISY, 0.4)
    assert network.calls == calls


@pytest.mark.parametrize(
    ("scale", "high", "low"), [(1.0, [(3, 0)], []), (2.5, [(3, 0)], [(3, 0)]), (0.0, [], [(3, 0)])]
)
def test_autoguidance_asks_both_for_the_condition(
    scale: float, high: list[tuple[int, int]], low: list[tuple[int, int]]
) -> None:
    network, guide = Counted(), Counted(0.5)
    guided(network, FLOW, Guidance(scale=scale), guide)(NOISY, 0.4)
    assert network.calls == high
    assert guide.calls == low


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_outputs_are_moved_along_their_difference(scale: float) -> None:
    network = Counted()
    high, low = given_and_null(network, 0.4)
    found = guided(network, FLOW, Guidance(scale=scale))(NOISY, 0.4)
    torch.testing.assert_close(FLOW.velocity(found, 0.4), low + scale * (high - low))
    guide = Counted(0.3)
    led = guided(network, FLOW, Guidance(scale=scale), guide)(NOISY, 0.4)
    low = given_and_null(guide, 0.4)[0]
    torch.testing.assert_close(FLOW.velocity(led, 0.4), low + scale * (high - low))


@pytest.mark.parametrize("name", ["euler", "heun", "dpm++"])
def test_a_scale_of_one_is_no_guidance_at_all(name: str) -> None:
    network, times = Counted(), times_for(name, FLOW, 4)

    def plain(noisy: Tensor, time: float, *, step_time: float | None = None) -> object:
        return FLOW.predict(network(noisy, torch.full((3,), time), torch.zeros(3, dtype=torch.bool)), noisy, time)

    made = [
        SAMPLERS[name](predict, NOISY, times, FLOW, lambda _: NOISY)
        for predict in (
            plain,
            guided(network, FLOW, Guidance()),
            guided(network, FLOW, Guidance(scale=1.0), Counted(9)),
        )
    ]
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


def test_a_network_that_guides_itself_stays_as_it_is() -> None:
    network = Counted()
    alone = guided(network, FLOW, Guidance())(NOISY, 0.4)
    led = guided(network, FLOW, Guidance(scale=5.0), network)(NOISY, 0.4)
    assert torch.equal(alone.clean, led.clean)
    assert torch.equal(alone.noise, led.noise)


@pytest.mark.parametrize("guide", [None, Counted(0.5, copies=2)])
def test_the_learned_variance_is_not_guided(guide: Network | None) -> None:
    diffusion = Diffusion(DiffusionConfig())
    network = Counted(copies=2)
    high, _ = given_and_null(network, 500.0)
    found = guided(network, diffusion, Guidance(scale=4.0), guide)(NOISY, 500.0)
    assert found.variance_fraction is not None
    torch.testing.assert_close(found.variance_fraction, (high[..., 4:] + 1) / 2)
    assert (found.noise - high[..., :4]).abs().max() > 1


def test_guidance_keeps_to_its_interval_bounds_included() -> None:
    network = Counted()
    predict = guided(network, FLOW, Guidance(scale=2.0, interval=(0.2, 0.7)))
    for time in (1.0, 0.71, 1 - 0.3, 0.7, 0.5, 0.2, 0.19, 0.0):
        predict(NOISY, time)
    assert [rows for rows, _ in network.calls] == [3, 3, 6, 6, 6, 6, 3, 3]
    assert Guidance(scale=2.0, interval=(0.2, 0.7)).at(0.1 + 0.6) == 2


def test_guidance_is_decided_where_the_step_began() -> None:
    network = Counted()
    predict = guided(network, FLOW, Guidance(scale=2.0, interval=(0.0, 0.5)))
    predict(NOISY, 0.4, step_time=0.6)
    predict(NOISY, 0.6, step_time=0.5)
    assert [rows for rows, _ in network.calls] == [3, 6]
    network.calls.clear()
    SAMPLERS["heun"](predict, NOISY, FLOW.grid(4), FLOW, lambda _: NOISY)
    assert [rows for rows, _ in network.calls] == [3, 3, 3, 3, 6, 6, 6]


def test_intervals_of_a_diffusion_are_shares_of_its_timesteps() -> None:
    diffusion, network = Diffusion(DiffusionConfig()), Counted(copies=2)
    predict = guided(network, diffusion, Guidance(scale=2.0, interval=(0.0, 0.5)))
    for time in (999.0, 500.0, 499.0, 0.0):
        predict(NOISY, time)
    assert [rows for rows, _ in network.calls] == [3, 3, 6, 6]


@pytest.mark.parametrize(
    ("schedule", "shape"),
    [
        ("constant", lambda _: 1.0),
        ("linear", lambda f: 1 - f),
        ("cosine", lambda f: math.cos(math.pi * f / 2) ** 2),
    ],
)
def test_schedules_have_their_shapes(schedule: str, shape: Callable[[float], float]) -> None:
    guidance = Guidance(scale=4.0, schedule=schedule)
    for fraction in (0.0, 0.25, 0.5, 0.9, 1.0):
        assert guidance.at(fraction) == pytest.approx(1 + 3 * shape(fraction))
    assert guidance.at(0.0) == 4
    assert schedule == "constant" or guidance.at(1.0) == 1  # exactly, so that no half is wasted


def test_outputs_of_low_precision_are_combined_in_float32() -> None:
    network = Counted()
    high, low = (x.bfloat16().float() for x in given_and_null(network, 0.4))
    predict = guided(lambda *inputs: network(*inputs).bfloat16(), FLOW, Guidance(scale=3.0))
    found = predict(NOISY, 0.4)
    assert found.clean.dtype == torch.float32
    torch.testing.assert_close(FLOW.velocity(found, 0.4), low + 3 * (high - low))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": -1.0}, "scale is -1.0, expected 0 to 1000"),
        ({"scale": math.nan}, "scale is nan, expected 0 to 1000"),
        ({"interval": (0.5, 0.2)}, r"interval is \[0.5, 0.2\], expected two rising numbers from 0 to 1"),
        ({"interval": (0.5, 1.2)}, r"interval is \[0.5, 1.2\], expected two rising"),
    ],
)
def test_bad_guidance_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Guidance(**fields)
