"""Objectives: bounds that are bounds, estimators that are unbiased, and what is known to be wrong elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, MultivariateNormal, Normal

from vae.config import Config, DataConfig, LikelihoodConfig, ModelConfig, ObjectiveConfig
from vae.likelihoods import Gaussian as GaussianLikelihood
from vae.load import build_model
from vae.model import VAE, Draw, Gaussian
from vae.objectives import (
    Critic,
    critic_loss,
    decompose,
    free,
    importance_bound,
    objective,
    permute_latents,
    published_weights,
    stratified_weights,
    weighted_weights,
)


def draw_of(log_likelihood, kl, log_q=None, log_p=None) -> Draw:
    zero = torch.zeros_like(log_likelihood)
    mean = torch.zeros(len(kl), kl.shape[2])
    latents = torch.zeros(*log_likelihood.shape, kl.shape[2])
    return Draw(latents, log_likelihood, kl, log_q if log_q is not None else zero, log_p if log_p is not None else zero,
                Gaussian(mean, mean))  # fmt: skip


def test_evidence_lower_bound_by_hand():
    """Two pixels, one latent, one draw: -log 2 for each pixel at logit 0; KL(N(1, 4) || N(0, 1)) = 1 + 1.5 - log 2."""
    config = Config(
        data=DataConfig(image_size=4, binarize="dynamic"), model=ModelConfig(kind="mlp", latents=1, hidden=(2,))
    )
    net = build_model(config)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        net.posterior.bias.copy_(torch.tensor([1.0, math.log(4.0)]))
    x = torch.ones(1, 1, 4, 4)
    draw = net(x, torch.zeros(1, 1, 1))
    divergence = 0.5 * (1 + 4 - 1 - math.log(4))
    assert draw.elbo.item() == pytest.approx(-16 * math.log(2) - divergence, abs=1e-5)
    loss = objective(ObjectiveConfig(beta=4.0), 1, 100, draw).loss
    assert loss.item() == pytest.approx(16 * math.log(2) + 4 * divergence, abs=1e-4)


def test_reductions_are_sums_over_pixels_and_latents_and_a_mean_over_images():
    """Twice the batch: the same loss. Twice the pixels: twice the log-likelihood."""
    kl = torch.rand(4, 1, 3)
    log_likelihood = -100 * torch.rand(4, 1)
    once = objective(ObjectiveConfig(), 1, 10, draw_of(log_likelihood, kl)).loss
    twice = objective(ObjectiveConfig(), 1, 10, draw_of(log_likelihood.repeat(2, 1), kl.repeat(2, 1, 1))).loss
    assert once.item() == pytest.approx(twice.item())
    assert once.item() == pytest.approx((kl.sum(2).mean() - log_likelihood.mean()).item())


def test_warm_up_capacity_and_free_bits():
    draw = draw_of(torch.full((2, 1), -50.0), torch.tensor([[[1.0, 3.0]], [[3.0, 5.0]]]))  # means 2 and 4, sum 6
    warm = ObjectiveConfig(beta=2.0, warmup=10)
    assert objective(warm, 5, 10, draw).loss.item() == pytest.approx(50 + 1.0 * 6)
    assert objective(warm, 20, 10, draw).loss.item() == pytest.approx(50 + 2.0 * 6)
    capacity = ObjectiveConfig(kind="capacity", capacity=8.0, capacity_steps=4, capacity_gamma=10.0)
    assert objective(capacity, 2, 10, draw).loss.item() == pytest.approx(50 + 10 * (6 - 4))
    assert objective(capacity, 9, 10, draw).loss.item() == pytest.approx(50 + 10 * (8 - 6))
    assert free(draw.kl, 3.0).item() == pytest.approx(3 + 4)  # the minimum applies to the batch's mean
    assert objective(ObjectiveConfig(free_bits=3.0), 1, 10, draw).loss.item() == pytest.approx(50 + 7)


# -- bounds on the likelihood ------------------------------------------------------------------------------------------


class LinearGaussian(VAE):
    """x = W z + b + sigma e with a posterior that is off on purpose: everything about it has a closed form."""

    def __init__(self, sigma: float = 0.3) -> None:
        likelihood = GaussianLikelihood(1, LikelihoodConfig(kind="gaussian", sigma_from="fixed", sigma=sigma))
        super().__init__(ModelConfig(latents=2, hidden=(4,)), 4, likelihood)
        generator = torch.Generator().manual_seed(0)
        self.weight = 0.5 * torch.randn(16, 2, generator=generator)
        self.sigma = likelihood.split(torch.zeros(1, 1, 4, 4))[1].exp()
        precision = torch.eye(2) + self.weight.T @ self.weight / self.sigma**2
        self.covariance = torch.linalg.inv(precision)

    def infer(self, x):
        mean = (x.flatten(1) - 0.5) @ self.weight @ self.covariance / self.sigma**2
        off = 0.05 + 0.9 * mean
        return Gaussian(off, (1.5 * self.covariance.diagonal()).log().expand(len(x), -1))

    def decode(self, z):
        return (z @ self.weight.T).view(-1, 1, 4, 4)

    def exact(self, x):
        covariance = self.weight @ self.weight.T + self.sigma**2 * torch.eye(16)
        return MultivariateNormal(torch.full((16,), 0.5), covariance).log_prob(x.flatten(1))


def linear_images(net: LinearGaussian, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(count, 2, generator=generator)
    noise = net.sigma * torch.randn(count, 1, 4, 4, generator=generator)
    return net.decode(z) + 0.5 + noise


def test_importance_sampled_likelihood_of_a_linear_model():
    """Within 0.02 nat of the exact marginal likelihood, image by image on average."""
    net = LinearGaussian()
    x = linear_images(net, 20)
    draw = net(x, net.noise(20, 5000, torch.Generator().manual_seed(2)))
    bound = importance_bound(draw.log_weights)
    assert (bound - net.exact(x)).abs().mean() < 0.02
    assert draw.elbo.mean() < net.exact(x).mean() - 0.05  # the posterior is off, so the ELBO is


def test_importance_bound_rises_with_samples():
    """E[L_1] <= E[L_2] <= ... (Burda et al. 2016, theorem 1), each gap by more than three standard errors."""
    net = LinearGaussian()
    x = linear_images(net, 50)
    weights = net(x, net.noise(50, 4096, torch.Generator().manual_seed(3))).log_weights
    means, errors = [], []
    for samples in (1, 2, 4, 16, 64):
        bounds = importance_bound(weights.view(-1, samples))  # groups of draws of one image
        means.append(bounds.mean().item())
        errors.append((bounds.view(50, -1).std(1) / math.sqrt(4096 / samples)).square().sum().sqrt().item() / 50)
    for lower, higher, e1, e2 in zip(means, means[1:], errors, errors[1:], strict=False):
        assert higher - lower > 3 * math.hypot(e1, e2)
    assert means[-1] < net.exact(x).mean() + 0.01


def test_importance_objective_is_the_bound():
    net = LinearGaussian()
    x = linear_images(net, 4)
    draw = net(x, net.noise(4, 8, torch.Generator().manual_seed(0)))
    losses = objective(ObjectiveConfig(kind="iwae", samples=8), 1, 100, draw)
    expected = torch.logsumexp(draw.log_weights, 1).mean() - math.log(8)
    assert losses.loss.item() == pytest.approx(-expected.item())


# -- the total correlation ---------------------------------------------------------------------------------------------

DATA = 7  # images in all
BATCH = 4  # in a batch: all 7 * 6 * 5 * 4 ordered batches are enumerated


def enumerated_estimate(weights) -> torch.Tensor:
    """The mean over all batches of the estimate of q(z) for the first image's code, over its true value."""
    import itertools

    generator = torch.Generator().manual_seed(0)
    means = torch.randn(DATA, 2, generator=generator, dtype=torch.float64)
    log_variances = torch.randn(DATA, 2, generator=generator, dtype=torch.float64) - 3
    posterior = Gaussian(means, log_variances)
    noise = torch.randn(DATA, 2, generator=generator, dtype=torch.float64)
    codes = posterior.sample(noise)
    density = torch.stack([Gaussian(means[j], log_variances[j]).log_prob(codes).exp() for j in range(DATA)], 1)
    truth = density.mean(1)  # q(z_i) = (1/N) sum_j q(z_i | x_j)
    log_weight = weights(BATCH, DATA)
    ratios = []
    for batch in itertools.permutations(range(DATA), BATCH):
        rows = density[list(batch)][:, list(batch)]  # q(z_i | x_j) within the batch
        estimate = (log_weight.exp() * rows).sum(1)
        ratios.append(estimate / truth[list(batch)])
    return torch.stack(ratios).mean()


def test_stratified_estimate_is_unbiased():
    assert enumerated_estimate(stratified_weights).item() == pytest.approx(1.0, abs=0.01)


def test_published_estimate_is_not():
    """The entries that the authors' program fills: too much weight on the image that z came from."""
    assert enumerated_estimate(published_weights).item() > 1.5


@pytest.mark.parametrize(("batch", "data"), [(2, 10), (64, 5000), (4, 4)])
def test_weights(batch, data):
    weights = stratified_weights(batch, data).exp()
    torch.testing.assert_close(weights.sum(1), torch.ones(batch, dtype=torch.float64))
    torch.testing.assert_close(weights.diagonal(), torch.full((batch,), 1 / data, dtype=torch.float64))
    assert weighted_weights(batch, data).exp().sum(1)[0].item() == pytest.approx(1 / data)
    if batch > 2:
        assert published_weights(batch, data).exp()[2, 2].item() == pytest.approx(1 / (batch - 1))  # not 1/N


def test_parts_add_up_to_the_divergence():
    """mutual + total correlation + dimension-wise = log q(z|x) - log p(z), whatever the weights."""
    torch.manual_seed(0)
    posterior = Gaussian(torch.randn(8, 3), torch.randn(8, 3) - 1)
    z = posterior.sample(torch.randn(8, 3))
    for weights in (stratified_weights, published_weights, weighted_weights):
        parts = decompose(posterior, z, weights(8, 100).float())
        expected = (posterior.log_prob(z) - Normal(0.0, 1.0).log_prob(z).sum(1)).mean()
        assert sum(part.item() for part in parts) == pytest.approx(expected.item(), abs=1e-4)


def test_total_correlation_of_a_known_posterior():
    """A whole dataset as the batch, a code of two equal latents: TC is large; independent latents: near zero."""
    torch.manual_seed(0)
    z = torch.randn(512, 1)
    narrow = torch.full((512, 2), -3.0)
    equal = decompose(Gaussian(z.expand(-1, 2), narrow), z.expand(-1, 2) + 0.0, stratified_weights(512, 512).float())
    means = torch.randn(512, 2)
    apart = decompose(Gaussian(means, narrow), means, stratified_weights(512, 512).float())
    assert equal.total_correlation > 1.0
    assert abs(apart.total_correlation.item()) < 0.4


def test_permuted_latents_keep_each_latent_and_break_their_tie():
    z = torch.arange(100.0)[:, None].expand(-1, 3)
    mixed = permute_latents(z, torch.Generator().manual_seed(0))
    for column in mixed.unbind(1):
        torch.testing.assert_close(column.sort().values, z[:, 0])
    assert (mixed[:, 0] == mixed[:, 1]).float().mean() < 0.2


def test_critic_learns_the_density_ratio():
    """log q(z) / prod q(z_j) of a correlated normal distribution is known; the critic's logit comes near."""
    torch.manual_seed(0)
    rho = 0.9
    cover = torch.tensor([[1.0, rho], [rho, 1.0]])
    joint = MultivariateNormal(torch.zeros(2), cover)
    critic = Critic(ObjectiveConfig(kind="factor", critic_width=64, critic_layers=2), 2)
    optimizer = torch.optim.Adam(critic.parameters(), 3e-3)
    rng = torch.Generator().manual_seed(0)
    for _ in range(600):
        optimizer.zero_grad()
        critic_loss(critic, joint.sample((256,)), joint.sample((256,)), rng).backward()
        optimizer.step()
    total_correlation = critic(joint.sample((4096,))).mean().item()
    assert total_correlation == pytest.approx(-0.5 * math.log(1 - rho**2), rel=0.25)  # its exact value, 0.83 nats


def test_factor_objective_leaves_the_critic_alone():
    """The autoencoder's step follows the critic's gradient, the critic's weights get theirs from its own loss only."""
    critic = Critic(ObjectiveConfig(kind="factor", critic_width=8, critic_layers=1), 2)
    z = torch.randn(4, 1, 2, requires_grad=True)
    draw = draw_of(torch.zeros(4, 1), torch.zeros(4, 1, 2))._replace(latents=z)
    objective(ObjectiveConfig(kind="factor", beta=3.0), 1, 10, draw, critic).loss.backward()
    assert z.grad.abs().sum() > 0
    loss = critic_loss(critic, z[:, 0].detach(), z[:, 0].detach(), torch.Generator().manual_seed(0))
    critic.zero_grad()
    loss.backward()
    assert all(isinstance(p, nn.Parameter) and p.grad is not None for p in critic.parameters())


def test_bernoulli_model_bound_holds_against_enumeration():
    """A one-latent model whose exact log p(x) comes from a fine grid over z: the ELBO is below, IWAE-500 near."""
    torch.manual_seed(0)
    config = Config(
        data=DataConfig(image_size=4, binarize="dynamic"), model=ModelConfig(kind="mlp", latents=1, hidden=(8,))
    )
    net = build_model(config)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn_like(p)
        # a wide q(z | x): the draws have to find every z that p(x | z) favours
        net.posterior.weight *= 0.1
        net.posterior.bias.copy_(torch.tensor([0.0, 1.0]))
    x = torch.bernoulli(torch.full((5, 1, 4, 4), 0.5))
    grid = torch.linspace(-8, 8, 4001)
    logits = net.decode(grid[:, None])
    log_joint = (
        Normal(0.0, 1.0).log_prob(grid)[:, None] + Bernoulli(logits=logits).log_prob(x[:, None]).flatten(2).sum(2).T
    )
    exact = torch.logsumexp(log_joint, 0) + math.log(16 / 4000)
    with torch.no_grad():
        draw = net(x, net.noise(5, 20_000, torch.Generator().manual_seed(0)))
    assert (draw.elbo < exact + 0.02).all()
    torch.testing.assert_close(importance_bound(draw.log_weights), exact, atol=0.03, rtol=0)
