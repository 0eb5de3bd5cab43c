import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from softvq.errors import InputError, RunError
from softvq.training import muon
from softvq.training.muon import Muon
from softvq.training.optim import (
    OptimConfig,
    Optimizer,
    copy_named,
    learning_rate,
    parameter_groups,
)

NO_SKIP, SKIP = torch.zeros(()), torch.ones(())


class Network(nn.Module):
    """One of everything a tokenizer is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 2)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.gamma = nn.Parameter(torch.ones(4))
        self.mask_token = nn.Parameter(torch.randn(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 4))
        self.codebook = nn.Parameter(torch.randn(2, 8, 4))
        self.teacher = nn.Linear(4, 4).requires_grad_(False)


def with_gradients(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    network = Network()
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    return network


def test_learning_rate_rises_in_a_line_then_follows_the_cosine() -> None:
    config = OptimConfig(lr=2.0, warmup_steps=4, min_lr_ratio=0.25)
    assert [learning_rate(config, step, 12) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert learning_rate(config, 8, 12) == pytest.approx((2.0 + 0.5) / 2)  # half way
    assert learning_rate(config, 6, 12) == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate(config, 12, 12) == pytest.approx(0.5)


def test_constant_learning_rate_does_not_depend_on_the_length() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=2, schedule="constant")
    assert [learning_rate(config, step, 5) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert learning_rate(config, 10_000, 5) == learning_rate(config, 10_000, 50_000) == 1.0


@given(st.integers(0, 500), st.integers(1, 500), st.floats(0, 1), st.integers(0, 600))
def test_learning_rate_stays_between_its_ends(warmup: int, steps: int, ratio: float, step: int) -> None:
    config = OptimConfig(lr=1e-3, warmup_steps=warmup, min_lr_ratio=ratio)
    rate = learning_rate(config, step, steps)
    assert 0 <= rate <= 1e-3 * (1 + 1e-9)
    if step >= warmup:
        assert rate >= 1e-3 * ratio * (1 - 1e-9)
        assert learning_rate(config, step + 1, steps) <= rate * (1 + 1e-9)


def test_only_matrices_of_layers_are_decayed() -> None:
    decayed, rest = parameter_groups(Network())
    assert set(decayed) == {"embed.weight", "linear.weight"}
    kept = {"embed.bias", "linear.bias", "norm.weight", "norm.bias", "gamma", "mask_token", "pos_embed", "codebook"}
    assert set(rest) == kept


def test_groups_of_the_real_tokenizer() -> None:
    from softvq.tokenizers.autoencoder import ImageTokenizer
    from softvq.tokenizers.presets import preset

    tokenizer = ImageTokenizer(preset("softvq-tiny-16", image_size=32))
    decayed, rest = parameter_groups(tokenizer)
    assert decayed.keys() | rest.keys() == {name for name, p in tokenizer.named_parameters() if p.requires_grad}
    assert all(name.endswith(".weight") and parameter.ndim in (2, 4) for name, parameter in decayed.items())
    assert not any(word in name for name in decayed for word in ("norm", "token", "pos", "codebook", ".ls", "bias"))
    assert any("attn.qkv" in name for name in decayed)
    assert any("patch_embed" in name for name in decayed)


def test_first_update_is_that_of_adamw_by_hand() -> None:
    network = with_gradients()
    config = OptimConfig(lr=0.1, weight_decay=0.5, grad_clip=None, schedule="constant")
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    Optimizer(network, config, 10).update(0, NO_SKIP)
    for name, parameter in network.named_parameters():
        if name not in gradients:
            assert torch.equal(parameter, before[name])
            continue
        shrunk = before[name] * (1 - 0.1 * 0.5) if name in ("embed.weight", "linear.weight") else before[name]
        torch.testing.assert_close(parameter.detach(), shrunk - 0.1 * gradients[name] / (gradients[name].abs() + 1e-8))
        assert parameter.grad is None


def test_many_updates_are_those_of_the_plain_adamw() -> None:
    ours, plain = with_gradients(), with_gradients()
    config = OptimConfig(lr=1e-2, weight_decay=0.1, warmup_steps=3, grad_clip=None)
    optimizer = Optimizer(ours, config, 20)
    decayed, rest = parameter_groups(plain)
    groups = [{"params": decayed.values(), "weight_decay": 0.1}, {"params": rest.values(), "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=config.betas, foreach=False, fused=False)
    for step in range(20):
        for one, other in zip(optimizer.parameters.values(), [*decayed.values(), *rest.values()], strict=True):
            one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(step))
            other.grad = one.grad.clone()
        optimizer.update(step, NO_SKIP)
        for group in reference.param_groups:
            group["lr"] = learning_rate(config, step, 20)
        reference.step()
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_skipped_update_changes_no_bit_even_with_nan_gradients() -> None:
    network = with_gradients()
    optimizer = Optimizer(network, OptimConfig(lr=0.1), 10)
    optimizer.update(0, NO_SKIP)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    state = {name: value.clone() for name, value in optimizer.state().items()}
    for parameter in optimizer.parameters.values():
        parameter.grad = torch.full_like(parameter, math.nan)
    optimizer.clip_gradients()
    optimizer.update(1, SKIP)
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())
    assert all(torch.equal(value, state[name]) for name, value in optimizer.state().items())


@pytest.mark.parametrize(("limit", "after"), [(None, None), (1.0, 1.0), (1e6, None)])
def test_clipping_returns_the_norm_there_was(limit: float | None, after: float | None) -> None:
    network = with_gradients()
    optimizer = Optimizer(network, OptimConfig(grad_clip=limit), 10)
    norm = torch.cat([p.grad.flatten() for p in optimizer.parameters.values()]).norm()
    assert optimizer.clip_gradients() == pytest.approx(float(norm))
    left = torch.cat([p.grad.flatten() for p in optimizer.parameters.values()]).norm()
    assert float(left) == pytest.approx(after or float(norm), rel=1e-5)


def test_state_is_kept_by_name_and_taken_over_exactly() -> None:
    network, fresh = with_gradients(), Network()
    optimizer, other = Optimizer(network, OptimConfig(), 10), Optimizer(fresh, OptimConfig(), 10)
    optimizer.update(0, NO_SKIP)
    state = optimizer.state()
    assert "linear.weight.exp_avg_sq" in state
    assert not any(name.startswith("teacher") for name in state)
    assert all(value.dtype == torch.float32 for value in state.values())
    other.load_state({name: value.clone() for name, value in state.items()})
    assert all(torch.equal(value, state[name]) for name, value in other.state().items())
    fresh.load_state_dict(network.state_dict())
    for one, twin in zip(optimizer.parameters.values(), other.parameters.values(), strict=True):
        one.grad, twin.grad = torch.ones_like(one), torch.ones_like(one)
    optimizer.update(1, NO_SKIP)
    other.update(1, NO_SKIP)
    assert all(torch.equal(one, twin) for one, twin in zip(network.parameters(), fresh.parameters(), strict=True))


def test_tensors_of_another_model_are_refused_before_any_is_copied() -> None:
    targets = {"a": torch.zeros(2), "b": torch.zeros(3)}
    for sources in ({"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(4)}, {**targets, "c": torch.ones(1)}):
        with pytest.raises(RunError, match="model state does not fit this model"):
            copy_named(targets, sources, "model")
    assert torch.equal(targets["a"], torch.zeros(2))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0.0),
        ("betas", (0.9, 1.0)),
        ("weight_decay", -1.0),
        ("warmup_steps", -1),
        ("min_lr_ratio", 1.5),
        ("grad_clip", 0.0),
    ],
)
def test_config_refuses(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{field} is .*expected"):
        OptimConfig(**{field: value})


class Blocks(nn.Module):
    """A hidden matrix, which Muon moves, among what AdamW moves."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.blocks = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))


def blocks_with_gradients(seed: int) -> Blocks:
    torch.manual_seed(seed)
    module = Blocks()
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    return module


def test_muon_moves_hidden_matrices_along_orthogonal_directions_and_nothing_else() -> None:
    module, twin = blocks_with_gradients(0), blocks_with_gradients(0)
    before = module.blocks[0].weight.detach().clone()
    config = OptimConfig(kind="muon", lr=0.1, weight_decay=0.0, schedule="constant", grad_clip=None)
    Optimizer(module, config, 10).update(0, NO_SKIP)
    Optimizer(twin, dataclasses.replace(config, kind="adamw"), 10).update(0, NO_SKIP)
    scale = 0.1 * 0.2 * math.sqrt(8)  # lr x AdamW's usual root mean square x sqrt of the longer side
    singular = torch.linalg.svdvals((module.blocks[0].weight - before) / scale)
    assert singular.max() < 1.35
    assert singular.median() > 0.6
    moved_alike = {name: bool(torch.equal(p, twin.get_parameter(name))) for name, p in module.named_parameters()}
    assert [name for name, alike in moved_alike.items() if not alike] == ["blocks.0.weight"]


def test_a_skipped_update_by_muon_changes_nothing_even_if_the_gradient_is_not_finite() -> None:
    module = blocks_with_gradients(0)
    optimizer = Optimizer(module, OptimConfig(kind="muon", lr=0.1), 10)
    optimizer.update(0, NO_SKIP)
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    state = {name: value.clone() for name, value in optimizer.state().items()}
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.update(1, SKIP)
    assert all(torch.equal(p, weights[name]) for name, p in module.named_parameters())
    assert all(torch.equal(value, state[name]) for name, value in optimizer.state().items())


def test_muon_resumes_from_its_state_bit_for_bit() -> None:
    config = OptimConfig(kind="muon", lr=0.1)
    straight = blocks_with_gradients(0)
    first = Optimizer(straight, config, 10)
    first.update(0, NO_SKIP)
    resumed = Blocks()
    resumed.load_state_dict(straight.state_dict())
    second = Optimizer(resumed, config, 10)
    second.load_state({name: value.clone() for name, value in first.state().items()})
    for module, optimizer in ((straight, first), (resumed, second)):
        torch.manual_seed(1)
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.update(1, NO_SKIP)
    assert all(torch.equal(p, resumed.get_parameter(name)) for name, p in straight.named_parameters())


SHAPES = [(8, 8), (24, 8), (8, 8), (8, 32), (24, 8)]


def matrices_like(shapes: list[tuple[int, int]]) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


@pytest.mark.parametrize("most", [64, 1 << 20])
def test_muon_in_stacks_is_the_muon_of_torch(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "MOST_NUMBERS", most)  # 64 numbers are a stack of one matrix
    ours, theirs = matrices_like(SHAPES), matrices_like(SHAPES)
    stacked = Muon(ours, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step, lr in enumerate((0.1, 0.03, 0.2)):
        torch.manual_seed(step + 1)
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        before = [matrix.detach().clone() for matrix in theirs]
        reference.param_groups[0]["lr"] = lr
        reference.step()
        stacked.step(lr, NO_SKIP)
        for one, other, old in zip(ours, theirs, before, strict=True):
            # bfloat16 rounds products in stacks otherwise than single ones
            assert (one - other).norm() < 0.02 * (step + 1) * (other - old).norm()
            assert_close(stacked.state[one]["momentum_buffer"], reference.state[other]["momentum_buffer"])


def test_updates_of_matrices_come_back_in_their_order() -> None:
    gradients = [matrix.detach() for matrix in matrices_like(SHAPES)]
    together = muon.orthogonal_updates(gradients, 0.1)
    for gradient, update in zip(gradients, together, strict=True):
        (alone,) = muon.orthogonal_updates([gradient], 0.1)
        assert (update - alone).norm() < 0.02 * alone.norm()
        assert (gradient * update).sum() < 0
