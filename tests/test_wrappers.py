"""Product and residual quantizers, alone and within each other, and what holds for quantizers of every kind."""

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F

from softvq.config import from_dict, to_dict
from softvq.errors import InputError
from softvq.randomness import fold_in, keys_of
from softvq.tokenizers import codebooks
from softvq.tokenizers.codebooks import codebook_statistics
from softvq.tokenizers.quantizers import (
    GMMVQConfig,
    GumbelConfig,
    KLConfig,
    NoneConfig,
    ProductConfig,
    QuantizerConfig,
    ResidualConfig,
    SoftVQConfig,
    VQConfig,
    build_quantizer,
    check_quantizer,
    innermost,
    unit_vectors,
)

TOKENS, DIM, CODES = 4, 6, 8
SIZES = {"codebook_size": CODES, "num_codebooks": 2}
COLD = {"temperature": 1e-6, **SIZES}
LEAVES = {
    "softvq": SoftVQConfig(**SIZES),
    "euclidean": SoftVQConfig(similarity="euclidean", detach_logits=False, **SIZES),
    "vq": VQConfig(entropy_weight=0.1, **SIZES),
    "gmmvq": GMMVQConfig(**SIZES),
    "gumbel": GumbelConfig(**SIZES),
    "hard gumbel": GumbelConfig(hard=True, entropy_per_codebook=True, **SIZES),
}
WRAPPERS = {
    "product": ProductConfig(parts=3, inner=LEAVES["softvq"]),
    "residual": ResidualConfig(depth=3, inner=LEAVES["vq"]),
    "product of residual": ProductConfig(inner=ResidualConfig(inner=LEAVES["gmmvq"])),
    "residual of product": ResidualConfig(depth=3, inner=ProductConfig(inner=LEAVES["gumbel"])),
    "four": ResidualConfig(inner=ProductConfig(inner=ResidualConfig(inner=ProductConfig(parts=3, inner=LEAVES["vq"])))),
}
EVERY = {**LEAVES, **WRAPPERS, "kl": KLConfig(), "none": NoneConfig()}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A config with any quantizer in it."""

    quantizer: QuantizerConfig


def build(config, seed=0, dim=DIM):
    torch.manual_seed(seed)
    return build_quantizer(config, num_latent_tokens=TOKENS, latent_dim=dim)


def draw(batch=4, dim=DIM):
    return torch.randn(batch, TOKENS, dim, generator=torch.Generator().manual_seed(0))


def keys(batch=4):
    return keys_of(0, "test", torch.arange(batch))


def with_leaf(config, leaf):
    if isinstance(config, ProductConfig | ResidualConfig):
        return dataclasses.replace(config, inner=with_leaf(config.inner, leaf))
    return leaf


def stage_counts(config):
    if isinstance(config, ProductConfig):
        return (config.parts, *stage_counts(config.inner))
    return (config.depth, *stage_counts(config.inner)) if isinstance(config, ResidualConfig) else ()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_latents_give_finite_values_and_gradients(name, dtype):
    quantizer = build(EVERY[name])
    normal = draw(1, quantizer.input_dim)
    extremes = (0 * normal, 0 * normal + 1, 1e4 * normal, 0 * normal + 1e4, 1e-7 * normal, normal * 10 ** (8 * normal))
    pre = torch.cat(extremes).clamp(-6e4, 6e4).to(dtype).requires_grad_()
    latents, losses = quantizer(pre, keys(6))
    (latents.mean() + sum(losses.values())).backward()
    assert latents.dtype == torch.float32
    for value in (latents, *losses.values(), quantizer.encode(pre), *quantizer.averages(pre).values(), pre.grad):
        assert value.isfinite().all()
    for parameter in quantizer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_split_over_ranks_trains_as_the_whole(name, monkeypatch):
    quantizer, pre = build(EVERY[name]), draw(dim=build(EVERY[name]).input_dim)

    def trained(part, mean):
        monkeypatch.setattr(codebooks, "mean_over_ranks", mean)
        quantizer.zero_grad()
        latents, losses = quantizer(pre[part], keys()[part])
        total = latents.square().mean() + sum(losses.values())
        if total.requires_grad:
            total.backward()
        gradients = [torch.zeros(1) if p.grad is None else p.grad.clone() for p in quantizer.parameters()]
        return latents, total.detach(), gradients

    marginals = []
    latents, total, gradients = trained(slice(0, 4), lambda value: marginals.append(value.detach()) or value)
    ranks = []
    for part in (slice(0, 2), slice(2, 4)):  # each rank is told what the ranks together would have found
        reduced = iter(marginals)
        ranks.append(trained(part, lambda value, reduced=reduced: value + (next(reduced) - value).detach()))
        assert next(reduced, None) is None, "a collective ran another number of times, perhaps in the backward pass"
    torch.testing.assert_close(torch.cat([rank[0] for rank in ranks]), latents)
    torch.testing.assert_close((ranks[0][1] + ranks[1][1]) / 2, total)
    for whole, first, second in zip(gradients, ranks[0][2], ranks[1][2], strict=True):
        torch.testing.assert_close((first + second) / 2, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [*LEAVES, *WRAPPERS])
def test_indices_lookup_and_averages_have_an_axis_for_each_wrapper(name):
    quantizer, pre, stages = build(EVERY[name]), draw(), stage_counts(EVERY[name])
    indices = quantizer.indices(pre)
    assert indices.shape == (4, TOKENS, *stages)
    assert quantizer.lookup(indices).shape == pre.shape
    top, weights = quantizer.top_codewords(pre, 3)
    assert top.shape == weights.shape == (4, TOKENS, *stages, 3)
    assert torch.equal(top[..., 0], indices)
    assert (weights.diff(dim=-1) <= 0).all()
    averages = quantizer.averages(pre)
    groups = 2 * int(torch.tensor(stages).prod())
    assert averages["likeliest"].shape == averages["marginal"].shape == (groups, CODES)
    torch.testing.assert_close(averages["marginal"].sum(dim=-1), torch.ones(groups))
    assert quantizer.statistics(pre) == codebook_statistics(averages)
    halves = [quantizer.averages(half)["max_probability"] for half in pre.split(2)]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, averages["max_probability"])
    with pytest.raises(InputError, match="k is 9"):
        quantizer.top_codewords(pre, 9)


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("leaf", ["softvq", "gmmvq", "gumbel"])
def test_temperature_to_zero_is_the_same_wrapper_of_vq(name, leaf):
    kinds = {"softvq": SoftVQConfig, "gmmvq": GMMVQConfig, "gumbel": GumbelConfig}
    cold = build(with_leaf(WRAPPERS[name], kinds[leaf](**COLD)))
    hard = build(with_leaf(WRAPPERS[name], VQConfig(**SIZES)))
    hard.load_state_dict({key: value for key, value in cold.state_dict().items() if key in hard.state_dict()})
    pre = draw()
    torch.testing.assert_close(cold.encode(pre), hard.encode(pre), atol=1e-4, rtol=0)
    assert torch.equal(cold.indices(pre), hard.indices(pre))
    torch.testing.assert_close(hard.lookup(hard.indices(pre)), hard.encode(pre))
    torch.testing.assert_close(hard(pre)[0], hard.encode(pre))


@pytest.mark.parametrize("name", [name for name in LEAVES if name != "euclidean"])
@pytest.mark.parametrize(
    "wrap", [lambda x: ProductConfig(parts=1, inner=x), lambda x: ResidualConfig(depth=1, inner=x)]
)
def test_one_stage_is_the_quantizer_within(name, wrap):
    wrapped, plain, pre = build(wrap(LEAVES[name])), build(LEAVES[name]), draw()
    plain.load_state_dict(wrapped.stages[0].state_dict())
    torch.testing.assert_close(wrapped.encode(pre), plain.encode(pre))
    torch.testing.assert_close(wrapped(pre, keys(), 1.5), plain(pre, fold_in(keys(), 0), 1.5))
    assert torch.equal(wrapped.indices(pre)[:, :, 0], plain.indices(pre))
    torch.testing.assert_close(wrapped.statistics(pre), plain.statistics(pre))


def test_product_quantizes_each_part_by_itself():
    quantizer, pre = build(WRAPPERS["product"]), draw()
    latents, losses = quantizer(pre)
    terms = []
    for i, stage in enumerate(quantizer.stages):
        channels = slice(2 * i, 2 * i + 2)
        own, own_losses = stage(pre[..., channels])
        torch.testing.assert_close(latents[..., channels], own)
        torch.testing.assert_close(quantizer.encode(pre)[..., channels], stage.encode(pre[..., channels]))
        terms.append(own_losses["entropy"])
    torch.testing.assert_close(losses["entropy"], sum(terms) / 3)
    assert len({stage.codebook.sum().item() for stage in quantizer.stages}) == 3


@pytest.mark.parametrize("wrapper", [ProductConfig, ResidualConfig])
def test_stages_draw_other_noise(wrapper):
    config = wrapper(inner=GumbelConfig(gumbel_temperature=0.1, temperature=1e3, **SIZES))
    quantizer = build(config)
    drawn = []
    for stage in quantizer.stages:
        stage.load_state_dict(quantizer.stages[0].state_dict())
        stage.register_forward_hook(lambda module, args, output: drawn.append((args[1], output[0])))
    quantizer(draw(), keys())
    assert not torch.equal(drawn[0][0], drawn[1][0])
    assert (drawn[0][1] - drawn[1][1]).abs().amax(dim=-1).median() > 0.1, "a posterior this flat is its noise alone"


def test_residual_quantizes_what_was_left_with_learned_scales():
    quantizer, pre = build(ResidualConfig(depth=3, inner=SoftVQConfig(temperature=0.2, **SIZES))), draw()
    torch.testing.assert_close(quantizer.scales.detach(), torch.tensor([1.0, 0.5, 0.25]))
    rest, expected, terms = F.normalize(pre, dim=-1), torch.zeros_like(pre), []
    for scale, stage in zip(quantizer.scales, quantizer.stages, strict=True):
        latents, losses = stage(rest)
        rest, expected = rest - scale * latents, expected + scale * latents
        terms.append(losses["entropy"])
    found, losses = quantizer(pre)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(quantizer.encode(pre), expected)
    torch.testing.assert_close(losses["entropy"], sum(terms) / 3)
    gradients = torch.autograd.grad(found.square().sum(), [quantizer.scales, *quantizer.stages.parameters()])
    expected_gradients = torch.autograd.grad(
        expected.square().sum(), [quantizer.scales, *quantizer.stages.parameters()]
    )
    torch.testing.assert_close(gradients, expected_gradients)


def test_each_depth_takes_its_squared_scale_from_the_error_where_scales_fit():
    """With unit codewords c and s the mean of r.c over tokens, the mean of |r - s c|^2 is that of |r|^2 less s^2."""
    depth = 6
    quantizer, pre = build(ResidualConfig(depth=depth, inner=VQConfig(codebook_size=64))), draw(16)
    rest, errors = F.normalize(pre, dim=-1), []
    with torch.no_grad():
        for i, stage in enumerate(quantizer.stages):
            quantizer.scales[i] = (rest * stage.encode(rest)).sum(dim=-1).mean()
            rest = rest - quantizer.scales[i] * stage.encode(rest)
            errors.append(float(rest.square().sum(dim=-1).mean()))
        squares = quantizer.scales.square()
        torch.testing.assert_close(torch.tensor(errors), 1 - squares.cumsum(dim=0), atol=1e-5, rtol=0)
        gap = F.normalize(pre, dim=-1) - quantizer.encode(pre)
    assert errors == sorted(errors, reverse=True)
    assert float(gap.square().sum(dim=-1).mean()) == pytest.approx(errors[-1], abs=1e-5)
    assert errors[-1] < 0.2 * errors[0]


@pytest.mark.parametrize("name", EVERY)
def test_configs_survive_a_round_trip(name):
    data = to_dict(Model(quantizer=EVERY[name]))
    assert from_dict(Model, data) == Model(quantizer=EVERY[name])
    check_quantizer(EVERY[name], num_latent_tokens=TOKENS, latent_dim=DIM * 2)
    with torch.device("meta"):
        assert build(EVERY[name]).state_dict().keys() == build(EVERY[name], seed=1).state_dict().keys()


def nested(*kinds, leaf=None):
    data = leaf or {"kind": "vq"}
    for kind in reversed(kinds):
        data = {"kind": kind, "inner": data}
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (nested("residual", leaf={"kind": "product", "parts": 0}), "quantizer.inner: parts is 0, expected 1 to 64"),
        (
            nested("residual", "product", leaf={"kind": "product", "parts": "two"}),
            "quantizer.inner.inner.parts is 'two', expected a whole number",
        ),
        (nested("residual", "product", leaf={"kind": "kl"}), "quantizer.inner.inner.kind is 'kl', expected one of"),
        (nested("product", leaf={"kind": "vq", "codes": 3}), "unknown field 'quantizer.inner.codes'"),
        ({"kind": "residual", "depth": 65}, "quantizer: depth is 65, expected 1 to 64"),
        (nested(*["product"] * 5), "5 product and residual quantizers are nested, expected at most 4"),
        (
            {"kind": "product", "parts": 64, "inner": {"kind": "residual", "depth": 17}},
            "parts is 64, which makes 1088 quantizers, expected at most 1024",
        ),
    ],
)
def test_impossible_nestings_are_named(data, message):
    with pytest.raises(InputError, match=re.escape(message)):
        from_dict(Model, {"quantizer": data})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ProductConfig(parts=4), "parts is 4, expected a divisor of latent_dim (6)"),
        (
            ResidualConfig(inner=ProductConfig(inner=ProductConfig())),
            "parts is 2, expected a divisor of latent_dim (3)",
        ),
        (ProductConfig(inner=VQConfig(num_codebooks=3)), "num_codebooks is 3, expected a divisor of num_latent_tokens"),
    ],
)
def test_sizes_that_do_not_fit_are_named_with_or_without_building(config, message):
    for check in (build_quantizer, check_quantizer):
        with pytest.raises(InputError, match=re.escape(message)):
            check(config, num_latent_tokens=TOKENS, latent_dim=DIM)


def test_the_tokenizer_is_told_the_codebook_and_the_size_of_latents():
    for name, config in {**LEAVES, **WRAPPERS}.items():
        assert innermost(config).codebook_size == CODES
        norms = build(config).lookup(build(config).indices(draw())).norm(dim=-1)
        vectors = unit_vectors(config)
        assert (vectors > 0) == (name != "euclidean")
        if not isinstance(config, ResidualConfig) and not isinstance(getattr(config, "inner", None), ResidualConfig):
            torch.testing.assert_close(norms, torch.full((4, TOKENS), vectors**0.5 if vectors else norms[0, 0].item()))
    assert innermost(KLConfig()) == KLConfig()
    assert not unit_vectors(KLConfig())
    assert not unit_vectors(NoneConfig())
    assert not unit_vectors(ProductConfig(inner=LEAVES["euclidean"]))
