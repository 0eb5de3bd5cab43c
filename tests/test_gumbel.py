"""Gumbel-softmax draws against the posterior they are drawn from, their limits, and their gradients."""

import pytest
import torch
import torch.nn.functional as F

from softvq.errors import InputError
from softvq.randomness import keys_of, uniform
from softvq.tokenizers.gumbel import Gumbel, GumbelConfig
from softvq.tokenizers.softvq import SoftVQ, SoftVQConfig

TOKENS, DIM, CODES = 4, 3, 5


def drawn(seed=0, **fields):
    torch.manual_seed(seed)
    config = GumbelConfig(**{"codebook_size": CODES, "num_codebooks": 2, "temperature": 0.5, **fields})
    return Gumbel(config, num_latent_tokens=TOKENS, latent_dim=DIM)


def draw(batch=3):
    return torch.randn(batch, TOKENS, DIM, generator=torch.Generator().manual_seed(0))


def keys(batch=3):
    return keys_of(0, "gumbel", torch.arange(batch))


def noise_of(batch=3):
    return -(-uniform(keys(batch), TOKENS, CODES).log()).log()


def test_a_draw_is_the_softmax_of_log_posterior_and_gumbel_noise():
    quantizer, pre = drawn(gumbel_temperature=0.7), draw()
    latents, noise = quantizer(pre, keys())[0], noise_of()
    codewords = F.normalize(quantizer.codebook, dim=-1)
    for token in range(TOKENS):
        own = codewords[token // 2]
        logits = F.normalize(pre[:, token], dim=-1) @ own.T / 0.5
        for softening, found in ((1.0, latents), (3.0, quantizer(pre, keys(), torch.tensor(3.0))[0])):
            expected = torch.softmax((logits.log_softmax(dim=-1) + noise[:, token]) / (0.7 * softening), dim=-1) @ own
            torch.testing.assert_close(found[:, token], expected)


@pytest.mark.parametrize("fields", [{"gumbel_temperature": 1e-4}, {"hard": True}])
def test_codewords_are_drawn_as_often_as_the_posterior_says(fields):
    count = 4000
    quantizer = drawn(**fields)
    pre = draw(1).expand(count, -1, -1)
    with torch.no_grad():
        latents = quantizer(pre, keys(count))[0]
    expected = quantizer.posterior(pre[:1])[0].detach()
    codewords = F.normalize(quantizer.codebook.detach(), dim=-1).repeat_interleave(TOKENS // 2, dim=0)
    distances = torch.cdist(latents.transpose(0, 1), codewords)
    assert (distances.amin(dim=-1) < 1e-3).float().mean() > 0.99
    counts = F.one_hot(distances.argmin(dim=-1), CODES).sum(dim=1)
    chi_squares = ((counts - count * expected).square() / (count * expected)).sum(dim=-1)
    assert chi_squares.max() < 25  # 4 degrees of freedom: one in 20,000


def test_gumbel_temperature_to_infinity_is_the_mean_of_the_codebook():
    quantizer = drawn(gumbel_temperature=1e6)
    means = F.normalize(quantizer.codebook, dim=-1).mean(dim=1).repeat_interleave(2, dim=0)
    torch.testing.assert_close(quantizer(draw(), keys())[0], means.expand(3, -1, -1), atol=1e-4, rtol=0)


def test_a_hard_draw_is_a_codeword_with_the_gradient_of_the_soft_one():
    soft, hard = drawn(), drawn(hard=True)
    hard.load_state_dict(soft.state_dict())
    weights, gradients = draw(), []
    for quantizer in (soft, hard):
        pre = draw().requires_grad_()
        latents = quantizer(pre, keys())[0]
        gradients.append(torch.autograd.grad((latents * weights).sum(), pre)[0])
    torch.testing.assert_close(*gradients)
    codewords = F.normalize(hard.codebook, dim=-1).repeat_interleave(2, dim=0)
    logits = torch.einsum("btd,tkd->btk", F.normalize(draw(), dim=-1), codewords) / 0.5
    chosen = (logits + noise_of()).argmax(dim=-1)
    torch.testing.assert_close(latents, hard.lookup(chosen))


def test_the_latents_in_use_are_the_posterior_mean_or_the_likeliest_codeword():
    quantizer, hard = drawn(), drawn(hard=True)
    plain = SoftVQ(
        SoftVQConfig(codebook_size=CODES, num_codebooks=2, temperature=0.5), num_latent_tokens=TOKENS, latent_dim=DIM
    )
    for module in (hard, plain):
        module.load_state_dict(quantizer.state_dict())
    torch.testing.assert_close(quantizer.encode(draw()), plain.encode(draw()))
    torch.testing.assert_close(quantizer.posterior(draw()), plain.posterior(draw()))
    torch.testing.assert_close(quantizer(draw())[1]["entropy"], plain(draw())[1]["entropy"])
    torch.testing.assert_close(hard.encode(draw()), hard.lookup(plain.indices(draw())))


def test_noise_belongs_to_the_samples_keys_and_to_every_token():
    quantizer, pre = drawn(num_codebooks=2), draw()
    latents = quantizer(pre, keys())[0]
    assert torch.equal(latents, quantizer(pre, keys())[0])
    parts = [quantizer(pre[part], keys()[part])[0] for part in (slice(0, 1), slice(1, 3))]
    torch.testing.assert_close(latents, torch.cat(parts))
    assert not torch.equal(latents, quantizer(pre, keys().flip(0))[0])
    assert not torch.equal(quantizer(pre)[0], quantizer(pre)[0])
    same = pre[:1, :1].expand(2, TOKENS, -1)
    assert len(quantizer(same, keys(2))[0].flatten(0, 1).unique(dim=0)) == 2 * TOKENS


def test_the_same_noise_is_drawn_again_in_the_backward_pass():
    quantizer, pre = drawn(codebook_size=2048), draw().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        latents = quantizer(pre, keys())[0]
    assert max(kept) <= 2048 * 2 * DIM < 3 * TOKENS * 2048
    (found,) = torch.autograd.grad(latents.square().sum(), pre)
    noise = -(-uniform(keys(), TOKENS, 2048).log()).log()
    codewords = F.normalize(quantizer.codebook, dim=-1).repeat_interleave(2, dim=0)
    logits = torch.einsum("btd,tkd->btk", F.normalize(pre, dim=-1), codewords) / 0.5
    direct = torch.einsum("btk,tkd->btd", (logits + noise).softmax(dim=-1), codewords)
    torch.testing.assert_close(found, torch.autograd.grad(direct.square().sum(), pre)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["temperature", "gumbel_temperature", "entropy_temperature"])
def test_impossible_temperatures_are_named(name):
    with pytest.raises(InputError, match=f"{name} is 0.0"):
        GumbelConfig(**{name: 0.0})
