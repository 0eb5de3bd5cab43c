"""Gaussian-mixture responsibilities against torch.distributions, Monte Carlo, limits, and SoftVQ as a special case."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from softvq.errors import InputError
from softvq.tokenizers.gmmvq import GMMVQ, GMMVQConfig
from softvq.tokenizers.softvq import SoftVQ, SoftVQConfig

TOKENS, DIM, CODES = 4, 3, 6


def mixture(*, fitted=True, seed=0, dim=DIM, **fields):
    """Return a quantizer whose priors, scales and precision are at the start or, if `fitted`, somewhere else."""
    torch.manual_seed(seed)
    config = GMMVQConfig(**{"codebook_size": CODES, "num_codebooks": 2, **fields})
    quantizer = GMMVQ(config, num_latent_tokens=TOKENS, latent_dim=dim)
    if fitted:
        for parameter in (quantizer.log_priors, quantizer.log_scales, *quantizer.precision.parameters()):
            torch.nn.init.normal_(parameter, std=0.7)
    return quantizer


def draw(seed=0, batch=3, dim=DIM):
    return torch.randn(batch, TOKENS, dim, generator=torch.Generator().manual_seed(seed))


def components_of(quantizer, codebook, omega):
    """Return the priors' and components' distributions of one token's codebook at its precision, in float64."""
    scales = quantizer.log_scales[codebook].double().tanh().exp()
    variances = (scales.square() / omega.double())[:, None, None]
    centres = F.normalize(quantizer.codebook[codebook].double(), dim=-1)
    normals = MultivariateNormal(centres, variances * torch.eye(centres.shape[-1]).double())
    return Categorical(logits=quantizer.log_priors[codebook].double()), normals


def test_responsibilities_are_those_of_torch_distributions():
    quantizer, pre = mixture(temperature=0.3), draw()
    with torch.no_grad():
        posterior, latents, omegas = quantizer.posterior(pre), quantizer.encode(pre), quantizer.precisions(pre)
        trained = quantizer(pre)[0]
        for sample in range(len(pre)):
            for token in range(TOKENS):
                prior, normals = components_of(quantizer, token // 2, omegas[sample, token])
                z = F.normalize(pre[sample, token].double(), dim=-1)
                total = MixtureSameFamily(prior, normals).log_prob(z)
                expected = (prior.logits + normals.log_prob(z) - total).exp().float()
                torch.testing.assert_close(posterior[sample, token], expected, atol=1e-5, rtol=1e-4)
                mean = expected @ normals.mean.float()
                torch.testing.assert_close(latents[sample, token], mean, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(trained[sample, token], mean, atol=1e-5, rtol=1e-4)


def test_precision_starts_at_one_over_the_temperature_and_stays_within_bounds():
    pre = 1e4 * draw()
    torch.testing.assert_close(mixture(fitted=False).precisions(pre), torch.full((3, TOKENS), 1 / 0.07))
    quantizer = mixture(temperature=0.5)
    expected = 2 * (4 * torch.tanh(quantizer.precision(draw())[..., 0] / 4)).exp()
    torch.testing.assert_close(quantizer.precisions(draw()), expected)
    assert quantizer.precisions(pre).min() >= 2 * math.exp(-4) * (1 - 1e-6)
    assert quantizer.precisions(pre).max() <= 2 * math.exp(4) * (1 + 1e-6)


@pytest.mark.parametrize("entropy_per_codebook", [True, False])
def test_it_starts_as_softvq(entropy_per_codebook):
    fields = {"codebook_size": CODES, "num_codebooks": 2, "entropy_per_codebook": entropy_per_codebook}
    quantizer = mixture(fitted=False, kl_weight=0.0, entropy_per_codebook=entropy_per_codebook)
    plain = SoftVQ(SoftVQConfig(detach_logits=False, **fields), num_latent_tokens=TOKENS, latent_dim=DIM)
    plain.load_state_dict({"codebook": quantizer.codebook})
    pre = draw()
    torch.testing.assert_close(quantizer.posterior(pre), plain.posterior(pre))
    torch.testing.assert_close(quantizer.encode(pre), plain.encode(pre))
    results = []
    for module in (quantizer, plain):
        latents, losses = module(pre, softening=1.5)
        (latents.square().sum() + losses["entropy"]).backward()
        results.append((latents, losses["entropy"], module.codebook.grad))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


def test_temperature_to_zero_is_the_nearest_by_scaled_distance():
    quantizer, pre = mixture(temperature=1e-6, num_codebooks=1), draw()
    scales, codewords = quantizer.log_scales[0].tanh().exp(), F.normalize(quantizer.codebook[0], dim=-1)
    units = F.normalize(pre, dim=-1)
    distances = torch.cdist(units, codewords.expand(3, -1, -1))
    nearest = (distances / scales).argmin(dim=-1)
    assert not torch.equal(nearest, distances.argmin(dim=-1)), "the scales do not matter here, so nothing is tested"
    assert torch.equal(quantizer.indices(pre), nearest)
    torch.testing.assert_close(quantizer.encode(pre), codewords[nearest])
    torch.testing.assert_close(quantizer.lookup(nearest), codewords[nearest])


def test_the_bound_lies_above_the_divergence_and_meets_it_where_components_lie_apart():
    pre, gaps = draw(dim=2), []
    for temperature in (1.0, 1e-3):
        quantizer = mixture(temperature=temperature, dim=2, num_codebooks=1, codebook_size=3)
        with torch.no_grad():
            angles = torch.tensor([0.0, 2.1, 4.2])
            quantizer.codebook[0] = torch.stack([angles.cos(), angles.sin()], dim=-1)
            bounds, posterior, omegas = quantizer.bound(pre), quantizer.posterior(pre), quantizer.precisions(pre)
            prior, normals = components_of(quantizer, 0, omegas[0, 0])
            responsibilities = Categorical(probs=posterior[0, 0].double())
            ours, theirs = (MixtureSameFamily(weights, normals) for weights in (responsibilities, prior))
            samples = ours.sample((40000,))
            ratios = ours.log_prob(samples) - theirs.log_prob(samples)
        error = float(ratios.std() / len(ratios) ** 0.5)
        gap = float(bounds[0, 0] - ratios.mean())
        assert gap > -4 * error - 1e-5
        gaps.append((gap, error))
    assert gaps[0][0] > 0.01 + 4 * gaps[0][1], "overlapping components"
    assert abs(gaps[1][0]) < 4 * gaps[1][1] + 1e-4, "separate components"


def test_the_bound_is_the_loss_and_is_information_plus_the_gap_to_the_prior():
    quantizer, pre = mixture(kl_weight=0.5, temperature=0.4, num_codebooks=1), draw(batch=20)
    bound, posterior = quantizer.bound(pre), quantizer.posterior(pre).flatten(0, 1)
    torch.testing.assert_close(quantizer(pre)[1]["kl"], 0.5 * bound.mean())
    prior = Categorical(logits=quantizer.log_priors[0])
    expected = torch.distributions.kl_divergence(Categorical(probs=posterior), prior)
    torch.testing.assert_close(bound.flatten(), expected, atol=1e-5, rtol=1e-4)
    marginal = Categorical(probs=posterior.mean(dim=0))
    information = marginal.entropy() - Categorical(probs=posterior).entropy().mean()
    torch.testing.assert_close(bound.mean(), information + torch.distributions.kl_divergence(marginal, prior))


def test_bound_and_regulariser_of_one_posterior_add_up_to_the_gap_to_the_prior():
    quantizer = mixture(kl_weight=1.0, entropy_weight=1.0, temperature=0.2, entropy_temperature=0.2, num_codebooks=1)
    torch.nn.init.zeros_(quantizer.precision.weight)
    torch.nn.init.zeros_(quantizer.precision.bias)
    pre = draw(batch=20)
    marginal = Categorical(probs=quantizer.posterior(pre).flatten(0, 1).mean(dim=0))
    gap = torch.distributions.kl_divergence(marginal, Categorical(logits=quantizer.log_priors[0]))
    torch.testing.assert_close(sum(quantizer(pre)[1].values()), gap, atol=1e-4, rtol=0)


def test_softening_divides_the_logarithms():
    quantizer, pre = mixture(), draw()
    expected = (quantizer.posterior(pre).log() / 3).softmax(dim=-1)
    codewords = F.normalize(quantizer.codebook, dim=-1).repeat_interleave(2, dim=0)
    latents, losses = quantizer(pre, softening=torch.tensor(3.0))
    torch.testing.assert_close(latents, torch.einsum("btk,tkd->btd", expected, codewords), atol=1e-5, rtol=1e-4)
    assert torch.equal(losses["entropy"], quantizer(pre)[1]["entropy"])


def test_no_posterior_and_no_difference_of_vectors_is_kept():
    quantizer = mixture(codebook_size=4096, num_codebooks=1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        quantizer(draw(batch=8).requires_grad_())
    assert max(kept) <= 4096 * DIM < 8 * TOKENS * 4096


def test_large_parameters_do_no_harm():
    quantizer = mixture(temperature=1e-6)
    with torch.no_grad():
        quantizer.log_priors[:, 0], quantizer.log_scales[:, 1], quantizer.log_scales[:, 2] = 1e4, 1e4, -1e4
        quantizer.precision.bias.fill_(1e4)
    latents, losses = quantizer(draw())
    (latents.sum() + sum(losses.values())).backward()
    assert all(value.isfinite().all() for value in (latents, *losses.values()))
    assert all(parameter.grad.isfinite().all() for parameter in quantizer.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"kl_weight": -1.0}, "kl_weight is -1.0"),
        ({"codebook_size": 1}, "codebook_size is 1"),
    ],
)
def test_impossible_values_are_named(fields, message):
    with pytest.raises(InputError, match=message):
        GMMVQConfig(**fields)
