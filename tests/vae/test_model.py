"""Networks: shapes at any size, half-precision safety, draws, and what starts where."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

from vae.config import Config, DataConfig, LikelihoodConfig, ModelConfig
from vae.load import build_model
from vae.model import LOG_VARIANCE_RANGE, Gaussian, standard_log_prob

KINDS = [
    {"kind": "mlp", "hidden": (32, 16)},
    {"kind": "conv", "channels": 8, "width": 16},
    {"kind": "ladder", "ladder": (2, 3), "width": 16, "hidden": (32,)},
    {"kind": "ladder", "ladder": (1, 1, 1), "network": "conv", "channels": 8, "width": 16},
]


def build(size: int = 28, binarize: str = "dynamic", likelihood: LikelihoodConfig | None = None, **model):
    torch.manual_seed(0)
    data = DataConfig(image_size=size, binarize=binarize)
    return build_model(Config(data=data, likelihood=likelihood or LikelihoodConfig(), model=ModelConfig(**model)))


def images(count: int, channels: int = 1, size: int = 28) -> torch.Tensor:
    return torch.bernoulli(torch.full((count, channels, size, size), 0.3), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model", KINDS, ids=lambda m: f"{m['kind']}-{m.get('network', '')}")
@pytest.mark.parametrize(("size", "channels", "count", "samples"), [(28, 1, 3, 2), (29, 3, 1, 1), (5, 1, 2, 3)])
def test_shapes(model, size, channels, count, samples):
    net = build(size, image_channels=channels, **model)
    x = images(count, channels, size)
    noise = net.noise(count, samples, torch.Generator().manual_seed(0))
    draw = net(x, noise)
    assert draw.latents.shape == (count, samples, net.size)
    assert draw.log_likelihood.shape == draw.log_q.shape == draw.log_p.shape == (count, samples)
    assert draw.elbo.shape == (count,)
    assert net.codes(x).shape == (count, net.size)
    assert net.decode(net.prior(noise[:, 0])).shape == (count, channels, size, size)
    draw.elbo.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("latents", [1, 512])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_latent_sizes(kind, latents):
    net = build(kind=kind, latents=latents, hidden=(16,), channels=8, width=16)
    assert net(images(1), net.noise(1, 1, torch.Generator().manual_seed(0))).latents.shape == (1, 1, latents)


@pytest.mark.parametrize("model", KINDS, ids=lambda m: f"{m['kind']}-{m.get('network', '')}")
def test_draws_of_an_image_are_neighbours(model):
    """K draws at once are K single draws with the same noise."""
    net = build(**model)
    perturb(net)
    x = images(3)
    noise = net.noise(3, 4, torch.Generator().manual_seed(0))
    together = net(x, noise)
    for k in range(4):
        alone = net(x, noise[:, k : k + 1])
        for name in ("log_likelihood", "log_q", "log_p", "latents"):
            torch.testing.assert_close(getattr(together, name)[:, k], getattr(alone, name)[:, 0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("model", KINDS, ids=lambda m: f"{m['kind']}-{m.get('network', '')}")
def test_an_image_does_not_depend_on_its_neighbours(model):
    """No statistics of a batch anywhere, in training mode or out of it."""
    net = build(**model)
    perturb(net)
    x = images(4)
    noise = net.noise(4, 1, torch.Generator().manual_seed(0))
    whole = net.train()(x, noise)
    torch.testing.assert_close(whole.elbo[2:3], net(x[2:3], noise[2:3]).elbo, atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(whole.elbo, net.eval()(x, noise).elbo)


def perturb(net: torch.nn.Module) -> None:
    """Move every weight away from its start, where some are zero."""
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))


def test_divergence_and_density_against_torch():
    mean, log_variance = torch.randn(2, 5, 7).unbind()
    q = Gaussian(mean, log_variance)
    reference = Normal(mean, (log_variance / 2).exp())
    z = torch.randn(5, 7)
    torch.testing.assert_close(q.kl(), kl_divergence(reference, Normal(torch.zeros(7), torch.ones(7))))
    torch.testing.assert_close(q.log_prob(z), Independent(reference, 1).log_prob(z))
    torch.testing.assert_close(standard_log_prob(z), Normal(0.0, 1.0).log_prob(z).sum(1))
    noise = torch.randn(5, 7)
    torch.testing.assert_close(q.sample(noise), mean + log_variance.exp().sqrt() * noise)


def test_hierarchy_divergence_is_that_of_its_densities():
    """The analytic KL divergence of the layers equals the mean of log q - log p over many draws."""
    net = build(kind="ladder", ladder=(2, 3), width=16, hidden=(32,))
    perturb(net)
    x = images(2)
    with torch.no_grad():
        draw = net(x, net.noise(2, 20_000, torch.Generator().manual_seed(0)))
    estimate = draw.log_q - draw.log_p
    error = estimate.std(1) / math.sqrt(20_000)
    difference = draw.kl.sum(2).mean(1) - estimate.mean(1)
    assert draw.kl.mean() > 0.01
    assert (difference.abs() < 5 * error + 1e-4).all()


def test_hierarchy_starts_with_a_standard_prior_and_decodes_what_it_drew():
    net = build(kind="ladder", ladder=(2, 3), width=16, hidden=(32,))
    x = images(2)
    noise = net.noise(2, 1, torch.Generator().manual_seed(0))
    torch.testing.assert_close(net.prior(noise[:, 0]), noise[:, 0])
    draw = net(x, noise)
    assert draw.kl.min() > 0.001  # the posterior is not the prior: the decoder would learn to do without the code
    perturb(net)
    draw = net(x, noise)
    again = net.likelihood.log_prob(x, net.decode(draw.latents[:, 0]))
    torch.testing.assert_close(again, draw.log_likelihood[:, 0])


@pytest.mark.parametrize("model", KINDS, ids=lambda m: f"{m['kind']}-{m.get('network', '')}")
def test_layers_start_as_wide_as_their_input(model):
    """What is set to zero stays so, biases are zero, and a weight's variance is 1 / (inputs of its unit)."""
    layers = {n: m for n, m in build(**model).named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    fresh = {n: m for n, m in build(**model, init="near_prior").named_modules() if n in layers}
    assert {n for n, m in layers.items() if not m.weight.any()} == {n for n, m in fresh.items() if not m.weight.any()}
    assert not any(m.bias.any() for m in layers.values())
    large = [m.weight for m in layers.values() if m.weight.any() and m.weight.numel() > 2000]
    for weight in large:
        assert weight.var().item() * weight[0].numel() == pytest.approx(1, abs=0.2)
    assert all(m.weight.var() * m.weight[0].numel() < 0.5 for m in fresh.values() if m.weight.numel() > 2000)
    posterior = build(**model, init="near_prior").infer(images(3))
    if isinstance(posterior, Gaussian):
        assert posterior.kl().max() < 0.01
    assert large


def test_a_deep_encoder_still_tells_images_apart():
    """The reason for `init`: the standard deviation of posterior means over images, before any training."""
    spread = {}
    for init in ("lecun", "near_prior"):
        means = build(kind="mlp", hidden=(128,) * 5, latents=20, init=init).infer(images(50)).mean
        spread[init] = means.std(0).mean().item()
    assert spread["lecun"] > 10 * spread["near_prior"]


def test_a_hierarchy_of_extreme_weights_stays_finite():
    """Deviations of five layers multiply: a training once came to a loss of 1e17 and an infinite gradient."""
    net = build(kind="ladder", ladder=(4,) * 5, width=16, hidden=(32,))
    with torch.no_grad():
        for layer in net.levels:
            for head in (layer.prior[-1], layer.correction[-1]):
                head.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
                head.bias[4:] = 50.0  # log-variances
    draw = net(images(2), net.noise(2, 3, torch.Generator().manual_seed(0)))
    assert draw.elbo.abs().max() < 1e6
    draw.elbo.mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() < 1e8 for p in net.parameters() if p.grad is not None)


def test_log_variance_is_limited():
    wild = Gaussian.from_network(torch.tensor([[0.0, 1e30]], dtype=torch.float16).clamp(max=6e4))
    assert wild.log_variance.item() == LOG_VARIANCE_RANGE[1]
    assert torch.isfinite(wild.sample(torch.ones(1, 1))).all()
    assert torch.isfinite(wild.kl()).all()
    low = Gaussian.from_network(torch.tensor([[0.0, -6e4]], dtype=torch.float16))
    assert torch.isfinite(low.log_prob(torch.ones(1, 1))).all()
    assert wild.mean.dtype == torch.float32


def test_standard_deviation_is_half_the_log_variance():
    assert Gaussian(torch.zeros(1), torch.tensor([math.log(9.0)])).sample(torch.ones(1)).item() == pytest.approx(3)
