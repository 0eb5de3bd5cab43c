"""The transformer of SiT and DiT, and what it is told: time and condition."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from softvq.errors import InputError
from softvq.generators.conditioning import Condition
from softvq.generators.config import GeneratorConfig
from softvq.generators.generator import LatentGenerator
from softvq.generators.presets import GENERATORS, generator_preset
from softvq.generators.transformer import (
    LatentTransformer,
    ModulatedBlock,
    TimestepEmbedding,
    TransformerConfig,
    modulate,
    patchify_latents,
    unpatchify_latents,
)

TOKENS, DIM, WIDTH, CLASSES = 9, 3, 16, 4
BATCH = 5
NULL = torch.arange(BATCH) % 2 == 1


def network(kind: str = "class", moved: bool = True, **fields: object) -> LatentTransformer:
    torch.manual_seed(0)
    config = TransformerConfig(**{"width": WIDTH, "depth": 2, "num_heads": 2, **fields})
    made = LatentTransformer(config, TOKENS, DIM, 2 * DIM, Condition(kind, CLASSES, 6, WIDTH))
    for parameter in made.parameters() if moved else ():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return made


def inputs(kind: str = "class") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(1)
    condition = torch.arange(BATCH) % CLASSES
    if kind == "embedding":
        condition = torch.randn(BATCH, 6, generator=draws)
    return torch.randn(BATCH, TOKENS, DIM, generator=draws), torch.linspace(0, 999, BATCH), condition, NULL


def test_it_starts_with_zero_output_and_blocks_that_do_nothing() -> None:
    fresh, (noisy, time, condition, null) = network(moved=False), inputs()
    assert not fresh(noisy, time, condition, null).any()
    tokens, vector = torch.randn(2, TOKENS, WIDTH), torch.randn(2, WIDTH)
    for block in fresh.blocks:
        assert isinstance(block, ModulatedBlock)
        assert torch.equal(block(tokens, vector), tokens)
    moved = network()
    assert moved(noisy, time, condition, null).any()
    assert not torch.equal(moved.blocks[0](tokens, vector), tokens)


def test_a_block_is_the_equation() -> None:
    block = network().blocks[0]
    assert isinstance(block, ModulatedBlock)
    tokens, vector = torch.randn(2, TOKENS, WIDTH), torch.randn(2, WIDTH)
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(vector)[:, None].chunk(6, dim=-1)

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()

    expected = tokens + gate1 * block.attn(norm(tokens) * (1 + scale1) + shift1)
    expected = expected + gate2 * block.mlp(norm(expected) * (1 + scale2) + shift2)
    torch.testing.assert_close(block(tokens, vector), expected)


def test_modulate() -> None:
    tokens, shift, scale = torch.ones(2, 3, 4), torch.arange(8.0).view(2, 4), torch.tensor([[1.0] * 4, [2.0] * 4])
    expected = torch.stack([(2 + shift[0]).expand(3, -1), (3 + shift[1]).expand(3, -1)])
    assert torch.equal(modulate(tokens, shift, scale), expected)


@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_only_positions_tell_tokens_apart(qk_norm: bool) -> None:
    plain, (noisy, *others) = network(qk_norm=qk_norm), inputs()
    order = torch.tensor([3, 1, 4, 0, 5, 8, 2, 6, 7])
    assert not torch.allclose(plain(noisy[:, order], *others), plain(noisy, *others)[:, order], atol=1e-3)
    plain.positions.zero_()
    torch.testing.assert_close(plain(noisy[:, order], *others), plain(noisy, *others)[:, order], atol=1e-5, rtol=1e-5)


def test_sines_interleave_along_the_sequence() -> None:
    positions = network(positions="sine").positions[0]
    for place in range(TOKENS):
        for pair in range(WIDTH // 2):
            angle = place / 10_000 ** (2 * pair / WIDTH)
            assert positions[place, 2 * pair] == pytest.approx(math.sin(angle), abs=1e-6)
            assert positions[place, 2 * pair + 1] == pytest.approx(math.cos(angle), abs=1e-6)


def test_sine_2d_tells_rows_from_columns() -> None:
    made = network(positions="sine_2d")
    assert "positions" not in dict(made.named_parameters())
    grid = made.positions[0].view(3, 3, 2, WIDTH // 2)
    assert torch.equal(grid[:, :, 0], grid[:, :1, 0].expand(3, 3, -1))  # the first half knows the row alone
    assert torch.equal(grid[:, :, 1], grid[:1, :, 1].expand(3, 3, -1))  # the second the column
    assert torch.equal(grid[:, 0, 0], grid[0, :, 1])
    assert len(made.positions[0].unique(dim=0)) == TOKENS


def test_sine_2d_needs_a_square() -> None:
    condition = Condition("none", 1, 1, WIDTH)
    config = TransformerConfig(width=WIDTH, depth=1, num_heads=2, positions="sine_2d")
    with pytest.raises(InputError, match="square number of tokens; it is 8"):
        LatentTransformer(config, 8, DIM, DIM, condition)


def test_learned_positions_are_trained() -> None:
    assert "positions" in dict(network(positions="learned").named_parameters())
    assert "positions" in network(positions="sine").state_dict()


@given(
    batch=st.integers(1, 3), channels=st.integers(1, 4), side=st.integers(1, 5), patch=st.integers(1, 4),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_patches_go_back_to_where_they_were(batch: int, channels: int, side: int, patch: int, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, channels, side * patch, side * patch, generator=draws)
    tokens = patchify_latents(latents, patch)
    assert tokens.shape == (batch, side * side, patch * patch * channels)
    assert torch.equal(unpatchify_latents(tokens, patch), latents)
    row, column = seed % side, (seed // side) % side
    piece = latents[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
    assert torch.equal(tokens[:, row * side + column], piece.permute(0, 2, 3, 1).flatten(1))


def test_latents_that_are_no_square_are_cut_row_by_row() -> None:
    latents = torch.arange(8.0).view(1, 1, 2, 4)
    assert patchify_latents(latents, 2).tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7]]]


@pytest.mark.parametrize(
    ("name", "millions", "digit"),
    [("sit-xl", 674.93, 0.005), ("dit-xl", 674.96, 0.005), ("sit-l", 457.9, 0.05), ("sit-b", 130.4, 0.05)],
)
def test_sizes_are_the_published_ones(name: str, millions: float, digit: float) -> None:
    with torch.device("meta"):
        generator = LatentGenerator(generator_preset(name, num_tokens=64, latent_dim=32))
    state = generator.state_dict()  # where positions count too, as they do in the published figures
    assert abs(sum(tensor.numel() for tensor in state.values()) / 1e6 - millions) <= digit
    assert state["network.condition.table.weight"].shape[0] == 1001
    trained = {name for name, _ in generator.named_parameters()}
    assert state.keys() - trained == {"network.positions"}


@pytest.mark.parametrize("name", GENERATORS)
def test_every_preset_can_be_built(name: str) -> None:
    with torch.device("meta"):
        generator = LatentGenerator(generator_preset(name, num_tokens=32, latent_dim=16, num_classes=5))
    assert isinstance(generator.config, GeneratorConfig)
    assert generator.config.network.kind == ("mar" if name.startswith("mar") else "transformer")
    assert generator.config.process.kind == ("flow" if name.startswith("sit") else "diffusion")


def test_a_preset_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"no generator 'sit-xxl', expected one of sit-tiny, sit-xs, "):
        generator_preset("sit-xxl", num_tokens=1, latent_dim=1)


@torch.no_grad()
def test_neighbouring_times_differ_in_bf16() -> None:
    embedding = TimestepEmbedding(WIDTH)
    full = embedding(torch.tensor([998.0, 999.0]))
    low = embedding.bfloat16()(torch.tensor([998.0, 999.0]))
    assert low.dtype == torch.bfloat16
    assert (low[0] - low[1]).abs().max() > 0.3 * (full[0] - full[1]).abs().max() > 0
    torch.testing.assert_close(low.float(), full, atol=2e-2, rtol=2e-2)
    noisy, _, condition, null = inputs()
    whole, times = network().bfloat16(), torch.tensor([998.0, 999.0])
    output = whole(noisy[:1].repeat(2, 1, 1), times, condition[:1].repeat(2), null[:1].repeat(2))
    assert output.dtype == torch.bfloat16
    assert not torch.equal(output[0], output[1])


@torch.no_grad()
def test_time_is_cosines_then_sines() -> None:
    embedding = TimestepEmbedding(8, frequencies=6)
    seen: list[Tensor] = []
    embedding.mlp[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    embedding(torch.tensor([0.7]))
    speeds = [10_000 ** (-i / 3) for i in range(3)]
    expected = [math.cos(0.7 * s) for s in speeds] + [math.sin(0.7 * s) for s in speeds]
    assert seen[0][0].tolist() == pytest.approx(expected, abs=1e-6)


def test_a_class_is_a_row_of_the_table() -> None:
    condition = Condition("class", CLASSES, 6, WIDTH)
    found = condition(torch.tensor([0, 3, 3]), torch.tensor([False, False, True]))
    assert torch.equal(found, condition.table.weight[[0, 3, CLASSES]])


def test_an_embedding_is_projected_and_hidden_ones_are_null() -> None:
    condition = Condition("embedding", CLASSES, 6, WIDTH)
    nn.init.normal_(condition.null)
    vectors = torch.randn(2, 6)
    found = condition(vectors, torch.tensor([False, True]))
    torch.testing.assert_close(found, torch.stack([condition.projection(vectors)[0], condition.null]))


def test_without_a_condition_there_is_only_null() -> None:
    condition = Condition("none", 1, 1, WIDTH)
    nn.init.normal_(condition.null)
    found = condition(torch.tensor([5, -1]), torch.tensor([False, True]))
    assert torch.equal(found, condition.null.expand(2, -1))


@pytest.mark.parametrize("kind", ["class", "embedding", "none"])
@pytest.mark.parametrize("positions", ["sine", "learned"])
def test_gradients_reach_every_parameter(kind: str, positions: str) -> None:
    made = network(kind, positions=positions, qk_norm=True)
    made(*inputs(kind)).square().sum().backward()
    lacking = [name for name, p in made.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not lacking
    if kind == "class":  # classes 0, 2 and again 0 of a batch are shown, the others hidden
        rows = made.condition.table.weight.grad.abs().sum(dim=1) > 0
        assert rows.tolist() == [True, False, True, False, True]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 0}, "depth is 0, expected 1 to 1024"),
        ({"num_heads": 3}, r"num_heads is 3, expected a divisor of width \(16\)"),
        ({"width": 18, "num_heads": 2}, "width is 18, expected a multiple of 4"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0"),
    ],
)
def test_sizes_that_cannot_be(fields: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        network(**fields)
