"""MAR: what its encoder sees, and its loss against plain loops."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from softvq.errors import InputError
from softvq.generators.conditioning import Condition
from softvq.generators.diffusion import Diffusion, DiffusionConfig
from softvq.generators.heads import DenoisingHead
from softvq.generators.mar import (
    HEAD,
    MAR,
    ORDER,
    RATIO,
    TRAINING,
    MARConfig,
    masked_counts,
    random_orders,
    select,
)
from softvq.randomness import fold_in, keys_of, normal
from tests.small_mar import CLASSES, DIM, PROCESSES, TINY, TOKENS, Clean, batch_of, model_of, plain_z

# --- what is seen ---


def test_only_visible_tokens_change_z() -> None:
    model, (clean, condition, null, keys) = model_of(), batch_of(3)
    orders, visible = random_orders(keys, TOKENS), torch.tensor([0, 2, 5])
    vector = model.condition(condition, null)

    def z_of(latents: Tensor) -> Tensor:
        return model(select(latents, orders)[:, :5], orders, vector, visible)

    before = z_of(clean)
    for row in range(3):
        for rank in range(TOKENS):
            changed = clean.clone()
            changed[row, orders[row, rank]] += 5
            change = (z_of(changed) - before).abs().amax(dim=(1, 2))
            assert (change[row] > 1e-3) == (rank < visible[row]), (row, rank)
            assert change.sum() == change[row]


def test_all_visible_needs_no_counts() -> None:
    model, (clean, condition, null, keys) = model_of(), batch_of(3)
    orders, vector = random_orders(keys, TOKENS), model.condition(condition, null)
    front = select(clean, orders)[:, :4]
    both = [model(front, orders, vector, visible) for visible in (None, torch.full((3,), 4))]
    torch.testing.assert_close(*both, atol=1e-5, rtol=0)


def test_z_depends_on_places_not_on_the_order_they_are_given_in() -> None:
    model, (clean, condition, null, keys) = model_of(), batch_of(2)
    orders, vector = random_orders(keys, TOKENS), model.condition(condition, null)
    swapped = torch.cat([orders[:, :4].flip(1), orders[:, 4:].flip(1)], dim=1)
    found = [select(model(select(clean, o)[:, :4], o, vector), o.argsort(1)) for o in (orders, swapped)]
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


# --- loss ---


def plain_loss(model: MAR, clean: Tensor, condition: Tensor, null: Tensor, key: Tensor) -> Tensor:
    key = fold_in(key[None], TRAINING)
    order = random_orders(fold_in(key, ORDER), TOKENS)[0].tolist()
    visible = TOKENS - int(masked_counts(model.config, fold_in(key, RATIO), TOKENS))
    z = plain_z(model, clean, order[:visible], model.condition(condition[None], null[None])[0])
    found = []
    for repeat in range(model.config.head_repeats):
        for rank in range(visible, TOKENS):
            token = fold_in(key, HEAD) + repeat * TOKENS + rank
            time, noise = model.process.draw_times(fold_in(token, 0)), normal(fold_in(token, 1), DIM)
            x = clean[None, order[rank]]
            noisy = model.process.noisy(x, noise, time)
            output = model.head(noisy, model.process.network_time(time), z[None, order[rank]])
            found.append(sum(model.process.losses(output, x, noise, time).values()))
    return torch.stack(found).mean()


@pytest.mark.parametrize("name", PROCESSES)
def test_loss_is_that_of_plain_loops(name: str) -> None:
    model, (clean, condition, null, keys) = model_of(PROCESSES[name]()), batch_of(8)
    losses = model.losses(clean, condition, null, keys)
    expected = torch.stack([plain_loss(model, *sample) for sample in zip(clean, condition, null, keys, strict=True)])
    torch.testing.assert_close(sum(losses.values()), expected, atol=1e-5, rtol=1e-5)
    masked = masked_counts(TINY, fold_in(fold_in(keys, TRAINING), RATIO), TOKENS)
    assert 0.5 <= masked.float().mean() / TOKENS <= 1
    assert len(set(masked.tolist())) > 2


def test_loss_of_a_sample_does_not_depend_on_its_batch() -> None:
    model, batch = model_of(), batch_of(6)
    (whole,) = model.losses(*batch).values()
    order = torch.tensor([3, 5, 0, 2, 1, 4])
    (permuted,) = model.losses(*(part[order] for part in batch)).values()
    torch.testing.assert_close(permuted, whole[order], atol=1e-5, rtol=1e-5)
    (alone,) = model.losses(*(part[4:5] for part in batch)).values()
    torch.testing.assert_close(alone, whole[4:5], atol=1e-5, rtol=1e-5)
    assert whole.unique().numel() == 6


def test_gradients_reach_every_parameter() -> None:
    for process in (Clean(), Diffusion(DiffusionConfig(schedule="cosine"))):
        for kind in ("class", "embedding", "none"):
            model, (clean, condition, null, keys) = model_of(process, kind=kind), batch_of(6)
            if kind == "embedding":
                condition = normal(keys, 5)
            losses = model.losses(clean, condition, null, keys)
            sum(losses.values()).sum().backward()
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None, (kind, name)
                assert parameter.grad.isfinite().all(), (kind, name)
                assert parameter.grad.abs().sum() > 0, (kind, name)


def test_hidden_condition_gives_the_null_loss() -> None:
    model, (clean, condition, null, keys) = model_of(), batch_of(6)
    (first,) = model.losses(clean, condition, null, keys).values()
    (second,) = model.losses(clean, (condition + 1) % CLASSES, null, keys).values()
    assert torch.equal((first - second).abs() > 1e-3, ~null)


def test_training_hides_as_many_tokens_as_the_normal_says() -> None:
    keys = keys_of(0, "ratio", torch.arange(20_000))
    config = dataclasses.replace(TINY, min_mask_ratio=0.7, mask_std=0.25)
    ratios = masked_counts(config, keys, 1000) / 1000
    assert ratios.min() >= 0.7
    assert ratios.max() <= 1
    # of the part of a normal between a and its mean: mean + std (pdf(a) - pdf(0)) / (cdf(0) - cdf(a))
    a, pdf = -1.2, lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    mean = 1 + 0.25 * (pdf(a) - pdf(0)) / (0.5 - 0.5 * math.erfc(-a / math.sqrt(2)))
    assert ratios.mean().item() == pytest.approx(mean, abs=2e-3)  # rounded up, so half a token in 1000 more


@pytest.mark.parametrize(("ratio", "tokens", "fewest"), [(0.7, 10, 8), (0.0, 10, 1), (1.0, 10, 10), (0.5, 1, 1)])
def test_training_hides_at_least_one_token(ratio: float, tokens: int, fewest: int) -> None:
    config = dataclasses.replace(TINY, min_mask_ratio=ratio, mask_std=10.0)
    counts = masked_counts(config, keys_of(0, "ratio", torch.arange(500)), tokens)
    assert (counts.min(), counts.max()) == (fewest, tokens)
    assert counts.unique().numel() == tokens - fewest + 1
    model, (clean, condition, null, keys) = model_of(config=config, tokens=tokens), batch_of(4)
    (loss,) = model.losses(clean[:, :tokens], condition, null, keys).values()
    assert loss.isfinite().all()


def test_the_head_is_its_formula() -> None:
    head, noisy, time, z = model_of().head, torch.randn(5, DIM), torch.rand(5), torch.randn(5, TINY.width)
    vector = head.time_embedding(time) + head.projection(z)
    vector = vector * torch.sigmoid(vector)

    def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-6).sqrt() * (
            1 + scale
        ) + shift

    x = head.to_hidden(noisy)
    for block in head.blocks:
        shift, scale, gate = block.modulation(vector).chunk(3, dim=1)
        inner = block.mlp[0](modulated(x, shift, scale))
        x = x + gate * block.mlp[2](inner * torch.sigmoid(inner))
    expected = head.to_output(modulated(x, *head.final_modulation(vector).chunk(2, dim=1)))
    torch.testing.assert_close(head(noisy, time, z), expected, atol=1e-4, rtol=1e-4)


def test_a_new_network_draws_nothing_from_its_input_yet() -> None:
    head = DenoisingHead(3, 6, 16, 12, 2)
    assert head(torch.randn(5, 3), torch.rand(5), torch.randn(5, 16)).abs().max() == 0


# --- sizes and bad input ---


def test_mar_b_has_the_papers_size() -> None:
    with torch.device("meta"):
        condition = Condition("class", 1000, 1, 768)
        model = MAR(MARConfig(), 256, 16, condition, Diffusion(DiffusionConfig(schedule="cosine")))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(208e6, rel=0.03)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 0),
        ("encoder_depth", 0),
        ("decoder_depth", 0),
        ("num_heads", 0),
        ("num_heads", 5),
        ("mlp_ratio", 0.0),
        ("head_width", 0),
        ("head_depth", 0),
        ("condition_tokens", 0),
        ("min_mask_ratio", 1.5),
        ("min_mask_ratio", math.nan),
        ("mask_std", 0.0),
        ("mask_std", math.inf),
        ("head_repeats", 0),
    ],
)
def test_config_refuses(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^{field} is {value}"):
        MARConfig(**{field: value})


@pytest.mark.parametrize(("sizes", "message"), [((0, 3), "num_tokens is 0"), ((3, 0), "latent_dim is 0")])
def test_no_network_for_nothing(sizes: tuple[int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MAR(TINY, *sizes, Condition("class", CLASSES, 1, TINY.width), Clean())
