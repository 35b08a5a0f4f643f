"""Likelihoods: that they are distributions, and the same ones as torch's."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal

from common.config import ConfigError
from vae.config import Config, DataConfig, LikelihoodConfig
from vae.data import bits_per_dimension
from vae.likelihoods import SMALLEST_LOG_SIGMA, Gaussian, LogisticMixture, build_likelihood

GREY = torch.arange(256) / 255


def test_bernoulli_against_torch():
    likelihood = build_likelihood(LikelihoodConfig(), 2)
    logits = 10 * torch.randn(3, 2, 4, 4)
    x = torch.bernoulli(torch.full((3, 2, 4, 4), 0.5))
    expected = Bernoulli(logits=logits).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(likelihood.log_prob(x, logits), expected)
    extreme = torch.full((1, 2, 1, 1), 1e4)
    assert likelihood.log_prob(torch.ones(1, 2, 1, 1), extreme).item() == 0
    assert torch.isfinite(likelihood.log_prob(torch.zeros(1, 2, 1, 1), extreme)).all()


def test_cross_entropy_of_grey_pixels_is_no_likelihood():
    """Over [0, 1] it integrates to more than one where p is away from 1/2: which is why it is refused."""
    likelihood = build_likelihood(LikelihoodConfig(), 1)
    grid = torch.linspace(0, 1, 1001)[:, None, None, None]
    density = likelihood.log_prob(grid, torch.full_like(grid, 3.0)).exp()
    assert abs(torch.trapezoid(density.flatten(), dx=0.001).item() - 1) > 0.3
    for data in (DataConfig(), DataConfig(dataset="cifar10", image_size=32)):
        with pytest.raises(ConfigError, match="black and white"):
            Config(data=data)
    with pytest.raises(ConfigError, match="black and white pixels take bernoulli"):
        Config(data=DataConfig(binarize="dynamic"), likelihood=LikelihoodConfig(kind="gaussian"))


@pytest.mark.parametrize("sigma_from", ["fixed", "learned", "optimal", "decoder"])
def test_gaussian_against_torch(sigma_from):
    likelihood = Gaussian(2, LikelihoodConfig(kind="gaussian", sigma_from=sigma_from, sigma=0.2)).eval()
    output = torch.randn(3, likelihood.outputs, 4, 4)
    x = torch.rand(3, 2, 4, 4)
    mean, log_sigma = likelihood.split(output)
    expected = Normal(mean, log_sigma.exp()).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(likelihood.log_prob(x, output), expected)
    if sigma_from != "decoder":
        assert log_sigma.exp().item() == pytest.approx(0.2, rel=0.05)  # the soft floor adds a little


def test_optimal_sigma_is_the_best_one():
    """In closed form it beats every other single sigma (Rybkin et al. 2021, eq. 4)."""
    likelihood = Gaussian(1, LikelihoodConfig(kind="gaussian")).train()
    x = torch.rand(8, 1, 6, 6)
    output = 0.5 * torch.randn(8, 1, 6, 6)
    best = likelihood.log_prob(x, output).sum()
    for sigma in torch.linspace(0.05, 2, 40):
        assert Normal(output + 0.5, sigma).log_prob(x).sum() <= best + 0.01 * best.abs()
    root_mean_square = ((x - output - 0.5) ** 2).mean().sqrt()
    assert likelihood.best_log_sigma(x, output + 0.5).exp().item() == pytest.approx(root_mean_square.item(), rel=0.01)


def test_optimal_sigma_is_remembered_for_evaluation():
    likelihood = Gaussian(1, LikelihoodConfig(kind="gaussian", sigma=0.5)).train()
    x = torch.full((4, 1, 8, 8), 0.5)
    output = torch.full((4, 1, 8, 8), 0.1)  # an error of 0.1 everywhere
    for _ in range(1500):
        likelihood.log_prob(x, output)
    assert likelihood.split(output)[1].exp().item() == pytest.approx(0.1, rel=0.1)
    assert "log_sigma" in likelihood.state_dict()


@pytest.mark.parametrize("sigma_from", ["learned", "optimal", "decoder"])
def test_sigma_cannot_run_to_zero(sigma_from):
    """A decoder that reproduces its input exactly has a finite likelihood, of a grey level's width."""
    likelihood = Gaussian(1, LikelihoodConfig(kind="gaussian", sigma_from=sigma_from)).train()
    x = torch.full((2, 1, 4, 4), 0.5)
    output = torch.zeros(2, likelihood.outputs, 4, 4)
    if sigma_from == "decoder":
        output[:, 1] = -1e3
    if sigma_from == "learned":
        torch.nn.init.constant_(likelihood.log_sigma, -1e3)
    most = 16 * (-SMALLEST_LOG_SIGMA - 0.5 * math.log(2 * math.pi))
    assert (likelihood.log_prob(x, output) <= most + 1e-3).all()


def test_density_in_bits_contains_the_width_of_a_grey_level():
    """A uniform density on [0, 1] says nothing, and takes the full 8 bits."""
    assert bits_per_dimension(torch.zeros(1), 784).item() == 8
    likelihood = build_likelihood(LikelihoodConfig(kind="gaussian"), 1)
    assert likelihood.dimension_bits == 8.0


@pytest.mark.parametrize("mixtures", [1, 5])
def test_logistic_mixture_sums_to_one(mixtures):
    likelihood = LogisticMixture(1, LikelihoodConfig(kind="logistic_mixture", mixtures=mixtures))
    torch.manual_seed(0)
    for scale in (0.1, 1.0, 4.0):
        output = scale * torch.randn(1, likelihood.outputs, 1, 1)
        total = likelihood.log_prob(GREY[:, None, None, None], output.expand(256, -1, -1, -1)).exp().sum()
        assert total.item() == pytest.approx(1, abs=1e-4)


def test_logistic_mixture_in_colour_sums_to_one():
    """Over blue, given red and green; over green and blue together by a coarser sum."""
    likelihood = LogisticMixture(3, LikelihoodConfig(kind="logistic_mixture", mixtures=2))
    torch.manual_seed(0)
    output = torch.randn(1, likelihood.outputs, 1, 1)
    reds, greens, blues = torch.meshgrid(GREY[::51], GREY, GREY, indexing="ij")
    x = torch.stack([reds, greens, blues], -1).reshape(-1, 3, 1, 1)
    log_p = likelihood.log_prob(x, output.expand(len(x), -1, -1, -1)).view(6, -1)
    red_alone = LogisticMixture(1, LikelihoodConfig(kind="logistic_mixture", mixtures=2))
    table = output.reshape(1, 2, -1)
    only_red = table[:, :, [0, 1, 4]].reshape(1, -1, 1, 1)  # weight, red's mean, red's scale
    expected = red_alone.log_prob(GREY[::51].reshape(-1, 1, 1, 1), only_red.expand(6, -1, -1, -1))
    torch.testing.assert_close(torch.logsumexp(log_p, 1), expected, atol=1e-4, rtol=1e-4)


def test_logistic_mixture_is_finite_far_out():
    likelihood = LogisticMixture(1, LikelihoodConfig(kind="logistic_mixture", mixtures=1))
    output = torch.tensor([0.0, 50.0, -30.0]).reshape(1, 3, 1, 1).requires_grad_()
    log_p = likelihood.log_prob(torch.full((1, 1, 1, 1), 100 / 255), output)
    log_p.sum().backward()
    assert torch.isfinite(log_p).all()
    assert torch.isfinite(output.grad).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_logistic_mixture_draws_what_it_says(channels):
    """The share of each grey value of red among many draws, against its probability."""
    config = LikelihoodConfig(kind="logistic_mixture", mixtures=3)
    likelihood = LogisticMixture(channels, config)
    torch.manual_seed(3)
    output = torch.randn(1, likelihood.outputs, 1, 1)
    drawn = likelihood.draw(output.expand(40_000, -1, -1, -1), torch.Generator().manual_seed(0))
    assert drawn.shape == (40_000, channels, 1, 1)
    values, counts = (drawn * 255).round().long().unique(dim=0, return_counts=True)
    many = counts > 200  # in colour few colours occur so often
    log_p = likelihood.log_prob(values[many] / 255, output.expand(int(many.sum()), -1, -1, -1))
    assert many.any()
    share = counts[many] / 40_000
    assert ((share - log_p.exp()).abs() < 5 * (share / 40_000).sqrt()).all()


def test_logistic_mixture_mean_is_that_of_its_draws():
    likelihood = LogisticMixture(3, LikelihoodConfig(kind="logistic_mixture", mixtures=2))
    torch.manual_seed(0)
    output = torch.randn(1, likelihood.outputs, 2, 2)
    # narrow components, for the mean clamps what the draws clamp one by one
    output.view(1, 2, -1, 2, 2)[:, :, 4:7] = -4
    output.view(1, 2, -1, 2, 2)[:, :, 1:4] *= 0.3
    drawn = likelihood.draw(output.expand(20_000, -1, -1, -1), torch.Generator().manual_seed(0)).mean(0)
    torch.testing.assert_close(drawn, likelihood.mean(output)[0], atol=0.01, rtol=0)
