"""The quantizers against closed forms, limits and independent computations."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from softvq.errors import InputError
from softvq.randomness import keys_of
from softvq.tokenizers.codebooks import codebook_statistics, entropy_averages, entropy_of, posterior_averages, unit
from softvq.tokenizers.quantizers import (
    KL,
    VQ,
    KLConfig,
    NoneConfig,
    SoftVQ,
    SoftVQConfig,
    VQConfig,
    build_quantizer,
)

TOKENS, DIM = 8, 5


def soft(**fields):
    return SoftVQ(SoftVQConfig(**{"codebook_size": 16, **fields}), num_latent_tokens=TOKENS, latent_dim=DIM)


def draw(seed=0, batch=3):
    return torch.randn(batch, TOKENS, DIM, generator=torch.Generator().manual_seed(seed))


def entropy_loss(logits):
    return entropy_of(*entropy_averages(logits))


def test_latents_are_the_posterior_mean_of_each_tokens_own_codebook():
    quantizer, pre = soft(num_codebooks=4, temperature=0.3), draw()
    unit, codewords = F.normalize(pre, dim=-1), F.normalize(quantizer.codebook, dim=-1)
    for token in range(TOKENS):
        own = codewords[token // 2]
        posterior = torch.softmax(unit[:, token] @ own.T / 0.3, dim=-1)
        torch.testing.assert_close(quantizer.posterior(pre)[:, token], posterior)
        torch.testing.assert_close(quantizer.encode(pre)[:, token], posterior @ own)
        torch.testing.assert_close(quantizer(pre)[0][:, token], posterior @ own)


@given(seed=st.integers(0, 1000), num_codebooks=st.sampled_from([1, 2, 4, 8]))
def test_temperature_to_zero_is_the_nearest_codeword(seed, num_codebooks):
    torch.manual_seed(seed)
    cold = soft(num_codebooks=num_codebooks, temperature=1e-6)
    hard = VQ(VQConfig(codebook_size=16, num_codebooks=num_codebooks), num_latent_tokens=TOKENS, latent_dim=DIM)
    hard.load_state_dict(cold.state_dict())
    pre = draw(seed)
    torch.testing.assert_close(cold.encode(pre), hard.encode(pre), atol=1e-4, rtol=0)
    assert torch.equal(cold.indices(pre), hard.indices(pre))


@given(seed=st.integers(0, 1000))
def test_temperature_to_infinity_is_the_mean_of_the_codebook(seed):
    torch.manual_seed(seed)
    warm = soft(num_codebooks=1, temperature=1e6)
    mean = F.normalize(warm.codebook[0], dim=-1).mean(dim=0)
    torch.testing.assert_close(warm.encode(draw(seed)), mean.expand(3, TOKENS, DIM), atol=1e-5, rtol=0)


@given(seed=st.integers(0, 1000), temperature=st.floats(1e-3, 1e3))
def test_posterior_is_a_distribution_and_latents_lie_in_the_unit_ball(seed, temperature):
    torch.manual_seed(seed)
    quantizer = soft(temperature=temperature)
    pre = 10 * draw(seed)
    posterior = quantizer.posterior(pre)
    assert posterior.min() >= 0
    torch.testing.assert_close(posterior.sum(dim=-1), torch.ones(3, TOKENS))
    assert quantizer.encode(pre).norm(dim=-1).max() <= 1 + 1e-5


def test_the_papers_posterior_is_of_euclidean_distances():
    quantizer, pre = soft(num_codebooks=1, similarity="euclidean", temperature=0.5), draw()
    codewords = quantizer.codebook[0]
    distances = (pre[:, :, None] - codewords).square().sum(dim=-1).sqrt()
    posterior = torch.softmax(-distances / 0.5, dim=-1)
    torch.testing.assert_close(quantizer.posterior(pre), posterior)
    torch.testing.assert_close(quantizer.encode(pre), posterior @ codewords)


@pytest.mark.parametrize("detach", [True, False])
def test_gradient_of_the_codebook_passes_the_logits_only_if_asked(detach):
    quantizer, pre = soft(num_codebooks=1, detach_logits=detach, temperature=0.2), draw()
    quantizer(pre)[0].square().sum().backward()
    codebook = quantizer.codebook.detach().clone().requires_grad_()
    codewords = F.normalize(codebook[0], dim=-1)
    logits = F.normalize(pre, dim=-1) @ (codewords.detach() if detach else codewords).T / 0.2
    (logits.softmax(dim=-1) @ codewords).square().sum().backward()
    torch.testing.assert_close(quantizer.codebook.grad, codebook.grad)


@pytest.mark.parametrize("entropy_weight", [0.0, 0.01])
def test_training_keeps_no_posterior(entropy_weight):
    size = 4096
    quantizer = soft(codebook_size=size, num_codebooks=1, entropy_weight=entropy_weight)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        latents, losses = quantizer(draw(batch=8).requires_grad_())
    assert max(kept) <= size * DIM < 8 * TOKENS * size
    assert latents.requires_grad
    assert bool(losses) == (entropy_weight > 0)


@pytest.mark.parametrize("kind", ["softvq", "vq"])
def test_everything_is_float32_under_autocast(kind):
    config = SoftVQConfig(codebook_size=16) if kind == "softvq" else VQConfig(codebook_size=16, entropy_weight=0.1)
    quantizer = build_quantizer(config, num_latent_tokens=TOKENS, latent_dim=DIM)
    pre = draw().bfloat16().float()
    expected, expected_losses = quantizer(pre)
    with torch.autocast("cpu", torch.bfloat16):
        latents, losses = quantizer(pre.bfloat16())
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(losses, expected_losses)


def test_entropy_of_equal_logits_is_zero_and_of_perfect_use_is_minus_log_k():
    codes = 32
    assert entropy_loss(torch.zeros(1, 10, codes)).item() == pytest.approx(0, abs=1e-4)
    assert entropy_loss(1e4 * torch.eye(codes)[None]).item() == pytest.approx(-math.log(codes), abs=1e-4)


def test_entropy_is_minus_the_mutual_information():
    logits = torch.randn(1, 50, 7)
    joint = torch.distributions.Categorical(logits=logits[0])
    marginal = torch.distributions.Categorical(probs=joint.probs.mean(dim=0))
    expected = joint.entropy().mean() - marginal.entropy()
    torch.testing.assert_close(entropy_loss(logits), expected, atol=1e-4, rtol=0)


def test_entropy_per_codebook_differs_from_the_pooled_one():
    pooled, each = soft(num_codebooks=4), soft(num_codebooks=4, entropy_per_codebook=True)
    each.load_state_dict(pooled.state_dict())
    pre = draw()
    logits = pooled._similarities(pre, pooled._codewords()) / 0.01
    torch.testing.assert_close(
        each(pre)[1]["entropy"], 0.01 * torch.stack([entropy_loss(x[None]) for x in logits]).mean()
    )
    torch.testing.assert_close(pooled(pre)[1]["entropy"], 0.01 * entropy_loss(logits.reshape(1, -1, 16)))


def test_statistics_closed_forms():
    one_hot = F.one_hot(torch.tensor([[0, 0, 1, 2]]), 8).float()
    averages = posterior_averages(one_hot)
    torch.testing.assert_close(averages["likeliest"], torch.tensor([[0.5, 0.25, 0.25, 0, 0, 0, 0, 0]]))
    figures = codebook_statistics(averages)
    assert figures["usage"] == pytest.approx(3 / 8)
    assert figures["perplexity"] == pytest.approx(math.exp(1.5 * math.log(2)))
    assert figures["posterior_entropy"] == 0
    assert figures["max_probability"] == 1
    uniform = codebook_statistics(posterior_averages(torch.full((2, 5, 8), 1 / 8)))
    assert uniform["perplexity"] == pytest.approx(8)
    assert uniform["posterior_entropy"] == pytest.approx(math.log(8))
    assert codebook_statistics({}) == {}


def test_averages_of_halves_make_the_averages_of_the_whole():
    quantizer, pre = soft(num_codebooks=2, temperature=0.5), draw(batch=6)
    whole, first, second = (quantizer.averages(part) for part in (pre, pre[:3], pre[3:]))
    assert whole["likeliest"].shape == whole["marginal"].shape == (2, 16)
    assert whole["posterior_entropy"].shape == whole["max_probability"].shape == (2,)
    for name, value in whole.items():
        torch.testing.assert_close((first[name] + second[name]) / 2, value)
    posterior = torch.distributions.Categorical(probs=quantizer.posterior(pre))
    entropies = posterior.entropy().reshape(6, 2, 4).mean(dim=(0, 2))
    torch.testing.assert_close(whole["posterior_entropy"], entropies)


def test_softening_multiplies_the_temperature_of_the_latents_alone():
    quantizer, softer = soft(temperature=0.1), soft(temperature=0.25)
    softer.load_state_dict(quantizer.state_dict())
    for softening in (2.5, torch.tensor(2.5)):
        latents, losses = quantizer(draw(), softening=softening)
        torch.testing.assert_close(latents, softer(draw())[0])
        assert torch.equal(losses["entropy"], quantizer(draw())[1]["entropy"])


@pytest.mark.parametrize("kind", ["softvq", "vq"])
def test_top_codewords_are_the_likeliest_with_their_probabilities(kind):
    if kind == "softvq":
        quantizer = soft(num_codebooks=2, temperature=0.3)
    else:
        quantizer = VQ(VQConfig(codebook_size=16, num_codebooks=2), num_latent_tokens=TOKENS, latent_dim=DIM)
    pre = draw()
    indices, weights = quantizer.top_codewords(pre, 3)
    units, codewords = F.normalize(pre, dim=-1), F.normalize(quantizer.codebook, dim=-1)
    for token in range(TOKENS):
        order = torch.cdist(units[:, token], codewords[token // 4]).argsort(dim=-1)[:, :3]
        assert torch.equal(indices[:, token], order)
    if kind == "softvq":
        torch.testing.assert_close(weights, quantizer.posterior(pre).sort(dim=-1, descending=True).values[..., :3])
    else:
        assert torch.equal(weights, torch.tensor([1.0, 0, 0]).expand(3, TOKENS, 3))
    everything = quantizer.top_codewords(pre, 16)[1]
    torch.testing.assert_close(everything.sum(dim=-1), torch.ones(3, TOKENS))


@pytest.mark.parametrize("k", [0, 17])
def test_more_codewords_than_there_are_cannot_be_the_top(k):
    with pytest.raises(InputError, match=rf"k is {k}, expected 1 to the codebook's size \(16\)"):
        soft().top_codewords(draw(), k)


def test_lookup_finds_the_codewords_of_each_tokens_codebook():
    quantizer = soft(num_codebooks=4)
    indices = torch.arange(24).reshape(3, TOKENS) % 16
    found, codewords = quantizer.lookup(indices), F.normalize(quantizer.codebook, dim=-1)
    for token in range(TOKENS):
        torch.testing.assert_close(found[:, token], codewords[token // 2][indices[:, token]])
    raw = soft(similarity="euclidean", num_codebooks=1)
    assert torch.equal(raw.lookup(indices), raw.codebook[0][indices])


def test_unit_vectors_are_those_of_torch_and_next_to_zero_have_no_slope():
    vectors = torch.tensor([[3.0, 4.0], [3e-4, 4e-4], [3e-6, 4e-6], [0.0, 0.0]], requires_grad=True)
    units = unit(vectors)
    torch.testing.assert_close(units[:2], F.normalize(vectors[:2], dim=-1))
    torch.testing.assert_close(units[2:], vectors[2:] / 1e-4)
    units[:, 0].sum().backward()
    torch.testing.assert_close(vectors.grad[:2], torch.tensor([[16.0, -12.0], [160000.0, -120000.0]]) / 125)
    assert torch.equal(vectors.grad[2:], torch.zeros(2, 2))


def test_vq_takes_the_nearest_and_passes_gradients_straight_through():
    quantizer = VQ(VQConfig(codebook_size=16), num_latent_tokens=TOKENS, latent_dim=DIM)
    pre = draw().requires_grad_()
    unit, codewords = F.normalize(pre, dim=-1), F.normalize(quantizer.codebook[0], dim=-1)
    nearest = torch.cdist(unit.detach(), codewords.expand(3, -1, -1)).argmin(dim=-1)
    assert torch.equal(quantizer.indices(pre), nearest)
    latents, losses = quantizer(pre)
    torch.testing.assert_close(latents, codewords[nearest])
    (through,) = torch.autograd.grad(latents.sum(), pre, retain_graph=True)
    (direct,) = torch.autograd.grad(unit.sum(), pre)
    torch.testing.assert_close(through, direct)
    gap = (unit - codewords[nearest]).square().mean()
    torch.testing.assert_close(losses["codebook"], gap)
    torch.testing.assert_close(losses["commitment"], 0.25 * gap)


def test_kl_divergence_matches_torch_distributions_and_draws_have_its_moments():
    quantizer = KL(KLConfig(kl_weight=2.0), latent_dim=DIM)
    pre = torch.randn(3, TOKENS, 2 * DIM)
    mean, log_variance = pre.chunk(2, dim=-1)
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    standard = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(normal, standard).sum(dim=(1, 2))
    torch.testing.assert_close(quantizer.divergence(pre), expected)
    torch.testing.assert_close(quantizer(pre)[1]["kl"], 2 * expected.mean())
    torch.testing.assert_close(quantizer.encode(pre), normal.mean)
    draws = quantizer(pre[:1].expand(4000, -1, -1), keys_of(0, "draws", torch.arange(4000)))[0]
    scores = (draws - normal.mean[0]) / normal.stddev[0]
    assert scores.mean(dim=0).abs().max() < 0.08  # five standard errors
    assert (scores.std(dim=0) - 1).abs().max() < 0.06


def test_the_noise_of_kl_belongs_to_the_samples_keys():
    quantizer, pre, keys = KL(KLConfig(), latent_dim=DIM), torch.randn(4, TOKENS, 2 * DIM), torch.arange(4)
    latents = quantizer(pre, keys)[0]
    assert torch.equal(latents, torch.cat([quantizer(pre[:1], keys[:1])[0], quantizer(pre[1:], keys[1:])[0]]))
    assert not torch.equal(latents, quantizer(pre, keys + 4)[0])
    assert not torch.equal(quantizer(pre)[0], quantizer(pre)[0])


def test_no_quantizer_changes_nothing():
    quantizer = build_quantizer(NoneConfig(), num_latent_tokens=TOKENS, latent_dim=DIM)
    pre = draw()
    assert torch.equal(quantizer.encode(pre), pre)
    assert quantizer(pre)[1] == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftVQConfig(temperature=0.0), "temperature is 0.0"),
        (lambda: SoftVQConfig(codebook_size=1), "codebook_size is 1"),
        (lambda: SoftVQConfig(entropy_weight=-1.0), "entropy_weight is -1.0"),
        (lambda: VQConfig(num_codebooks=0), "num_codebooks is 0"),
        (lambda: KLConfig(kl_weight=-1.0), "kl_weight is -1.0"),
        (lambda: soft(num_codebooks=3), "num_codebooks is 3, expected a divisor of num_latent_tokens"),
    ],
)
def test_impossible_values_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
