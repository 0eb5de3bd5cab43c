"""MAR draws an image token by token: what it sees, how it is guided, and that its batch does not matter."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from softvq.errors import InputError
from softvq.generators.diffusion import Diffusion, DiffusionConfig
from softvq.generators.guidance import Guidance
from softvq.generators.mar import (
    MAR,
    random_orders,
    select,
)
from softvq.generators.sampling import SAMPLERS
from softvq.generators.unmasking import sample, unmasking_counts
from softvq.randomness import fold_in
from tests.small_mar import CLASSES, DIM, PROCESSES, TOKENS, batch_of, model_of, plain_z


def jump(predict, latents, times, process, draw) -> Tensor:
    """Solve in one evaluation each step, and add a little noise, so that the noise of the steps is seen."""
    for i, time in enumerate(times[:-1]):
        clean = predict(latents, time).clean
        latents = clean + times[i + 1] * draw(i)
    return latents


def draw(model: MAR, condition: Tensor, keys: Tensor, **options) -> Tensor:
    times = model.process.grid(options.pop("head_steps", 3))
    options = {"steps": 4, "sampler": jump, "guidance": Guidance(scale=2.0, schedule="linear"), **options}
    return sample(model, condition, keys, times=times, **options)


def count_rows(model: MAR) -> tuple[list[int], list[int]]:
    """Return lists that grow by the batch of each call of the transformers, and by the rows of each of the head."""
    network, head = [], []
    model.encoder_blocks[0].register_forward_pre_hook(lambda _, args: network.append(len(args[0])))
    model.head.register_forward_pre_hook(lambda _, args: head.append(len(args[0])))
    return network, head


@given(st.integers(1, 300), st.data())
def test_unmasking_shows_some_tokens_in_every_step_and_all_at_last(tokens: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, tokens))
    counts = (tokens, *unmasking_counts(tokens, steps))
    assert len(counts) == steps + 1
    assert counts[-1] == 0
    assert all(before > after for before, after in itertools.pairwise(counts))


def test_unmasking_follows_the_cosine() -> None:
    assert unmasking_counts(256, 8) == (*(math.floor(256 * math.cos(math.pi / 16 * i)) for i in range(1, 8)), 0)
    assert unmasking_counts(4, 4) == (3, 2, 1, 0)


def test_one_step_is_the_head_on_z_of_hidden_tokens() -> None:
    model, (clean, condition, _, keys) = model_of(), batch_of(3)
    seen = []

    def spy(predict, latents, times, process, draw) -> Tensor:
        seen.append(latents)
        return jump(predict, latents, times, process, draw)

    found = draw(model, condition, keys, steps=1, head_steps=1, guidance=Guidance(scale=1.0), sampler=spy)
    z = [plain_z(model, clean[i], [], model.condition.table(condition[i])) for i in range(3)]
    orders = random_orders(fold_in(keys, 0), TOKENS)
    noise = select(seen[0].unflatten(0, (3, TOKENS)), orders.argsort(1))
    expected = model.head(noise.flatten(0, 1), torch.full((3 * TOKENS,), 10.0), torch.cat(z))
    torch.testing.assert_close(found, expected.unflatten(0, (3, TOKENS)), atol=1e-5, rtol=1e-5)
    assert noise.unique().numel() == 3 * TOKENS * DIM


def test_later_steps_see_the_tokens_that_were_drawn() -> None:
    model, (_, condition, _, keys) = model_of(), batch_of(2)
    keys_in_order, values = random_orders(fold_in(keys, 0), TOKENS), []

    def mark(predict, latents, times, process, draw) -> Tensor:
        values.append(torch.full_like(latents, float(len(values) + 1)))
        return values[-1]

    seen = []
    model.to_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = draw(model, condition, keys, steps=3, sampler=mark)
    hidden = (TOKENS, *unmasking_counts(TOKENS, 3))
    steps = torch.cat([torch.full((a - b,), i + 1.0) for i, (a, b) in enumerate(itertools.pairwise(hidden))])
    assert torch.equal(select(found, keys_in_order)[..., 0], steps.expand(2, -1))
    assert [part.shape[1] for part in seen] == [TOKENS - count for count in hidden[:-1]]
    assert torch.equal(seen[2][0, :, 0], steps[: seen[2].shape[1]])


@pytest.mark.parametrize("steps", [1, 3, TOKENS])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_a_head_that_knows_the_answer_gives_it(steps: int, scale: float) -> None:
    class Constant(nn.Module):
        def forward(self, noisy: Tensor, time: Tensor, z: Tensor) -> Tensor:
            assert len(noisy) == len(time) == len(z)
            return torch.full_like(noisy, 0.75)

    model, (_, condition, _, keys) = model_of(), batch_of(2)
    model.head = Constant()
    found = draw(model, condition, keys, steps=steps, sampler=SAMPLERS["ddim"], guidance=Guidance(scale=scale))
    torch.testing.assert_close(found, torch.full((2, TOKENS, DIM), 0.75), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", PROCESSES)
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    model, (_, condition, _, keys) = model_of(PROCESSES[name]()), batch_of(7)
    whole = draw(model, condition, keys)
    for size in (1, 3):
        some = draw(model, condition[-size:], keys[-size:])
        assert (some - whole[-size:]).abs().max() <= 1e-5 * whole.abs().max()  # untrained noise predictors go far
    assert whole.isfinite().all()
    assert whole.unique().numel() > 0.9 * whole.numel()


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++", "dpm++_sde"])
def test_the_samplers_drive_the_head(sampler: str) -> None:
    process = Diffusion(DiffusionConfig(schedule="cosine"))
    model, (_, condition, _, keys) = model_of(process), batch_of(2)
    found = draw(model, condition, keys, sampler=SAMPLERS[sampler], head_steps=6)
    assert found.shape == (2, TOKENS, DIM)
    assert found.dtype == torch.float32
    assert found.isfinite().all()


def test_guidance_costs_a_second_half_only_where_it_is_used() -> None:
    hidden = unmasking_counts(TOKENS, 4)
    shown = [a - b for a, b in zip((TOKENS, *hidden), hidden, strict=False)]
    for guidance, parts in (
        (Guidance(scale=1.0), [1, 1, 1, 1]),
        (Guidance(scale=0.0), [1, 1, 1, 1]),
        (Guidance(scale=2.0), [2, 2, 2, 2]),
        (Guidance(scale=2.0, interval=(0.0, hidden[2] / TOKENS)), [1, 1, 2, 2]),
        (Guidance(scale=2.0, interval=(hidden[1] / TOKENS, 1.0)), [2, 2, 1, 1]),
    ):
        model, (_, condition, _, keys) = model_of(), batch_of(3)
        network, head = count_rows(model)
        draw(model, condition, keys, guidance=guidance, head_steps=2)
        assert network == [3 * part for part in parts], guidance
        assert head == [3 * part * n for part, n in zip(parts, shown, strict=True) for _ in range(2)], guidance


def test_guidance_moves_from_null_to_condition() -> None:
    model, (_, condition, _, keys) = model_of(), batch_of(3)

    def at(scale: float, condition: Tensor = condition) -> Tensor:
        return draw(model, condition, keys, steps=1, head_steps=1, guidance=Guidance(scale=scale))

    torch.testing.assert_close(at(0.0), at(1.0, torch.full_like(condition, CLASSES)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(at(2.5), at(0.0) + 2.5 * (at(1.0) - at(0.0)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(at(1.0), at(1.0 + 1e-6), atol=1e-4, rtol=1e-4)


def test_guidance_rises_as_tokens_appear() -> None:
    model, (_, condition, _, keys) = model_of(), batch_of(1)
    scales = []

    class Spy(Guidance):
        def at(self, fraction: float) -> float:
            scales.append(Guidance.at(self, fraction))
            return scales[-1]

    draw(model, condition, keys, guidance=Spy(scale=3.0, schedule="linear"), steps=4)
    expected = [1 + 2 * (1 - count / TOKENS) for count in unmasking_counts(TOKENS, 4)]
    assert scales == pytest.approx(expected)
    assert scales[-1] == 3


def test_temperature_scales_all_noise() -> None:
    model, (_, condition, _, keys) = model_of(), batch_of(2)
    seen = []

    def spy(predict, latents, times, process, draw) -> Tensor:
        seen.append((latents, draw(0), draw(1)))
        return latents

    for temperature in (1.0, 0.5, 0.0):
        draw(model, condition, keys, steps=1, sampler=spy, temperature=temperature)
    for full, half, none in zip(*seen, strict=True):
        torch.testing.assert_close(half, 0.5 * full)
        assert none.abs().max() == 0
    assert not torch.isclose(seen[0][0], seen[0][1]).any()
    assert not torch.isclose(seen[0][1], seen[0][2]).any()


def test_sampling_in_low_precision_gives_float32() -> None:
    model, (_, condition, _, keys) = model_of(), batch_of(2)
    wanted = draw(model, condition, keys)
    with torch.autocast("cpu", torch.bfloat16):
        found = [draw(model, condition, keys)]
    found.append(draw(model.bfloat16(), condition, keys))
    for one in found:
        assert one.dtype == torch.float32
        assert 0 < (one - wanted).abs().mean() < 0.2 * wanted.abs().mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "^steps is 0, expected 1 to 10 tokens$"),
        ({"steps": 99}, "^steps is 99, expected 1 to 10 tokens$"),
        ({"temperature": -1.0}, "^temperature is -1.0, expected at least 0$"),
        ({"temperature": math.nan}, "^temperature is nan"),
    ],
)
def test_sampling_refuses(options: dict[str, float], message: str) -> None:
    model, (_, condition, _, keys) = model_of(), batch_of(1)
    with pytest.raises(InputError, match=message):
        draw(model, condition, keys, **options)
